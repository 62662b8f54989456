"""A labelled sheet of pictures as one image: a row a prompt, a column a model, a seed or a number of steps."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from zoo.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image
    from torch import Tensor

    Picture: TypeAlias = Image.Image | Tensor | Path | str | None

GAP, MARGIN = 8, 12
FONT = 11
LINE = 14
"""Height of a line of text in pixels, at Pillow's own font of `FONT` points."""
LETTER = 6.1
"""Pixels that a letter of that font takes, on average."""
LINES = 6
"""Lines of one label, at most."""
GRAY, BLACK, FRAME = (120, 120, 120), (0, 0, 0), (200, 200, 200)


def to_picture(picture: Any) -> Image.Image:
    """Return an RGB image of a PIL image, a path, or a float tensor ``[3, H, W]`` in [0, 1].

    Raises:
        DataError: a path that is no readable image.
        ConfigError: a tensor of another shape.
    """
    from pathlib import Path

    from PIL import Image

    if isinstance(picture, (str, Path, Image.Image)):
        from zoo.data.images import load_rgb

        return load_rgb(picture)
    if picture.ndim != 3 or picture.shape[0] != 3:
        raise ConfigError(f"expected an image tensor [3, H, W], not {list(picture.shape)}")
    pixels = picture.detach().float().clamp(0, 1).mul(255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())  # [H, W, 3]


def scaled(picture: Image.Image, side: int) -> Image.Image:
    """Return the picture with ``side`` as its longer side; small ones keep their pixels visible."""
    from PIL import Image

    scale = side / max(picture.size)
    how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    return picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), how)


def wrapped(text: str, width: int, lines: int = LINES) -> list[str]:
    """Return the lines of a text in ``width`` pixels; what is beyond ``lines`` is cut and marked."""
    found = textwrap.wrap(text, max(4, int(width / LETTER)))
    return found if len(found) <= lines else [*found[: lines - 1], f"{found[lines - 1]} ..."]


def labelled_sheet(
    pictures: Sequence[Sequence[Picture]],
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    notes: Sequence[Sequence[str]] = (),
    cell: int = 128,
    left: int = 140,
) -> Image.Image:
    """Return one picture of many.

    Args:
        pictures: for each row its pictures: PIL images, paths, or float tensors [3, H, W] in [0, 1]; None leaves a
            place empty.
        rows: a label left of each row, e.g. the prompt.
        columns: a label above each column, e.g. the model.
        notes: for each row a text below each of its pictures.
        cell: side of a picture in pixels; others are scaled, small ones without smoothing.
        left: width of the row labels.

    Raises:
        ConfigError: no pictures, or labels that are not one a row or column.
    """
    from PIL import Image, ImageDraw, ImageFont

    width = max((len(row) for row in pictures), default=0)
    if not width:
        raise ConfigError("a sheet needs at least one picture")
    labelled: tuple[tuple[str, Sequence[Any], int], ...] = (
        ("row", rows, len(pictures)),
        ("column", columns, width),
        ("note", notes, len(pictures)),
    )
    for what, labels, count in labelled:
        if labels and len(labels) != count:
            raise ConfigError(f"the sheet needs {count} {what} labels, not {len(labels)}")
    font = ImageFont.load_default(FONT)
    heads = [wrapped(text, cell) for text in columns]
    top = MARGIN + (max(map(len, heads)) * LINE + 4 if heads else 0)
    start = MARGIN + (left + GAP if rows else 0)
    sides = [wrapped(text, left, max(1, cell // LINE)) for text in rows]
    below = [[wrapped(text, cell) for text in row] for row in notes]
    room = [max((len(lines) for lines in row), default=0) * LINE for row in below] or [0] * len(pictures)
    heights = [cell + space + GAP + (4 if space else 0) for space in room]
    size = (start + width * (cell + GAP) - GAP + MARGIN, top + sum(heights) - GAP + MARGIN)
    page = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(page)

    def write(x: int, y: int, lines: Sequence[str], colour: tuple[int, int, int]) -> None:
        for number, line in enumerate(lines):
            pen.text((x, y + number * LINE), line, fill=colour, font=font)

    for place, lines in enumerate(heads):
        write(start + place * (cell + GAP), MARGIN, lines, GRAY)
    y = top
    for number, row in enumerate(pictures):
        if sides:
            write(MARGIN, y, sides[number], BLACK)
        for place, picture in enumerate(row):
            x = start + place * (cell + GAP)
            if picture is not None:
                page.paste(scaled(to_picture(picture), cell), (x, y))
                pen.rectangle((x - 1, y - 1, x + cell, y + cell), outline=FRAME)
            if below and place < len(below[number]):
                write(x, y + cell + 4, below[number][place], BLACK)
        y += heights[number]
    return page
