"""Masks as COCO's annotations store them: polygons, and runs of equal pixels (RLE) in two writings.

Read with numpy alone: pycocotools is a compiled package, and of it two short functions would be used. The masks are
the same to the pixel (tests/goldens/data/coco_masks.json holds those of pycocotools).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

FINE = 5
"""COCO's masks follow a polygon on a grid this much finer than the pixels."""


def mask_of(segmentation: Any, height: int, width: int) -> NDArray[np.bool_]:
    """Return the mask ``[height, width]`` of a COCO annotation's ``segmentation``.

    Args:
        segmentation: a list of polygons ``[x1, y1, x2, y2, ...]`` in pixels, of which the mask is the union; one such
            polygon; or ``{"size": [height, width], "counts": ...}`` with the counts as a list or as COCO's text.

    Raises:
        ValueError: anything else, or runs of an image of another size.
    """
    if isinstance(segmentation, Mapping):
        size, counts = segmentation.get("size"), segmentation.get("counts")
        if list(size or ()) != [height, width]:
            raise ValueError(f"runs of an image of size {size}, and the image's is {[height, width]}")
        if isinstance(counts, bytes):
            counts = counts.decode("ascii")
        return of_runs(read_counts(counts) if isinstance(counts, str) else list(counts or ()), height, width)
    if not isinstance(segmentation, Sequence) or isinstance(segmentation, str) or not len(segmentation):
        raise ValueError(f"a segmentation is polygons or runs, not {str(segmentation)[:60]!r}")
    polygons = segmentation if isinstance(segmentation[0], Sequence) else [segmentation]
    mask = np.zeros((height, width), bool)
    for polygon in polygons:
        mask |= of_polygon(polygon, height, width)
    return mask


def of_runs(counts: Sequence[int], height: int, width: int) -> NDArray[np.bool_]:
    """Return the mask of run lengths, down the columns from the upper left pixel, the first run outside.

    Raises:
        ValueError: the runs do not fill the image.
    """
    lengths = np.asarray(counts, np.int64)
    if lengths.ndim != 1 or (lengths < 0).any() or lengths.sum() != height * width:
        raise ValueError(f"the runs do not fill an image of {width}x{height} pixels")
    inside = np.arange(len(lengths)) % 2 == 1
    return np.repeat(inside, lengths).reshape(width, height).T


def read_counts(text: str) -> list[int]:
    """Return the run lengths of COCO's text: five bits a sign from 48 on, lowest first, the sixth says that more
    follow; numbers are signed, and from the fourth on the difference from the last but one.

    Raises:
        ValueError: a sign outside of that, or a text that ends within a number.
    """
    counts: list[int] = []
    value = shift = 0
    for sign in text:
        code = ord(sign) - 48
        if not 0 <= code < 64:
            raise ValueError(f"{sign!r} is no sign of run lengths")
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    if shift:
        raise ValueError("the run lengths end within a number")
    return counts


def of_polygon(polygon: Sequence[float], height: int, width: int) -> NDArray[np.bool_]:
    """Return the mask of one polygon by COCO's rule (``rleFrPoly`` of its released mask API).

    The corners are rounded to a grid of fifths of pixels, and each edge is walked on it in steps of one along its
    longer axis. Wherever the walk changes column at the middle of a pixel, everything below it in that column changes
    between inside and outside.

    Raises:
        ValueError: fewer than three corners, or an odd number of coordinates.
    """
    points = np.asarray(polygon, np.float64)
    if points.ndim != 1 or len(points) < 6 or len(points) % 2 or not np.isfinite(points).all():
        raise ValueError(f"a polygon has at least three corners x, y: {str(list(polygon))[:60]}")
    corners = np.trunc(points.reshape(-1, 2) * FINE + 0.5).astype(np.int64)
    path = np.concatenate([_walk(a, b) for a, b in zip(corners, np.roll(corners, -1, 0), strict=True)])  # [M, 2]
    x, y = path[:, 0], path[:, 1]
    change = np.flatnonzero(x[1:] != x[:-1]) + 1
    before, after = x[change - 1], x[change]
    column = (np.where(after < before, after, after - 1) + 0.5) / FINE - 0.5
    row = (np.minimum(y[change - 1], y[change]) + 0.5) / FINE - 0.5
    kept = (np.floor(column) == column) & (column >= 0) & (column <= width - 1)
    rows = np.ceil(np.clip(row[kept], 0, height)).astype(np.int64)
    crossed = np.bincount(column[kept].astype(np.int64) * height + rows, minlength=height * width)[: height * width]
    mask: NDArray[np.bool_] = np.cumsum(crossed) % 2 == 1
    return mask.reshape(width, height).T


def _walk(start: NDArray[np.int64], end: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the points ``[n, 2]`` from a corner to the next, both included."""
    (dx, dy) = np.abs(end - start)
    long, other = (0, 1) if dx >= dy else (1, 0)
    flipped = start[long] > end[long]  # always walked upwards, so that an edge is the same from both its sides
    low, high = (end, start) if flipped else (start, end)
    steps = np.arange(high[long] - low[long] + 1)
    slope = (high[other] - low[other]) / max(high[long] - low[long], 1)
    out = np.empty((len(steps), 2), np.int64)
    out[:, long] = low[long] + steps
    out[:, other] = np.trunc(low[other] + slope * steps + 0.5)
    return out[::-1] if flipped else out
