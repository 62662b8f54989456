"""A BERT (Devlin et al. 2019) that reads text alone or, in the layers that own cross-attention, an image as well."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.encoders.base import Encoder, TextEncoderConfig
from zoo.errors import ConfigError
from zoo.layout import Layout, Segment, lay_out
from zoo.layout_facts import look_at_padding
from zoo.nn import MLMHead, TokenEmbedding, Trunk, TrunkConfig, start_std
from zoo.part import Features


@dataclass(frozen=True, kw_only=True)
class BertConfig(TextEncoderConfig):
    """BERT base by default, split as ALBEF splits it: 6 layers for text, 6 for fusion.

    Attributes:
        vocab_size: Rows of the embedding table, ``added`` ids included.
        added: Ids behind those of the tokenizer (BLIP's [DEC] and [ENC]).
        width: Hidden size.
        depth: Layers in all.
        heads: Attention heads.
        ffn: Width of the feed-forward layers.
        types: Rows of the token type table, of which only row 0 is read; 0 = none (BLIP).
        dropout: On every branch, the embeddings and the attention weights while training.
        eps: Of the norms.
        text_share: Share of the layers, from the first, that text alone goes through: 0.5 in ALBEF, 1 in BLIP.
        cross_share: Share of the layers, up to the last, that own cross-attention: 0.5 in ALBEF, 1 in BLIP.
        lm_head: Own BERT's head that predicts words, whose matrix is the token table.
    """

    tokenizer: str = "hf:google-bert/bert-base-uncased"
    vocab_size: int = 30522
    context_length: int = 512
    added: int = 0
    width: int = 768
    depth: int = 12
    heads: int = 12
    ffn: int = 3072
    types: int = 2
    dropout: float = 0.1
    eps: float = 1e-12
    text_share: float = 0.5
    cross_share: float = 0.5
    lm_head: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.added < self.vocab_size:
            raise ValueError(f"added = {self.added} must be 0 or more and below vocab_size = {self.vocab_size}")
        if not 0 < self.text_share <= 1 or not 0 < self.cross_share <= 1:
            raise ValueError(f"text_share = {self.text_share}, cross_share = {self.cross_share} must lie in (0, 1]")
        if self.text_depth + self.cross_depth < self.depth:
            raise ValueError(
                f"text_share = {self.text_share} and cross_share = {self.cross_share} leave layers between text and"
                " fusion that nothing runs alone: they must add up to 1 or more"
            )
        if self.width % self.heads:
            raise ValueError(f"width = {self.width} is not divisible by heads = {self.heads}")

    def scaled(self, sizes: Mapping[str, Any]) -> Self:
        """As every part's; the ``added`` ids come on top of the scale's vocabulary, which is the tokenizer's."""
        small = super().scaled(sizes)
        return replace(small, vocab_size=sizes["vocab_size"] + self.added) if "vocab_size" in sizes else small

    @property
    def text_depth(self) -> int:
        """Layers that text alone goes through; at least one."""
        return max(1, round(self.depth * self.text_share))

    @property
    def cross_depth(self) -> int:
        """Layers that own cross-attention; at least one."""
        return max(1, round(self.depth * self.cross_share))

    def trunk(self, context_width: int | None) -> TrunkConfig:
        """The layers' configuration: those of text alone, or all of them reading a context of ``context_width``."""
        first = self.depth - self.cross_depth
        depth = self.text_depth if context_width is None else self.depth
        cross = context_width is not None
        return TrunkConfig(
            width=self.width,
            depth=depth,
            heads=self.heads,
            ffn=self.ffn,
            eps=self.eps,
            placement="post",
            final_norm=False,
            dropout=self.dropout,
            attention_dropout=self.dropout,
            blocks=tuple("scf" if cross and i >= first else "sf" for i in range(depth)),
            context_width=context_width,
            init_std=start_std(self.width),
        )

    def build(self, context_width: int | None = None) -> Bert:
        """Build the encoder; without ``context_width``, the width of what cross-attention reads, only its text half."""
        return Bert(self, context_width)


class Bert(Encoder):
    """``embed`` (a ``TokenEmbedding``), ``trunk`` and, where it can fuse and the config wants one, ``lm_head``."""

    def __init__(self, config: BertConfig, context_width: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.width = self.pooled_width = config.width
        self.tokens = config.context_length
        self.context_width = context_width
        self.embed = TokenEmbedding(
            config.vocab_size,
            config.width,
            positions=config.context_length,
            types=config.types,
            norm="layer",
            eps=config.eps,
            dropout=config.dropout,
        )
        self.trunk = Trunk(config.trunk(context_width))
        self.lm_head: MLMHead | None = None
        if config.lm_head and context_width is not None:
            self.lm_head = MLMHead(config.width, config.vocab_size, eps=config.eps)

    @property
    def split(self) -> bool:
        """Whether fusion can go on from the states of text alone, because no layer belongs to both (ALBEF)."""
        return self.config.text_depth <= self.config.depth - self.config.cross_depth

    def reading(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] as a text that reads an image begins: BLIP puts [ENC], its last id, in the first place;
        without added ids they stay as they are."""
        if self.config.added < 2:
            return ids
        return torch.cat([torch.full_like(ids[:, :1], self.config.vocab_size - 1), ids[:, 1:]], 1)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        context: Tensor | None = None,
        context_rows: Tensor | None = None,
        context_mask: Tensor | None = None,
        states: Tensor | None = None,
    ) -> Features:
        """Encode token ids [B, T], every token reading every other.

        Args:
            mask: [B, T], 1 = real.
            context: [B, N, context_width] an image's tokens; without them only the text layers run.
            context_rows: [B] int64, the row of ``context`` that each text reads, by default its own.
            context_mask: [B, N], 1 = real, for each text.
            states: [B, T, width], what this encoder returned for the text alone, from where fusion goes on; needs a
                ``split`` stack.

        Returns:
            ``tokens`` [B, T, width] and ``pooled``, the state of the first token ([CLS]).

        Raises:
            ConfigError: A context for an encoder built without ``context_width``, or more tokens than positions.
        """
        cut = short_texts(mask)
        if cut is not None:
            return self._in_two(x, cast(Tensor, mask), cut, context, context_rows, context_mask, states)
        layout = text_layout(x, mask)
        reading: dict[str, Any] = {
            "context": context, "context_rows": context_rows, "context_mask": context_mask,
        }  # fmt: skip
        if context is None:
            tokens = self.trunk(self.embed(x), layout, layers=slice(0, self.config.text_depth))
        elif self.context_width is None:
            raise ConfigError("this text encoder reads text alone: build it with context_width to fuse images into it")
        elif states is None:
            tokens = self.trunk(self.embed(x), layout, **reading)
        else:
            if not self.split:
                raise ConfigError("layers that text alone goes through also fuse: give token ids, not text states")
            layers = slice(self.config.text_depth, None)
            tokens = self.trunk(states, layout, **reading, layers=layers)
        tokens = cast(Tensor, tokens)
        return Features(tokens, None if mask is None else mask.bool(), tokens[:, 0])

    def _in_two(
        self,
        x: Tensor,
        mask: Tensor,
        cut: int,
        context: Tensor | None,
        context_rows: Tensor | None,
        context_mask: Tensor | None,
        states: Tensor | None,
    ) -> Features:
        """``forward`` of the texts of at most ``cut`` tokens and of the longer ones, each no longer than need be."""
        long = mask[:, cut:].any(1)
        order = torch.cat([(~long).nonzero()[:, 0], long.nonzero()[:, 0]])
        tokens = []
        for rows, length in ((order[: int((~long).sum())], cut), (order[int((~long).sum()) :], x.shape[1])):
            own = context[rows] if context is not None and context_rows is None else context
            part = self(
                x[rows, :length],
                mask[rows, :length],
                context=own,
                context_rows=None if context_rows is None else context_rows[rows],
                context_mask=None if context_mask is None else context_mask[rows],
                states=None if states is None else states[rows, :length],
            )
            tokens.append(F.pad(part.tokens, (0, 0, 0, x.shape[1] - length)))
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
        together = torch.cat(tokens)[back]  # [B, T, D], zero on the pads left out
        return Features(together, mask.bool(), together[:, 0])

    def logits(self, hidden: Tensor) -> Tensor:
        """Words [..., vocab_size] that hidden states [..., width] predict; ConfigError without ``lm_head``."""
        if self.lm_head is None:
            raise ConfigError("this text encoder predicts no words: set text_encoder.lm_head=true")
        logits: Tensor = self.lm_head(hidden, self.embed.tokens.weight)
        return logits


def short_texts(mask: Tensor | None) -> int | None:
    """A length that cuts a batch [B, T] of unequal texts in two so that reading each part by itself saves a quarter of
    the tokens; None where none does, or where looking at the mask would make an accelerator wait."""
    if mask is None or mask.device.type != "cpu" or len(mask) < 32 or look_at_padding(mask.bool()) != "right":
        return None
    lengths = mask.sum(1).sort().values
    longest = int(lengths[-1])
    cost = torch.arange(1, len(mask) + 1) * lengths + torch.arange(len(mask) - 1, -1, -1) * longest
    best = int(cost.argmin())
    cut = int(lengths[best])
    return cut if longest > cut and int(cost[best]) < 0.75 * mask.shape[1] * len(mask) else None


def text_layout(ids: Tensor, mask: Tensor | None) -> Layout:
    """Every real token of [B, T] reads every other; pads are read by none."""
    real = None if mask is None or (mask.device.type == "cpu" and bool(mask.all())) else mask.bool()
    return lay_out([Segment("text", ids.shape[1], "text", "full")], real=real, device=ids.device)


__all__ = ["Bert", "BertConfig", "text_layout"]
