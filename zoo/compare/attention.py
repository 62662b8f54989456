"""Attention layouts as pictures and words, from the text that a manifest keeps of them (``Layout.draw``)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from math import log2
from typing import TYPE_CHECKING

from zoo.compare.plotting import STAND_IN, WIDTH, draw

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEAD = re.compile(r"^(?P<tokens>\d+) tokens, (?P<pads>\d+) pads, attention: (?P<kind>\w+)\. Rows read columns:$")
SEGMENT = re.compile(r"^(?P<name>\S.*?) \((?P<count>\d+)\)\s+(?P<words>(?:all|past|-)(?:\s+(?:all|past|-))*)$")
ORDER = "order: "
STRETCH = re.compile(r"^(?P<name>.*) \((?P<count>\d+)\)$")
CELLS = re.compile(r"^(?P<head>.*?)\s*(?P<cells>[■·]+)$")
MOST = 512
"""Tokens of the longest sequence that is drawn token by token."""

Corner = tuple[float, float]
Block = tuple[float, float, float, float]
"""Left, top, width, height of what is read, in units of the picture's own grid."""


@dataclass(frozen=True)
class Drawn:
    """One layout, read back.

    Attributes:
        name: of the sequence, as the model calls it.
        tokens: its length.
        kind: ``full``, ``causal`` or ``table``.
        segments: name and number of tokens of each segment, in the order of the table.
        reads: for each segment, what its rows read of every segment: ``all``, ``past`` or ``-``.
        pieces: name and length of the stretches of the sequence in their order; empty where it was not kept.
        cells: for each token, ``■`` at those it reads; empty where the sequence is long.
    """

    name: str
    tokens: int
    kind: str
    segments: tuple[tuple[str, int], ...]
    reads: tuple[tuple[str, ...], ...]
    pieces: tuple[tuple[str, int], ...] = ()
    cells: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        """Who reads whom: ``image reads all of itself; text reads image and its own past``."""
        told = []
        for (name, _), row in zip(self.segments, self.reads, strict=True):
            own: list[str] = []
            for (other, _), word in zip(self.segments, row, strict=True):
                if word == "-" or (word == "past" and self._behind(other, name)):
                    continue
                if other == name:
                    own.append({"all": "all of itself", "past": "its own past"}[word])
                else:
                    own.append(other if word == "all" or self._behind(name, other) else f"{other} before it")
            told.append(
                f"{name} reads {', '.join(own[:-1]) + ' and ' if own[1:] else ''}{own[-1] if own else 'nothing'}"
            )
        return "; ".join(told)

    def _behind(self, one: str, other: str) -> bool:
        """Whether all of ``one`` is known to stand behind all of ``other``."""
        places = {name: [n for n, (piece, _) in enumerate(self.pieces) if piece == name] for name in (one, other)}
        return bool(places[one] and places[other]) and min(places[one]) > max(places[other])


def read_layouts(text: str) -> tuple[list[Drawn], str]:
    """Read the layouts of a manifest; what is none of them comes back as text."""
    found, rest = [], []
    blocks = text.split("\n\n")
    while blocks:
        lines = blocks.pop(0).splitlines()
        order = lines.pop()[len(ORDER) :] if lines and lines[-1].startswith(ORDER) else ""
        head = HEAD.match(lines[1]) if len(lines) > 3 else None
        rows = [SEGMENT.match(line) for line in lines[3:]] if head else []
        if head is None or not rows or not all(rows):
            rest.append("\n".join(lines))
            continue
        segments = tuple((r["name"], int(r["count"])) for r in rows if r)
        reads = tuple(tuple(r["words"].split()) for r in rows if r)
        if any(len(row) != len(segments) for row in reads):
            rest.append("\n".join(lines))
            continue
        pieces, cells = _cells(blocks[0]) if blocks else ((), ())
        if cells:
            blocks.pop(0)
        elif order:
            stretches = [STRETCH.match(text) for text in order.split(" | ")]
            pieces = tuple((m["name"], int(m["count"])) for m in stretches if m)
        found.append(Drawn(lines[0], int(head["tokens"]), head["kind"], segments, reads, pieces, cells))
    return found, "\n\n".join(block for block in rest if block.strip())


def _cells(block: str) -> tuple[tuple[tuple[str, int], ...], tuple[str, ...]]:
    """The drawing token by token, if the block is one: the stretches, and a row of cells a token."""
    rows = [CELLS.match(line) for line in block.splitlines()]
    if not rows or not all(rows) or len({len(r["cells"]) for r in rows if r} | {len(rows)}) > 1 or len(rows) > MOST:
        return (), ()
    pieces: list[tuple[str, int]] = []
    for row in rows:
        assert row is not None
        if row["head"] or not pieces:
            pieces.append((row["head"], 1))
        else:
            pieces[-1] = (pieces[-1][0], pieces[-1][1] + 1)
    return tuple(pieces), tuple(r["cells"] for r in rows if r)


def picture(layout: Drawn, title: str) -> str:
    """Draw who reads whom: rows read the filled columns.

    Token by token where the layout was kept so; else by stretches, whose sides grow with the logarithm of their length,
    and a triangle stands for "the past of it".
    """
    names = layout.pieces or tuple(segment for segment in layout.segments if segment[1])
    sides = [float(count) if layout.cells else 1 + log2(count) for _, count in names]
    side, left, top = 270.0, 112.0, 26.0
    scale = side / (sum(sides) or 1)
    height = top + side + 8

    def paint(figure: Figure) -> dict[str, str]:
        from matplotlib.patches import PathPatch
        from matplotlib.path import Path

        axes = figure.add_axes((left / WIDTH, 8 / height, side / WIDTH, side / height))
        axes.set_xlim(0, sum(sides))
        axes.set_ylim(sum(sides), 0)
        axes.set_axis_off()
        ink = STAND_IN["--s0"]  # the edge closes the seams between rectangles
        shapes = _shapes(layout.cells) if layout.cells else _by_stretches(layout, names, sides)
        outline = Path.make_compound_path(*(Path([*shape, shape[0]], closed=True) for shape in shapes))
        axes.add_patch(PathPatch(outline, facecolor=ink, edgecolor=ink, linewidth=0.5))
        ends = [sum(sides[:n]) for n in range(len(sides) + 1)]
        axes.vlines(ends, 0, ends[-1], color=STAND_IN["--soft"], lw=0.8, clip_on=False)
        axes.hlines(ends, 0, ends[-1], color=STAND_IN["--soft"], lw=0.8, clip_on=False)
        for n, (name, count) in enumerate(names):
            middle = (ends[n] + ends[n + 1]) / 2
            text = name if len(name) < 12 else name[:11] + "…"
            if sides[n] * scale >= 9:
                axes.text(-8 / scale, middle, f"{text} ({count})", ha="right", va="center", color=STAND_IN["--ink"])
            if sides[n] * scale >= 6.6 * len(text):
                axes.text(middle, -7 / scale, text, ha="center", color=STAND_IN["--soft"])
        return {}

    return draw(title, paint, height, "mask")


def _shapes(cells: Sequence[str]) -> list[list[Corner]]:
    """Rectangles that cover the filled cells: runs of a row, joined with equal runs of the rows above."""
    open_runs: dict[tuple[int, int], int] = {}
    done: list[Block] = []
    for y, row in enumerate([*cells, ""]):
        here = set()
        x = 0
        for mark, run in groupby(row):
            length = len(list(run))
            if mark == "■":
                here.add((x, length))
            x += length
        for run_, start in list(open_runs.items()):
            if run_ not in here:
                done.append((run_[0], start, run_[1], y - start))
                del open_runs[run_]
        for run_ in here:
            open_runs.setdefault(run_, y)
    return [[(x, y), (x + w, y), (x + w, y + h), (x, y + h)] for x, y, w, h in sorted(done)]


def _by_stretches(layout: Drawn, names: Sequence[tuple[str, int]], sides: Sequence[float]) -> list[list[Corner]]:
    """A rectangle where a stretch reads another, a triangle where it reads the past of itself, or of one whose place in
    the sequence is not known."""
    number = {name: n for n, (name, _) in enumerate(layout.segments)}
    shapes = []
    for row, (reader, _) in enumerate(names):
        for column, (read, _) in enumerate(names):
            if reader not in number or read not in number:  # pads
                continue
            word = layout.reads[number[reader]][number[read]]
            if word == "-" or (word == "past" and layout.pieces and column > row):
                continue
            x, y, w, h = sum(sides[:column]), sum(sides[:row]), sides[column], sides[row]
            corners = [(x, y), (x + w, y), (x + w, y + h), (x, y + h)]
            whole = word == "all" or (layout.pieces and column < row)
            shapes.append(corners if whole else [corners[0], corners[2], corners[3]])
    return shapes
