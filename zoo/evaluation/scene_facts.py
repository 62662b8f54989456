"""What the caption of a scene states, and whether objects found in a picture bear it out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from zoo.data.scenes_layout import opposite
from zoo.data.scenes_texts import WORDS

SLACK = 0.1
"""Two objects lie left of, right of, above or below each other if their centres differ along this axis by more than
this share of the sum of their extents along it (the threshold of GenEval, Ghosh et al. 2023, and its released code)."""

_ARTICLES = ("a", "an")
_PLACES = {"left of": "left", "right of": "right", "above": "above", "below": "below"}
_LINES = {"from left to right: ": "left", "from top to bottom: ": "above"}


@dataclass(frozen=True, slots=True)
class Facts:
    """What is stated.

    Attributes:
        names: the kinds of objects, in the order of their first mention.
        counts: name -> how many, for the kinds whose number is stated.
        relations: (a, direction, b): every ``a`` lies to the ``direction`` of every ``b``.
    """

    names: tuple[str, ...]
    counts: dict[str, int]
    relations: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True, slots=True)
class Found:
    """One object found in a picture: its name and the box of its pixels, left, top, right, bottom, the last two
    excluded."""

    name: str
    box: tuple[int, int, int, int]


def facts_of(caption: str, names: Sequence[str]) -> Facts:
    """Read a caption or prompt of ``zoo.data.scenes_texts``; a colour of the background is passed over.

    Args:
        names: the kinds of objects of the scene.

    Raises:
        ValueError: it is no such caption, or mentions none of them.
    """
    caption = re.sub(r", on an? [a-z]+ background$", "", caption)
    some = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    for opening, direction in _LINES.items():
        if caption.startswith(opening):
            line = caption.removeprefix(opening).split(", ")
            if set(line) <= set(names):
                steps = tuple(dict.fromkeys((a, direction, b) for a, b in pairwise(line)))
                # of "cat, dog, cat" no place of all cats follows
                once = tuple(step for step in steps if line.count(step[0]) == line.count(step[2]) == 1)
                return Facts(tuple(dict.fromkeys(line)), {n: line.count(n) for n in line}, once)
    if single := re.fullmatch(rf"the ({some}) is ({'|'.join(_PLACES)}) the ({some})", caption):
        a, place, b = single.groups()
        return Facts((a, b), {}, ((a, _PLACES[place], b),))
    numbers = "|".join(sorted((*WORDS, *_ARTICLES), key=len, reverse=True))
    mentions = list(re.finditer(rf"\b({numbers}) ({some}) icons?\b", caption))
    if not mentions:
        raise ValueError(f"{caption!r} is no caption of a scene of {', '.join(names)}")
    counts = {m[2]: 1 if m[1] in _ARTICLES else WORDS.index(m[1]) for m in mentions}
    relations: tuple[tuple[str, str, str], ...] = ()
    if len(mentions) == 2:
        between = caption[mentions[0].end() : mentions[1].start()].strip()
        if between in _PLACES:
            relations = ((mentions[0][2], _PLACES[between], mentions[1][2]),)
    return Facts(tuple(counts), counts, relations)


def holds(a: Found, direction: str, b: Found) -> bool:
    """Whether the centre of ``a`` lies to the ``direction`` of the centre of ``b``, by more than `SLACK`."""
    if direction in ("right", "below"):
        return holds(b, opposite(direction), a)
    axis = 0 if direction == "left" else 1
    extents = a.box[axis + 2] - a.box[axis] + b.box[axis + 2] - b.box[axis]
    ahead = (b.box[axis] + b.box[axis + 2] - a.box[axis] - a.box[axis + 2]) / 2
    return ahead > SLACK * extents


def check(facts: Facts, found: Sequence[Found]) -> dict[str, float]:
    """Count what of the facts holds: ``right_objects``, ``right_counts``, ``right_positions`` and ``right_scenes``.

    A kind is there if at least one object of its name is found; its count is right if as many as stated are; a relation
    holds if both kinds are there and every object of the one lies so to every one of the other. Other objects do no
    harm. A scene is right if all of it holds.
    """
    own = {name: [f for f in found if f.name == name] for name in facts.names}
    objects = sum(bool(own[name]) for name in facts.names)
    counts = sum(len(own[name]) == count for name, count in facts.counts.items())
    positions = sum(
        bool(own[a] and own[b]) and all(holds(x, d, y) for x in own[a] for y in own[b]) for a, d, b in facts.relations
    )
    whole = objects == len(facts.names) and counts == len(facts.counts) and positions == len(facts.relations)
    return {
        "right_objects": float(objects),
        "right_counts": float(counts),
        "right_positions": float(positions),
        "right_scenes": float(whole),
    }


def stated(facts: Facts) -> dict[str, float]:
    """The numbers that `check`'s are shares of."""
    return {
        "stated_objects": float(len(facts.names)),
        "stated_counts": float(len(facts.counts)),
        "stated_positions": float(len(facts.relations)),
        "stated_scenes": 1.0,
    }
