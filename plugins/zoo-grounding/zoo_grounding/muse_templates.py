"""Questions about named instances, with answers of several targets, as MUSE has them (arXiv 2312.02228, section 4):
written from templates, where MUSE was written by GPT-4V."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zoo.data.scenes_layout import Stream
from zoo.errors import ConfigError, near

KINDS = ("names", "every", "group", "largest", "smallest", "beside", "all")
"""names: instances by their names. every: all instances of one name. group: all of one kind of things (COCO's
supercategory). largest, smallest: by pixels. beside: all on one side of an instance that is the only one of its name.
all: everything."""

SEG = "{seg}"
"""Stands for a target in an answer."""

_CLEAR = 1.25
"""An instance is larger than another only where it has this many times its pixels."""

_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@dataclass(frozen=True, slots=True)
class Instance:
    """One instance of an image: its name, the group that the name belongs to (empty: none), its box (left, top, right,
    bottom) and its area, both in pixels."""

    name: str
    group: str
    box: tuple[float, float, float, float]
    area: float


@dataclass(frozen=True, slots=True)
class Triple:
    """A question, its answer with `SEG` once a target, and the place of each target's instance, in order of mention."""

    question: str
    answer: str
    targets: tuple[int, ...]
    kind: str


def parse_kinds(text: str) -> tuple[str, ...]:
    """Return the kinds that names joined by ``+`` or ``,`` stand for, in the order of `KINDS`; ``any`` is all of them.

    Raises:
        ConfigError: an unknown kind.
    """
    if text == "any":
        return KINDS
    named = [part.strip() for part in text.replace("+", ",").split(",")]
    for name in named:
        if name not in KINDS:
            raise ConfigError(
                f"ask = {text!r}: unknown kind {name!r}{near(name, KINDS)}; expected any, or some of {', '.join(KINDS)}"
                " joined by +"
            )
    return tuple(kind for kind in KINDS if kind in named)


def triples(
    instances: Sequence[Instance],
    stream: Stream,
    kinds: Sequence[str],
    count: int,
    targets: tuple[int, int],
) -> list[Triple]:
    """Return up to ``count`` triples about an image, no question twice, of kinds in a random order.

    Args:
        instances: What the image shows.
        stream: Decides everything that is drawn.
        targets: Fewest and most targets of an answer; what a question asks for is never cut to fit.
    """
    out: list[Triple] = []
    seen: set[str] = set()
    for _ in range(4):  # a kind may give another question the second time
        for kind in stream.shuffled(kinds):
            made = _make(kind, instances, stream, targets)
            if made is None or made.question in seen or not targets[0] <= len(made.targets) <= targets[1]:
                continue
            seen.add(made.question)
            out.append(made)
            if len(out) == count:
                return out
    return out


def answer_of(names: Sequence[str], stream: Stream) -> str:
    """An answer that names its targets in order, each followed by `SEG`, in one of two ways: name by name, or names of
    equal targets once (``two cats {seg} and {seg}``)."""
    if stream.below(2):
        return _joined([f"{_the(name)} {SEG}" for name in names]) + "."
    groups: list[tuple[str, int]] = []
    for name in names:
        if groups and groups[-1][0] == name:
            groups[-1] = (name, groups[-1][1] + 1)
        else:
            groups.append((name, 1))
    parts = [
        f"{_the(name)} {SEG}" if count == 1 else f"{_number(count)} {name} {_joined([SEG] * count)}"
        for name, count in groups
    ]
    return f"{stream.choice(('sure, ', ''))}{_joined(parts)}."


def _make(kind: str, instances: Sequence[Instance], stream: Stream, targets: tuple[int, int]) -> Triple | None:
    if kind == "names":
        return _names(instances, stream, targets)
    if kind == "every":
        return _every(instances, stream)
    if kind == "group":
        return _group(instances, stream)
    if kind in ("largest", "smallest"):
        return _by_size(instances, stream, targets, kind)
    if kind == "beside":
        return _beside(instances, stream)
    question = stream.choice(("what is in the picture?", "segment everything in the picture.", "what do you see?"))
    return _triple(question, _left_to_right(instances, range(len(instances))), instances, stream, kind)


def _names(instances: Sequence[Instance], stream: Stream, targets: tuple[int, int]) -> Triple | None:
    """Some names, each with all of its instances."""
    names = stream.shuffled(list(_counts(instances)))
    chosen: list[str] = []
    found: list[int] = []
    wanted = targets[0] + stream.below(targets[1] - targets[0] + 1)
    for name in names:
        own = [place for place, instance in enumerate(instances) if instance.name == name]
        if len(found) + len(own) <= wanted:
            chosen.append(name)
            found += _left_to_right(instances, own)
    if not chosen:
        return None
    asked = _joined([_the(name) for name in chosen])
    text = stream.choice(("where is {}?", "please segment {}.", "show me {}.", "can you segment {}?"))
    if len(found) > 1:
        text = text.replace("where is", "where are")
    return _triple(text.format(asked), found, instances, stream, "names")


def _every(instances: Sequence[Instance], stream: Stream) -> Triple | None:
    repeated = [name for name, count in _counts(instances).items() if count > 1]
    if not repeated:
        return None
    name = stream.choice(repeated)
    own = [place for place, instance in enumerate(instances) if instance.name == name]
    text = stream.choice(("segment every {}.", "mark each {} on its own.", "find all of the {} separately."))
    return _triple(text.format(name), _left_to_right(instances, own), instances, stream, "every")


def _group(instances: Sequence[Instance], stream: Stream) -> Triple | None:
    groups = [group for group in dict.fromkeys(i.group for i in instances) if group]
    if len(groups) < 2:  # with one group it is the question for everything
        return None
    group = stream.choice(groups)
    own = [place for place, instance in enumerate(instances) if instance.group == group]
    text = stream.choice(("what belongs to {}?", "segment all that is {}.", "which things here are {}?"))
    return _triple(text.format(group), _left_to_right(instances, own), instances, stream, "group")


def _by_size(instances: Sequence[Instance], stream: Stream, targets: tuple[int, int], kind: str) -> Triple | None:
    order = sorted(range(len(instances)), key=lambda place: instances[place].area, reverse=kind == "largest")
    areas = [instances[place].area for place in order]
    clear = [
        n
        for n in range(max(1, targets[0]), min(targets[1], len(order) - 1) + 1)
        if max(areas[n - 1], areas[n]) >= _CLEAR * min(areas[n - 1], areas[n]) > 0
    ]
    if not clear:
        return None
    count = stream.choice(clear)
    what = f"{kind} thing" if count == 1 else f"{_number(count)} {kind} things"
    text = stream.choice(("what {be} the {what}?", "segment the {what}.", "which {be} the {what} here?"))
    question = text.format(be="is" if count == 1 else "are", what=what)
    return _triple(question, order[:count], instances, stream, kind)


def _beside(instances: Sequence[Instance], stream: Stream) -> Triple | None:
    counts = _counts(instances)
    for place in stream.shuffled([p for p, i in enumerate(instances) if counts[i.name] == 1]):
        for side in stream.shuffled(("left of", "right of", "above", "below")):
            sure = [_on_side(other.box, instances[place].box, side) for other in instances]
            found = [p for p, yes in enumerate(sure) if yes and p != place]
            doubtful = any(yes is None for p, yes in enumerate(sure) if p != place)
            if found and not doubtful:
                text = stream.choice(("what is {} {}?", "segment what lies {} {}.", "which things are {} {}?"))
                question = text.format(side, _the(instances[place].name))
                return _triple(question, _left_to_right(instances, found), instances, stream, "beside")
    return None


def _on_side(a: Sequence[float], b: Sequence[float], side: str) -> bool | None:
    """Whether box a lies on that side of box b; None where one may argue: they overlap, and its centre lies there."""
    low, high = {"left of": (0, 2), "right of": (0, 2), "above": (1, 3), "below": (1, 3)}[side]
    first, second = (a, b) if side in ("left of", "above") else (b, a)
    if first[high] <= second[low]:
        return True
    return False if first[low] + first[high] >= second[low] + second[high] else None


def _triple(question: str, places: Sequence[int], instances: Sequence[Instance], stream: Stream, kind: str) -> Triple:
    return Triple(question, answer_of([instances[place].name for place in places], stream), tuple(places), kind)


def _left_to_right(instances: Sequence[Instance], places: Sequence[int]) -> list[int]:
    return sorted(places, key=lambda place: (instances[place].box[0], instances[place].box[1], place))


def _counts(instances: Sequence[Instance]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for instance in instances:
        counts[instance.name] = counts.get(instance.name, 0) + 1
    return counts


def _the(name: str) -> str:
    return f"the {name}"


def _number(count: int) -> str:
    return _WORDS[count] if count < len(_WORDS) else str(count)


def _joined(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
