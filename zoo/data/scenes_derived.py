"""What sources share that draw several scenes for one id: icons, splits, pictures, and the ids themselves."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from zoo.data.openmoji import LICENCE
from zoo.data.sample import check_split, split_of
from zoo.data.scenes import Scenes, ScenesConfig, owner
from zoo.data.scenes_edits import sizes_after
from zoo.data.scenes_layout import UNITS, Scene
from zoo.data.scenes_render import Renderer, sides
from zoo.errors import ConfigError

MOST_OBJECTS = 8
"""Objects of a scene that leaves room for changes."""


class Derived:
    """Base of sources over scenes. Ids are ``train-000000`` and so on; ``_compose`` draws what an id stands for.

    Args:
        scenes: which icons, how many, on which background.
        counts: split -> how many ids.
        changes: that one object can go through, one after another.
        size: of pictures, in pixels.

    Raises:
        ConfigError: a count out of range, or too many objects.
    """

    name = ""
    what = ""
    licence = LICENCE
    max_bad = 0

    def __init__(self, scenes: ScenesConfig, counts: Mapping[str, int], changes: int, size: int) -> None:
        for split, count in counts.items():
            if not 0 <= count <= 10_000_000:
                raise ConfigError(f"{split}_{self.what} = {count}: expected 0 to 10,000,000")
        self.base = Scenes(scenes, size)
        if self.base.objects[1] > MOST_OBJECTS:
            raise ConfigError(f"objects = {scenes.objects!r}: changes need room, so at most {MOST_OBJECTS} objects")
        self.size = size
        self.counts = dict(counts)
        self.changes = changes
        self._forget()

    def _forget(self) -> None:
        self._kept = lru_cache(maxsize=4096)(self._compose)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_kept"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def _compose(self, id: str) -> Any:
        raise TypeError(f"{type(self).__name__} defines no _compose")

    @property
    def renderer(self) -> Renderer:
        return self.base.renderer

    def ids(self, split: str) -> list[str]:
        """Return the ids of a split, ordered."""
        check_split(split)
        return [f"{split}-{number:06d}" for number in range(self.counts[split])]

    def split_of(self, id: str) -> str:
        """Return the split of an id.

        Raises:
            DataError: there is no such id.
        """
        return split_of(id, self.counts, self.name)

    def owned(self, split: str, scene: Scene) -> bool:
        """Return whether the split may show this picture (always, where each split has icons of its own)."""
        return self.base.config.icons == "heldout" or owner(scene) == split

    @property
    def starts(self) -> tuple[int, ...]:
        """Sides of icons in units before anything changes."""
        return self.base.icon_sizes

    def prepare(self) -> None:
        """Render now what is not cached yet, so that no worker has to."""
        found = self.starts
        for _ in range(self.changes):
            found = sizes_after(found)
        for side in sides(found, self.size, UNITS):
            self.renderer.sprites.all(side)
