"""Icons that move in one of five ways: as clips, or as what a sensor on them measures."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from zoo.data.openmoji import LICENCE, svg_files
from zoo.data.sample import Sample
from zoo.data.scenes_render import Sprites
from zoo_modalities.data.labelled import Generated, GeneratedConfig
from zoo_modalities.data.motion import GAITS, SIDE, Motion, clip, imu

MOVERS = ("1F431", "1F436", "1F697", "26BD", "1F980", "1F388", "1F34E", "2B50")
"""Icons that move: cat, dog, car, ball, crab, balloon, apple, star; which one says nothing about how."""


@dataclass(frozen=True, kw_only=True)
class MotionsConfig(GeneratedConfig):
    """Ways of moving as the label.

    Attributes:
        modality: ``video``, a clip of ten frames in five seconds, or ``imu``, five seconds at 400 samples a second.
        size: Pixels of a frame; 0 takes the model's.
    """

    kind: ClassVar[str] = "motions"
    labels: ClassVar[tuple[str, ...]] = GAITS

    modality: Literal["video", "imu"] = "imu"
    size: int = 0

    def open(self, image_size: int | None) -> Motions:
        return Motions(self, self.size or image_size or 64, self.modality)


class Motions(Generated):
    """See `MotionsConfig`.

    Raises:
        MissingExtra: A package that carries the icons is not installed.
    """

    licence = LICENCE
    config: MotionsConfig

    def __init__(self, config: MotionsConfig, size: int, modality: str) -> None:
        video = modality == "video"
        super().__init__(config, modality, *([size] if video else []))
        self.size = size
        files = svg_files() if video else {}
        self.sprites = Sprites({code: files[code] for code in sorted(MOVERS)}) if video else None

    def make(self, id: str, label: str, draw: np.random.Generator) -> Sample:
        room = (1 - SIDE) / 2 - 0.1
        motion = Motion(
            gait=label,
            frequency=draw.uniform(0.5, 2.0),
            size=draw.uniform(0.1, 0.18),
            lean=math.radians(50) * draw.uniform(-1, 1),
            start=(room * draw.uniform(-1, 1), room * draw.uniform(-1, 1)),
            phase=2 * math.pi * draw.uniform(),
        )
        if self.sprites is None:
            signal = imu(motion, self.version, id)
        else:
            mover = str(draw.choice(MOVERS))
            signal = clip(np.asarray(self.sprites.get(mover, 64)), motion, self.size)
        return Sample(id, None, (label,), {"label": label, "modalities": {self.config.modality: signal}})
