"""A comic page of a story's frames, and an animated clip of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from zoo.data.sheet import scaled
from zoo.errors import ConfigError, RunError

MARGIN, GAP, FRAME = 20, 14, 3
"""Pixels around the page, between panels, and of a panel's line."""
INK, PAPER = (24, 24, 24), (252, 250, 244)
LINES = 4
"""Lines of a caption, at most."""


def comic_page(
    pictures: Sequence[Image.Image],
    captions: Sequence[str],
    title: str = "",
    *,
    columns: int = 0,
    panel: int = 256,
) -> Image.Image:
    """Lay pictures out as a page, each in a panel with its caption below.

    Args:
        columns: Panels a row; 0 = as square as the number allows.
        panel: Width of a panel in pixels; small pictures keep their pixels visible.

    Raises:
        ConfigError: No pictures, or captions that are not one a picture.
    """
    if not pictures or len(captions) != len(pictures):
        raise ConfigError(f"a page of {len(pictures)} pictures and {len(captions)} captions: expected one each")
    columns = min(len(pictures), columns or math.ceil(math.sqrt(len(pictures))))
    size = max(12, panel // 18)
    font, head = ImageFont.load_default(size), ImageFont.load_default(2 * size)
    line = round(1.3 * size)
    panels = [scaled(picture.convert("RGB"), panel) for picture in pictures]
    texts = [wrapped(caption, font, panel) for caption in captions]
    rows = [range(start, min(start + columns, len(panels))) for start in range(0, len(panels), columns)]
    heights = [max(panels[i].height for i in row) + line * max(len(texts[i]) for i in row) + 8 for row in rows]
    top = MARGIN + (3 * size if title else 0)
    width = 2 * MARGIN + columns * panel + (columns - 1) * GAP
    page = Image.new("RGB", (width, top + sum(heights) + GAP * (len(rows) - 1) + MARGIN), PAPER)
    pen = ImageDraw.Draw(page)
    if title:
        shown = (wrapped(title, head, width - 2 * MARGIN) or [""])[0]
        pen.text((MARGIN, MARGIN - 4), shown, fill=INK, font=head)
    y = top
    for row, height in zip(rows, heights, strict=True):
        for place, i in enumerate(row):
            x = MARGIN + place * (panel + GAP)
            page.paste(panels[i], (x, y))
            box = (x - 1, y - 1, x + panels[i].width, y + panels[i].height)
            pen.rectangle(box, outline=INK, width=FRAME)
            for number, text in enumerate(texts[i]):
                pen.text((x, y + panels[i].height + 6 + number * line), text, fill=INK, font=font)
        y += height + GAP
    return page


def wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """The lines of a text in ``width`` pixels of a font; what is beyond the last line is cut and marked."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > LINES:
        lines = [*lines[: LINES - 1], f"{lines[LINES - 1]} ..."]
    return lines


def save_page(page: Image.Image, path: Path) -> None:
    """Write a page as PNG.

    Raises:
        RunError: It cannot be written.
    """
    try:
        page.save(path, "PNG")
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from None


def save_clip(frames: Sequence[Image.Image], durations: Sequence[int], path: Path, side: int = 256) -> None:
    """Write frames as an animated GIF that repeats, each shown for its duration in milliseconds.

    Raises:
        RunError: It cannot be written.
    """
    shown = [scaled(frame.convert("RGB"), side) for frame in frames]
    try:
        shown[0].save(path, "GIF", save_all=True, append_images=shown[1:], duration=list(durations), loop=0, disposal=2)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from None
