"""Any decoder with further tokens behind its vocabulary, whose rows are parameters of their own.

A decoder that is frozen keeps its tables to the bit, whatever the new rows learn: no gradient, momentum or weight decay
reaches them (the release of MiniGPT-5 multiplies their gradients by zero, and decays them all the same).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.decoders.base import Decoder, DecoderConfig
from zoo.layout import Layout, Segment, TokenBatch


@dataclass(frozen=True, kw_only=True)
class ExtendedConfig(DecoderConfig):
    """A decoder and how many tokens it gets; made by a wiring with ``extended``."""

    base: DecoderConfig
    added: int

    def build(self) -> ExtendedDecoder:
        return ExtendedDecoder(self.base.build(), self.added)


def extended(config: DecoderConfig, added: int) -> ExtendedConfig:
    """The configuration of a decoder with ``added`` tokens more."""
    return ExtendedConfig(
        base=config, added=added, tokenizer=config.tokenizer, vocab_size=config.vocab_size + added,
        context_length=config.context_length,
    )  # fmt: skip


class ExtendedDecoder(Decoder):
    """``base``, ``input_rows`` and ``output_rows`` [added, width]; ids from the base's ``vocab_size`` on are the new
    ones. New rows start as the mean of the base's."""

    context_length: int

    def __init__(self, base: Decoder, added: int) -> None:
        super().__init__()
        self.base = base
        self.width, self.first = base.width, base.vocab_size
        self.vocab_size = self.first + added
        self.context_width = base.context_width
        self.context_length = getattr(base, "context_length", 0)
        self.input_rows, self.output_rows = (
            nn.Parameter(_mean(table, added).to(torch.get_default_dtype())) for table in base.tables()
        )

    @property
    def image_tokens(self) -> int:
        return self.base.image_tokens

    @image_tokens.setter
    def image_tokens(self, tokens: int) -> None:
        self.base.image_tokens = tokens

    def embed(self, ids: Tensor) -> Tensor:
        known = ids < self.first
        embeds = self.base.embed(ids.where(known, 0))  # [B, T, D]
        rows = F.embedding((ids - self.first).clamp(0, len(self.input_rows) - 1), self.input_rows)
        return torch.where(known[..., None], embeds, rows.to(embeds.dtype))

    def forward(self, batch: TokenBatch, cache: Any = None, **context: Any) -> Tensor:
        hidden: Tensor = self.base(batch, cache, **context)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        return torch.cat([self.base.logits(hidden), F.linear(hidden, self.output_rows.to(hidden.dtype))], -1)

    def logits_of(self, hidden: Tensor, columns: slice) -> Tensor:
        inside = columns.stop is not None and columns.stop <= self.first
        return self.base.logits_of(hidden, columns) if inside else self.logits(hidden)[..., columns]

    def tables(self) -> tuple[Tensor, Tensor]:
        inner = self.base.tables()
        rows = (self.input_rows, self.output_rows)
        first, second = (torch.cat([old, new.to(old)]) for old, new in zip(inner, rows, strict=True))
        return first, second

    def arrange(self, layout: Layout, ids: Tensor, slots: Tensor) -> Layout:
        return self.base.arrange(layout, ids, slots)

    def grow(self, layout: Layout) -> Layout:
        return self.base.grow(layout)

    def sketch(self, segments: Sequence[Segment]) -> Layout:
        return self.base.sketch(segments)

    def new_cache(self) -> Any:
        return self.base.new_cache()

    def select_cache(self, cache: Any, index: Tensor) -> Any:
        return self.base.select_cache(cache, index)

    def cut_cache(self, cache: Any, length: int) -> Any:
        return self.base.cut_cache(cache, length)

    def adopt(self, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors to start from; those of a decoder without further tokens go to ``base``, and the new rows become the
        mean of its rows."""
        if not stored or any(name.startswith("base.") for name in stored):
            return stored
        out = {f"base.{name}": tensor for name, tensor in stored.items()}
        own = dict(self.named_parameters(remove_duplicate=False))
        for rows, table in zip(("input_rows", "output_rows"), self.base.tables(), strict=True):
            name = next((n for n, parameter in own.items() if parameter is table and n in out), None)
            if name is not None:
                out[rows] = _mean(out[name], len(own[rows]))
        return out


@torch.no_grad()
def _mean(table: Tensor, count: int) -> Tensor:
    return table.float().mean(0).repeat(count, 1)


class TextOnly:
    """A view of a decoder that writes text: ids from ``first`` on have no chance.

    Args:
        decoder: Whose ids behind ``first`` are left out.
        first: How many ids may be written.
    """

    def __init__(self, decoder: Decoder, first: int) -> None:
        self.decoder, self.vocab_size = decoder, first

    def __call__(self, *args: Any, **more: Any) -> Tensor:
        hidden: Tensor = self.decoder(*args, **more)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        return self.decoder.logits_of(hidden, slice(0, self.vocab_size))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.decoder, name)
