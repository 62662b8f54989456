"""Parts of people among the icons: hair and skin, each a layer of OpenMoji's drawings, as exact masks."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from zoo.data.openmoji import OpenMoji
from zoo.data.sample import stable_hash
from zoo.errors import DataError, MissingExtra

PARTS = ("hair", "skin")
"""Layers of an icon's drawing that can be asked for, in the words of a question."""

SMALLEST = 0.02
"""Share of an icon's square that a part fills, at least: 4 pixels by 4 of an icon of 28."""

KEPT = 4096
"""Masks of parts kept in memory."""

_ONE, _OTHER = "#ff0000", "#0000ff"
_SVG = "{http://www.w3.org/2000/svg}"
_COUPLES = frozenset({"kiss", "couple with heart", "family"})
_PLAIN = re.compile(r"[a-z]+( [a-z]+){0,2}")
_TEN = {0: "test", 1: "val"}


def people(whole: OpenMoji, split: str, files: Mapping[str, Path]) -> dict[str, str]:
    """Hexcode -> name of the split's people with hair: every skin tone of them has the name of its role.

    Which split may show a role follows from a hash of the role alone, so that no skin tone of a held-out person is in
    training; roles are those of one code point with a plain name.
    """
    found: dict[str, str] = {}
    named = {
        id: name for of in ("train", "val", "test") for id, name in zip(whole.ids(of), whole.names(of), strict=True)
    }
    for id in named:
        role = whole.attributes(id).get("role", "")
        name = named.get(role, "")
        if not role or "-" in role.removesuffix("-FE0F") or not _PLAIN.fullmatch(name) or name in _COUPLES:
            continue
        if _TEN.get(stable_hash("grounding-person", role) % 10, "train") == split and has_parts(files.get(id)):
            found[id] = name
    return found


@lru_cache(maxsize=8192)
def has_parts(file: Path | None) -> bool:
    """Whether the drawing has something in each of the layers `PARTS`; the text is looked at, which is much faster than
    parsing it."""
    text = "" if file is None else file.read_text(encoding="utf-8")
    return all(re.search(rf'<g id="{part}">\s*<[a-z]', text) for part in PARTS)


class PartMasks:
    """The share of each pixel of an icon that shows one of its parts.

    Args:
        files: Hexcode -> SVG.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.files = dict(files)
        self._forget()

    def _forget(self) -> None:
        self._kept = lru_cache(maxsize=KEPT)(self._share)

    def __getstate__(self) -> dict[str, Any]:
        return {"files": self.files}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def share(self, icon: str, part: str, side: int) -> NDArray[np.float32]:
        """Return [side, side] in 0 to 1: what the part's layer contributes, lines over it taken off.

        The icon is drawn twice, its part in two colours; painting is linear in a layer's colour, so that the two
        pictures differ, in units of the colours' difference, by the part's share.
        """
        return self._kept(icon, part, side)

    def visible(self, icon: str, part: str) -> bool:
        """Whether the part is large enough to be asked for: `SMALLEST` of the icon's square."""
        return bool(self.share(icon, part, 72).mean() >= SMALLEST)

    def _share(self, icon: str, part: str, side: int) -> NDArray[np.float32]:
        one, other = (self._drawn(icon, part, side, colour) for colour in (_ONE, _OTHER))
        share: NDArray[np.float32] = (np.abs(one[..., 0] - other[..., 0]) / 255).astype(np.float32)
        return share

    def _drawn(self, icon: str, part: str, side: int, colour: str) -> NDArray[np.float32]:
        """Premultiplied [side, side, 3] of the icon with a layer in one colour."""
        try:
            import resvg_py
        except ImportError:
            raise MissingExtra("resvg_py", None, "rendering parts of icons") from None
        from PIL import Image

        drawing = _read(self.files[icon])
        layer = _layer(drawing, part)
        if layer is None:
            raise DataError(f"the icon {icon} has no layer {part!r}")
        for element in layer.iter():
            for key in ("fill", "stroke"):
                if element.get(key, "none") != "none":
                    element.set(key, colour)
        png = resvg_py.svg_to_bytes(
            svg_string=ElementTree.tostring(drawing, "unicode"), width=side, height=side, skip_system_fonts=True
        )
        pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGBA")).astype(np.float32)
        return (pixels[..., :3] * pixels[..., 3:] / 255).astype(np.float32)


def _read(file: Path) -> ElementTree.Element:
    return ElementTree.fromstring(file.read_text(encoding="utf-8"))  # out of an installed package


def _layer(drawing: ElementTree.Element, part: str) -> ElementTree.Element | None:
    return next((group for group in drawing.iter(f"{_SVG}g") if group.get("id") == part and len(group)), None)
