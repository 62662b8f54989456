"""What is said and asked about a scene; every sentence is true and every answer the only right one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from zoo.data.scenes_icons import IconPool
from zoo.data.scenes_layout import DIRECTIONS, Placed, Scene, Stream, all_beside, beside, opposite
from zoo.errors import ConfigError, near

KINDS = ("what", "count", "exist", "where", "relation", "which", "colour")
"""what: naming the only kind, or the outermost object. count: of one kind, or in all. exist: is there one. where: of
one object seen from another. relation: is one left of (...) another. which: the only kind on one side of an object.
colour: of the background."""
STRATEGIES = ("random", "popular", "adversarial")
"""How the missing object of an ``exist`` question was chosen (POPE, Li et al. 2023)."""

WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
         "thirteen", "fourteen", "fifteen", "sixteen")  # fmt: skip
_OF = {"left": "left of", "right": "right of", "above": "above", "below": "below"}
_MOST = {"left": "furthest to the left", "right": "furthest to the right", "above": "at the very top",
         "below": "at the very bottom"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Question:
    """``kind`` is one of `KINDS`; ``strategy`` one of `STRATEGIES` for ``exist``, else empty; ``names`` are the icons
    it mentions."""

    question: str
    answer: str
    kind: str
    strategy: str = ""
    names: tuple[str, ...] = ()


def parse_kinds(text: str) -> tuple[str, ...]:
    """Return the kinds that ``none``, ``all`` or names joined by ``+`` or ``,`` stand for, in the order of `KINDS`.

    Raises:
        ConfigError: an unknown kind.
    """
    if text in ("none", "all"):
        return KINDS if text == "all" else ()
    named = [part.strip() for part in text.replace("+", ",").split(",")]
    for name in named:
        if name not in KINDS:
            raise ConfigError(
                f"questions = {text!r}: unknown kind {name!r}{near(name, (*KINDS, 'all', 'none'))}; expected none, all,"
                f" or some of {', '.join(KINDS)} joined by +"
            )
    return tuple(kind for kind in KINDS if kind in named)


def an(name: str) -> str:
    """Return the name with "a" or "an" as it is spoken."""
    vowel = name[0] in "aeiou" and not name.startswith(("uni", "eu", "one", "ukulele", "utensil"))
    return f"{'an' if vowel or name.startswith(('hour', 'honest', 'x-ray')) else 'a'} {name}"


def _some(name: str, count: int) -> str:
    return f"{an(name)} icon" if count == 1 else f"{WORDS[count]} {name} icons"


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def captions(scene: Scene) -> tuple[str, ...]:
    """Return distinct true sentences: first what is where, as whole as one sentence can be, then paraphrases and
    single relations."""
    kinds = scene.kinds()
    some = {name: _some(name, len(group)) for name, group in kinds.items()}
    names = list(kinds)
    out: list[str] = []
    if len(kinds) == 2:
        first, second = names
        for direction in DIRECTIONS:
            if all_beside(kinds[first], kinds[second], direction):
                out.append(f"{some[first]} {_OF[direction]} {some[second]}")
                out.append(f"{some[second]} {_OF[opposite(direction)]} {some[first]}")
    out.append(_listed(list(some.values())))
    if len(kinds) > 1:
        out.append(_listed(list(some.values())[::-1]))
    total = len(scene.objects)
    if total > 1:
        out.append(f"{WORDS[total]} icons: {_listed(list(some.values()))}")
    for axis, label in (("left", "from left to right"), ("above", "from top to bottom")):
        line = sorted(scene.objects, key=lambda o: o.x if axis == "left" else o.y)
        if total > 1 and all(beside(a, b, axis) for a, b in pairwise(line)):
            out.append(f"{label}: {', '.join(o.name for o in line)}")
    single = [group[0] for group in kinds.values() if len(group) == 1]
    for a in single:
        for b in single:
            if a is not b:
                out += [f"the {a.name} is {_OF[d]} the {b.name}" for d in DIRECTIONS if beside(a, b, d)]
    return tuple(dict.fromkeys(out))


def prompt(scene: Scene) -> str:
    """Return one sentence to draw the scene from: its first caption, and the background's colour if not white."""
    text = captions(scene)[0]
    return text if scene.background == "white" else f"{text}, on {an(scene.background)} background"


def questions(scene: Scene, pool: IconPool, stream: Stream, kinds: Sequence[str]) -> list[Question]:
    """Return the questions of these kinds that have one right answer here, in a random order.

    At most one question a kind, except ``exist``, which asks for something there and something missing.
    """
    makers = {
        "what": _what, "count": _count, "where": _where, "relation": _relation, "which": _which, "colour": _colour,
    }  # fmt: skip
    found: list[Question] = []
    for kind in kinds:
        if kind == "exist":
            found += _exist(scene, pool, stream)
        elif question := makers[kind](scene, stream):
            found.append(question)
    return stream.shuffled(found)


def _what(scene: Scene, stream: Stream) -> Question | None:
    kinds = list(scene.kinds())
    if len(kinds) == 1:
        text = stream.choice(("what is in the picture?", "what does the picture show?", "which icon is shown?"))
        return Question(text, kinds[0], "what", "", (kinds[0],))
    for direction in stream.shuffled(DIRECTIONS):
        for placed in scene.objects:
            others = [o for o in scene.objects if o.name != placed.name]
            if all(beside(placed, other, direction) for other in others):
                text = stream.choice(("what is {}?", "which icon is {}?", "what do you see {}?"))
                return Question(text.format(_MOST[direction]), placed.name, "what", "", (placed.name,))
    return None


def _count(scene: Scene, stream: Stream) -> Question | None:
    if len(scene.objects) == 1 and stream.below(2):
        return None  # there "1" is the only answer, which would be the usual one
    kinds = scene.kinds()
    counts = {name: len(group) for name, group in kinds.items()} | {"": len(scene.objects)}
    wanted = stream.choice(sorted(set(counts.values())))  # first the answer, so that "1" is not the usual one
    name = stream.choice([name for name, count in counts.items() if count == wanted])
    if not name:
        text = stream.choice(("how many icons are there?", "how many icons does the picture show in all?"))
        return Question(text, str(len(scene.objects)), "count")
    text = stream.choice(("how many {} icons are there?", "how many {} icons does the picture show?"))
    return Question(text.format(name), str(len(kinds[name])), "count", "", (name,))


def _exist(scene: Scene, pool: IconPool, stream: Stream) -> list[Question]:
    text = stream.choice(("is there {} icon in the picture?", "does the picture show {} icon?", "is there {} icon?"))
    names = list(scene.kinds())
    strategy = stream.choice(STRATEGIES)
    there = stream.choice(names)
    missing = pool.absent(stream, pool.rows(names), strategy)
    if missing is None:  # without its "no" the "yes" would tip the balance
        return []
    absent = pool.names[missing]
    return [
        Question(text.format(an(there)), "yes", "exist", strategy, (there,)),
        Question(text.format(an(absent)), "no", "exist", strategy, (absent,)),
    ]


def _pair(scene: Scene, stream: Stream, axes: Sequence[str], alone: bool) -> tuple[Placed, Placed, str] | None:
    """Return a, b and the direction of a seen from b, both the only ones of their name; ``alone``: in no other one."""
    single = stream.shuffled([group[0] for group in scene.kinds().values() if len(group) == 1])
    for a in single:
        for b in single:
            if a is not b:
                true = [d for d in axes if beside(a, b, d)]
                if true and not (alone and len(true) > 1):
                    return a, b, stream.choice(true)
    return None


def _where(scene: Scene, stream: Stream) -> Question | None:
    found = _pair(scene, stream, DIRECTIONS, alone=True)
    if found is None:
        return None
    a, b, direction = found
    text = stream.choice(("where is the {a}, seen from the {b}?", "on which side of the {b} is the {a}?"))
    return Question(text.format(a=a.name, b=b.name), direction, "where", "", (a.name, b.name))


def _relation(scene: Scene, stream: Stream) -> Question | None:
    found = _pair(scene, stream, DIRECTIONS, alone=False)
    if found is None:
        return None
    a, b, direction = found
    yes = stream.below(2) == 1
    asked = _OF[direction if yes else opposite(direction)]
    text = stream.choice(("is the {a} {d} the {b}?", "does the {a} lie {d} the {b}?"))
    answer = "yes" if yes else "no"
    return Question(text.format(a=a.name, b=b.name, d=asked), answer, "relation", "", (a.name, b.name))


def _which(scene: Scene, stream: Stream) -> Question | None:
    kinds = scene.kinds()
    for b in stream.shuffled([group[0] for group in kinds.values() if len(group) == 1]):
        for direction in stream.shuffled(DIRECTIONS):
            there = [[beside(a, b, direction) for a in group] for name, group in kinds.items() if name != b.name]
            names = [name for name in kinds if name != b.name]
            if any(side is None for group in there for side in group):
                continue
            right = [name for name, group in zip(names, there, strict=True) if any(group)]
            if len(right) == 1:
                text = stream.choice(("what is {d} the {b}?", "which icon is {d} the {b}?"))
                text = text.format(d=_OF[direction], b=b.name)
                return Question(text, right[0], "which", "", (right[0], b.name))
    return None


def _colour(scene: Scene, stream: Stream) -> Question:
    text = stream.choice(("what colour is the background?", "which colour does the background have?"))
    return Question(text, scene.background, "colour")
