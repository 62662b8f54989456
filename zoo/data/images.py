"""From pictures to normalised tensors, as the released models were fed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zoo.data.decode import decode
from zoo.errors import ConfigError, DataError, near

if TYPE_CHECKING:
    from PIL import Image

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Mode = Literal["crop", "squash", "pad"]
Interpolation = Literal["bicubic", "bilinear", "lanczos", "nearest"]
Augment = Literal["none", "random-resized-crop", "shift", "flip", "shift-flip"]


@dataclass(frozen=True, kw_only=True)
class ImageTransform:
    """Resize to ``size`` x ``size``, scale to [0, 1], normalise.

    ``mode``: "crop" resizes the short side and crops the centre (CLIP); "squash" resizes both sides (BLIP-2); "pad"
    pads to a square with ``int(255 * mean)`` first (LLaVA-1.5, ``expand2square``). ``augment`` applies in training
    only: "random-resized-crop" of ``crop_scale`` of the area (open_clip trains with 0.9 to 1), "shift" by up to
    ``shift`` of the side with the border repeated, "flip" left to right, or both. What is drawn depends on
    (seed, id, draw) alone.

    Raises:
        ConfigError: a value out of its range.
    """

    size: int
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    mode: Mode = "crop"
    interpolation: Interpolation = "bicubic"
    augment: Augment = "none"
    crop_scale: tuple[float, float] = (0.9, 1.0)
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)
    shift: float = 0.0625

    def __post_init__(self) -> None:
        for name, value, options in (
            ("mode", self.mode, get_args(Mode)),
            ("interpolation", self.interpolation, get_args(Interpolation)),
            ("augment", self.augment, get_args(Augment)),
        ):
            if value not in options:
                raise ConfigError(f"unknown image {name} {value!r}{near(str(value), options)}")
        if self.size < 1 or len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ConfigError(
                f"image size {self.size}, mean {self.mean}, std {self.std}: expected size >= 1 and 3 channels, std > 0"
            )
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1 or not 0 <= self.shift < 1:
            raise ConfigError(f"crop_scale {self.crop_scale} and shift {self.shift} must lie in 0..1")

    # -- one by one ------------------------------------------------------------------------------------------------

    def __call__(
        self,
        images: Sequence[Image.Image | Path | str],
        keys: Sequence[tuple[object, ...]] | None = None,
    ) -> Tensor:
        """Transform images; with ``keys`` (one (seed, id, draw) an image) augment them, without evaluate.

        Returns:
            ``[B, 3, size, size]`` float32, RGB.

        Raises:
            DataError: a path that is no readable image.
        """
        pictures = [load_rgb(image) for image in images]
        if keys is not None and self.augment == "random-resized-crop":
            pixels = [self._random_crop(p, uniforms(22, "crop", *k)) for p, k in zip(pictures, keys, strict=True)]
            return self.normalise(np.stack(pixels) if pixels else self._empty())
        pixels = [self._resize(picture) for picture in pictures]
        return self.from_array(np.stack(pixels) if pixels else self._empty(), keys)

    def _empty(self) -> NDArray[np.uint8]:
        return np.empty((0, self.size, self.size, 3), np.uint8)

    def _resize(self, image: Image.Image) -> NDArray[np.uint8]:
        from PIL import Image as PIL

        resample = PIL.Resampling[self.interpolation.upper()]
        if self.mode == "pad" and image.width != image.height:
            side = max(image.width, image.height)
            square = PIL.new("RGB", (side, side), tuple(int(255 * m) for m in self.mean))
            square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            image = square
        if self.mode == "squash":
            width = height = self.size
        else:  # the long side is truncated, as torchvision and transformers do
            short = min(image.width, image.height)
            width, height = (int(self.size * s / short) for s in (image.width, image.height))
        if (width, height) != image.size:
            image = image.resize((width, height), resample)
        if (width, height) != (self.size, self.size):
            left, top = round((width - self.size) / 2), round((height - self.size) / 2)  # torchvision's rounding
            image = image.crop((left, top, left + self.size, top + self.size))
        return np.asarray(image, np.uint8)  # [size, size, 3]

    def _random_crop(self, image: Image.Image, u: NDArray[np.float64]) -> NDArray[np.uint8]:
        """Crop a random box and resize it: ten tries at (area, log ratio), else the largest centred box."""
        from PIL import Image as PIL

        resample = PIL.Resampling[self.interpolation.upper()]
        low, high = (math.log(r) for r in self.crop_ratio)
        for attempt in range(10):
            area = (
                image.width
                * image.height
                * (self.crop_scale[0] + u[2 * attempt] * (self.crop_scale[1] - self.crop_scale[0]))
            )
            ratio = math.exp(low + u[2 * attempt + 1] * (high - low))
            width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < width <= image.width and 0 < height <= image.height:
                left = int(u[20] * (image.width - width + 1))
                top = int(u[21] * (image.height - height + 1))
                break
        else:
            ratio = image.width / image.height
            width = min(image.width, round(image.height * self.crop_ratio[1])) if ratio > 1 else image.width
            height = min(image.height, round(image.width / self.crop_ratio[0])) if ratio < 1 else image.height
            left, top = (image.width - width) // 2, (image.height - height) // 2
        box = (left, top, left + width, top + height)
        return np.asarray(image.resize((self.size, self.size), resample, box), np.uint8)

    # -- whole batches ---------------------------------------------------------------------------------------------

    def takes_arrays(self, height: int, width: int, train: bool) -> bool:
        """Tell whether images stored at this size need no resizing, so that ``from_array`` equals ``__call__``."""
        return height == width == self.size and not (train and self.augment == "random-resized-crop")

    def from_array(self, pixels: NDArray[np.uint8], keys: Sequence[tuple[object, ...]] | None = None) -> Tensor:
        """Normalise images that already have the model's size; with ``keys`` shift and flip them.

        Args:
            pixels: ``[B, size, size, 3]``, RGB.
            keys: one (seed, id, draw) an image, or None for evaluation.

        Returns:
            ``[B, 3, size, size]`` float32.
        """
        if keys is not None and self.augment != "none" and len(pixels):
            u = np.stack([uniforms(3, "shift", *key) for key in keys])  # [B, 3]
            if "shift" in self.augment:
                most = round(self.shift * self.size)
                offset = np.floor(u[:, :2] * (2 * most + 1)).astype(np.int64) - most  # [B, 2] in -most..most
                grid = np.arange(self.size)
                rows = np.clip(grid + offset[:, :1], 0, self.size - 1)  # [B, size]; the border is repeated
                columns = np.clip(grid + offset[:, 1:], 0, self.size - 1)
                pixels = pixels[np.arange(len(pixels))[:, None, None], rows[:, :, None], columns[:, None, :]]
            if "flip" in self.augment:
                pixels = np.where((u[:, 2] < 0.5)[:, None, None, None], pixels[:, :, ::-1], pixels)
        return self.normalise(pixels)

    def normalise(self, pixels: NDArray[np.uint8]) -> Tensor:
        """Return ``(pixels / 255 - mean) / std`` as ``[B, 3, H, W]`` float32 from ``[B, H, W, 3]`` bytes."""
        mean = torch.tensor(self.mean, dtype=torch.float32).view(3, 1, 1)
        std = torch.tensor(self.std, dtype=torch.float32).view(3, 1, 1)
        planes = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))  # moved as bytes: a quarter of the traffic
        return torch.from_numpy(planes).to(torch.float32).div_(255).sub_(mean).div_(std)  # [B, 3, H, W]


def load_rgb(image: Image.Image | Path | str) -> Image.Image:
    """Return an image as RGB, opening a path.

    Raises:
        DataError: the path is no readable image.
    """
    if isinstance(image, (str, Path)):
        path = Path(image).expanduser()
        if not path.is_file():
            raise DataError(f"there is no image {str(image)!r}")
        return decode(path, str(image), max_pixels=178_956_970)  # Pillow's own limit for refusing a file
    if not hasattr(image, "convert"):
        raise DataError(f"expected a PIL image or a path, got {type(image).__name__}")
    return image if image.mode == "RGB" else image.convert("RGB")


def uniforms(count: int, *key: object) -> NDArray[np.float64]:
    """Return ``count`` numbers in [0, 1) that depend on ``key`` alone, not on any generator's state or version."""
    text = "\0".join(map(str, key)).encode()
    raw = np.frombuffer(hashlib.shake_128(text).digest(8 * count), "<u8")
    return (raw >> np.uint64(11)).astype(np.float64) / 2**53
