"""Rows of text and images packed into sequences of one length, so that few positions are pads.

A step reads the samples it would read without packing, and everything there is one of a sample or of an image stays in
their order; only what is one of a token is laid out anew. That is why packing changes no number of a run beyond
rounding: not the order of samples, not what is drawn at random for an image, not what a loss is divided by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.data.sequences import IGNORE, TASKS
from zoo.errors import ConfigError, DataError

OF_TOKENS = {"input_ids", "attention_mask", "segment", "labels", "image_slots"}
"""What a batch of rows holds of every token: ``zoo.data.sequences.collate``'s, of which a bridge's has some."""

PADS = {"segment": -1, "labels": IGNORE}
"""What stands at pads; 0 where nothing is said."""


def check_packing(model: Any, length: int) -> None:
    """Refuse what cannot be packed, before anything long begins.

    Raises:
        ConfigError: The model reads no packed rows, or its rows may be longer than ``length``.
    """
    if not getattr(model, "reads_packed_rows", False):
        raise ConfigError(
            f"trainer.pack = {length}: {type(model).__name__} reads no packed rows, only wirings that lay text and"
            " images out as one sequence do (unified, unified-latent, unified-vision, and bridge where neither its"
            " connector reads the text nor its decoder lays rows out itself): set trainer.pack=0"
        )
    if length < model.row_length:
        raise ConfigError(
            f"trainer.pack = {length} is shorter than a row may be, {model.row_length} tokens: set trainer.pack to that"
            " or more, or lower decoder.context_length or wiring.text_length"
        )


def first_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Divide rows of ``lengths`` among sequences of ``room`` tokens: the longest first, each into the first that has
    room for it; rows of one length in their order.

    Returns:
        The numbers of the rows in each sequence. A pure function of the lengths.
    """
    sequences: list[list[int]] = []
    left: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        size = lengths[row]
        place = next((place for place, free in enumerate(left) if free >= size), len(left))
        if place == len(left):
            sequences.append([])
            left.append(room)
        sequences[place].append(row)
        left[place] -= size
    return sequences


def pack(
    batch: dict[str, Tensor], length: int, ids: Sequence[str] = (), image: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """Lay the B rows of a batch out as P sequences of ``length`` tokens.

    Pads of rows are left out, and no row predicts the first token of the one behind it.

    Args:
        ids: The rows' samples, for the message of an error.
        image: The placeholder of an image and how many an image has, where the batch has no ``image_slots``.

    Returns:
        The batch with [P, length] in place of every [B, T], and beside it ``document`` [P, length] int64, the row that
        a token belongs to (-1 at pads), ``image_order`` [N] int64, which of the N images stands in the k-th group of
        slots, and ``eye_order`` [M] likewise for images that an encoder reads (``eye_values``). What is one
        a row (``task``, ``text_bytes``) or one an image keeps its order.

    Raises:
        DataError: A row is longer than ``length``; the message names it.
    """
    real = batch["attention_mask"]  # [B, T]
    sizes = real.sum(1).tolist()
    if sizes and max(sizes) > length:
        row = sizes.index(max(sizes))
        name = f"sample {ids[row]!r}" if ids else f"row {row} of the batch"
        raise DataError(
            f"{name} has {sizes[row]} tokens, and trainer.pack = {length} holds no more than that many: raise it"
        )
    sequences = first_fit(sizes, length)
    source = torch.full((len(sequences), length), -1)  # the place in the batch that each token comes from
    document = torch.full_like(source, -1)
    begins = torch.zeros_like(source, dtype=torch.bool)
    for number, rows in enumerate(sequences):
        at = 0
        for row in rows:
            here = slice(at, at + sizes[row])
            source[number, here] = real[row].nonzero()[:, 0] + row * real.shape[1]
            document[number, here] = row
            begins[number, at : at + 1] = True
            at += sizes[row]
    kept, source = source >= 0, source.clamp(min=0)
    out = dict(batch)
    for name in OF_TOKENS & batch.keys():
        values = batch[name].flatten()[source] if kept.any() else source.to(batch[name].dtype)
        out[name] = torch.where(kept, values, torch.tensor(PADS.get(name, 0), dtype=values.dtype))
    out["labels"] = out["labels"].masked_fill(begins, IGNORE)
    order = [row for rows in sequences for row in rows]
    if (slots := batch.get("image_slots")) is not None:
        starts = slots & ~torch.nn.functional.pad(slots[:, :-1], (1, 0))  # an image is never next to another
        counts = starts.sum(1)  # [B] images of the rows
    else:
        assert image is not None
        counts = (batch["input_ids"] == image[0]).sum(1) // image[1]
    if "eye_values" in batch:
        seen = batch["task"] == TASKS.index("mmu")
        out["eye_order"] = _images(counts * seen, order)
        counts = counts * ~seen
    return out | {"document": document, "image_order": _images(counts, order)}


def _images(counts: Tensor, order: Sequence[int]) -> Tensor:
    """The images of rows, ``counts`` [B], numbered in the rows' own order, as they stand when the rows stand in
    ``order``."""
    first = (counts.cumsum(0) - counts).tolist()
    numbers = [first[row] + image for row in order for image in range(int(counts[row]))]
    return torch.tensor(numbers, dtype=torch.long)


@dataclass
class Fill:
    """How full sequences were: what packing saved. It counts the batches that this process has read since it started,
    one ahead of training included.

    Attributes:
        length: Of a sequence.
        tokens: Positions that are no pads.
        places: All positions of the packed batches.
        padded: Positions that the same rows take when each batch is padded to its longest.
        sequences, rows: How many there were.
    """

    length: int
    tokens: int = 0
    places: int = 0
    padded: int = 0
    sequences: int = 0
    rows: int = 0

    def add(self, batch: dict[str, Tensor]) -> None:
        """Count a packed batch."""
        document = batch["document"]
        rows = int(document.max()) + 1
        sizes = torch.bincount(document[document >= 0], minlength=1)
        self.tokens += int(sizes.sum())
        self.places += document.numel()
        self.padded += rows * int(sizes.max())
        self.sequences += len(document)
        self.rows += rows

    def to_plain(self) -> dict[str, Any]:
        """What a manifest says: the counts, and the fractions that are no pads with packing and without."""
        return {
            "length": self.length,
            "rows": self.rows,
            "sequences": self.sequences,
            "tokens": self.tokens,
            "fill": round(self.tokens / max(1, self.places), 4),
            "padded_fill": round(self.tokens / max(1, self.padded), 4),
        }


def packing_line(packing: dict[str, Any]) -> str:
    """A line for the user out of ``Fill.to_plain``."""
    return (
        f"packing: {packing['rows']} rows in {packing['sequences']} sequences of {packing['length']};"
        f" {packing['fill']:.1%} of the positions are tokens ({packing['padded_fill']:.1%} if batches were padded)"
    )
