"""Frames of OpenMoji stories as single pictures, whose captions name the character by its kind or by its name."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from zoo.data.openmoji import DEFAULT_SIZE
from zoo.data.sample import SPLITS, Sample, SourceConfig, check_split
from zoo.data.scenes_icons import IconPool, by_popularity
from zoo.data.scenes_layout import Scene
from zoo.data.scenes_texts import prompt
from zoo.data.stories import Stories, StoriesConfig
from zoo.errors import ConfigError, near

RULES = 1
"""Raised whenever the same fields make other frames or other captions."""

KINDS: dict[str, tuple[tuple[int, int], ...]] = {
    "animal": ((0x1F400, 0x1F41F), (0x1F421, 0x1F43C), (0x1F980, 0x1F9A2)),
    "vehicle": ((0x1F680, 0x1F69D), (0x1F6FA, 0x1F6FB), (0x2708, 0x2708), (0x26F5, 0x26F5)),
    "food": ((0x1F32D, 0x1F32F), (0x1F345, 0x1F370), (0x1F950, 0x1F96F)),
    "heart": ((0x1F499, 0x1F49C), (0x2764, 0x2764), (0x1F5A4, 0x1F5A4), (0x1F90D, 0x1F90E), (0x1F9E1, 0x1F9E1)),
    "plant": ((0x1F331, 0x1F344),),
    "face": ((0x1F600, 0x1F636), (0x1F910, 0x1F92F), (0x1F970, 0x1F97A)),
}
"""Kind -> the code points (first and last) of its icons."""


@dataclass(frozen=True, kw_only=True)
class StoryFramesConfig(SourceConfig):
    """Stories of ``openmoji-stories`` frame by frame: one picture, one caption.

    With ``naming="kind"`` captions say "an animal icon" where a story shows a fox: nothing in the text of a frame tells
    which animal the story is about, so that images drawn each for itself differ in it, and only what they read of each
    other can make it one. ``naming="icon"`` says "a fox icon"; ``"both"`` gives both captions, for a judge that knows
    both.

    ``kinds`` are some of animal, vehicle, food, heart, plant, face, joined by ``+``; of each there are ``per_kind``
    icons, the same in all splits; stories of val and test open with pictures that no training story opens with.
    ``frames`` is of a story. ``background`` and ``size`` are as for ``openmoji-stories``.
    """

    kind: ClassVar[str] = "story-frames"
    size: int | None = None
    frames: int = 4
    naming: Literal["kind", "icon", "both"] = "kind"
    kinds: str = "animal+vehicle+food+heart"
    per_kind: int = 6
    background: Literal["white", "coloured"] = "coloured"
    train_stories: int = 4_000
    val_stories: int = 100
    test_stories: int = 200
    seed: int = 0

    def open(self, image_size: int | None) -> StoryFrames:
        return StoryFrames(self, self.size or image_size or DEFAULT_SIZE)


class StoryFrames(Stories):
    """See :class:`StoryFramesConfig`. Ids are ``train-000000.0``: a story and a frame.

    Raises:
        ConfigError: a field is out of range.
        MissingExtra: a package that carries the icons or the names is not installed.
    """

    name = "story-frames"
    sides: ClassVar[tuple[int, ...]] = (24, 28, 32)

    def __init__(self, config: StoryFramesConfig, size: int = DEFAULT_SIZE) -> None:
        wanted = [part.strip() for part in config.kinds.split("+")]
        for part in wanted:
            if part not in KINDS:
                raise ConfigError(f"kinds = {config.kinds!r}: unknown kind {part!r}{near(part, KINDS)}; joined by +")
        if config.per_kind < 2:
            raise ConfigError(
                f"per_kind = {config.per_kind}: expected at least 2 icons a kind, to tell one from another"
            )
        counts = {f"{split}_stories": getattr(config, f"{split}_stories") for split in SPLITS}
        stories = StoriesConfig(
            frames=config.frames, icons="train", background=config.background, seed=config.seed, **counts
        )
        super().__init__(stories, size)
        self.frames_config = config
        everything = self.base.pools["train"]
        named = dict(zip(everything.icons, everything.names, strict=True))
        self.kind_of = _chosen(everything.icons, wanted, config.per_kind)
        pool = IconPool(list(self.kind_of), {icon: named[icon] for icon in self.kind_of})
        self.base.pools = dict.fromkeys(SPLITS, pool)
        own = {key: value for key, value in asdict(config).items() if key != "size"}
        self.version = f"{self.base.version.split('/')[0]}/frames{RULES}/{json.dumps(own, sort_keys=True)}"

    def ids(self, split: str) -> list[str]:
        """Return the ids of a split's frames, story by story."""
        check_split(split)
        return [f"{story}.{frame}" for story in super().ids(split) for frame in range(self.frames_config.frames)]

    def caption(self, scene: Scene, naming: str) -> str:
        """Return one sentence to draw a scene from, that names its icons or their kinds."""
        if naming == "icon":
            return prompt(scene)
        kinds = tuple(replace(placed, name=self.kind_of[placed.icon]) for placed in scene.objects)
        return prompt(replace(scene, objects=kinds))

    def text_sample(self, id: str) -> Sample:
        """Return the frame without its image.

        ``meta``: ``cluster`` (the story), and ``story``: its ``ids``, ``captions``, ``character`` (icon, name, kind)
        and the number of this ``frame``.
        """
        name, _, number = id.partition(".")
        frame = int(number) if number.isdigit() else -1
        scenes = self.story(name).scenes
        if not 0 <= frame < len(scenes):
            self.split_of(id)  # names the ids there are
        naming = self.frames_config.naming
        names = ("kind", "icon") if naming == "both" else (naming,)
        captions = tuple(self.caption(scene, names[0]) for scene in scenes)
        who = scenes[0].objects[0]
        meta: dict[str, Any] = {
            "cluster": name,
            "story": {
                "ids": tuple(f"{name}.{n}" for n in range(len(scenes))),
                "captions": captions,
                "character": {"icon": who.icon, "name": who.name, "kind": self.kind_of[who.icon]},
                "frame": frame,
            },
        }
        return Sample(id, None, tuple(self.caption(scenes[frame], name) for name in names), meta)

    def sample(self, id: str) -> Sample:
        """Return the frame at ``size`` pixels."""
        from PIL import Image

        known = self.text_sample(id)
        return replace(known, image=Image.fromarray(self.renderer.image(self._scene(id))))

    def images(self, ids: list[str]) -> NDArray[np.uint8]:
        """Return the pictures [n, size, size, 3], RGB."""
        out = np.empty((len(ids), self.size, self.size, 3), np.uint8)
        for row, id in enumerate(ids):
            self.renderer.paint(self._scene(id), out[row])
        return out

    def _scene(self, id: str) -> Scene:
        name, _, number = id.partition(".")
        return self.story(name).scenes[int(number)]

    @cached_property
    def characters(self) -> dict[str, str]:
        """Name -> kind of every icon, for prompts by hand."""
        pool = self.base.pools["train"]
        return {name: self.kind_of[icon] for icon, name in zip(pool.icons, pool.names, strict=True)}


def _chosen(icons: tuple[str, ...], kinds: list[str], count: int) -> dict[str, str]:
    """Icon -> kind, in the order of code points: of each kind the ``count`` icons that scenes draw most often."""
    kind_of: dict[str, str] = {}
    for kind in kinds:
        own = [icon for icon in icons if any(a <= int(icon.split("-")[0], 16) <= b for a, b in KINDS[kind])]
        if len(own) < count:
            raise ConfigError(f"per_kind = {count}: there are {len(own)} icons of kind {kind!r}")
        kind_of |= dict.fromkeys((own[row] for row in by_popularity(own)[:count]), kind)
    return {icon: kind_of[icon] for icon in icons if icon in kind_of}
