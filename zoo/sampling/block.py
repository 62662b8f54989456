"""What stands before an image is computed once: its keys and values serve every step of drawing the image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zoo.decoders.base import Decoder
from zoo.errors import ConfigError
from zoo.layout import Layout, TokenBatch

CHUNK = 32
"""Images that are drawn at once."""


def distinct(*columns: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of a batch that differ, and which of them each row is: an unconditional prefix, or several images of one
    prompt, need computing once.

    Args:
        columns: ``[B, T, ...]`` integer or bool tensors that together say what a row is (ids, segment numbers).

    Returns:
        (first ``[P]``, rows ``[B]``), int64: ``columns[i][first][rows]`` equals ``columns[i]``; first is ascending.
    """
    flat = torch.cat([column.flatten(1).long() for column in columns], dim=1)  # [B, sum of T]
    _, group = torch.unique(flat, dim=0, return_inverse=True)  # [B], numbered by the rows' order as numbers
    count = int(group.max()) + 1 if len(group) else 0
    place = torch.arange(len(group), device=flat.device)
    first = torch.full((count,), len(group), device=flat.device).scatter_reduce(0, group, place, "amin")
    order = first.argsort()
    return first[order], order.argsort()[group]


class Prefix:
    """The sequence before an image, computed once; blocks of rows are forwarded against its keys and values.

    This is exact where no row of the prefix reads the block, which is so in every layout of this package: text is
    causal and stands before the image. It is not exact to keep the rows of a block that attends to all of itself and
    then to change the block: forward the finished block once more with ``keep``.

    Both branches of classifier-free guidance are rows of one batch. Rows may share a prefix (``rows``), which is then
    computed once and copied.

    Example::

        prefix = Prefix(decoder, decoder.embed(ids), layout)     # left pads
        for step in range(steps):
            hidden = prefix.block(decoder.embed(image_ids), "image")     # the cache is cut back afterwards
        prefix.block(decoder.embed(image_ids), "image", keep=True)       # what follows reads the finished image
        hidden = prefix.block(decoder.embed(next_id), "text", keep=True)

    Attributes:
        layout: Of all that is kept so far.
        hidden: ``[B, D]``, the last row's state of what was kept last, which predicts the token behind it.
    """

    def __init__(self, decoder: Decoder, embeds: Tensor, layout: Layout, rows: Tensor | None = None) -> None:
        """Forward the prefix.

        Args:
            embeds: ``[P, T, D]``; pads in front, so that all rows end together.
            layout: Of these T tokens; it also names the segments of the blocks to come, which need no token in it yet.
                Its positions should not count pads where the decoder's positions are not relative.
            rows: ``[B]`` int64, the prefix of each row of the batch; every prefix is a row of its own by default.

        Raises:
            ConfigError: The prefix does not fit the decoder's context, or a row ends with a pad.
        """
        self.decoder, self.layout = decoder, layout
        self._check(embeds.shape[1])
        self._cache: Any = decoder.new_cache()
        self.hidden = decoder(TokenBatch(embeds, layout), self._cache)[:, -1]  # [P, D]
        if rows is not None:
            self.select(rows)

    @property
    def batch(self) -> int:
        """Rows of the batch."""
        return len(self.hidden)

    @property
    def length(self) -> int:
        """Tokens kept so far, pads included."""
        return self.layout.length

    def select(self, rows: Tensor) -> None:
        """Go on with the rows ``rows`` ``[N]`` int64 of the batch; repeats allowed."""
        self._cache = self.decoder.select_cache(self._cache, rows)
        self.hidden = self.hidden[rows]
        if self.layout.batch > 1:
            self.layout = self.layout.select(rows)

    def block(
        self,
        embeds: Tensor,
        segment: str | int,
        keep: bool = False,
        *,
        real: Tensor | None = None,
        position: Tensor | None = None,
        modality: int | None = None,
    ) -> Tensor:
        """Forward rows behind the prefix.

        Args:
            embeds: ``[B, n, D]``.
            segment: Name or number of the layout's segment they belong to.
            keep: Later blocks read these rows; otherwise they are forgotten.
            real: ``[B, n]`` bool, False for rows of the batch that write nothing here; they are pads from then on.
            position: ``[B | 1, n]`` or ``[B | 1, axes, n]``; by default the ids after the last real one.
            modality: Their expert route; that of the last token by default.

        Returns:
            Hidden states ``[B, n, D]``.

        Raises:
            ConfigError: The decoder's context is full, or no such segment.
        """
        count, past = embeds.shape[1], self.length
        self._check(past + count)
        layout = self._of_batch(len(embeds)) if real is not None else self.layout
        if position is None and real is not None and layout.position.ndim == 2:
            # a pad takes the id before it, so that the next real token goes on from there
            position = layout.position[:, -1:] + real.to(layout.position.device).long().cumsum(1)
        elif position is not None and position.shape[0] != layout.batch:
            position = position.expand(layout.batch, *position.shape[1:])
        layout = layout.append(segment, count, real=real, position=position, modality=modality)
        hidden: Tensor = self.decoder(TokenBatch(embeds, layout), self._cache)  # [B, n, D]
        if keep:
            self.layout = layout
            last = hidden[:, -1]
            self.hidden = last if real is None else torch.where(real[:, -1:].to(last.device), last, self.hidden)
        else:
            self._cache = self.decoder.cut_cache(self._cache, past)
        return hidden

    def _of_batch(self, batch: int) -> Layout:
        """The layout with a row for every row of the batch, which may then differ."""
        if self.layout.batch == batch:
            return self.layout
        return self.layout.select(torch.zeros(batch, dtype=torch.long, device=self.layout.segment.device))

    def _check(self, length: int) -> None:
        room = getattr(self.decoder, "context_length", 0)
        if room and length > room:
            raise ConfigError(
                f"the sequence would have {length} tokens, image tokens included, and the decoder reads {room}:"
                " shorten the prompt or give the decoder a longer context_length"
            )


class Branches:
    """Several prefixes of one row each, of any length, drawn from as the rows of one batch: the branches of guidance
    where one of them is a long history and the others are short. Has what ``decode_codes`` asks of a ``Prefix``."""

    def __init__(self, branches: Sequence[tuple[Prefix, str | int]]) -> None:
        """Join prefixes, each with the segment of its layout that the image belongs to."""
        self._branches = list(branches)

    @property
    def batch(self) -> int:
        """Rows, one a branch."""
        return len(self._branches)

    @property
    def hidden(self) -> Tensor:
        """``[branches, D]``, the last rows' states."""
        return torch.cat([prefix.hidden for prefix, _ in self._branches])

    def select(self, rows: Tensor) -> None:
        """Go on with the branches ``rows`` ``[N]``."""
        self._branches = [self._branches[row] for row in rows.tolist()]

    def block(
        self,
        embeds: Tensor,
        segment: str | int = "",
        keep: bool = False,
        *,
        position: Tensor | None = None,
        modality: int | None = None,
    ) -> Tensor:
        """Forward ``[branches, n, D]``, each row behind its own prefix; ``segment`` is not read."""
        rows = zip(self._branches, torch.split(embeds, 1), strict=True)
        return torch.cat(
            [prefix.block(row, own, keep, position=position, modality=modality) for (prefix, own), row in rows]
        )
