"""Changes of a scene, each of which one short instruction names without doubt, and whose result follows exactly.

Where something comes to lie follows from the scene and the instruction: beside an object means level with its middle
(moved in where the canvas ends) at a distance of `GAP`; at an edge or in a corner means touching it; larger is half as
large again and smaller two thirds, both about the middle. Squares stay apart, so that a change hides nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from zoo.data.scenes_icons import IconPool
from zoo.data.scenes_layout import BACKGROUNDS, DIRECTIONS, STEP, UNITS, Placed, Scene, Stream, beside
from zoo.data.scenes_texts import an
from zoo.errors import ConfigError, near

KINDS = ("add", "remove", "replace", "move", "resize", "background")
GAP = 2
"""Units between an object and one that is put beside it."""
FAR = 8
"""Units by which an object that is moved must move at least, so that the move can be seen."""
CORNERS = ("upper left", "upper right", "lower left", "lower right")
EDGES = {"left": "left", "right": "right", "above": "top", "below": "bottom"}
"""Direction -> the edge of the picture that lies there."""
LARGEST = 48
"""Units that a side may have at most: that of an icon alone in a scene."""
OF = {"left": "left of", "right": "right of", "above": "above", "below": "below"}


@dataclass(frozen=True, slots=True)
class Edit:
    """A change of one scene.

    ``targets`` are the places in ``Scene.objects`` of what is changed, ``placed`` what stands there afterwards (or what
    is added). ``name`` is the name of what is changed or added, ``new`` the name of what it becomes (replace).
    ``where`` is a direction, edge (``at left``), corner (``upper left``), ``larger``, ``smaller`` or a colour;
    ``anchor`` the name of the object it is seen from.
    """

    kind: str
    targets: tuple[int, ...] = ()
    placed: tuple[Placed, ...] = ()
    name: str = ""
    new: str = ""
    where: str = ""
    anchor: str = ""


def apply(edit: Edit, scene: Scene) -> Scene:
    """Return the scene after the change; everything the change does not name stays as it is."""
    if edit.kind == "background":
        return replace(scene, background=edit.where)
    if edit.kind == "add":
        return replace(scene, objects=(*scene.objects, *edit.placed))
    if edit.kind == "remove":
        return replace(scene, objects=tuple(o for n, o in enumerate(scene.objects) if n not in edit.targets))
    objects = list(scene.objects)
    for place, placed in zip(edit.targets, edit.placed, strict=True):
        objects[place] = placed
    return replace(scene, objects=tuple(objects))


def parse_edits(text: str) -> tuple[str, ...]:
    """Return the kinds that ``all`` or names joined by ``+`` stand for, in the order of `KINDS`.

    Raises:
        ConfigError: an unknown kind.
    """
    if text == "all":
        return KINDS
    named = [part.strip() for part in text.replace("+", ",").split(",")]
    for name in named:
        if name not in KINDS:
            raise ConfigError(
                f"edits = {text!r}: unknown kind {name!r}{near(name, (*KINDS, 'all'))}; expected all, or some of"
                f" {', '.join(KINDS)} joined by +"
            )
    return tuple(kind for kind in KINDS if kind in named)


# -- drawing a change ----------------------------------------------------------------------------------------------


VARIANTS = {"add": ("beside", "corner"), "move": ("beside", "edge"), "resize": ("larger", "smaller")}
"""Kind -> what sets two forms of it apart."""


def draw(
    kind: str,
    scene: Scene,
    pool: IconPool,
    stream: Stream,
    on: Collection[str] | None = None,
    variant: str | None = None,
) -> Edit | None:
    """Return a change of this kind, or None where the scene allows none.

    Args:
        on: names of what may be changed, or beside which something may be added; by default all.
        variant: one of `VARIANTS`; by default either, a random one first.
    """
    if kind == "background":
        return Edit(kind, where=stream.choice([c for c in BACKGROUNDS if c != scene.background]))
    if kind == "remove":
        return _remove(scene, stream, on)
    if kind == "replace":
        return _replace(scene, pool, stream, on)
    wanted = (variant,) if variant is not None else stream.shuffled(VARIANTS[kind])
    for each in wanted:
        made = (
            _add(scene, pool, stream, on, each)
            if kind == "add"
            else _move(scene, stream, on, each)
            if kind == "move"
            else _resize(scene, stream, on, each)
        )
        if made is not None:
            return made
    return None


def _single(scene: Scene, stream: Stream, on: Collection[str] | None) -> list[int]:
    """Return the places of objects that are the only ones of their name, in a random order."""
    kinds = scene.kinds()
    return stream.shuffled([
        place
        for place, placed in enumerate(scene.objects)
        if len(kinds[placed.name]) == 1 and (on is None or placed.name in on)
    ])  # fmt: skip


def _absent(scene: Scene, pool: IconPool, stream: Stream) -> int | None:
    return pool.absent(stream, pool.rows(list(scene.kinds())), "random")


def _add(scene: Scene, pool: IconPool, stream: Stream, on: Collection[str] | None, variant: str) -> Edit | None:
    row = _absent(scene, pool, stream)
    if row is None:
        return None
    options: list[tuple[Placed | None, str]] = [(None, corner) for corner in CORNERS]
    if variant == "beside":
        options = [(scene.objects[place], side) for place in _single(scene, stream, on) for side in DIRECTIONS]
    largest = max(placed.size for placed in scene.objects)
    for anchor, where in stream.shuffled(options):
        size = anchor.size if anchor else largest
        x, y = next_to(anchor, size, where) if anchor else in_corner(size, where)
        placed = Placed(pool.icons[row], pool.names[row], x, y, size)
        if fits(scene, placed):
            return Edit("add", (), (placed,), placed.name, where=where, anchor=anchor.name if anchor else "")
    return None


def _remove(scene: Scene, stream: Stream, on: Collection[str] | None) -> Edit | None:
    kinds = scene.kinds()
    names = [name for name in kinds if on is None or name in on]
    if len(kinds) < 2 or not names:  # something must be left
        return None
    name = stream.choice(names)
    return Edit("remove", tuple(n for n, placed in enumerate(scene.objects) if placed.name == name), (), name)


def _replace(scene: Scene, pool: IconPool, stream: Stream, on: Collection[str] | None) -> Edit | None:
    row, places = _absent(scene, pool, stream), _single(scene, stream, on)
    if row is None or not places:
        return None
    old = scene.objects[places[0]]
    placed = replace(old, icon=pool.icons[row], name=pool.names[row])
    return Edit("replace", (places[0],), (placed,), old.name, placed.name)


def _move(scene: Scene, stream: Stream, on: Collection[str] | None, variant: str) -> Edit | None:
    for place in _single(scene, stream, on):
        old = scene.objects[place]
        options: list[tuple[Placed | None, str]] = [(None, side) for side in DIRECTIONS]
        if variant == "beside":
            anchors = [scene.objects[n] for n in _single(scene, stream, None) if n != place]
            options = [(a, side) for a in anchors for side in DIRECTIONS if not beside(old, a, side)]
        for anchor, side in stream.shuffled(options):
            x, y = next_to(anchor, old.size, side) if anchor else at(old, side)
            new = replace(old, x=x, y=y)
            if max(abs(x - old.x), abs(y - old.y)) >= FAR and fits(scene, new, place):
                where = side if anchor else f"at {side}"
                return Edit("move", (place,), (new,), old.name, where=where, anchor=anchor.name if anchor else "")
    return None


def _resize(scene: Scene, stream: Stream, on: Collection[str] | None, variant: str) -> Edit | None:
    for place in _single(scene, stream, on):
        new = resized(scene.objects[place], variant)
        if new is not None and fits(scene, new, place):
            return Edit("resize", (place,), (new,), new.name, where=variant)
    return None


# -- places --------------------------------------------------------------------------------------------------------


def fits(scene: Scene, placed: Placed, ignored: int | None = None) -> bool:
    """Return whether a square lies inside the canvas and apart from all objects but the one at place ``ignored``."""
    right, bottom = placed.x + placed.size, placed.y + placed.size
    if min(placed.x, placed.y) < 0 or right > scene.width or bottom > scene.height:
        return False
    return all(
        right <= o.x or o.x + o.size <= placed.x or bottom <= o.y or o.y + o.size <= placed.y
        for place, o in enumerate(scene.objects)
        if place != ignored
    )


def next_to(anchor: Placed, size: int, direction: str) -> tuple[int, int]:
    """Return the corner of a square ``GAP`` away from an object and level with its middle, or as near as fits in."""
    middle = (anchor.size - size) // 2
    if direction in ("left", "right"):
        x = anchor.x - GAP - size if direction == "left" else anchor.x + anchor.size + GAP
        return x, min(max(anchor.y + middle, 0), UNITS - size)
    y = anchor.y - GAP - size if direction == "above" else anchor.y + anchor.size + GAP
    return min(max(anchor.x + middle, 0), UNITS - size), y


def at(placed: Placed, direction: str) -> tuple[int, int]:
    """Return the corner of an object moved straight to the edge of the canvas in a direction."""
    last = UNITS - placed.size
    return {"left": (0, placed.y), "right": (last, placed.y), "above": (placed.x, 0), "below": (placed.x, last)}[
        direction
    ]


def in_corner(size: int, corner: str) -> tuple[int, int]:
    """Return the upper left corner of a square in a corner of the canvas."""
    upper, left = corner.startswith("upper"), corner.endswith("left")
    return 0 if left else UNITS - size, 0 if upper else UNITS - size


def resized(placed: Placed, where: str) -> Placed | None:
    """Return the object half as large again, or two thirds as large, about its middle; None beyond the limits.

    Sides stay multiples of ``STEP`` (cut down), so that the middle stays where it was unless the canvas ends there.
    """
    size = (placed.size * 3 // 2 if where == "larger" else placed.size * 2 // 3) // STEP * STEP
    if not 2 * STEP <= size <= LARGEST or size == placed.size:
        return None
    shift = (placed.size - size) // 2
    x, y = (min(max(corner + shift, 0), UNITS - size) for corner in (placed.x, placed.y))
    return replace(placed, x=x, y=y, size=size)


# -- words ---------------------------------------------------------------------------------------------------------

_WORDINGS: dict[str, tuple[str, ...]] = {
    "add beside": ("add {a} {of} the {anchor}", "put {a} {of} the {anchor}", "draw {a} {of} the {anchor}",
                   "{of} the {anchor}, add {a}"),
    "add corner": ("add {a} in the {where} corner", "put {a} in the {where} corner", "draw {a} in the {where} corner",
                   "in the {where} corner, add {a}"),
    "remove": ("remove the {name}", "take the {name} away", "delete the {name}", "erase the {name}"),
    "remove all": ("remove all {name} icons", "take every {name} icon away", "delete all {name} icons",
                   "erase every {name} icon"),
    "replace": ("replace the {name} with {new}", "turn the {name} into {new}", "put {new} in place of the {name}",
                "swap the {name} for {new}"),
    "move beside": ("move the {name} {of} the {anchor}", "put the {name} {of} the {anchor}",
                    "place the {name} {of} the {anchor}", "the {name} should be {of} the {anchor}"),
    "move edge": ("move the {name} to the {edge} edge", "put the {name} at the {edge} edge",
                  "push the {name} to the {edge} edge", "the {name} should be at the {edge} edge"),
    "resize larger": ("make the {name} larger", "make the {name} bigger", "enlarge the {name}",
                      "the {name} should be larger"),
    "resize smaller": ("make the {name} smaller", "shrink the {name}", "reduce the {name} in size",
                       "the {name} should be smaller"),
    "background": ("make the background {where}", "change the background to {where}", "turn the background {where}",
                   "the background should be {where}"),
}  # fmt: skip


def form(edit: Edit) -> str:
    """Return which group of wordings an edit is told in: its kind, and what sets it apart within that."""
    if edit.kind == "add":
        return "add beside" if edit.anchor else "add corner"
    if edit.kind == "remove":
        return "remove" if len(edit.targets) == 1 else "remove all"
    if edit.kind == "move":
        return "move beside" if edit.anchor else "move edge"
    return f"resize {edit.where}" if edit.kind == "resize" else edit.kind


def filled(pattern: str, edit: Edit) -> str:
    """Return a wording with the edit's names, places and colours in it."""
    direction = edit.where.removeprefix("at ")
    return pattern.format(
        name=edit.name,
        a=f"{an(edit.name)} icon" if edit.name else "",
        new=f"{an(edit.new)} icon" if edit.new else "",
        of=OF.get(direction, ""),
        edge=EDGES.get(direction, ""),
        where=edit.where,
        anchor=edit.anchor,
    )


def wordings(edit: Edit) -> tuple[str, ...]:
    """Return the instruction in several wordings, all of which mean the same."""
    return tuple(filled(pattern, edit) for pattern in _WORDINGS[form(edit)])


def sizes_after(before: Sequence[int]) -> tuple[int, ...]:
    """Return the sides that objects of these sides can have after one change."""
    changed = [resized(Placed("", "", 0, 0, size), where) for size in before for where in ("larger", "smaller")]
    return tuple(sorted({*before, *(placed.size for placed in changed if placed)}))
