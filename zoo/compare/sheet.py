"""A sheet of drawn images as one PNG: a column a text, the real images above, and below them one row a run."""

from __future__ import annotations

import base64
import binascii
import io
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.compare.rundir import Run, find_runs
from zoo.errors import RunError

if TYPE_CHECKING:
    from PIL.Image import Image

CELL = 96
GAP = 8
LINE = 13
"""Height of a line of text in pixels."""
LABEL = 150
"""Width of the rows' labels in pixels."""


def write_sheet(paths: Sequence[Path | str], out: Path | str, labels: Sequence[str] = (), columns: int = 12) -> Path:
    """Write the sheet of the runs at or below ``paths``, from their samples.json.

    Args:
        out: the PNG.
        labels: of the rows, one a run; by default the runs' names.
        columns: texts shown, at most; those that every run has drawn, in the first run's order.

    Raises:
        RunError: a path has no run, a run has drawn nothing, no text was drawn by all, or the place cannot be written.
    """
    runs = find_runs([str(p) for p in paths])
    if labels and len(labels) != len(runs):
        raise RunError(f"{len(labels)} labels for {len(runs)} runs ({', '.join(r.name for r in runs)}); give one each")
    drawn = [_drawn(run) for run in runs]
    for run, own in zip(runs, drawn, strict=True):
        if not own:
            raise RunError(
                f"{run.path} has drawn no images: evaluate it with the task text-to-image or scene-check"
            )
    shared = [key for key in drawn[0] if all(key in own for own in drawn)][:columns]
    if not shared:
        raise RunError("no text was drawn by all of these runs; compare runs of one split")
    texts = [drawn[0][key][0] for key in shared]
    rows = [("real", [drawn[0][key][1] for key in shared])]
    names = labels or [f"{run.name} seed {run.seed}" for run in runs]
    rows += [(name, [own[key][2] for key in shared]) for name, own in zip(names, drawn, strict=True)]
    target = Path(out)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(target.name + ".tmp")
        sheet(rows, texts).save(temporary, "PNG", optimize=True)
        os.replace(temporary, target)
    except OSError as error:
        raise RunError(f"cannot write {target}: {error.strerror or error}; choose another place") from error
    return target


def sheet(rows: Sequence[tuple[str, Sequence[Image]]], texts: Sequence[str]) -> Image:
    """Lay out pictures: ``rows`` of a label and one picture a text, the texts above the columns."""
    from PIL import Image as pil
    from PIL import ImageDraw, ImageFont

    font = ImageFont.load_default(11)
    wrapped = [textwrap.wrap(text, 16)[:5] for text in texts]
    head = max([len(lines) for lines in wrapped], default=0) * LINE + 2 * GAP
    size = (LABEL + len(texts) * (CELL + GAP) + GAP, head + len(rows) * (CELL + GAP))
    canvas = pil.new("RGB", size, "white")
    pen = ImageDraw.Draw(canvas)
    for column, lines in enumerate(wrapped):
        pen.multiline_text((LABEL + column * (CELL + GAP), GAP), "\n".join(lines), "black", font, spacing=2)
    for row, (label, pictures) in enumerate(rows):
        top = head + row * (CELL + GAP)
        pen.multiline_text((GAP, top), "\n".join(textwrap.wrap(label, 22)), "black", font, spacing=2)
        for column, picture in enumerate(pictures):
            left = LABEL + column * (CELL + GAP)
            shown = picture.convert("RGB").resize((CELL, CELL), pil.Resampling.BICUBIC)
            canvas.paste(shown, (left, top))
            pen.rectangle((left - 1, top - 1, left + CELL, top + CELL), outline=(200, 200, 200))
    return canvas


def _drawn(run: Run) -> dict[str, tuple[str, Image, Image]]:
    """Item -> text, real picture and drawn picture."""
    found = {}
    for sample in run.samples:
        outputs = sample.get("outputs")
        for entry in outputs.values() if isinstance(outputs, Mapping) else ():
            real, drawn = _opened(sample.get("image")), _opened(entry.get("picture"))
            if real is not None and drawn is not None:
                found[str(sample["id"])] = (str(entry.get("text", sample.get("reference", ""))), real, drawn)
                break
    return found


def _opened(value: Any) -> Image | None:
    from PIL import Image as pil
    from PIL import UnidentifiedImageError

    if not isinstance(value, str) or not value:
        return None
    try:
        image = pil.open(io.BytesIO(base64.b64decode(value, validate=True)), formats=["PNG"])
        image.load()
    except (binascii.Error, ValueError, UnidentifiedImageError, OSError):
        return None
    return image
