"""A sheet of drawn images as one PNG: a column a text, the real images above, and below them one row a run."""

from __future__ import annotations

import base64
import binascii
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.compare.rundir import Run, find_runs
from zoo.data.sheet import labelled_sheet
from zoo.errors import RunError

if TYPE_CHECKING:
    from PIL.Image import Image

CELL = 96
"""Pixels a side of a picture: what samples.json keeps."""


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
            raise RunError(f"{run.path} has drawn no images: evaluate it with the task text-to-image or scene-check")
    shared = [key for key in drawn[0] if all(key in own for own in drawn)][:columns]
    if not shared:
        raise RunError("no text was drawn by all of these runs; compare runs of one split")
    texts = [drawn[0][key][0] for key in shared]
    names = labels or [f"{run.name} seed {run.seed}" for run in runs]
    rows = [[drawn[0][key][1] for key in shared], *([own[key][2] for key in shared] for own in drawn)]
    page = labelled_sheet(rows, ["real", *names], texts, cell=CELL)
    target = Path(out)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(target.name + ".tmp")
        page.save(temporary, "PNG", optimize=True)
        os.replace(temporary, target)
    except OSError as error:
        raise RunError(f"cannot write {target}: {error.strerror or error}; choose another place") from error
    return target


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
