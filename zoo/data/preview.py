"""A sheet of samples to look at: pictures with their captions, questions and answers, as one image."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from zoo.data.processor import images_of
from zoo.data.sample import Source, read
from zoo.errors import DataError

CELL, GAP = 224, 12
LINE, COLUMNS = 14, 37
"""Height of a line of text in pixels, and letters that fit into one at Pillow's own font of 11 points."""


def sheet(source: Source, ids: Sequence[str], columns: int = 4, lines: int = 12) -> Any:
    """Return a PIL image with a cell for each sample: its pictures above its texts.

    Args:
        lines: of text in a cell; more are cut.

    Raises:
        DataError: no ids.
    """
    from PIL import Image, ImageDraw, ImageFont

    if not ids:
        raise DataError(f"{source.name}: nothing to show; the split is empty")
    height = CELL + lines * LINE + GAP
    rows = -(-len(ids) // columns)
    page = Image.new("RGB", (columns * (CELL + GAP) + GAP, rows * height + GAP), "white")
    draw = ImageDraw.Draw(page)
    font = ImageFont.load_default(11)
    for place, sample in enumerate(read(source, ids)):
        left, top = GAP + place % columns * (CELL + GAP), GAP + place // columns * height
        images = images_of(sample)
        for n, image in enumerate(images):
            side = CELL // len(images)
            scale = side / max(image.size)
            how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS  # small ones keep their pixels
            shown = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), how)
            page.paste(shown, (left + n * side, top))
        draw.rectangle((left - 1, top - 1, left + CELL, top + CELL), outline=(200, 200, 200))
        texts = [sample.id]
        turns = sample.meta.get("turns")
        texts += [f"- {q.replace(chr(10), ' ')} {a}" for q, a in turns] if turns else []
        texts += [f"* {text}" for text in sample.texts] if not turns or sample.meta.get("questions") else []
        wrapped = [line for text in texts for line in textwrap.wrap(text, COLUMNS) or [""]]
        for n, line in enumerate(wrapped[:lines]):
            draw.text((left, top + CELL + 4 + n * LINE), line, fill=(0, 0, 0) if n else (120, 120, 120), font=font)
    return page
