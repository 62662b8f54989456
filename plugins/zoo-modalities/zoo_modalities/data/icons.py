"""``openmoji-modalities``: icons with their names, and views of them in other modalities, derived or simulated."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from zoo.data.openmoji import DEFAULT_SIZE, LICENCE, OpenMoji, OpenMojiConfig
from zoo.data.sample import Sample, SourceConfig, stable_hash
from zoo.errors import ConfigError, near
from zoo_modalities.data import maps, motion, speech
from zoo_modalities.data.signal import LazySignals, Signal

RULES = 1
"""Raised whenever the same fields make other signals."""


@dataclass(frozen=True, slots=True, eq=False)
class Icon:
    """What a view is derived from.

    Attributes:
        id: Hexcode of the icon.
        name: Its name.
        role: Hexcode without skin tone and gender; equal for near copies.
        sprite: [S, S, 4] RGBA bytes, opaque inside the icon's outline.
        voice: ``simulated`` or ``espeak-ng``.
        seed: Of all that is drawn.
    """

    id: str
    name: str
    role: str
    sprite: NDArray[np.uint8]
    voice: str
    seed: int

    @property
    def motion(self) -> motion.Motion:
        return motion.motion_of(self.role, self.id, self.seed)


def _audio(icon: Icon) -> Signal:
    if icon.voice == "espeak-ng":
        return _spoken(icon.name)
    return speech.simulated(icon.name, stable_hash("voice", icon.seed, icon.id) % len(speech.PITCHES))


@lru_cache(maxsize=8192)
def _spoken(name: str) -> Signal:
    return speech.espeak(name)  # starting the program takes longer than a training step


def _depth(icon: Icon) -> Signal:
    return maps.depth(icon.sprite)


def _thermal(icon: Icon) -> Signal:
    return maps.thermal(icon.sprite, icon.name, icon.seed, icon.id)


def _video(icon: Icon) -> Signal:
    return motion.clip(icon.sprite, icon.motion, len(icon.sprite))


def _imu(icon: Icon) -> Signal:
    return motion.imu(icon.motion, icon.seed, icon.id)


FIELDS: Mapping[str, Callable[[Icon], Signal]] = {
    "audio": _audio,
    "depth": _depth,
    "thermal": _thermal,
    "video": _video,
    "imu": _imu,
}
"""Name of a modality -> how it is made of an icon."""


@dataclass(frozen=True, kw_only=True)
class ModalitiesConfig(SourceConfig):
    """OpenMoji icons and their names with derived views of each: ``Sample.meta["modalities"]``.

    Attributes:
        modalities: Which views: audio (the name, spoken), depth, thermal, video (a clip of the icon moving), imu (a
            sensor on the moving icon). All but video's pixels are simulated; the names and icons are real.
        pairing: ``all``: every item has all of them and its name. ``one``: every training item has one only, or its
            name alone, by a hash of its id, so that no two of them ever describe the same training image.
        picture: ``icon`` as it is, or ``frame``: the middle of its clip, moved and turned.
        voice: ``simulated`` (letters as sounds), ``espeak-ng`` (the program must be installed), or ``auto``: espeak-ng
            where it is installed.
        size, split_scheme, language: As of ``data=openmoji``.
        seed: Of voices, noise and motion.
    """

    kind: ClassVar[str] = "openmoji-modalities"
    modalities: list[str] = field(default_factory=lambda: ["audio", "depth", "thermal", "imu"])
    pairing: Literal["all", "one"] = "all"
    picture: Literal["icon", "frame"] = "icon"
    voice: speech.Voice = "auto"
    size: int | None = None
    split_scheme: Literal["random", "compositional"] = "random"
    language: str = "en"
    seed: int = 0

    def open(self, image_size: int | None) -> Modalities:
        return Modalities(self, self.size or image_size or DEFAULT_SIZE)


class Modalities:
    """See `ModalitiesConfig`. Ids, splits and names are those of ``data=openmoji``.

    Raises:
        ConfigError: An unknown modality, or a voice that is not installed.
        MissingExtra: A package that carries the icons or the names is not installed.
    """

    name = "openmoji-modalities"
    licence = LICENCE
    max_bad = 0

    def __init__(self, config: ModalitiesConfig, size: int = DEFAULT_SIZE) -> None:
        for name in config.modalities:
            if name not in FIELDS:
                raise ConfigError(f"data.modalities: unknown modality {name!r}{near(name, FIELDS)}")
        if len(set(config.modalities)) != len(config.modalities):
            raise ConfigError(f"data.modalities = {list(config.modalities)} names one twice")
        if config.seed < 0:
            raise ConfigError(f"data.seed = {config.seed} must not be negative")
        self.config = config
        self.size = size
        self.voice = speech.resolve_voice(config.voice) if "audio" in config.modalities else "none"
        self.icons = OpenMoji(OpenMojiConfig(split_scheme=config.split_scheme, language=config.language), size)
        self._train = frozenset(self.icons.ids("train"))
        plain = {
            "modalities": sorted(config.modalities),
            "pairing": config.pairing,
            "picture": config.picture,
            "voice": self.voice,
            "seed": config.seed,
        }
        self.version = f"{self.icons.version}/modalities{RULES}/{json.dumps(plain, sort_keys=True)}"

    def ids(self, split: str) -> list[str]:
        """Return the hexcodes of a split, ordered."""
        return self.icons.ids(split)

    def attributes(self, id: str) -> dict[str, str]:
        """As ``data=openmoji``: role, skin tone and gender."""
        return self.icons.attributes(id)

    def names(self, split: str) -> list[str]:
        """The names of a split in the order of its ids."""
        return self.icons.names(split)

    def given(self, id: str) -> tuple[str, ...]:
        """What an item has beside its image: ``text`` and modalities."""
        all_of_them = ("text", *self.config.modalities)
        if self.config.pairing == "all" or id not in self._train:
            return all_of_them
        return (all_of_them[stable_hash("pairing", self.config.seed, id) % len(all_of_them)],)

    def icon(self, id: str) -> Icon:
        """What the views of an item are derived from."""
        known = self.icons.text_sample(id).meta
        return Icon(
            id=id,
            name=str(known["name"]),
            role=str(known["cluster"]),
            sprite=maps.cut_out(self.icons.images([id])[0]),
            voice=self.voice,
            seed=self.config.seed,
        )

    def signals(self, id: str) -> LazySignals:
        """The views of an item by name, made when they are read."""
        given = self.given(id)

        def maker(make: Callable[[Icon], Signal]) -> Callable[[], Signal]:
            return lambda: make(self.icon(id))

        return LazySignals({name: maker(FIELDS[name]) for name in self.config.modalities if name in given})

    def text_sample(self, id: str) -> Sample:
        """Return the sample without its image: the name (unless it has another companion), and ``meta`` as of
        ``data=openmoji`` with ``modalities`` (name -> Signal) and ``motion`` (the gait, where it moves)."""
        known = self.icons.text_sample(id)
        meta: dict[str, Any] = {**known.meta, "modalities": self.signals(id)}
        if {"video", "imu"} & set(self.config.modalities) or self.config.picture == "frame":
            meta["motion"] = motion.motion_of(str(known.meta["cluster"]), id, self.config.seed).gait
        return replace(known, texts=known.texts if "text" in self.given(id) else (), meta=meta)

    def sample(self, id: str) -> Sample:
        """Return the icon on white at ``size`` pixels with all it has."""
        from PIL import Image

        return replace(self.text_sample(id), image=Image.fromarray(self.images([id])[0]))

    def images(self, ids: Sequence[str]) -> NDArray[np.uint8]:
        """Return the pictures ``[n, size, size, 3]``, RGB."""
        if self.config.picture == "icon":
            return self.icons.images(ids)
        middle = motion.SECONDS / 2
        icons = [self.icon(id) for id in ids]
        frames = [motion.frame(icon.sprite, icon.motion, middle, self.size) for icon in icons]
        return np.stack(frames) if frames else np.empty((0, self.size, self.size, 3), np.uint8)

    def prepare(self) -> None:
        """Render now what is not cached yet, so that no worker has to."""
        self.icons.prepare()
