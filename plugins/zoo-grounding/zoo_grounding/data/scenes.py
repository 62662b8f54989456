"""Scenes of OpenMoji icons with questions whose answers are exact masks."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from zoo.data.openmoji import DEFAULT_SIZE, LICENCE, OpenMoji, OpenMojiConfig, svg_files
from zoo.data.sample import Sample, SourceConfig, check_split, split_of
from zoo.data.scenes import ATTEMPTS, Scenes, ScenesConfig, compose, described, owner
from zoo.data.scenes_layout import Scene, Stream
from zoo.data.scenes_texts import captions
from zoo.errors import ConfigError, DataError
from zoo_grounding.data.parts import PartMasks, people
from zoo_grounding.data.questions import Asked, Wanted, asked_of, parse_kinds

RULES = 1
"""Raised whenever the same fields make other scenes, questions or masks."""

SHOWN = 0.5
"""Share of a pixel from which it counts as a target's."""


@dataclass(frozen=True, kw_only=True)
class GroundingScenesConfig(SourceConfig):
    """Scenes with questions that name, place, count or reason, and answers with masks.

    Scenes are those of ``data=openmoji-scenes`` (see its fields ``size``, ``objects``, ``icons``, ``kinds``,
    ``overlap``, ``background`` and ``seed``), among whose icons are people where ``people`` is true: their hair and
    skin are layers of the drawings, so that parts have exact masks too. ``questions`` is ``all`` or kinds joined by
    ``+``: name, every, several, absent, place, reason, part (``zoo_grounding.data.questions``); every scene allows at
    least one, and ``turns`` of those it allows are kept. ``wording="plain"`` gives each kind one form, which a short
    run learns; ``"varied"`` draws LISA's.
    """

    kind: ClassVar[str] = "openmoji-grounding"
    size: int | None = None
    objects: str | int = "1..4"
    questions: str = "all"
    turns: int = 2
    wording: Literal["varied", "plain"] = "varied"
    people: bool = True
    icons: Literal["heldout", "train"] = "heldout"
    kinds: int = 0
    overlap: bool = False
    background: Literal["white", "coloured"] = "white"
    train_scenes: int = 20_000
    val_scenes: int = 500
    test_scenes: int = 1_000
    seed: int = 0

    def open(self, image_size: int | None) -> GroundingScenes:
        return GroundingScenes(self, self.size or image_size or DEFAULT_SIZE)


class _WithPeople(Scenes):
    """Scenes among whose icons are people; each split has roles of its own."""

    @staticmethod
    def things(whole: OpenMoji, split: str) -> dict[str, str]:
        found = {**Scenes.things(whole, split), **people(whole, split, svg_files())}
        return dict(sorted(found.items(), key=lambda pair: [int(code, 16) for code in pair[0].split("-")]))


class GroundingScenes:
    """See :class:`GroundingScenesConfig`. Ids are ``train-000000`` and so on.

    Raises:
        ConfigError: a field is out of range, or no scene of so few objects allows the wanted questions.
        MissingExtra: a package that carries the icons or the names is not installed.
    """

    name = "openmoji-grounding"
    licence = LICENCE
    max_bad = 0

    def __init__(self, config: GroundingScenesConfig, size: int = DEFAULT_SIZE) -> None:
        if config.turns < 1:
            raise ConfigError(f"data.turns = {config.turns}: expected 1 or more questions a scene")
        self.config = config
        self.kinds = parse_kinds(config.questions)
        if "part" in self.kinds and not config.people:
            if self.kinds == ("part",):
                raise ConfigError("data.questions = 'part' asks for hair and skin, and data.people is false")
            self.kinds = tuple(kind for kind in self.kinds if kind != "part")
        shared = ("objects", "icons", "kinds", "overlap", "background", "train_scenes", "val_scenes", "test_scenes")
        scenes = {name: getattr(config, name) for name in (*shared, "seed")}
        self.base = (_WithPeople if config.people else Scenes)(ScenesConfig(questions="none", **scenes), size)
        if self.base.objects[1] < 2 and set(self.kinds) <= {"every", "several", "place"}:
            raise ConfigError(
                f"data.questions = {config.questions!r} need two objects, and objects = {config.objects!r} gives one"
            )
        self.size = size
        shown = self.base.renderer.sprites.files
        whole = OpenMoji(OpenMojiConfig(), DEFAULT_SIZE)
        self.people = frozenset(icon for icon in shown if whole.attributes(icon))
        self.parts = PartMasks({icon: file for icon, file in shown.items() if icon in self.people})
        own = {k: v for k, v in asdict(config).items() if k not in _OUTSIDE}
        own["objects"] = str(config.objects)
        self.version = f"{self.base.version.split('/')[0]}/grounding{RULES}/{json.dumps(own, sort_keys=True)}"
        self._forget()

    def _forget(self) -> None:
        self._kept = lru_cache(maxsize=4096)(self._compose)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_kept"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def ids(self, split: str) -> list[str]:
        """Return the ids of a split, ordered."""
        check_split(split)
        return self.base.ids(split)

    def scene(self, id: str) -> Scene:
        """Return the description from which everything else follows.

        Raises:
            DataError: there is no such id.
        """
        return self._kept(id)[0]

    def asked(self, id: str) -> tuple[Asked, ...]:
        """Return what is asked about a scene."""
        return self._kept(id)[1]

    def _compose(self, id: str) -> tuple[Scene, tuple[Asked, ...]]:
        split = split_of(id, self.base.counts, self.name)
        pool, config = self.base.pools[split], self.base.config
        for attempt in range(ATTEMPTS):
            scene = compose(pool, Stream("grounding", config.seed, id, attempt), self.base.objects, config)
            if config.icons == "train" and owner(scene) != split:
                continue
            stream = Stream("grounding-questions", config.seed, id, attempt)
            found = asked_of(scene, pool, stream, self.kinds, self._has_part, self.config.wording == "varied")
            if found:
                return scene, tuple(found[: self.config.turns])
        raise DataError(
            f"no scene of {self.config.objects} objects allows questions = {self.config.questions!r}; allow other kinds"
            " or another number of objects"
        )

    def _has_part(self, icon: str, part: str) -> bool:
        return icon in self.people and self.parts.visible(icon, part)

    def sample(self, id: str) -> Sample:
        """Return the picture at ``size`` pixels and everything known about it.

        ``meta``: ``turns`` (question, answer with ``{seg}`` once a target); ``masks``, [H, W] uint8 each, of the
        targets over all answers in order; ``questions``, one a turn with its ``kind`` and number of ``targets``;
        ``objects`` and ``background`` as in ``data=openmoji-scenes``.
        """
        from PIL import Image

        scene, asked = self._kept(id)
        renderer = self.base.renderer
        visible = renderer.visible(scene)  # [objects, H, W]
        meta = described(scene, renderer)
        meta["turns"] = [(q.question, q.answer) for q in asked]
        meta["questions"] = [
            {"question": q.question, "answer": q.answer, "kind": q.kind, "targets": len(q.targets)} for q in asked
        ]
        meta["masks"] = [
            (self._shown(scene, visible, wanted) >= SHOWN).astype(np.uint8) for q in asked for wanted in q.targets
        ]
        return Sample(id, Image.fromarray(renderer.image(scene)), captions(scene)[:1], meta)

    def masks(self, id: str, size: int | None = None) -> NDArray[np.bool_]:
        """Return ``[objects, H, W]``: the pixels that show each object of ``meta["objects"]``, covered ones left out.

        Args:
            size: width in pixels; by default the source's.
        """
        renderer = type(self.base.renderer)(self.base.renderer.sprites, size or self.size)
        return renderer.masks(self.scene(id))

    def _shown(self, scene: Scene, visible: NDArray[np.float32], wanted: Wanted) -> NDArray[np.float32]:
        """The share [H, W] of each pixel that shows a target."""
        seen: NDArray[np.float32] = visible[wanted.object]
        if not wanted.part:
            return seen
        placed = scene.objects[wanted.object]
        left, top, side = self.base.renderer.square(scene, placed)
        here = (slice(top, top + side), slice(left, left + side))
        alpha = self.base.renderer.sprites.get(placed.icon, side)[..., 3].astype(np.float32) / 255
        free = np.divide(seen[here], alpha, out=np.zeros_like(alpha), where=alpha > 0)  # what lies above, taken off
        out = np.zeros_like(seen)
        out[here] = self.parts.share(placed.icon, wanted.part, side) * free
        return out

    def prepare(self) -> None:
        """Render now what is not cached yet, so that no worker has to."""
        self.base.prepare()


_OUTSIDE = frozenset({"size", "blank_images", "text_only", "shuffled_captions", "trusted"})
