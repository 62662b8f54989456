"""Masked data modelling (BEiT-3, arXiv 2208.10442, section 2.2): images are a language too, and one loss serves images,
texts and pairs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.draws import rows as rows_of
from zoo.objectives.base import Objective, full_precision, over_ranks
from zoo.objectives.masked_lm import IGNORE, mask_words
from zoo.recipe import ObjectiveConfig

STREAMS = ("image", "text", "pair")


@dataclass(frozen=True, kw_only=True)
class MaskedDataConfig(ObjectiveConfig):
    """Masked data modelling; rates are those of the paper.

    Attributes:
        streams: What is read: ``image`` and ``text`` alone, and ``pair``, both in one sequence.
        share: Share of the batch that each stream reads. A third sends every sample through one of them: the paper's
            batch of 6,144 is 2,048 images, 2,048 texts and 2,048 pairs. With 1 every sample goes through all.
        image_rate: Share of the patches to hide, in blocks.
        text_rate: Probability of a word to be masked in a text alone; the paper's 0.15 (a later survey says 0.10).
        pair_image_rate, pair_text_rate: The same in a pair.
        smallest_block: Least patches of a block, where the grid has room for several such.
        aspect: Least ratio of a block's sides; the largest is its inverse.
        weights: Factor of each stream's loss. The paper states none.
    """

    streams: list[str] = field(default_factory=lambda: list(STREAMS))
    share: float = 1 / 3
    image_rate: float = 0.4
    text_rate: float = 0.15
    pair_image_rate: float = 0.4
    pair_text_rate: float = 0.5
    smallest_block: int = 16
    aspect: float = 0.3
    weights: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in (*self.streams, *self.weights):
            if name not in STREAMS:
                raise ValueError(f"stream {name!r} must be one of {', '.join(STREAMS)}")
        if not self.streams or len(set(self.streams)) != len(self.streams):
            raise ValueError(f"streams = {self.streams} must name at least one, each once")
        for name in ("image_rate", "text_rate", "pair_image_rate", "pair_text_rate"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must lie between 0 and 1")
        if not 0 < self.share <= 1 or not 0 < self.aspect <= 1 or self.smallest_block < 1:
            raise ValueError("share and aspect must lie in (0, 1] and smallest_block must be 1 or more")

    def build(self) -> MaskedData:
        return MaskedData(self)


@dataclass(frozen=True)
class Masked:
    """What one stream hides.

    Attributes:
        rows: [n] int64, the samples it reads.
        hidden: [n, patches] bool, the patches to be predicted; None where it reads no image.
        ids: [n, T] the text to be read.
        labels: [n, T] the true id where a word is to be predicted, -100 elsewhere.
    """

    rows: Tensor
    hidden: Tensor | None = None
    ids: Tensor | None = None
    labels: Tensor | None = None


class MaskedData(Objective):
    """Cross-entropy over what is hidden, of image codes and of words alike; a stream's terms are means, and are added.

    It reads through ``model.read_image(pixels, hidden)``, ``read_text(ids, mask)`` and ``read_pair(image tokens, text
    tokens, mask)``, predicts through ``model.code_logits`` and ``model.word_logits`` at hidden places alone, and takes
    the true codes from the output ``image_codes``. There is no contrast and no matching in it.
    """

    learns: ClassVar[str] = "masked"
    needs: ClassVar[frozenset[str]] = frozenset({"image_codes"})

    def __init__(self, config: MaskedDataConfig) -> None:
        super().__init__()
        self.config = config
        self.parts = round(1 / config.share)

    def forward(
        self, model: Any, batch: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Draw what to hide from torch's global stream, and compute the loss in nats.

        Reports each stream's loss (``image``, ``text``, ``pair``), and ``code_accuracy`` and ``word_accuracy`` in
        [0, 1] over all streams.
        """
        return self.loss(model, batch, outputs["image_codes"], self.draw(model, batch))

    def loss(
        self, model: Any, batch: Mapping[str, Tensor], codes: Tensor, drawn: Mapping[str, Masked]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of what ``drawn`` hides in each stream; ``codes`` [B, patches] are the image's targets."""
        report: dict[str, Tensor] = {}
        hits: dict[str, list[Tensor]] = {"code": [], "word": []}
        total = codes.new_zeros((), dtype=torch.float32)
        for name, masked in drawn.items():
            loss = codes.new_zeros((), dtype=torch.float32)
            for kind, logits, targets in self._predict(model, batch, codes, masked):
                value, right = masked_cross_entropy(logits, targets)
                loss = loss + value
                hits[kind].append(right)
            report[name] = loss.detach()
            total = total + self.config.weights.get(name, 1.0) * loss
        report |= {f"{kind}_accuracy": torch.cat(right).mean() for kind, right in hits.items() if right}
        return total, report

    def _predict(
        self, model: Any, batch: Mapping[str, Tensor], codes: Tensor, masked: Masked
    ) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(kind, logits [M, classes], targets [M]) of what a stream hides."""
        image = text = None
        mask = None if batch.get("attention_mask") is None else batch["attention_mask"][masked.rows]
        if masked.hidden is not None and masked.ids is not None:
            seen = model.trunk.embed_image(batch["pixel_values"][masked.rows], masked.hidden)
            image, text = model.read_pair(seen, model.trunk.embed_text(masked.ids), mask)
        elif masked.hidden is not None:
            image = model.read_image(batch["pixel_values"][masked.rows], masked.hidden)
        else:
            text = model.read_text(masked.ids, mask)
        if image is not None and masked.hidden is not None:
            patches = image.tokens[:, -masked.hidden.shape[1] :]  # without the class token
            place = _places(masked.hidden, self.config.image_rate)
            yield "code", model.code_logits(patches.flatten(0, 1)[place]), codes[masked.rows].flatten()[place]
        if text is not None and masked.labels is not None:
            place = _places(masked.labels != IGNORE, self.config.text_rate)
            yield "word", model.word_logits(text.tokens.flatten(0, 1)[place]), masked.labels.flatten()[place]

    def draw(self, model: Any, batch: Mapping[str, Tensor]) -> dict[str, Masked]:
        """What each stream hides, by name."""
        c, size = self.config, batch["pixel_values"].shape[0]
        device = batch["pixel_values"].device
        count = max(1, round(c.share * size))
        drawn: dict[str, Masked] = {}
        # every third sample, say: with several processes the same samples as in one
        even = self.parts > 1 and self.parts * count <= size
        stride, apart = (self.parts, 1) if even else (1, count)
        for number, name in enumerate(c.streams):
            rows = (number * apart + stride * torch.arange(count, device=device)) % size
            hidden = ids = labels = None
            if name != "text":
                rate = c.image_rate if name == "image" else c.pair_image_rate
                hidden = self._hide(count, model.trunk.grid, rate).to(device)
            if name != "image":
                rate = c.text_rate if name == "text" else c.pair_text_rate
                ids, labels = self._mask(model, batch, rows, rate)
            drawn[name] = Masked(rows, hidden, ids, labels)
        return drawn

    def _hide(self, count: int, grid: tuple[int, int], rate: float) -> Tensor:
        patches = max(1, int(rate * grid[0] * grid[1]))
        return block_masks(count, grid, patches, smallest=self.config.smallest_block, aspect=self.config.aspect)

    def _mask(self, model: Any, batch: Mapping[str, Tensor], rows: Tensor, rate: float) -> tuple[Tensor, Tensor]:
        ids = batch["input_ids"][rows]
        if ids.is_meta:  # counting FLOPs: the tokenizer is not at hand, and no value can be seen
            return ids, ids
        special = model.special_ids
        words = ~torch.isin(ids, torch.tensor([special["cls"], special["pad"], special["eos"]], device=ids.device))
        if batch.get("attention_mask") is not None:
            words = words & batch["attention_mask"][rows].bool()
        return mask_words(ids, words, mask_id=special["mask"], vocab_size=model.vocab_size, probability=rate)


def masked_cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy, in nats, of targets [M] under logits [M, classes], and which of them rank first, [M].

    With several processes each divides by the mean number of targets a process, so that what DDP averages weighs every
    target alike. No targets give a zero that is connected to the graph.
    """
    _, count = over_ranks(torch.tensor(len(targets), device=logits.device))
    with full_precision(logits):
        loss = F.cross_entropy(logits.float(), targets, reduction="sum") / count
    return loss, (logits.detach().argmax(-1) == targets).float()


def block_masks(batch: int, grid: tuple[int, int], count: int, *, smallest: int = 16, aspect: float = 0.3) -> Tensor:
    """Hide exactly ``count`` patches of each image in rectangles (BEiT, arXiv 2106.08254, algorithm 1).

    A rectangle's area is uniform between ``smallest`` (a quarter of ``count``, if that is less, and 2 at least) and
    what is still to be hidden, the logarithm of its aspect uniform between those of ``aspect`` and its inverse; one
    that would hide too much is drawn again. BEiT gives up after ten draws and then hides fewer; this goes on.

    Returns:
        [batch, h*w] bool on the CPU, drawn from torch's global stream.

    Raises:
        ValueError: More patches to hide than there are.
    """
    height, width = grid
    if not 0 <= count <= height * width:
        raise ValueError(f"{count} of {height * width} patches cannot be hidden")
    low, span = math.log(aspect), -2 * math.log(aspect)
    smallest = min(smallest, max(2, count // 4))
    rows = [(1 << n) - 1 for n in range(width + 1)]  # n patches of a row, as bits
    masks: list[int] = []
    starts = rows_of(torch.rand, (batch, 16, 4), torch.device("cpu"), dtype=torch.float64)
    for start in starts.tolist():
        draws, used, mask, left, failed = start, 0, 0, count, 0
        own: torch.Generator | None = None
        while left:
            if used == len(draws):
                own = own or torch.Generator().manual_seed(int(start[0][0] * 2**53))  # whatever shares the batch
                draws, used = torch.rand(16, 4, dtype=torch.float64, generator=own).tolist(), 0
            u, used = draws[used], used + 1
            least = min(smallest, left)
            area, ratio = least + u[0] * (left - least), math.exp(low + span * u[1])
            high, wide = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            fits = 0 < high <= height and 0 < wide <= width
            block = 0
            if fits:
                top, side = int(u[2] * (height - high + 1)), int(u[3] * (width - wide + 1))
                for row in range(top, top + high):
                    block |= rows[wide] << (row * width + side)
            new = (block & ~mask).bit_count()
            if 0 < new <= left:
                mask, left, failed = mask | block, left - new, 0
            elif (failed := failed + 1) > 200:  # nearly full: take the first free patches
                for place in range(height * width):
                    if left and not mask >> place & 1:
                        mask, left = mask | 1 << place, left - 1
        masks.append(mask)
    bits = [[mask >> place & 1 for place in range(height * width)] for mask in masks]
    return torch.tensor(bits, dtype=torch.bool).reshape(batch, height * width)


def _places(chosen: Tensor, rate: float) -> Tensor:
    """Flat places [M] of what is chosen; on "meta" as many as the rate says."""
    if chosen.is_meta:
        return torch.arange(max(1, round(rate * chosen.numel())), device=chosen.device)
    return chosen.flatten().nonzero()[:, 0]
