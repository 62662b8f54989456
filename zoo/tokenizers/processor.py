"""What prepares samples for models with an image tokenizer: images alone, or with their stored codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from zoo.data.fused import FusionProcessor
from zoo.data.images import ImageTransform
from zoo.data.sample import Sample
from zoo.data.text import TextTokenizer
from zoo.errors import DataError
from zoo.tokenizers.stored import StoredCodes

if TYPE_CHECKING:
    from PIL import Image

    from zoo.data.processor import ImageLike


class ImageProcessor:
    """Samples to ``pixel_values``; texts are not looked at."""

    def __init__(self, transform: ImageTransform, seed: int = 0) -> None:
        self.transform, self.seed = transform, seed

    def __call__(
        self,
        samples: Sequence[Sample],
        train: bool = False,
        draws: Sequence[int] | None = None,
        pixels: NDArray[np.uint8] | None = None,
    ) -> dict[str, Tensor]:
        """Return ``pixel_values`` [B, 3, S, S].

        Args:
            draws: How often each sample was drawn before; with the seed and the id it decides the augmentation.
            pixels: The images as [B, H, W, 3] bytes, in place of ``sample.image``.

        Raises:
            DataError: A sample without an image.
        """
        draws = draws if draws is not None else [0] * len(samples)
        keys = [(self.seed, s.id, d) for s, d in zip(samples, draws, strict=True)] if train else None
        if pixels is not None and self.transform.takes_arrays(pixels.shape[1], pixels.shape[2], train):
            return {"pixel_values": self.transform.from_array(pixels, keys)}
        shown: list[Image.Image] = []
        for number, sample in enumerate(samples):
            image = sample.image
            if pixels is not None:
                from PIL import Image

                image = Image.fromarray(pixels[number])
            if image is None:
                raise DataError(f"sample {sample.id!r} has no image; this model needs one")
            shown.append(image)
        return {"pixel_values": self.transform(shown, keys)}

    def encode_images(self, images: Sequence[ImageLike]) -> Tensor:
        """Return ``[B, 3, S, S]`` float32, as in evaluation."""
        return self.transform(images)


class StoredCodesProcessor(FusionProcessor):
    """As ``FusionProcessor``, with the stored codes of every image."""

    def __init__(
        self,
        transform: ImageTransform,
        tokenizer: TextTokenizer,
        context_length: int,
        codes: StoredCodes,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__(transform, tokenizer, context_length, seed=seed)
        self.codes = codes

    def __call__(
        self,
        samples: Sequence[Sample],
        train: bool = False,
        draws: Sequence[int] | None = None,
        pixels: NDArray[np.uint8] | None = None,
    ) -> dict[str, Tensor]:
        """Return what ``FusionProcessor`` does, and ``image_codes`` [B, h*w] int64."""
        batch = super().__call__(samples, train, draws, pixels)
        return {**batch, "image_codes": self.codes.lookup([s.id for s in samples])}
