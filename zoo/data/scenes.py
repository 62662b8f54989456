"""Scenes of OpenMoji icons: pictures whose content is known exactly, with captions, questions, boxes and masks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from functools import cached_property, lru_cache
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from zoo.data.openmoji import DEFAULT_SIZE, LICENCE, OpenMoji, OpenMojiConfig, svg_files
from zoo.data.sample import SPLITS, Sample, SourceConfig, check_split, split_of, stable_hash
from zoo.data.scenes_icons import IconPool, is_thing, most_drawn
from zoo.data.scenes_layout import BACKGROUNDS, MOST, UNITS, Placed, Scene, Stream, places, sizes
from zoo.data.scenes_render import Renderer, Sprites, sides
from zoo.data.scenes_texts import Question, captions, parse_kinds, prompt, questions
from zoo.errors import ConfigError, DataError

RULES = 2
"""Raised whenever the same fields make other scenes or other texts."""
FEWEST_KINDS = 8
"""With fewer icons there is little left to ask for in vain."""
ATTEMPTS = 2000
"""Scenes drawn for one id before giving up on finding one that the wanted questions can be asked about."""


@dataclass(frozen=True, kw_only=True)
class ScenesConfig(SourceConfig):
    """Scenes of OpenMoji icons.

    A scene follows from ``seed`` and its id alone. ``objects`` is how many icons it has, as ``3`` or ``1..4`` (at most
    16). ``questions`` is ``none``, ``all``, or kinds joined by ``+``: what, count, exist, where, relation, which,
    colour (see ``zoo.data.scenes_texts``; ``all`` asks for a colour only where the background has one). Every scene
    allows at least one of them, and ``turns`` of those it allows are kept (0 keeps all). ``describe`` is a request that
    stands somewhere in every dialogue and is answered by the first caption (empty: in none).
    ``icons="heldout"`` draws the scenes of val and test from icons that no training scene shows (those that
    ``data=openmoji`` holds out too); ``"train"`` draws all splits from the training icons, so that val and test
    measure new scenes of known icons; which
    split may show a picture then follows from its content. ``kinds`` keeps only so many icons, those drawn most often
    (0 keeps all): a small world, which a model learns to see in a short run.
    ``captions="first"`` gives every scene one caption, the prompt to draw it from: what is where, and on which colour
    if not on white; ``"all"`` gives paraphrases and single relations too.
    ``overlap`` lets icons cover each other a little. ``background="coloured"`` draws one of eight plain colours.
    ``size`` None takes the model's image size.
    """

    kind: ClassVar[str] = "openmoji-scenes"
    size: int | None = None
    objects: str | int = "1..4"
    questions: str = "all"
    turns: int = 4
    describe: str = ""
    icons: Literal["heldout", "train"] = "heldout"
    kinds: int = 0
    captions: Literal["all", "first"] = "all"
    overlap: bool = False
    background: Literal["white", "coloured"] = "white"
    train_scenes: int = 20_000
    val_scenes: int = 500
    test_scenes: int = 1_000
    seed: int = 0

    def open(self, image_size: int | None) -> Scenes:
        return Scenes(self, self.size or image_size or DEFAULT_SIZE)


def parse_range(text: str | int, field: str, lowest: int, highest: int) -> tuple[int, int]:
    """Return the least and the most of ``"3"`` or ``"1..4"``.

    Args:
        field: what the message calls it.
        lowest: the least that may be asked for.
        highest: the most.

    Raises:
        ConfigError: anything else.
    """
    low, dots, high = str(text).partition("..")
    try:
        least, most = int(low), int(high if dots else low)
    except ValueError:
        least, most = lowest - 1, lowest - 1
    if not lowest <= least <= most <= highest:
        raise ConfigError(
            f"{field} = {text!r}: expected a number or a range like {lowest}..{min(lowest + 3, highest)}, from {lowest}"
            f" to {highest}"
        )
    return least, most


class Scenes:
    """See :class:`ScenesConfig`. Ids are ``train-000000`` and so on.

    Raises:
        ConfigError: a field is out of range, or no scene of so few objects allows the wanted questions.
        MissingExtra: a package that carries the icons or the names is not installed.
    """

    name = "openmoji-scenes"
    licence = LICENCE
    max_bad = 0

    def __init__(self, config: ScenesConfig, size: int = DEFAULT_SIZE) -> None:
        if not 16 <= size <= 2048:
            raise ConfigError(f"scenes can be rendered at 16 to 2048 pixels, not {size}")
        self.config = config
        self.size = size
        self.objects = parse_range(config.objects, "objects", 1, MOST)
        self.question_kinds = parse_kinds(config.questions)
        if config.background == "white":  # with one answer to it, it is no question
            if self.question_kinds == ("colour",):
                raise ConfigError('questions = "colour" has one answer on white; set background=coloured')
            self.question_kinds = tuple(kind for kind in self.question_kinds if kind != "colour")
        if self.question_kinds and self.objects[1] < 2 and set(self.question_kinds) <= {"where", "relation", "which"}:
            raise ConfigError(
                f"questions = {config.questions!r} need two objects, and objects = {config.objects!r} gives one;"
                " raise objects, or ask what, count or exist"
            )
        self.counts = {"train": config.train_scenes, "val": config.val_scenes, "test": config.test_scenes}
        for split, count in self.counts.items():
            if not 0 <= count <= 10_000_000:
                raise ConfigError(f"{split}_scenes = {count}: expected 0 to 10,000,000")
        if config.turns < 0 or config.seed < 0:
            raise ConfigError(f"turns = {config.turns} and seed = {config.seed} must not be negative")
        if config.kinds and config.kinds < FEWEST_KINDS:
            raise ConfigError(f"kinds = {config.kinds}: expected 0 (all icons) or at least {FEWEST_KINDS}")
        whole = OpenMoji(OpenMojiConfig(), DEFAULT_SIZE)
        things = {split: self.things(whole, split) for split in SPLITS}
        if config.icons == "train":
            things = dict.fromkeys(SPLITS, things["train"])
        if config.kinds:
            things = {split: {i: named[i] for i in most_drawn(named, config.kinds)} for split, named in things.items()}
        self.pools = {split: IconPool(list(named), named) for split, named in things.items()}
        files = svg_files()
        shown = sorted({icon for named in things.values() for icon in named})
        self.renderer = Renderer(Sprites({icon: files[icon] for icon in shown}), size)
        plain = {k: v for k, v in asdict(config).items() if k not in ("size", *_WRAPPERS) and (k, v) != ("kinds", 0)}
        plain["objects"] = str(config.objects)  # 3 and "3" are the same
        if config.captions == "all":  # versions of before there was a choice stay what they were
            del plain["captions"]
        self.version = f"{whole.version.split('/')[0]}/scenes{RULES}/{json.dumps(plain, sort_keys=True)}"
        self._forget()

    @staticmethod
    def things(whole: OpenMoji, split: str) -> dict[str, str]:
        """Return hexcode -> name of the split's icons that scenes show: those without variants in skin tone, as near
        copies of a held-out icon must not be in training."""
        named = zip(whole.ids(split), whole.names(split), strict=True)
        return {icon: name for icon, name in named if is_thing(icon, name) and not whole.attributes(icon)}

    def _forget(self) -> None:
        self._kept = lru_cache(maxsize=4096)(self._compose)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_kept"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    # -- scenes --------------------------------------------------------------------------------------------------------

    def ids(self, split: str) -> list[str]:
        """Return the ids of a split, ordered."""
        check_split(split)
        return [f"{split}-{number:06d}" for number in range(self.counts[split])]

    def scene(self, id: str) -> Scene:
        """Return the description from which everything else follows.

        Raises:
            DataError: there is no such id.
        """
        return self._kept(id)[0]

    def questions(self, id: str) -> tuple[Question, ...]:
        """Return what is asked about a scene."""
        return self._kept(id)[1]

    def _compose(self, id: str) -> tuple[Scene, tuple[Question, ...]]:
        split = split_of(id, self.counts, self.name)
        pool = self.pools[split]
        for attempt in range(ATTEMPTS):
            scene = compose(pool, Stream("scene", self.config.seed, id, attempt), self.objects, self.config)
            if self.config.icons == "train" and owner(scene) != split:
                continue
            if not self.question_kinds:
                return scene, ()
            asked = questions(scene, pool, Stream("questions", self.config.seed, id, attempt), self.question_kinds)
            if asked:
                return scene, tuple(asked[: self.config.turns or None])
        raise DataError(
            f"no scene of {self.config.objects} objects allows questions = {self.config.questions!r}; allow other"
            " kinds or another number of objects"
        )

    # -- samples -------------------------------------------------------------------------------------------------------

    def text_sample(self, id: str) -> Sample:
        """Return the sample without its image.

        ``texts`` are captions. ``meta``: ``turns`` (question, answer) and ``questions`` (the same with kind, strategy
        and names), absent where none are asked; ``objects``, one dictionary an object in the order of painting (icon,
        name, box in pixels, group: objects of one group share a name); ``background``.
        """
        scene, asked = self._kept(id)
        meta = described(scene, self.renderer)
        texts = captions(scene)
        if self.config.captions == "first":
            texts = (prompt(scene),)
        turns = [(q.question, q.answer) for q in asked]
        if self.config.describe:  # not always first: whoever is asked only one thing must know it from training
            place = Stream("describe", self.config.seed, id).below(len(turns) + 1)
            turns.insert(place, (self.config.describe, texts[0]))
        if turns:
            meta["turns"] = turns
        if asked:
            meta["questions"] = [
                {"question": q.question, "answer": q.answer, "kind": q.kind, "strategy": q.strategy, "names": q.names}
                for q in asked
            ]
        return Sample(id, None, texts, meta)

    def sample(self, id: str) -> Sample:
        """Return the picture at ``size`` pixels and everything known about it."""
        from PIL import Image

        known = self.text_sample(id)
        return Sample(id, Image.fromarray(self.renderer.image(self.scene(id))), known.texts, known.meta)

    def images(self, ids: Sequence[str]) -> NDArray[np.uint8]:
        """Return the pictures ``[n, size, size, 3]``, RGB."""
        out = np.empty((len(ids), self.size, self.size, 3), np.uint8)
        for row, id in enumerate(ids):
            self.renderer.paint(self.scene(id), out[row])
        return out

    def masks(self, id: str, size: int | None = None) -> NDArray[np.bool_]:
        """Return ``[objects, H, W]``: the pixels that show each object of ``meta["objects"]``, covered ones left out.

        Args:
            size: width in pixels; by default the source's.
        """
        return Renderer(self.renderer.sprites, size or self.size).masks(self.scene(id))

    @cached_property
    def icon_sizes(self) -> tuple[int, ...]:
        """The sides of icons in units that scenes of these many objects use."""
        return tuple(sorted({s for count in range(self.objects[0], self.objects[1] + 1) for s in sizes(count)}))

    def prepare(self) -> None:
        """Render now what is not cached yet, so that no worker has to."""
        for side in sides(self.icon_sizes, self.size, UNITS):
            self.renderer.sprites.all(side)


def described(scene: Scene, renderer: Renderer) -> dict[str, Any]:
    """Return ``objects``, one dictionary an object in the order of painting (icon, name, box in pixels, group: objects
    of one group share a name), and ``background``."""
    groups = {name: index for index, name in enumerate(scene.kinds())}
    objects = [
        {"icon": o.icon, "name": o.name, "box": list(box), "group": groups[o.name]}
        for o, box in zip(scene.objects, renderer.boxes(scene), strict=True)
    ]
    return {"objects": objects, "background": scene.background}


def owner(scene: Scene) -> str:
    """Return the one split that may show this picture, whatever the order of painting: 8 of 10 are for training."""
    place = stable_hash("scene-split", scene.background, sorted(map(astuple, scene.objects))) % 10
    return {0: "test", 1: "val"}.get(place, "train")


_WRAPPERS = ("blank_images", "text_only", "shuffled_captions", "trusted")


def compose(pool: IconPool, stream: Stream, objects: tuple[int, int], config: ScenesConfig) -> Scene:
    """Draw one scene: how many, of which kinds, where, and in which order they are painted.

    Half of the scenes show every kind once; in the others each group's share is drawn evenly from what is left.
    """
    least, most = objects
    total = least + stream.below(most - least + 1)
    groups = [1] * total if stream.uniform() < 0.5 else []
    while sum(groups) < total:
        groups.append(1 + stream.below(total - sum(groups)))
    kinds = pool.kinds(stream, len(groups))
    if len(kinds) < len(groups):  # a small pool without more names that cannot be confused
        groups = [*groups[: len(kinds) - 1], sum(groups[len(kinds) - 1 :])]
    rows = stream.shuffled([row for row, count in zip(kinds, groups, strict=True) for _ in range(count)])
    found = places(stream, total, config.overlap)
    background = "white" if config.background == "white" else stream.choice(tuple(BACKGROUNDS))
    placed = [
        Placed(pool.icons[row], pool.names[row], x, y, size) for row, (x, y, size) in zip(rows, found, strict=True)
    ]
    return Scene(tuple(placed), background=background)
