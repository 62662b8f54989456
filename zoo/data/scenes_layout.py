"""What a scene is: named icons on a canvas, and what can be said of their places without doubt."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from zoo.data.sample import stable_hash

T = TypeVar("T")

UNITS = 64
"""Side of a square canvas in units; icons lie on whole units, so that 64, 128, ... pixels round nothing."""
STEP = 4
"""Sides of icons are multiples of this many units: few sizes, so that each is rendered once and kept."""
MOST = 16
"""Objects that fit on a canvas at a size at which an icon can be told."""

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "yellow": (255, 245, 157),
    "pink": (248, 187, 208),
    "blue": (179, 229, 252),
    "green": (200, 230, 201),
    "orange": (255, 204, 128),
    "purple": (209, 196, 233),
    "gray": (207, 207, 207),
}
"""Name -> RGB of the plain colour behind the icons."""

DIRECTIONS = ("left", "right", "above", "below")


@dataclass(frozen=True, slots=True)
class Placed:
    """An icon in its square: ``x``, ``y`` are the upper left corner and ``size`` the side, in units of the canvas."""

    icon: str
    name: str
    x: int
    y: int
    size: int


@dataclass(frozen=True, slots=True)
class Scene:
    """Icons on a canvas of ``width`` x ``height`` units, painted in order: later ones cover earlier ones."""

    objects: tuple[Placed, ...]
    width: int = UNITS
    height: int = UNITS
    background: str = "white"

    def kinds(self) -> dict[str, list[Placed]]:
        """Return name -> the objects of that name, in the order of their first appearance."""
        found: dict[str, list[Placed]] = {}
        for placed in self.objects:
            found.setdefault(placed.name, []).append(placed)
        return found


class Stream:
    """Random choices that depend on the key alone.

    It draws from ``random.Random.random``, whose sequence for an integer seed Python keeps between versions (that of
    ``shuffle`` and ``choice`` it does not).
    """

    def __init__(self, *key: object) -> None:
        self.uniform: Callable[[], float] = random.Random(stable_hash(*key)).random

    def below(self, count: int) -> int:
        """Return one of 0 .. count - 1."""
        return int(self.uniform() * count)

    def choice(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]

    def shuffled(self, values: Sequence[T]) -> list[T]:
        out = list(values)
        for last in range(len(out) - 1, 0, -1):
            other = self.below(last + 1)
            out[last], out[other] = out[other], out[last]
        return out


# -- what can be said without doubt --------------------------------------------------------------------------------


def beside(a: Placed, b: Placed, direction: str) -> bool | None:
    """Return whether ``a`` lies to the ``direction`` of ``b``; None where one may argue.

    True: the squares do not share a column (row), so no drawn pixel does either. False: the centre of ``a`` is not on
    that side of the centre of ``b``.
    """
    if direction == "left":
        first, second, start, other = a, b, a.x, b.x
    elif direction == "above":
        first, second, start, other = a, b, a.y, b.y
    elif direction == "right":
        first, second, start, other = b, a, b.x, a.x
    else:
        first, second, start, other = b, a, b.y, a.y
    if start + first.size <= other:
        return True
    return False if 2 * start + first.size >= 2 * other + second.size else None


def all_beside(first: Sequence[Placed], second: Sequence[Placed], direction: str) -> bool:
    """Return whether every object of ``first`` lies to the ``direction`` of every one of ``second``, without doubt."""
    return all(beside(a, b, direction) for a in first for b in second)


def opposite(direction: str) -> str:
    return {"left": "right", "right": "left", "above": "below", "below": "above"}[direction]


# -- sizes and places ----------------------------------------------------------------------------------------------


def sizes(count: int) -> tuple[int, ...]:
    """Return the sides, in units, that icons may have in a square scene of ``count`` objects."""
    largest = int(0.8 * UNITS / math.ceil(math.sqrt(count))) // STEP * STEP
    smallest = max(2 * STEP, 2 * largest // 3 // STEP * STEP)
    return tuple(range(smallest, largest + 1, STEP))


def places(stream: Stream, count: int, overlap: bool) -> list[tuple[int, int, int]]:
    """Return (x, y, size) of ``count`` squares inside the canvas.

    Squares are disjoint. With ``overlap`` two of them may run into each other by at most a quarter of the smaller side
    along one axis, so that the middle half of every square stays free of all others and no icon is hidden.
    """
    for _ in range(8):
        found: list[tuple[int, int, int]] = []
        for _ in range(40 * count):
            size = stream.choice(sizes(count))
            new = (stream.below(UNITS - size + 1), stream.below(UNITS - size + 1), size)
            if overlap and found and stream.below(2):
                new = _leaning(stream, stream.choice(found), size)
            if max(new[:2]) + size <= UNITS and min(new) >= 0 and all(_apart(new, old, overlap) for old in found):
                found.append(new)
                if len(found) == count:
                    return found
    side = math.ceil(math.sqrt(count))  # too crowded to find places by chance: one square a cell of a grid
    cell, out = UNITS // side, []
    for place in stream.shuffled(range(side * side))[:count]:
        size = stream.choice(sizes(count))
        row, column = divmod(place, side)
        out.append((column * cell + stream.below(cell - size + 1), row * cell + stream.below(cell - size + 1), size))
    return out


def _leaning(stream: Stream, old: tuple[int, int, int], size: int) -> tuple[int, int, int]:
    """Return a square that runs into ``old`` as far as it may, from a random side."""
    depth = min(size, old[2]) // 4
    along = stream.below(2)
    corner = [0, 0]
    corner[along] = old[along] + old[2] - depth if stream.below(2) else old[along] - size + depth
    corner[1 - along] = old[1 - along] + stream.below(old[2]) - size // 2
    return corner[0], corner[1], size


def _apart(a: tuple[int, int, int], b: tuple[int, int, int], overlap: bool) -> bool:
    allowed = min(a[2], b[2]) // 4 if overlap else 0
    across = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    down = min(a[1] + a[2], b[1] + b[2]) - max(a[1], b[1])
    return min(across, down) <= allowed
