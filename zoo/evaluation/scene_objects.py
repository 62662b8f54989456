"""Where the objects of a picture of a scene may be: plain steps on pixels, from the picture to a tree of groups.

Lengths are for a picture of 64 pixels a side; they grow with it. What the groups show, `zoo.evaluation.scene_gallery`
tells.

1. The background is the median colour of the outermost ring; what differs from it by more than `OFF` of 255 in any
   channel is foreground.
2. Foreground that touches is a piece. Icons may consist of several pieces, so pieces are joined in steps: first what
   touches, then what is up to 2, 4, 6 and 8 pixels apart. That is a tree of groups.
3. Groups of less than `SPECK` of the picture are specks and count as nothing (an area opening, Vincent 1993: an opening
   with a disc would also remove the thin outlines of white icons).
4. A group is cut out: its foreground on white, in the middle of a square of which its longer side takes `FILL`.
5. Every group is given its likeness to its nearest icon. Of the tree the cut is taken whose groups, weighted by their
   pixels, are most like their icons; a group is only divided where its parts are more like icons by `MARGIN`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

OFF = 40
SPECK = 0.004
FILL = 0.75
MARGIN = 0.03
RADII = (0.0, 1.0, 2.0, 3.0, 4.0)
"""By how many 64ths of the side foreground grows before what touches is joined, step by step."""
CUT = 64
"""Pixels a side of what is cut out."""
MOST_GROUPS = 48
"""Groups of one picture that are looked at, the largest first; only noise has more."""


@dataclass(slots=True, eq=False)
class Group:
    """A node of the tree: its foreground [H, W] bool, the box around it, and the groups it is joined from."""

    mask: NDArray[np.bool_]
    box: tuple[int, int, int, int]
    area: int
    parts: tuple[Group, ...] = ()


def pixels_of(image: Image) -> NDArray[np.uint8]:
    """[H, W, 3] RGB."""
    return np.asarray(image.convert("RGB"))


def foreground(pixels: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """[H, W] bool: what is not background (step 1)."""
    ring = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])  # [2 (H + W), 3]
    background = np.median(ring, axis=0)  # [3]
    found: NDArray[np.bool_] = (np.abs(pixels - background) > OFF).any(-1)
    return found


def components(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Number what touches, corners included: [H, W] bool -> [H, W] int64, 1, 2, ... and 0 where the mask is not.

    Runs of a row that touch runs of the row above belong together; who belongs together is kept as a forest.
    """
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)  # [H, W + 1]
    rows, starts = np.nonzero(edges == 1)
    ends = np.nonzero(edges == -1)[1]  # excluded; in the same order as the starts
    of_row = np.searchsorted(rows, np.arange(len(mask) + 1)).tolist()
    first, last = starts.tolist(), ends.tolist()
    above = list(range(len(first)))

    def root(run: int) -> int:
        while above[run] != run:
            above[run] = above[above[run]]
            run = above[run]
        return run

    for row in range(1, len(mask)):
        other, other_end = of_row[row - 1], of_row[row]
        for run in range(of_row[row], of_row[row + 1]):
            while other < other_end and last[other] < first[run]:
                other += 1
            meets = other
            while meets < other_end and first[meets] <= last[run]:
                above[root(run)] = root(meets)
                meets += 1
    number: dict[int, int] = {}
    out = np.zeros(mask.shape, np.int64)
    for run, (row, start, end) in enumerate(zip(rows.tolist(), first, last, strict=True)):
        out[row, start:end] = number.setdefault(root(run), len(number) + 1)
    return out


def framed(mask: NDArray[np.bool_], parts: tuple[Group, ...] = ()) -> Group:
    """The group of this foreground, which is not empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    return Group(mask, box, int(mask.sum()), parts)


def grown(mask: NDArray[np.bool_], radius: int) -> NDArray[np.bool_]:
    """The mask and what is up to ``radius`` pixels from it, in a square."""
    for axis in (0, 1):
        wide = mask.copy()
        for step in range(1, min(radius, mask.shape[axis] - 1) + 1):
            ahead = [slice(None), slice(None)]
            behind = [slice(None), slice(None)]
            ahead[axis], behind[axis] = slice(step, None), slice(None, -step)
            wide[tuple(ahead)] |= mask[tuple(behind)]
            wide[tuple(behind)] |= mask[tuple(ahead)]
        mask = wide
    return mask


def groups_of(mask: NDArray[np.bool_]) -> list[Group]:
    """The tree's roots (steps 2 and 3, without specks): groups that nothing joins any more."""
    if not mask.any():
        return []
    side = max(mask.shape)
    least = max(1, round(SPECK * mask.size))
    below: list[Group] = []
    for radius in dict.fromkeys(round(r * side / 64) for r in RADII):
        level = components(grown(mask, radius)) * mask
        here = []
        for number in np.unique(level[level > 0]):
            own = level == number
            area = int(own.sum())
            if area < least:
                continue
            parts = tuple(group for group in below if bool((own & group.mask).any()))
            if len(parts) == 1 and parts[0].area == area:
                here.append(parts[0])  # nothing was joined
                continue
            here.append(framed(own, parts))
        below = here
    return below


def descendants(roots: Sequence[Group]) -> list[Group]:
    """All groups of the trees, the largest first, at most `MOST_GROUPS`."""
    found, waiting = [], list(roots)
    while waiting:
        group = waiting.pop()
        found.append(group)
        waiting += group.parts
    return sorted(found, key=lambda group: -group.area)[:MOST_GROUPS]


def cut_out(pixels: NDArray[np.uint8], group: Group) -> Image:
    """The group alone on white, `CUT` pixels a side (step 4)."""
    from PIL import Image as pil

    left, top, right, bottom = group.box
    own = np.where(group.mask[..., None], pixels, 255)[top:bottom, left:right].astype(np.uint8)  # [h, w, 3]
    side = max(1, round(max(own.shape[:2]) / FILL))
    canvas = pil.new("RGB", (side, side), "white")
    canvas.paste(pil.fromarray(own), ((side - own.shape[1]) // 2, (side - own.shape[0]) // 2))
    return canvas.resize((CUT, CUT), pil.Resampling.BICUBIC)


def softened(image: Image, side: int) -> Image:
    """The picture as if it had ``side`` pixels, at its own size."""
    from PIL import Image as pil

    small = image.resize((side, side), pil.Resampling.BOX)
    return small.resize(image.size, pil.Resampling.BICUBIC)


def best_cut(group: Group, likeness: Mapping[int, float]) -> tuple[float, list[Group]]:
    """The value and the groups of the best cut of one tree (step 5): the value of a group is its likeness times its
    pixels, that of a cut the sum of its groups'.

    Args:
        likeness: by ``id`` of the group; nought where it was not looked at.
    """
    own = max(0.0, likeness.get(id(group), 0.0)) * group.area
    below = [best_cut(part, likeness) for part in group.parts]
    divided = sum(value for value, _ in below)
    if below and divided > own * (1 + MARGIN):
        return divided, [g for _, chosen in below for g in chosen]
    return own, [group]
