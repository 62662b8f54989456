"""From samples with masks to what the wiring ``segmenter`` reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zoo.data.processor import PromptProcessor
from zoo.data.sample import Sample
from zoo.data.templates import Turn
from zoo.errors import DataError
from zoo_grounding.marks import TARGET, MarkedTokenizer, groups_of
from zoo_grounding.masks import Square, as_masks

if TYPE_CHECKING:
    from zoo_grounding.masks import ImageLike


class GroundingProcessor(PromptProcessor):
    """A prompt processor whose answers name targets (`TARGET`), each with a mask of the sample.

    Args:
        names: The tokens of one target, in order.
        square: What the mask decoder's picture becomes.
        shares: The image encoder reads that square too, in place of a picture of its own.
        others: Of ``PromptProcessor``; its tokenizer knows the names.
    """

    tokenizer: MarkedTokenizer
    dialogues: ClassVar[bool] = True

    def __init__(self, *, names: Sequence[str], square: Square, shares: bool, **others: Any) -> None:
        super().__init__(**others)
        self.names = tuple(names)
        self.square = square
        self.shares = shares
        self.target_ids = tuple(self.tokenizer.marks[name] for name in self.names)

    def __call__(
        self,
        samples: Sequence[Sample],
        train: bool = False,
        draws: Sequence[int] | None = None,
        pixels: NDArray[np.uint8] | None = None,
    ) -> dict[str, Tensor]:
        """What ``PromptProcessor`` returns, and

        - ``mask_pixels`` [B, 3, S, S] where the mask decoder reads pixels of its own; ``resized`` [B, 2] and
          ``image_sizes`` [B, 2], heights and widths inside the square and of the images;
        - ``masks`` [M, H, W] uint8 of all targets in order, padded with 0 to the largest image of the batch;
        - ``mask_row`` [M], the sample of every mask; ``mask_question`` [M], its answer, numbered over the batch;
          ``prompt_places`` [M, Q], where the target's tokens stand in ``input_ids``.

        A row that ``max_length`` cuts keeps the targets whose tokens are all there.

        Raises:
            DataError: A sample without an image or with several, whose masks are of another size than its image, or
                whose answers name another number of targets.
        """
        if pixels is not None:
            from PIL import Image

            samples = [Sample(s.id, Image.fromarray(p), s.texts, s.meta) for s, p in zip(samples, pixels, strict=True)]
        for sample in samples:
            if sample.image is None or len(sample.meta.get("images") or ()) > 1:
                raise DataError(f"sample {sample.id!r} must show one image, for masks to be drawn in")
        batch = super().__call__(samples, train, draws)
        seen, resized, sizes = self.square([s.image for s in samples if s.image is not None])
        batch["pixel_values" if self.shares else "mask_pixels"] = seen
        return {
            **batch,
            "resized": resized,
            "image_sizes": sizes,
            **self._targets(samples, batch["input_ids"], train, draws if draws is not None else [0] * len(samples)),
        }

    def _pixel_values(self, samples: Any, train: bool, draws: Any, pixels: Any) -> Tensor:
        if self.shares:
            return torch.empty(0)  # the square takes its place
        return super()._pixel_values(samples, train, draws, pixels)

    def encode_images(self, images: Sequence[ImageLike]) -> Tensor:
        return self.square(images)[0] if self.shares else super().encode_images(images)

    def _turns(self, sample: Sample, train: bool, draw: int) -> tuple[Turn, ...]:
        written = " ".join(self.names)
        return tuple(
            (question, None if answer is None else answer.replace(TARGET, written))
            for question, answer in super()._turns(sample, train, draw)
        )

    def _targets(self, samples: Sequence[Sample], ids: Tensor, train: bool, draws: Sequence[int]) -> dict[str, Tensor]:
        masks: list[Tensor] = []
        rows: list[int] = []
        questions: list[int] = []
        places: list[tuple[int, ...]] = []
        asked = 0
        prompts = len(self.names)
        for row, sample in enumerate(samples):
            own = as_masks(sample.meta.get("masks") or ())
            answers = [str(answer) for _, answer in super()._turns(sample, train, draws[row])]
            named = [answer.count(TARGET) for answer in answers]
            stored = [str(answer) for _, answer in sample.meta.get("turns") or ()] or answers
            _check(sample, own, sum(answer.count(TARGET) for answer in stored))
            found = [place for place, id in enumerate(ids[row].tolist()) if id in self.target_ids]
            whole = groups_of(found[: len(found) // prompts * prompts], prompts)
            of_answer = [asked + turn for turn, count in enumerate(named) for _ in range(count)]
            for mask, group, answer in zip(own, whole, of_answer, strict=False):
                masks.append(mask)
                rows.append(row)
                places.append(group)
                questions.append(answer)
            asked += len(answers)
        height = max((len(mask) for mask in masks), default=1)
        width = max((mask.shape[1] for mask in masks), default=1)
        canvas = torch.zeros(len(masks), height, width, dtype=torch.uint8)
        for number, mask in enumerate(masks):
            canvas[number, : mask.shape[0], : mask.shape[1]] = mask
        return {
            "masks": canvas,
            "mask_row": torch.tensor(rows, dtype=torch.long),
            "mask_question": torch.tensor(questions, dtype=torch.long),
            "prompt_places": torch.tensor(places, dtype=torch.long).view(-1, prompts),
        }


def _check(sample: Sample, masks: Sequence[Tensor], named: int) -> None:
    """Raise a DataError unless there is a mask of the image's size for every target."""
    if len(masks) != named:
        raise DataError(
            f"sample {sample.id!r}: its answers name {named} targets ({TARGET}), and it has {len(masks)} masks"
        )
    size = (sample.image.height, sample.image.width) if sample.image is not None else (0, 0)
    for mask in masks:
        if tuple(mask.shape) != size:
            raise DataError(
                f"sample {sample.id!r}: a mask of shape {list(mask.shape)}, its image is {size[0]} high and"
                f" {size[1]} wide: masks have one value a pixel"
            )
