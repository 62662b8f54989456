"""A sheet of samples to look at: pictures with their captions, questions and answers, as one image."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from zoo.data.processor import images_of
from zoo.data.sample import Sample, Source, parts_of, read
from zoo.errors import DataError

CELL, GAP = 224, 12
LINE, COLUMNS = 14, 37
"""Height of a line of text in pixels, and letters that fit into one at Pillow's own font of 11 points."""


def sheet(source: Source, ids: Sequence[str], columns: int = 4, lines: int = 12) -> Any:
    """Return a PIL image with a cell for each sample: its pictures above its texts.

    Where samples are several pictures and texts in one order (``meta["parts"]``) each is a row of pictures, with the
    text before a picture below it.

    Args:
        columns: of cells; rows of ordered pictures are as wide as they need.
        lines: of text in a cell; more are cut.

    Raises:
        DataError: no ids.
    """
    from PIL import Image, ImageDraw, ImageFont

    if not ids:
        raise DataError(f"{source.name}: nothing to show; the split is empty")
    samples = list(read(source, ids))
    if any("parts" in sample.meta and len(images_of(sample)) > 1 for sample in samples):
        return _strips(samples)
    height = CELL + lines * LINE + GAP
    rows = -(-len(ids) // columns)
    page = Image.new("RGB", (columns * (CELL + GAP) + GAP, rows * height + GAP), "white")
    draw = ImageDraw.Draw(page)
    font = ImageFont.load_default(11)
    for place, sample in enumerate(samples):
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


def _strips(samples: Sequence[Sample]) -> Any:
    """Return a sheet with a row for each sample: its pictures, each above the text that stands before it."""
    from zoo.data.sheet import labelled_sheet

    pictures, notes = [], []
    for sample in samples:
        images = images_of(sample)
        texts = [""] * max(1, len(images))
        place = 0
        for part in parts_of(sample):
            if isinstance(part, int):
                place = part + 1
            else:  # what follows the last picture is below it too
                here = min(place, len(texts) - 1)
                texts[here] = f"{texts[here]} {part}".strip()
        pictures.append(images or [None])
        notes.append(texts)
    return labelled_sheet(pictures, [sample.id for sample in samples], notes=notes, cell=CELL * 3 // 4, left=84)
