"""Where a point's name is written in a plot: beside it, where it covers least. matplotlib has no such layout."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

CHARACTER = 7.2
"""Mean advance of the label font at its size of 12 units."""
NEAR = 12.0
"""A label further from its point than this gets a line to it."""
MOST_COVERED = 30.0
"""Square units that a label may cover of what is there."""

Box = tuple[float, float, float, float]
"""Left, top, right, bottom, in units from the top left."""


class Spot(NamedTuple):
    """Where a label goes: its baseline's end at ``anchor`` (left or right), and where a line to it ends, if any."""

    x: float
    y: float
    anchor: str
    leader: tuple[float, float] | None


def placed(x: float, y: float, label: str, taken: list[Box], inside: Box) -> Spot | None:
    """Choose where the name of the point at (x, y) goes, and add its box to ``taken``.

    It covers as little of ``taken`` as can be, leaves ``inside`` as little as can be, and stays near; None where it
    would cover more than a little.
    """
    width, height = len(label) * CHARACTER, 12.0

    def box(left: float, base: float) -> Box:
        return left, base - height + 2, left + width, base + 2

    def cost(candidate: tuple[float, float, float]) -> float:
        left, base, distance = candidate
        here = box(left, base)
        return sum(_overlap(here, other) for other in taken) + 80 * _outside(here, inside) + distance

    left, base, _ = min(_candidates(x, y, width, height), key=cost)
    here = box(left, base)
    if sum(_overlap(here, other) for other in taken) > MOST_COVERED or _outside(here, inside) > 1:
        return None
    taken.append(here)
    near = (min(max(x, here[0]), here[2]), min(max(y, here[1]), here[3]))
    leader = near if math.hypot(near[0] - x, near[1] - y) > NEAR else None
    if left + width < x:  # the width is an estimate: its error goes away from the point
        return Spot(left + width, base, "right", leader)
    return Spot(left, base, "left", leader)


def _candidates(x: float, y: float, width: float, height: float) -> Iterator[tuple[float, float, float]]:
    for distance in (9.0, 20.0, 33.0, 47.0, 62.0):
        up, down = y - distance, y + distance + height - 3
        if distance == 9.0:
            yield x + 9, y + 4, distance
            yield x - 9 - width, y + 4, distance
        for base in (up, down):
            for left in (x - width / 2, x + 2, x - width - 2):
                yield left, base, distance


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _outside(box: Box, inside: Box) -> float:
    over = (inside[0] - box[0], inside[1] - box[1], box[2] - inside[2], box[3] - inside[3])
    return sum(max(0.0, each) for each in over)
