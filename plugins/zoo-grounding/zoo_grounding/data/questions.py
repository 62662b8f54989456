"""Questions about scenes whose answers are masks; each has one right set of targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from zoo.data.scenes_icons import IconPool
from zoo.data.scenes_layout import DIRECTIONS, Placed, Scene, Stream, beside
from zoo.errors import ConfigError, near
from zoo_grounding.data.parts import PARTS
from zoo_grounding.marks import TARGET

KINDS = ("name", "every", "several", "absent", "place", "reason", "part")
"""name: the only object of its name. every: all of a name, one mask each. several: two to four names in one question.
absent: a name that is not there, without a mask. place: an object by where it lies. reason: by what it is for, its
size, or that it is unlike the others. part: the hair or the skin of a person."""

ABSENT = 0.4
"""Chance that a question in vain is among those a scene allows."""

MOST_NAMED = 4
"""Objects named in one question."""

_ASK = (  # SHORT_QUESTION_LIST of LISA
    "Can you segment {} in this image?",
    "Please segment {} in this image.",
    "What is {} in this image? Please respond with segmentation mask.",
    "What is {} in this image? Please output segmentation mask.",
)
_LONG = ("{} Please respond with segmentation mask.", "{} Please output segmentation mask.")  # LONG_QUESTION_LIST
_ONE = (  # ANSWER_LIST of LISA
    f"It is {TARGET}.",
    f"Sure, {TARGET}.",
    f"Sure, it is {TARGET}.",
    f"Sure, the segmentation result is {TARGET}.",
    f"{TARGET}.",
)
_OF = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}
_MOST = {"left": "furthest to the left", "right": "furthest to the right", "above": "at the very top",
         "below": "at the very bottom"}  # fmt: skip

_RANGES: dict[str, tuple[tuple[int, int], ...]] = {
    "animal": ((0x1F400, 0x1F43D), (0x1F980, 0x1F9AE)),
    "food": ((0x1F32D, 0x1F32F), (0x1F345, 0x1F36F), (0x1F950, 0x1F96F)),
    "vehicle": ((0x1F680, 0x1F68E), (0x1F690, 0x1F6A4), (0x1F6F4, 0x1F6FC)),
    "thing": ((0x1F4A1, 0x1F4A1), (0x1F4B0, 0x1F4FF), (0x1F50B, 0x1F517), (0x1F525, 0x1F52E)),
}
"""Where Unicode puts animals, food and so on, by first code point; what lies elsewhere is of no sure sort."""

_SORTS = {
    "animal": "Which of the things shown is alive?",
    "food": "I am hungry; what could be eaten or drunk here?",
    "vehicle": "What in this picture could take me somewhere?",
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """A target: an object of the scene by its place in the order of painting, or a part of it."""

    object: int
    part: str = ""


@dataclass(frozen=True, slots=True)
class Asked:
    """A question, its answer with `TARGET` once a target, and the targets in that order."""

    question: str
    answer: str
    kind: str
    targets: tuple[Wanted, ...]


def parse_kinds(text: str) -> tuple[str, ...]:
    """The kinds that ``all`` or names joined by ``+`` stand for, in the order of `KINDS`.

    Raises:
        ConfigError: an unknown kind.
    """
    if text == "all":
        return KINDS
    named = [part.strip() for part in text.replace("+", ",").split(",")]
    for name in named:
        if name not in KINDS:
            raise ConfigError(
                f"data.questions = {text!r}: unknown kind {name!r}{near(name, (*KINDS, 'all'))}; expected all, or some"
                f" of {', '.join(KINDS)} joined by +"
            )
    return tuple(kind for kind in KINDS if kind in named)


def asked_of(
    scene: Scene,
    pool: IconPool,
    stream: Stream,
    kinds: Sequence[str],
    has_part: Callable[[str, str], bool],
    varied: bool,
) -> list[Asked]:
    """At most one question a kind, those that have one right answer here, in a random order.

    Args:
        has_part: Whether an icon (hexcode) has a part that can be seen.
        varied: Draw the wording of questions and answers; else each kind has one.
    """
    say = _Words(stream, varied)
    makers: dict[str, Callable[[Scene, Stream, _Words], Asked | None]] = {
        "name": _name,
        "every": _every,
        "several": _several,
        "place": _place,
        "reason": _reason,
        "part": lambda scene, stream, say: _part(scene, stream, say, has_part),
        "absent": lambda scene, stream, say: _absent(scene, stream, say, pool),
    }
    found = [question for kind in kinds if (question := makers[kind](scene, stream, say)) is not None]
    if len(found) > 1 and stream.uniform() >= ABSENT:  # it can always be asked, and would be the most frequent kind
        found = [question for question in found if question.kind != "absent"]
    return stream.shuffled(found)


class _Words:
    """The wording of questions and answers."""

    def __init__(self, stream: Stream, varied: bool) -> None:
        self.stream = stream
        self.varied = varied

    def _of(self, options: Sequence[str]) -> str:
        return self.stream.choice(options) if self.varied else options[0]

    def ask(self, what: str) -> str:
        return self._of(_ASK).format(what)

    def long(self, sentence: str) -> str:
        return self._of(_LONG).format(sentence)

    def answer(self, count: int, names: Sequence[str] = ()) -> str:
        """``count`` targets; with ``names`` each is named before it."""
        if names:
            text = _listed([f"the {name} {TARGET}" for name in names])
            return f"{text[0].upper()}{text[1:]}."
        return self._of(_ONE) if count == 1 else f"{_listed([TARGET] * count)}."


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _single(scene: Scene) -> list[int]:
    """The objects that are the only ones of their name."""
    kinds = scene.kinds()
    return [number for number, placed in enumerate(scene.objects) if len(kinds[placed.name]) == 1]


def _in_order(scene: Scene, numbers: Sequence[int]) -> tuple[Wanted, ...]:
    """From left to right; of two in one column the upper one first."""
    return tuple(Wanted(n) for n in sorted(numbers, key=lambda n: (scene.objects[n].x, scene.objects[n].y)))


def _name(scene: Scene, stream: Stream, say: _Words) -> Asked | None:
    if not (single := _single(scene)):
        return None
    number = stream.choice(single)
    return Asked(say.ask(f"the {scene.objects[number].name}"), say.answer(1), "name", (Wanted(number),))


def _every(scene: Scene, stream: Stream, say: _Words) -> Asked | None:
    groups = [name for name, group in scene.kinds().items() if len(group) > 1]
    if not groups:
        return None
    name = stream.choice(groups)
    targets = _in_order(scene, [n for n, placed in enumerate(scene.objects) if placed.name == name])
    return Asked(say.ask(f"every {name}"), say.answer(len(targets)), "every", targets)


def _several(scene: Scene, stream: Stream, say: _Words) -> Asked | None:
    single = stream.shuffled(_single(scene))
    if len(single) < 2:
        return None
    chosen = single[: 2 + stream.below(min(len(single), MOST_NAMED) - 1)]
    names = [scene.objects[number].name for number in chosen]
    what = _listed([f"the {name}" for name in names])
    return Asked(say.ask(what), say.answer(len(chosen), names), "several", tuple(Wanted(n) for n in chosen))


def _absent(scene: Scene, stream: Stream, say: _Words, pool: IconPool) -> Asked | None:
    missing = pool.absent(stream, pool.rows(list(scene.kinds())), stream.choice(("random", "popular", "adversarial")))
    if missing is None:
        return None
    name = pool.names[missing]
    return Asked(say.ask(f"the {name}"), f"There is no {name} in this image.", "absent", ())


def _place(scene: Scene, stream: Stream, say: _Words) -> Asked | None:
    """The outermost object on one side, or the only one on one side of an object with a name of its own."""
    objects = scene.objects
    found: list[tuple[str, int]] = []
    for direction in DIRECTIONS:
        for number, placed in enumerate(objects):
            others = [o for n, o in enumerate(objects) if n != number]
            if others and all(beside(placed, other, direction) for other in others):
                found.append((f"the icon {_MOST[direction]}", number))
        for anchor in _single(scene):
            sides = {n: beside(o, objects[anchor], direction) for n, o in enumerate(objects) if n != anchor}
            there = [n for n, side in sides.items() if side]
            if len(there) == 1 and None not in sides.values():
                found.append((f"the icon {_OF[direction]} the {objects[anchor].name}", there[0]))
    if not found:
        return None
    what, number = stream.choice(found)
    return Asked(say.ask(what), say.answer(1), "place", (Wanted(number),))


def _reason(scene: Scene, stream: Stream, say: _Words) -> Asked | None:
    """By its sort (the others are surely of another), as the largest or smallest by a third of its side, or as the one
    that is unlike the others, of which there are several alike."""
    found: list[tuple[str, tuple[Wanted, ...]]] = []
    sorts = [sort_of(placed) for placed in scene.objects]
    if None not in sorts:
        for sort, sentence in _SORTS.items():
            if fitting := [n for n, own in enumerate(sorts) if own == sort]:
                found.append((sentence, _in_order(scene, fitting)))
    by_size = sorted(range(len(scene.objects)), key=lambda n: scene.objects[n].size)
    if len(by_size) > 1:
        side = [scene.objects[n].size for n in by_size]
        if 3 * side[-1] >= 4 * side[-2]:
            found.append(("Which icon takes up most room?", (Wanted(by_size[-1]),)))
        if 3 * side[1] >= 4 * side[0]:
            found.append(("Which icon is the easiest to overlook?", (Wanted(by_size[0]),)))
    kinds = scene.kinds()
    if len(kinds) == 2 and len(scene.objects) > 2 and len(single := _single(scene)) == 1:
        found.append(("One of these is unlike all the others; which?", (Wanted(single[0]),)))
    if not found:
        return None
    sentence, targets = stream.choice(found)
    return Asked(say.long(sentence), say.answer(len(targets)), "reason", targets)


def _part(scene: Scene, stream: Stream, say: _Words, has_part: Callable[[str, str], bool]) -> Asked | None:
    found = [(n, part) for n in _single(scene) for part in PARTS if has_part(scene.objects[n].icon, part)]
    if not found:
        return None
    number, part = stream.choice(found)
    what = f"the {part} of the {scene.objects[number].name}"
    return Asked(say.ask(what), say.answer(1), "part", (Wanted(number, part),))


def sort_of(placed: Placed) -> str | None:
    """Animal, food, vehicle or thing; None where it is not sure to be one of them and none of the others."""
    code = int(placed.icon.split("-")[0], 16)
    return next((sort for sort, ranges in _RANGES.items() if any(a <= code <= b for a, b in ranges)), None)
