"""The Querying Transformer of BLIP-2: learned queries that read the image through cross-attention.

BERT-base with two additions (Li et al., arXiv 2301.12597, section 3.1): in every second layer the queries, and only
they, attend to the image; and queries and text share self-attention while each has its own feed-forward network.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from zoo.connectors.base import Connector, ConnectorConfig
from zoo.errors import ConfigError
from zoo.layout import MODALITIES, Layout, Segment, lay_out
from zoo.layout_facts import Reads
from zoo.nn import KVCache, TokenEmbedding, Trunk, TrunkConfig, copy_expert_
from zoo.part import Features

TEXT, QUERY = MODALITIES["text"], MODALITIES["image"]
"""Modality ids of the two kinds of rows, which are also the numbers of their feed-forward networks."""

Rule = Literal["contrastive", "matching", "generation"]

RULES: dict[Rule, dict[tuple[str, str], Reads]] = {
    "contrastive": {("queries", "text"): "never", ("text", "queries"): "never"},
    "matching": {("queries", "text"): "all", ("text", "queries"): "all"},
    "generation": {("queries", "text"): "never", ("text", "queries"): "all"},
}
"""What queries and text read of each other: two that do not meet, both all of both, and a text that is written from
the queries, where each token also reads those before it and the queries stay as they are without a text."""


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
        tokenizer: Of the text branch.
        vocab_size: Rows of the text branch's embedding table, ``added`` ids included: BERT's and ``[DEC]``.
        added: Ids behind those of the tokenizer; the last row is ``[DEC]``, which starts what is written.
        context_length: Text positions.
    """

    sized_by: ClassVar[str] = "ffn"

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
    tokenizer: str = "hf:google-bert/bert-base-uncased"
    vocab_size: int = 30523
    added: int = 1
    context_length: int = 512

    def __post_init__(self) -> None:
        if min(self.queries, self.width, self.depth, self.heads, self.ffn, self.cross_every) < 1:
            raise ValueError("queries, width, depth, heads, ffn and cross_every must be 1 or more")
        if self.width % self.heads:
            raise ValueError(f"width = {self.width} must be a multiple of heads = {self.heads}")
        if not 0 <= self.added < self.vocab_size:
            raise ValueError(f"added = {self.added} must be 0 or more and below vocab_size = {self.vocab_size}")

    def scaled(self, sizes: Mapping[str, Any]) -> Self:
        """As every part's; the ``added`` ids come on top of the scale's vocabulary, which is the tokenizer's."""
        small = super().scaled(sizes)
        return replace(small, vocab_size=sizes["vocab_size"] + self.added) if "vocab_size" in sizes else small

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

    def with_tokens(self, tokens: int, in_tokens: int) -> Self:
        return replace(self, queries=tokens)

    def build(self, *, in_width: int, in_tokens: int, out_width: int) -> QFormer:
        """Build it; ``out_width`` = 0 leaves the projection out, and the queries come at their own width."""
        return QFormer(self, in_width, out_width)


class QFormer(Connector):
    """``query_tokens``, ``ln_vision``, the embedding norm ``norm``, ``trunk``, ``text`` (if asked for) and ``proj``."""

    forward_only = False  # texts pass through it on their own

    def __init__(self, config: QFormerConfig, in_width: int, out_width: int) -> None:
        super().__init__()
        self.config = config
        self.width = out_width or config.width
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
        self.proj: nn.Module = nn.Linear(config.width, out_width) if out_width else nn.Identity()

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
        rows: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """The trunk's rows for [queries; text].

        Args:
            image: Tokens [B, N, in_width] that the queries read; None skips cross-attention.
            text: Embedded text from ``embed_text``.
            queries: Put the queries in front.
            layout: Who reads whom; by default everything real reads everything real (BLIP-2's matching rule).
            rows: [B] int64, the image that each row of the batch reads where several read one; its own by default.
            cache: Takes keys and values, and gives those of earlier rows; the layout then describes these too.

        Returns:
            [B, (queries) + T, width].
        """
        given = text if text is not None else image
        if given is None:
            raise ConfigError("the Q-Former was given neither an image nor a text")
        batch = given.tokens.shape[0]
        x = [self.query_tokens.to(given.tokens.dtype).expand(batch, -1, -1)] if queries else []
        if text is not None:
            x.append(text.tokens)
        if layout is None and self.config.text:
            layout = self.layout(text, queries=queries, batch=batch, device=given.tokens.device)
        return self.read(torch.cat(x, dim=1), layout, image, rows=rows, cache=cache)

    def read(
        self,
        x: Tensor,
        layout: Layout | None,
        image: Features | None = None,
        *,
        rows: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """The trunk's rows [B, T, width] for embedded rows [B, T, width], before the embedding norm; see ``hidden``."""
        context = None if image is None else self.ln_vision(image.tokens)  # [B, N, D_in]
        mask = None if image is None else image.mask
        if mask is not None and rows is not None:
            mask = mask[rows]
        x = self.dropout(self.norm(x))
        out = self.trunk(x, layout, context=context, context_rows=rows, context_mask=mask, cache=cache)
        assert isinstance(out, Tensor)
        return out

    def layout(
        self,
        text: Features | None = None,
        *,
        queries: bool = True,
        batch: int = 1,
        device: torch.device | str | None = None,
        rule: Rule = "matching",
    ) -> Layout:
        """The layout of [queries; text], one table a task (section 3.1 of the paper): see ``RULES``.

        A text alone, or queries alone, are what is left of any of them. Positions count the text's real tokens from 0;
        the queries have -1.
        """
        count = self.tokens if queries else 0
        length = 0 if text is None else text.tokens.shape[1]
        segments = [Segment("queries", count, modality=QUERY, attends="full")] if queries else []
        if text is not None:
            attends: Literal["full", "causal"] = "causal" if rule == "generation" else "full"
            segments.append(Segment("text", length, TEXT, attends, predicted=rule == "generation"))
        real, place = None, torch.arange(-count, length, device=device).clamp(min=-1)[None]
        if text is not None and text.mask is not None:
            mask = text.mask.bool()
            real = torch.cat([mask.new_ones(len(mask), count), mask], dim=1)
            counted = (mask.long().cumsum(1) - 1).clamp(min=0)
            place = torch.cat([place[:, :count].expand(len(mask), -1), counted], dim=1)
        both = queries and text is not None
        return lay_out(
            segments, batch, real=real, relation=RULES[rule] if both else None, position=place, device=device
        )

    def forward(self, features: Features, text: Features | None = None) -> Features:
        rows = self.hidden(features, text)[:, : self.tokens]  # [B, Q, width]
        return Features(self.proj(rows))

    def adopt(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of a Q-Former that has a text branch where this one has none, or has none where this one has,
        under this one's names: the queries' feed-forward network is the second of two, or the only one."""
        branched = any(".ffn.1." in name for name in stored)
        if branched == self.config.text:
            return dict(stored)
        if self.config.text:  # both start from the queries', as stage 1 starts them equal
            two = [(re.sub(r"\.(ffn|ffn_norm)\.", rf".\1.{i}.", n), t) for n, t in stored.items() for i in (0, 1)]
            return dict(two)
        return {re.sub(r"\.(ffn|ffn_norm)\.1\.", r".\1.", name): tensor for name, tensor in stored.items()}
