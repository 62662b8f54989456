"""The processor of models that judge a statement about two images, from samples of one image each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zoo.data.fused import FusionProcessor
from zoo.data.images import uniforms
from zoo.data.sample import Sample


class ComparedProcessor(FusionProcessor):
    """A caption as a statement about the first of two images, which is true where the first is its own.

    The other image is that of the neighbour in the batch (rows 0 and 1 see each other's, 2 and 3, ...; the last of an
    odd batch sees that of the row before), so that devices which share a batch in even parts see what one would. Which
    of the two comes first depends on (seed, id, draw).
    """

    def __call__(
        self,
        samples: Sequence[Sample],
        train: bool = False,
        draws: Sequence[int] | None = None,
        pixels: NDArray[np.uint8] | None = None,
    ) -> dict[str, Tensor]:
        """Return ``pixel_values`` and ``other_pixel_values`` [B, 3, S, S], ``encode_texts``, and ``labels`` [B] int64,
        1 where the statement is true."""
        batch = super().__call__(samples, train, draws, pixels)
        own = batch["pixel_values"]
        rows = torch.arange(len(own))
        other = own[torch.where((rows ^ 1) < len(own), rows ^ 1, (rows - 1).clamp(min=0))]
        draws = draws if draws is not None else [0] * len(samples)
        sides = [uniforms(1, "side", self.seed, s.id, d)[0] < 0.5 for s, d in zip(samples, draws, strict=True)]
        true = torch.tensor(sides)
        first = true.view(-1, 1, 1, 1)
        return {
            **batch,
            "pixel_values": torch.where(first, own, other),
            "other_pixel_values": torch.where(first, other, own),
            "labels": true.long(),
        }
