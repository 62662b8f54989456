"""Masks over a picture, each in a colour of its own, and an answer whose references have these colours."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

    from zoo.capabilities import MaskedText

COLOURS = (
    (0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167),
    (213, 94, 0), (86, 180, 233), (240, 228, 66), (0, 0, 0),
)  # fmt: skip
"""Okabe and Ito's palette, told apart by colour-blind readers; more masks begin again."""

STRENGTH = 0.55
"""Share of a mask's colour inside it."""


def overlay(image: Image, masks: Any) -> Image:
    """The picture in paler colours with masks [K, H, W] bool over it, later ones above, each with an edge one pixel
    wide in its full colour.

    Raises:
        ValueError: masks of another size than the picture.
    """
    from PIL import Image as pil

    pixels = np.asarray(image.convert("RGB")).astype(np.float32)
    found = np.asarray(masks, np.bool_)
    if found.ndim != 3 or found.shape[1:] != pixels.shape[:2]:
        raise ValueError(f"masks of shape {found.shape} for a picture of {pixels.shape[:2]} (height, width)")
    out = 0.6 * pixels + 0.4 * 255 if len(found) else pixels.copy()
    for number, mask in enumerate(found):
        colour = np.array(COLOURS[number % len(COLOURS)], np.float32)
        out[mask] = (1 - STRENGTH) * pixels[mask] + STRENGTH * colour
        padded = np.pad(mask, 1)
        inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
        out[mask & ~inner] = colour
    return pil.fromarray(np.clip(out + 0.5, 0, 255).astype(np.uint8))


def coloured(answer: MaskedText, colour: bool = True) -> str:
    """The answer for a terminal: every reference ``[k]`` on the colour of its mask; plain without ``colour``."""
    if not colour:
        return answer.text

    def painted(found: re.Match[str]) -> str:
        number = int(found[1])
        if not 1 <= number <= len(answer.masks):
            return found[0]
        red, green, blue = COLOURS[(number - 1) % len(COLOURS)]
        light = 299 * red + 587 * green + 114 * blue > 128_000
        return f"\x1b[1;{30 if light else 97};48;2;{red};{green};{blue}m{found[0]}\x1b[0m"

    return re.sub(r"\[(\d+)\]", painted, answer.text)
