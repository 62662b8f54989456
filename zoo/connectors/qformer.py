"""The Querying Transformer of BLIP-2: learned queries that read the image through cross-attention.

BERT-base with two additions (Li et al., arXiv 2301.12597, section 3.1): in every second layer the queries, and only
they, attend to the image; and queries and text share self-attention while each has its own feed-forward network.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zoo.connectors.base import Connector, ConnectorConfig
from zoo.errors import ConfigError
from zoo.layout import MODALITIES, Layout, Segment, lay_out
from zoo.nn import TokenEmbedding, Trunk, TrunkConfig, copy_expert_
from zoo.part import Features

TEXT, QUERY = MODALITIES["text"], MODALITIES["image"]
"""Modality ids of the two kinds of rows, which are also the numbers of their feed-forward networks."""


@dataclass(frozen=True, kw_only=True)
class QFormerConfig(ConnectorConfig):
    """The published Q-Former (section 3.1; LAVIS, blip2_models/Qformer.py).

    Attributes:
        queries: Learned queries, the tokens it returns.
        width: Width of its rows.
        depth: Layers.
        heads: Attention heads.
        ffn: Width of each feed-forward network.
        cross_every: Cross-attention in layers 0, n, 2n, ...
        dropout: Of branches and attention weights while training; the paper's is 0.1.
        eps: Of the norms inside.
        input_norm: A LayerNorm on the image tokens (LAVIS' ``ln_vision``). It stands here and not in the encoder
            because it learns while the encoder is frozen.
        input_eps: Of that norm: 1e-5 in LAVIS, 1e-6 in the transformers port.
        text: Build the text branch (word and position embeddings, text feed-forward networks), for stage 1 and for
            connectors that read the instruction (InstructBLIP).
        vocab_size: Of the text branch: BERT's and ``[DEC]``.
        context_length: Text positions.
    """

    queries: int = 32
    width: int = 768
    depth: int = 12
    heads: int = 12
    ffn: int = 3072
    cross_every: int = 2
    dropout: float = 0.1
    eps: float = 1e-12
    input_norm: bool = True
    input_eps: float = 1e-5
    text: bool = False
    vocab_size: int = 30523
    context_length: int = 512

    def __post_init__(self) -> None:
        if min(self.queries, self.width, self.depth, self.heads, self.ffn, self.cross_every) < 1:
            raise ValueError("queries, width, depth, heads, ffn and cross_every must be 1 or more")
        if self.width % self.heads:
            raise ValueError(f"width = {self.width} must be a multiple of heads = {self.heads}")

    def trunk(self, in_width: int) -> TrunkConfig:
        """The trunk's configuration over image tokens of ``in_width``."""
        return TrunkConfig(
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            ffn=self.ffn,
            eps=self.eps,
            placement="post",
            final_norm=False,
            dropout=self.dropout,
            attention_dropout=self.dropout,
            blocks=tuple("sf" if i % self.cross_every else "scf" for i in range(self.depth)),
            context_width=in_width,
            cross_modalities=(QUERY,) if self.text else None,
            routed=("ffn", "ffn_norm") if self.text else (),
            routes=(TEXT, QUERY) if self.text else (),
        )

    def build(self, *, in_width: int, in_tokens: int, out_width: int) -> QFormer:
        return QFormer(self, in_width, out_width)


class QFormer(Connector):
    """``query_tokens``, ``ln_vision``, the embedding norm ``norm``, ``trunk``, ``text`` (if asked for) and ``proj``."""

    def __init__(self, config: QFormerConfig, in_width: int, out_width: int) -> None:
        super().__init__()
        self.config = config
        self.width = out_width
        self.tokens = config.queries
        self.ln_vision = nn.LayerNorm(in_width, eps=config.input_eps) if config.input_norm else nn.Identity()
        self.query_tokens = nn.Parameter(torch.randn(1, config.queries, config.width) * 0.02)
        self.norm = nn.LayerNorm(config.width, eps=config.eps)
        self.dropout = nn.Dropout(config.dropout)
        self.trunk = Trunk(config.trunk(in_width))
        self.text: TokenEmbedding | None = None
        if config.text:
            self.text = TokenEmbedding(config.vocab_size, config.width, positions=config.context_length)
            if self.query_tokens.device.type != "meta":
                copy_expert_(self.trunk, TEXT, QUERY)  # stage 1 starts the two feed-forward networks equal
        self.proj = nn.Linear(config.width, out_width)

    def embed_text(self, ids: Tensor, mask: Tensor | None = None) -> Features:
        """Word and position embeddings [B, T, width] of ids [B, T], before the embedding norm; positions start at 0.

        Raises:
            ConfigError: The Q-Former was built without its text branch.
        """
        if self.text is None:
            raise ConfigError("this Q-Former has no text branch: build it with connector.text=true")
        return Features(self.text(ids), mask=mask)

    def hidden(
        self,
        image: Features | None,
        text: Features | None = None,
        *,
        queries: bool = True,
        layout: Layout | None = None,
    ) -> Tensor:
        """The trunk's rows for [queries; text].

        Args:
            image: Tokens [B, N, in_width] that the queries read; None skips cross-attention.
            text: Embedded text from ``embed_text``.
            queries: Put the queries in front.
            layout: Who reads whom; by default everything real reads everything real (BLIP-2's matching rule).

        Returns:
            [B, (queries) + T, width].
        """
        context = None if image is None else self.ln_vision(image.tokens)  # [B, N, D_in]
        given = image if image is not None else text
        if given is None:
            raise ConfigError("the Q-Former was given neither an image nor a text")
        batch = given.tokens.shape[0]
        rows = [self.query_tokens.to(given.tokens.dtype).expand(batch, -1, -1)] if queries else []
        if text is not None:
            rows.append(text.tokens)
        x = self.dropout(self.norm(torch.cat(rows, dim=1)))  # [B, Q + T, D]
        if layout is None and self.config.text:
            layout = self.layout(text, queries=queries, batch=batch, device=x.device)
        mask = None if image is None else image.mask
        out = self.trunk(x, layout, context=context, context_mask=mask)
        assert isinstance(out, Tensor)
        return out

    def layout(
        self,
        text: Features | None = None,
        *,
        queries: bool = True,
        batch: int = 1,
        device: torch.device | str | None = None,
    ) -> Layout:
        """The default layout of [queries; text]: all real rows read all real rows."""
        count = self.tokens if queries else 0
        length = 0 if text is None else text.tokens.shape[1]
        segments = [Segment("queries", count, modality=QUERY, attends="full")] if queries else []
        if text is not None:
            segments.append(Segment("text", length, modality=TEXT, attends="full"))
        real = None
        if text is not None and text.mask is not None:
            real = torch.cat([text.mask.new_ones(batch, count), text.mask], dim=1).bool()
        both = {("queries", "text"): "all", ("text", "queries"): "all"} if queries and text is not None else None
        return lay_out(segments, batch, real=real, relation=both, device=device)  # type: ignore[arg-type]

    def forward(self, features: Features, text: Features | None = None) -> Features:
        rows = self.hidden(features, text)[:, : self.tokens]  # [B, Q, width]
        return Features(self.proj(rows))
