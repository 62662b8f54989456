"""CoCa's attentional poolers (arXiv 2205.01917, section 3.2): learned queries read the image tokens once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.connectors.base import Connector, ConnectorConfig
from zoo.errors import ConfigError
from zoo.part import Features

POOLINGS = ("split", "cascade", "parallel")


class Pooler(nn.Module):
    """One multi-head attention whose queries are learned, with norms on queries, on what they read, and on the result.

    Args:
        queries: Learned queries.
        width: Of queries and result.
        in_width: Of the tokens that are read.
        heads: Attention heads.
        eps: Of the norms.
    """

    def __init__(self, queries: int, width: int, in_width: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.query_tokens = nn.Parameter(torch.randn(queries, width))
        self.query_norm = nn.LayerNorm(width, eps=eps)
        self.context_norm = nn.LayerNorm(in_width, eps=eps)
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(in_width, width)
        self.v = nn.Linear(in_width, width)
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=eps)
        for matrix in (self.q, self.k, self.v, self.out):
            nn.init.xavier_uniform_(matrix.weight)
            nn.init.zeros_(matrix.bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Read tokens [B, N, in_width] where ``mask`` [B, N] is True: [B, queries, width]."""
        x = self.context_norm(x)
        q = self.q(self.query_norm(self.query_tokens))[None].expand(len(x), -1, -1)  # projected once for the batch
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, self.k(x), self.v(x)))
        read = F.scaled_dot_product_attention(q, k, v, None if mask is None else mask[:, None, None])  # [B, H, n, d]
        out: Tensor = self.norm(self.out(read.transpose(1, 2).flatten(2)))
        return out


@dataclass(frozen=True, kw_only=True)
class AttentionalPoolerConfig(ConnectorConfig):
    """Image tokens for the decoder, and one vector for the contrastive loss.

    Attributes:
        queries: Queries of the captioning pooler.
        heads: Attention heads of every pooler.
        pooling: Where the vector comes from. ``split`` (open_clip): the first query is the vector, the others are the
            tokens. ``cascade`` (the paper): a second pooler with one query reads the tokens. ``parallel`` (the paper's
            ablation, table 8f): it reads the encoder's tokens.
        eps: Of every norm.
    """

    queries: int = 256
    heads: int = 8
    pooling: str = "split"
    eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling = {self.pooling!r} must be one of {', '.join(POOLINGS)}")
        if self.queries < 1 + (self.pooling == "split"):
            raise ValueError(f"queries = {self.queries} leave no token: pooling 'split' needs 2, others 1")
        if self.heads < 1:
            raise ValueError(f"heads = {self.heads} must be 1 or more")

    def build(self, *, in_width: int, in_tokens: int, out_width: int) -> AttentionalPooler:
        """Raises ConfigError where the decoder's width does not divide by the heads."""
        if out_width % self.heads:
            raise ConfigError(
                f"connector.heads = {self.heads} does not divide the decoder's width of {out_width}: set another"
            )
        return AttentionalPooler(self, in_width, out_width)


class AttentionalPooler(Connector):
    """``captions`` (a ``Pooler``) and, unless the vector is one of its queries, ``contrast``.

    Attributes:
        pooled_width: Width of ``Features.pooled``.
    """

    def __init__(self, config: AttentionalPoolerConfig, in_width: int, out_width: int) -> None:
        super().__init__()
        self.pooling = config.pooling
        self.width = self.pooled_width = out_width
        self.tokens = config.queries - (config.pooling == "split")
        self.captions = Pooler(config.queries, out_width, in_width, config.heads, config.eps)
        self.contrast: Pooler | None = None
        if config.pooling != "split":
            source = out_width if config.pooling == "cascade" else in_width
            self.contrast = Pooler(1, out_width, source, config.heads, config.eps)

    def forward(self, features: Features, text: Features | None = None) -> Features:
        """Return ``tokens`` [B, n, width] and ``pooled`` [B, width], both behind a norm."""
        read = self.captions(features.tokens, features.mask)
        if self.contrast is None:
            return Features(read[:, 1:], pooled=read[:, 0])
        if self.pooling == "cascade":
            return Features(read, pooled=self.contrast(read)[:, 0])
        return Features(read, pooled=self.contrast(features.tokens, features.mask)[:, 0])
