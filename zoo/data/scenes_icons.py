"""Which icons scenes are made of, how often each is drawn, and which are drawn together."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate

from zoo.data.sample import stable_hash
from zoo.data.scenes_layout import Stream

_NAME = re.compile(r"[a-z]+(-[a-z]+)*( [a-z]+(-[a-z]+)*){0,2}")
# words that make a name no name of a thing, or one that clashes with what scenes ask: places, sizes and numbers
_NOT_THINGS = frozenset({
    "button", "symbol", "symbols", "sign", "arrow", "arrows", "input", "mark", "tone", "hair", "bald", "left",
    "right", "up", "down", "above", "below", "left-right", "up-down", "up-left", "up-right", "down-left",
    "down-right", "small", "medium", "large", "low", "high", "oncoming", "no", "not", "off", "one", "two", "three",
    "four", "five", "six", "seven", "eight", "nine", "ten", "double", "hundred", "thirty", "square", "circle",
    "triangle", "diamond", "loop", "dash", "clockwise", "counterclockwise", "bars", "suit", "information",
    "copyright", "registered", "plus", "minus", "multiply", "divide", "infinity", "om", "restroom", "prohibited",
    "customs", "wireless", "footprints", "foggy", "fog",
})  # fmt: skip
_SMALL_WORDS = frozenset({
    "of", "with", "and", "in", "on", "the", "a", "an", "without", "behind", "from",
})  # fmt: skip

THEME = 8
"""Neighbours in the order of code points that make one theme: Unicode puts animals beside animals, food beside food."""
TOGETHER = 0.5
"""Chance that a further kind of a scene comes from the theme of one that is there."""
POPULAR = 0.1
"""Share of the icons that count as popular: those that are drawn most often."""

# drawn in thin lines at the rim of their squares, so that another icon could hide them
_FAINT = frozenset({"paperclip", "linked paperclips", "cyclone", "musical score", "shooting star"})


def is_thing(icon: str, name: str) -> bool:
    """Return whether an icon can be named in a scene: one code point, and a plain English name of up to three words."""
    if len([code for code in icon.split("-") if code != "FE0F"]) > 1 or not _NAME.fullmatch(name) or name in _FAINT:
        return False
    words = name.split()
    return not any(word in _NOT_THINGS or word.endswith("-thirty") for word in words)


def stems(name: str) -> frozenset[str]:
    """Return the words of a name without small words and endings, by which two names can be confused."""
    words = re.split(r"[ -]", name)
    return frozenset(re.sub(r"(e|s)+$", "", w) or w for w in words if w not in _SMALL_WORDS)


def by_popularity(icons: Sequence[str]) -> list[int]:
    """Return the rows of ``icons``, those drawn most often first."""
    return sorted(range(len(icons)), key=lambda row: stable_hash("scenes-popularity", icons[row]))


def most_drawn(names: Mapping[str, str], count: int) -> list[str]:
    """Return the ``count`` icons of ``names`` (hexcode -> name) drawn most often, in their given order, each name once
    and no two that could be confused."""
    icons, found, seen = list(names), set[int](), set[str]()
    for row in by_popularity(icons):
        if len(found) < count and seen.isdisjoint(stems(names[icons[row]])):
            found.add(row)
            seen |= stems(names[icons[row]])
    return [icon for row, icon in enumerate(icons) if row in found]


class IconPool:
    """The icons that the scenes of one split draw from.

    The icon of popularity rank r is drawn with a weight of 1 / sqrt(r); ranks follow from a hash of the icon. A further
    kind comes from the theme of one that is there with probability `TOGETHER`. So frequency and co-occurrence, by which
    POPE (Li et al. 2023, section 5.1) picks what to ask for in vain, are known by construction and need no counting.

    Args:
        icons: hexcodes in the order of their code points.
        names: hexcode -> name.
    """

    def __init__(self, icons: Sequence[str], names: Mapping[str, str]) -> None:
        self.icons = tuple(icons)
        self.names = tuple(names[icon] for icon in icons)
        self.stems = tuple(stems(name) for name in self.names)
        self._row = {name: row for row, name in enumerate(self.names)}
        ranked = by_popularity(self.icons)
        weights = [0.0] * len(icons)
        for rank, row in enumerate(ranked, 1):
            weights[row] = rank**-0.5
        self.popular = tuple(ranked[: max(1, round(POPULAR * len(icons)))])
        self._weights = weights
        self._everything = range(len(icons))
        self._totals: dict[range, list[float]] = {}

    def theme(self, row: int) -> range:
        """Return the rows that share the theme of ``row``."""
        start = row // THEME * THEME
        return range(start, min(start + THEME, len(self.icons)))

    def confusable(self, row: int, others: Sequence[int]) -> bool:
        """Return whether the name of ``row`` shares a word with one of ``others``: "cat" and "weary cat"."""
        return any(not self.stems[row].isdisjoint(self.stems[other]) for other in others)

    def rows(self, names: Sequence[str]) -> list[int]:
        return [self._row[name] for name in names]

    def _weighted(self, stream: Stream, among: range) -> int:
        totals = self._totals.get(among)
        if totals is None:
            totals = self._totals[among] = list(accumulate(self._weights[row] for row in among))
        return among[min(bisect_right(totals, stream.uniform() * totals[-1]), len(among) - 1)]

    def kinds(self, stream: Stream, count: int) -> list[int]:
        """Return rows of up to ``count`` icons whose names cannot be confused; fewer where the pool has no more."""
        found: list[int] = []
        for _ in range(20 * count):
            if len(found) == count:
                break
            related = bool(found) and stream.uniform() < TOGETHER
            among = self.theme(stream.choice(found)) if related else self._everything
            row = self._weighted(stream, among)
            if not self.confusable(row, found):
                found.append(row)
        return found

    def absent(self, stream: Stream, present: Sequence[int], strategy: str) -> int | None:
        """Return an icon that is not in the scene and cannot be confused with one that is; None if none is found.

        ``strategy``: ``random`` draws as scenes do, ``popular`` among the icons drawn most often, ``adversarial`` among
        those most often drawn together with one that is there.
        """
        for _ in range(40):
            if strategy == "adversarial":
                row = self._weighted(stream, self.theme(stream.choice(present)))
            elif strategy == "popular":
                row = stream.choice(self.popular)
            else:
                row = self._weighted(stream, self._everything)
            if not self.confusable(row, present):
                return row
        return None
