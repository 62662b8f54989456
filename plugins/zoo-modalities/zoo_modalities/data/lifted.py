"""Point clouds of icons: silhouettes that were given a thickness, turned, and measured with noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from zoo.data.openmoji import LICENCE, svg_files
from zoo.data.sample import Sample
from zoo.data.scenes_render import Sprites
from zoo.errors import ConfigError
from zoo_modalities.data.labelled import Generated, GeneratedConfig
from zoo_modalities.data.signal import Signal

ICONS = {
    "star": "2B50", "heart": "2764", "moon": "1F319", "key": "1F511", "scissors": "2702", "umbrella": "2602",
    "airplane": "2708", "anchor": "2693", "bell": "1F514", "fish": "1F41F",
}  # fmt: skip
"""Label -> hexcode."""
PARTS = ("front", "back", "side")
"""Where a point lies on the lifted icon."""
SIDE = 96
"""Pixels that silhouettes are read at."""


@dataclass(frozen=True, kw_only=True)
class IconPointsConfig(GeneratedConfig):
    """Ten icons as solids. Test clouds are other poses of the same icons.

    Attributes:
        points: Of a cloud.
        tilt: Largest angle about each of the three axes, degrees.
        noise: Deviation of a coordinate; the icon fits into -1..1.
    """

    kind: ClassVar[str] = "icon-points"
    labels: ClassVar[tuple[str, ...]] = tuple(ICONS)
    parts: ClassVar[tuple[str, ...]] = PARTS

    points: int = 1024
    tilt: float = 30.0
    noise: float = 0.01

    def open(self, image_size: int | None) -> IconPoints:
        if self.points < 8:
            raise ConfigError(f"data.points = {self.points} must be 8 or more")
        return IconPoints(self, self.points, self.tilt, self.noise)


class IconPoints(Generated):
    """See `IconPointsConfig`. ``meta["element_labels"]`` names where each point lies.

    Raises:
        MissingExtra: A package that carries the icons is not installed.
    """

    licence = LICENCE
    config: IconPointsConfig

    def __init__(self, config: IconPointsConfig, *fields: object) -> None:
        super().__init__(config, *fields)
        files = svg_files()
        sprites = Sprites({code: files[code] for code in sorted(ICONS.values())})
        self._inside = {label: np.asarray(sprites.get(code, SIDE))[..., 3] > 127 for label, code in ICONS.items()}
        self._edge = {label: mask & ~_eroded(mask) for label, mask in self._inside.items()}

    def make(self, id: str, label: str, draw: np.random.Generator) -> Sample:
        c = self.config
        sides = int(0.3 * c.points)
        flat = _drawn(self._inside[label], c.points - sides, draw)
        rim = _drawn(self._edge[label], sides, draw)
        thick = draw.uniform(0.15, 0.3)
        front = draw.uniform(size=len(flat)) < 0.5
        height = np.concatenate([np.where(front, thick, -thick), draw.uniform(-thick, thick, sides)])
        cloud = np.concatenate([np.concatenate([flat, rim]), height[:, None]], 1)  # [N, 3]
        turns = np.radians(draw.uniform(-c.tilt, c.tilt, 3))
        cloud = cloud @ _rotation(*(float(t) for t in turns)).T + c.noise * draw.standard_normal(cloud.shape)
        parts = np.array([*np.where(front, "front", "back"), *["side"] * sides])
        order = draw.permutation(len(cloud))
        meta = {
            "label": label,
            "element_labels": tuple(map(str, parts[order])),
            "modalities": {"points": Signal(cloud[order].astype(np.float32))},
        }
        return Sample(id, None, (label,), meta)


def _eroded(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    padded = np.pad(mask, 1)
    inner: NDArray[np.bool_] = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return inner


def _drawn(mask: NDArray[np.bool_], count: int, draw: np.random.Generator) -> NDArray[np.float64]:
    """Points [count, 2] anywhere in the pixels of a mask, x to the right and y up in -1..1."""
    rows, columns = np.nonzero(mask)
    chosen = draw.integers(len(rows), size=count)
    place = np.stack([columns[chosen], rows[chosen]], 1) + draw.uniform(size=(count, 2))
    points: NDArray[np.float64] = (2 * place / SIDE - 1) * np.array([1.0, -1.0])
    return points


def _rotation(a: float, b: float, c: float) -> NDArray[np.float64]:
    """About x, then y, then z."""
    x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    z = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    turned: NDArray[np.float64] = z @ y @ x
    return turned
