"""From a picture to the square that masks are drawn in, and from logits over the square back to the picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.data.images import load_rgb

if TYPE_CHECKING:
    from PIL import Image

    ImageLike = Image.Image | Path | str

IGNORED = 255
"""Value of a mask's pixels that nobody scores (ReasonSeg)."""


@dataclass(frozen=True)
class Square:
    """SAM's preprocessing (``ResizeLongestSide``, ``Sam.preprocess``): the longer side becomes ``size``, pixels are
    normalised, then zeros are put to the right and below.

    Attributes:
        size: Side in pixels.
        mean, std: Of pixel values in [0, 1].
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width inside the square."""
        scale = self.size / max(height, width)
        return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))

    def __call__(self, images: Sequence[ImageLike]) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels [N, 3, size, size] float32; heights and widths [N, 2] inside the square, and [N, 2] of the images.

        Raises:
            DataError: A path that is no readable image.
        """
        from PIL import Image

        pixels = torch.zeros(len(images), 3, self.size, self.size)
        inside, own = torch.zeros(len(images), 2, dtype=torch.long), torch.zeros(len(images), 2, dtype=torch.long)
        mean, std = (torch.tensor(values, dtype=torch.float32).view(3, 1, 1) for values in (self.mean, self.std))
        for row, image in enumerate(images):
            picture = load_rgb(image)
            height, width = self.resized(picture.height, picture.width)
            own[row] = torch.tensor((picture.height, picture.width))
            inside[row] = torch.tensor((height, width))
            if (width, height) != picture.size:
                picture = picture.resize((width, height), Image.Resampling.BILINEAR)
            values = torch.from_numpy(np.array(picture, np.uint8)).permute(2, 0, 1).float()  # [3, h, w]
            pixels[row, :, :height, :width] = (values / 255 - mean) / std
        return pixels, inside, own


def shown_patches(pixel_values: Tensor, cells: int) -> Tensor:
    """Which of the ``cells`` x ``cells`` patches of squares [N, 3, S, S] show something: [N, cells * cells] bool.

    Padding is exactly zero, which a normalised picture is nowhere as long as no mean is a multiple of 1/255; a patch
    counts as its first pixel does (PixelLM's nearest-neighbour mask).
    """
    patch = pixel_values.shape[-1] // cells
    first = pixel_values[:, :, : cells * patch : patch, : cells * patch : patch]  # [N, 3, cells, cells]
    return (first != 0).any(1).flatten(1)


def at_original_size(
    logits: Tensor, resized: Tensor, original: Tensor, square: int, canvas: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Logits over squares, as logits over the images they were made of (``Sam.postprocess_masks``): to the square's
    pixels, cut to what shows the image, to the image's size, both times bilinear.

    Args:
        logits: [M, h, w].
        resized: [M, 2] heights and widths inside the square.
        original: [M, 2] those of the images.
        square: Side of the square in pixels.
        canvas: Height and width of what is returned: the largest image's, at least.

    Returns:
        Logits [M, H, W] float32, 0 where a smaller image has no pixels, and where it has: [M, H, W] bool.
    """
    height, width = canvas
    whole = _resize(logits.float(), (square, square))  # [M, S, S]
    if logits.is_meta or not len(logits):  # sizes cannot be seen: the whole square is one image
        return _resize(whole, canvas), torch.ones(len(logits), height, width, dtype=torch.bool, device=logits.device)
    out = whole.new_zeros(len(logits), height, width)
    shown = torch.zeros(len(logits), height, width, dtype=torch.bool, device=logits.device)
    sizes = [tuple(row) for row in torch.cat([resized, original], 1).tolist()]
    alike = {size: [row for row, other in enumerate(sizes) if other == size] for size in dict.fromkeys(sizes)}
    if list(alike) == [(*sizes[0][:2], height, width)]:  # all of one size, which fills the canvas
        inner = whole[:, : sizes[0][0], : sizes[0][1]]
        return _resize(inner, canvas), ~shown
    for (h, w, own_height, own_width), rows in alike.items():
        index = torch.tensor(rows, device=logits.device)
        drawn = _resize(whole[index][:, :h, :w], (own_height, own_width))
        out = out.index_put((index,), F.pad(drawn, (0, width - own_width, 0, height - own_height)))
        shown[index, :own_height, :own_width] = True
    return out, shown


def _resize(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """[M, h, w] -> [M, *size], bilinear."""
    if logits.shape[-2:] == size:
        return logits
    resized: Tensor = F.interpolate(logits[:, None], size, mode="bilinear", align_corners=False)
    return resized[:, 0]


def as_masks(masks: Any) -> list[Tensor]:
    """A sample's masks as [H, W] uint8 each: 1 inside, 0 outside, `IGNORED`."""
    return [torch.from_numpy(np.array(mask, np.uint8)) for mask in masks]
