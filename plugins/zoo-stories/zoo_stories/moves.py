"""Scenes of OpenMoji icons that move: the frames between two pictures, which motion predictors learn from."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from zoo.data.openmoji import DEFAULT_SIZE
from zoo.data.sample import Sample, SourceConfig
from zoo.data.scenes import ATTEMPTS, ScenesConfig
from zoo.data.scenes_derived import Derived
from zoo.data.scenes_edits import LARGEST
from zoo.data.scenes_layout import UNITS, Placed, Scene, Stream, sizes
from zoo.data.scenes_texts import prompt
from zoo.errors import ConfigError, DataError

RULES = 1
"""Raised whenever the same fields make other frames."""
FINE = 8
"""Places between two frames lie on this fraction of a unit."""
FAR = 20
"""Units that something moves at least."""


@dataclass(frozen=True, kw_only=True)
class MovesConfig(SourceConfig):
    """Two pictures of one scene, in the second of which an icon lies elsewhere or has another size, and the frames
    between them.

    One object moves along a straight line, faster in the middle than at the ends (smoothstep), and may grow or shrink;
    the others stay. ``frames`` counts both pictures. ``objects`` and ``kinds`` as for ``openmoji-scenes``; icons are
    those of the training split throughout, and the opening picture decides the split. ``size`` None takes the model's
    image size.
    """

    kind: ClassVar[str] = "moving-scenes"
    size: int | None = None
    frames: int = 8
    objects: str | int = "1..2"
    kinds: int = 24
    background: str = "coloured"
    train_moves: int = 4_000
    val_moves: int = 100
    test_moves: int = 300
    seed: int = 0

    def open(self, image_size: int | None) -> Moves:
        return Moves(self, self.size or image_size or DEFAULT_SIZE)


@dataclass(frozen=True, slots=True)
class Move:
    """``scenes`` are the frames in order; ``mover`` is the place of what moves among their objects."""

    scenes: tuple[Scene, ...]
    mover: int


class Moves(Derived):
    """See :class:`MovesConfig`. Ids are ``train-000000`` and so on.

    Raises:
        ConfigError: a field is out of range.
    """

    name = "moving-scenes"
    what = "moves"

    def __init__(self, config: MovesConfig, size: int = DEFAULT_SIZE) -> None:
        if not 3 <= config.frames <= 64:
            raise ConfigError(f"frames = {config.frames}: expected 3 (one between two pictures) to 64")
        if config.background not in ("white", "coloured"):
            raise ConfigError(f"background = {config.background!r}: expected white or coloured")
        self.config = config
        scenes = ScenesConfig(
            objects=config.objects,
            questions="none",
            icons="train",
            kinds=config.kinds,
            background="white" if config.background == "white" else "coloured",
            seed=config.seed,
        )
        counts = {"train": config.train_moves, "val": config.val_moves, "test": config.test_moves}
        super().__init__(scenes, counts, changes=0, size=size)
        own = {key: value for key, value in asdict(config).items() if key != "size"}
        self.version = f"{self.base.version.split('/')[0]}/moves{RULES}/{json.dumps(own, sort_keys=True)}"

    def move(self, id: str) -> Move:
        """Return the description from which everything else follows.

        Raises:
            DataError: there is no such id.
        """
        found: Move = self._kept(id)
        return found

    def _compose(self, id: str) -> Move:
        from zoo.data.scenes import compose

        split = self.split_of(id)
        for attempt in range(ATTEMPTS):
            stream = Stream("move", self.config.seed, id, attempt)
            opening = compose(self.base.pools[split], stream, self.base.objects, self.base.config)
            if not self.owned(split, opening):
                continue
            mover = stream.below(len(opening.objects))
            goal = _goal(opening, mover, stream)
            if goal is not None:
                return Move(between(opening, mover, goal, self.config.frames), mover)
        raise DataError(f"no scene with room to move is found for {id!r}; allow fewer objects")

    def text_sample(self, id: str) -> Sample:
        """Return the move without its images. The text is a prompt of its first picture; ``meta``: ``last``, one of the
        last, and ``mover``, the place of what moves among the objects."""
        found = self.move(id)
        meta: dict[str, Any] = {"mover": found.mover, "last": prompt(found.scenes[-1])}
        return Sample(id, None, (prompt(found.scenes[0]),), meta)

    def sample(self, id: str) -> Sample:
        """Return the frames at ``size`` pixels as ``meta["images"]``, the first also as ``image``."""
        from PIL import Image

        known = self.text_sample(id)
        images = tuple(Image.fromarray(picture) for picture in self.pictures(id))
        return replace(known, image=images[0], meta={**known.meta, "images": images})

    def pictures(self, id: str) -> NDArray[np.uint8]:
        """Return the frames [frames, size, size, 3], RGB."""
        return np.stack([self.renderer.image(scene) for scene in self.move(id).scenes])


def _goal(scene: Scene, mover: int, stream: Stream) -> Placed | None:
    """Where and how large the object is in the end: far enough away, hiding nothing."""
    placed = scene.objects[mover]
    others = [o for n, o in enumerate(scene.objects) if n != mover]
    for _ in range(40):
        size = stream.choice(sizes(len(scene.objects))) if stream.below(2) else placed.size
        size = min(size, LARGEST)
        x, y = stream.below(UNITS - size + 1), stream.below(UNITS - size + 1)
        apart = all(x + size <= o.x or o.x + o.size <= x or y + size <= o.y or o.y + o.size <= y for o in others)
        centre = 2 * x + size - 2 * placed.x - placed.size, 2 * y + size - 2 * placed.y - placed.size
        if apart and max(map(abs, centre)) >= 2 * min(FAR, UNITS - size):
            return replace(placed, x=x, y=y, size=size)
    return None


def between(scene: Scene, mover: int, goal: Placed, frames: int) -> tuple[Scene, ...]:
    """Return ``frames`` scenes from ``scene`` to the one where the object ``mover`` is ``goal``, on a canvas of finer
    units; the time of frame n is n / (frames - 1), the share of the way 3 t^2 - 2 t^3."""
    fine = [replace(o, x=o.x * FINE, y=o.y * FINE, size=o.size * FINE) for o in scene.objects]
    start, end = fine[mover], replace(goal, x=goal.x * FINE, y=goal.y * FINE, size=goal.size * FINE)
    found = []
    for number in range(frames):
        time = number / (frames - 1)
        share = 3 * time**2 - 2 * time**3
        x, y, size = (
            round(a + share * (b - a)) for a, b in ((start.x, end.x), (start.y, end.y), (start.size, end.size))
        )
        objects = list(fine)
        objects[mover] = replace(start, x=x, y=y, size=size)
        found.append(replace(scene, objects=tuple(objects), width=scene.width * FINE, height=scene.height * FINE))
    return tuple(found)
