"""Simulated items with labels: words in noise, spectra of materials, X-ray and infrared pictures, series, graphs,
sentences. What each simulation leaves out is said in docs/families/meta-transformer.md."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from zoo.data.sample import Sample, stable_hash
from zoo.errors import ConfigError
from zoo_modalities.data import speech
from zoo_modalities.data.labelled import Generated, GeneratedConfig
from zoo_modalities.data.signal import Signal
from zoo_modalities.meta_transformer.graphs import Graph

Draw = np.random.Generator
Map = NDArray[np.float64]


def _sample(id: str, label: str, modality: str, values: NDArray[Any], rate: float | None = None, **meta: Any) -> Sample:
    kept = values if values.dtype == np.uint8 else values.astype(np.float32)
    return Sample(id, None, (label,), {"label": label, "modalities": {modality: Signal(kept, rate)}, **meta})


# -- sound ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SpokenDigitsConfig(GeneratedConfig):
    """One second of sound: a number word by the synthesizer of letters, in noise.

    Attributes:
        noise: Deviation of the noise over the word's.
        latest: Latest start of the word, seconds.
    """

    kind: ClassVar[str] = "spoken-digits"
    labels: ClassVar[tuple[str, ...]] = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

    noise: float = 0.1
    latest: float = 0.2

    def open(self, image_size: int | None) -> SpokenDigits:
        if not 0 <= self.latest < 1 or self.noise < 0:
            raise ConfigError(
                f"data.latest = {self.latest} must be within 0 and 1, data.noise = {self.noise} 0 or more"
            )
        return SpokenDigits(self, self.noise, self.latest)


class SpokenDigits(Generated):
    """See `SpokenDigitsConfig`: one of four voices, any loudness within a factor 2."""

    config: SpokenDigitsConfig

    def make(self, id: str, label: str, draw: Draw) -> Sample:
        word = speech.simulated(label, int(draw.integers(len(speech.PITCHES)))).values[: speech.RATE]
        start = min(int(draw.uniform() * self.config.latest * speech.RATE), speech.RATE - len(word))
        wave = np.zeros(speech.RATE)
        wave[start : start + len(word)] = word
        wave += self.config.noise * float(word.std()) * draw.standard_normal(len(wave))
        wave *= draw.uniform(0.5, 1) / max(1e-6, float(np.abs(wave).max()))
        return _sample(id, label, "audio", wave, float(speech.RATE))


# -- spectra -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MaterialsConfig(GeneratedConfig):
    """Squares of hyper-spectral pixels; the label is the material in the middle.

    Attributes:
        bands: Of the spectrum, from 0.4 to 2.5 micrometres.
        pixels: Side of the square.
        noise: Deviation of the noise of a reflectance.
    """

    kind: ClassVar[str] = "materials"
    labels: ClassVar[tuple[str, ...]] = ("vegetation", "soil", "water", "asphalt", "roof", "snow")

    bands: int = 200
    pixels: int = 7
    noise: float = 0.04

    def open(self, image_size: int | None) -> Materials:
        if self.bands < 2 or self.pixels < 1 or self.pixels % 2 == 0:
            raise ConfigError(f"data.bands = {self.bands}, data.pixels = {self.pixels}: expected 2 or more, and odd")
        return Materials(self, self.bands, self.pixels, self.noise)


class Materials(Generated):
    """See `MaterialsConfig`: smooth spectra by hand, linear mixing, one illumination for a square, water's bands of the
    air left out."""

    config: MaterialsConfig

    def make(self, id: str, label: str, draw: Draw) -> Sample:
        c = self.config
        waves = np.linspace(0.4, 2.5, c.bands)
        table = np.stack([_spectrum(name, waves) for name in self.labels])  # [K, bands]
        other = table[int(draw.integers(len(table)))]
        own = table[self.labels.index(label)] * (1 + 0.1 * draw.standard_normal())
        share = draw.uniform(0.0, 1.0, (c.pixels, c.pixels))
        share[c.pixels // 2, c.pixels // 2] = draw.uniform(0.65, 1.0)
        mixed = share * own[:, None, None] + (1 - share) * other[:, None, None]  # [bands, h, w]
        cube = draw.uniform(0.5, 1.2) * mixed + c.noise * draw.standard_normal(mixed.shape)
        return _sample(id, label, "hyperspectral", np.clip(cube, 0.0, 1.0))


def _spectrum(name: str, waves: Map) -> Map:
    """Reflectance by wavelength in micrometres, after the look of textbook curves."""

    def bump(middle: float, width: float) -> Map:
        return np.exp(-0.5 * ((waves - middle) / width) ** 2)

    edge = 1 / (1 + np.exp(-(waves - 0.71) / 0.02))  # vegetation's red edge
    damp = 1 - 0.5 * bump(1.45, 0.08) - 0.6 * bump(1.93, 0.1)  # water in leaves
    curves: dict[str, Map] = {
        "vegetation": (0.05 + 0.06 * bump(0.55, 0.03) + 0.45 * edge) * damp * np.exp(-0.3 * (waves - 0.7).clip(0)),
        "soil": 0.1 + 0.3 * (1 - np.exp(-1.5 * (waves - 0.4))) - 0.08 * bump(2.2, 0.04),
        "water": 0.12 * np.exp(-4 * (waves - 0.4)),
        "asphalt": 0.1 + 0.03 * waves,
        "roof": 0.1 + 0.25 / (1 + np.exp(-(waves - 0.6) / 0.03)) + 0.05 * waves,
        "snow": 0.9 * np.exp(-1.6 * (waves - 0.8).clip(0)) * (1 - 0.4 * bump(1.5, 0.1)),
    }
    return curves[name]


# -- pictures ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PicturesConfig(GeneratedConfig):
    """Fields of simulated pictures.

    Attributes:
        size: Pixels of a side.
        noise: Deviation of the noise of a pixel in [0, 1].
    """

    size: int = 64
    noise: float = 0.03


@dataclass(frozen=True, kw_only=True)
class XRayConfig(PicturesConfig):
    """X-ray pictures of a chest: nothing in it, a round shadow in a lung, or a lung filled from below."""

    kind: ClassVar[str] = "xray-objects"
    labels: ClassVar[tuple[str, ...]] = ("clear", "nodule", "fluid")

    def open(self, image_size: int | None) -> XRays:
        return XRays(self, self.size, self.noise)


def _plane(size: int) -> tuple[Map, Map]:
    """x and y of pixels in -1..1, y down."""
    side = (np.arange(size) + 0.5) / size * 2 - 1
    y, x = np.meshgrid(side, side, indexing="ij")
    return x, y


class XRays(Generated):
    """See `XRayConfig`: what passes through soft ellipses of attenuation (Beer-Lambert), without scatter."""

    config: XRayConfig

    def make(self, id: str, label: str, draw: Draw) -> Sample:
        c = self.config
        x, y = _plane(c.size)
        x, y = x + draw.uniform(-0.08, 0.08), y + draw.uniform(-0.08, 0.08)

        def ellipse(cx: float, cy: float, rx: float, ry: float, soft: float = 0.08) -> Map:
            return 1 / (1 + np.exp((np.hypot((x - cx) / rx, (y - cy) / ry) - 1) / soft))

        wide, tall = draw.uniform(0.28, 0.34), draw.uniform(0.5, 0.62)
        lungs = [(side * draw.uniform(0.38, 0.44), -0.05, wide, tall) for side in (-1, 1)]
        inside = sum(ellipse(*lung) for lung in lungs)
        attenuation = 1.6 * ellipse(0, 0.1, 0.95, 1.0) - 1.0 * inside  # the body, and air in it
        attenuation += 0.9 * np.exp(-((x / 0.1) ** 2)) + 0.6 * ellipse(0.15, 0.3, 0.3, 0.28)  # spine and heart
        ribs = np.sin(2 * np.pi * (y + 0.35 * np.abs(x)) * draw.uniform(2.8, 3.4) + draw.uniform(0, 6))
        attenuation += 0.2 * ribs.clip(0.3) * inside
        cx, cy, rx, ry = lungs[int(draw.integers(2))]
        if label == "nodule":
            angle, far, r = draw.uniform(0, 2 * np.pi), draw.uniform(0, 0.55), draw.uniform(0.08, 0.14)
            spot = (cx + far * rx * np.cos(angle), cy + far * ry * np.sin(angle))
            attenuation += draw.uniform(0.7, 1.0) * ellipse(*spot, r, r, 0.2)
        elif label == "fluid":
            level = cy + ry * draw.uniform(-0.1, 0.45)
            attenuation += draw.uniform(0.8, 1.1) * ellipse(cx, cy, rx, ry) / (1 + np.exp(-(y - level) / 0.03))
        picture = 1 - np.exp(-0.8 * attenuation.clip(0)) + c.noise * draw.standard_normal(x.shape)
        return _sample(id, label, "xray", picture.clip(0, 1))


@dataclass(frozen=True, kw_only=True)
class InfraredConfig(PicturesConfig):
    """Infrared pictures of a person, an animal, a car, or nothing but warm ground."""

    kind: ClassVar[str] = "infrared-objects"
    labels: ClassVar[tuple[str, ...]] = ("person", "animal", "car", "nothing")

    def open(self, image_size: int | None) -> Infrareds:
        return Infrareds(self, self.size, self.noise)


BODIES: dict[str, tuple[tuple[float, float, float, float, float], ...]] = {
    "person": (
        (0, -0.7, 0.16, 0.18, 1.0),
        (0, -0.2, 0.26, 0.4, 0.8),
        (-0.12, 0.5, 0.1, 0.4, 0.7),
        (0.12, 0.5, 0.1, 0.4, 0.7),
    ),
    "animal": (
        (0, 0, 0.55, 0.24, 0.9),
        (0.62, -0.28, 0.2, 0.16, 1.0),
        (-0.4, 0.4, 0.07, 0.3, 0.6),
        (-0.2, 0.4, 0.07, 0.3, 0.6),
        (0.25, 0.4, 0.07, 0.3, 0.6),
        (0.42, 0.4, 0.07, 0.3, 0.6),
    ),
    "car": (
        (0, 0.1, 0.85, 0.24, 0.35),
        (-0.05, -0.2, 0.45, 0.22, 0.3),
        (-0.5, 0.36, 0.17, 0.17, 0.9),
        (0.5, 0.36, 0.17, 0.17, 0.9),
        (0.7, 0.08, 0.16, 0.14, 1.0),
    ),
    "nothing": (),
}
"""Ellipses of a body seen from the side: middle, radii, warmth."""


class Infrareds(Generated):
    """See `InfraredConfig`: soft ellipses of warmth at any place, size and side, on ground with warm patches."""

    config: InfraredConfig

    def make(self, id: str, label: str, draw: Draw) -> Sample:
        c = self.config
        x, y = _plane(c.size)
        ground = 0.15 + 0.1 * y * draw.uniform(-1, 1)
        for _ in range(3):  # stones that kept the sun's warmth
            cx, cy = draw.uniform(-1, 1, 2)
            ground = ground + draw.uniform(0.05, 0.25) * np.exp(-(((x - cx) ** 2 + (y - cy) ** 2) / 0.06))
        size, side = draw.uniform(0.45, 0.8), 1 if draw.uniform() < 0.5 else -1
        cx, cy = draw.uniform(-0.9 + size, 0.9 - size, 2) if size < 0.9 else (0.0, 0.0)
        warmth = np.zeros_like(x)
        for ex, ey, rx, ry, warm in BODIES[label]:
            far = np.hypot((x - cx - side * size * ex) / (size * rx), (y - cy - size * ey) / (size * ry))
            warmth = np.maximum(warmth, warm / (1 + np.exp((far - 1) / 0.15)))
        picture = ground + draw.uniform(0.5, 0.8) * warmth + c.noise * draw.standard_normal(x.shape)
        return _sample(id, label, "infrared", picture.clip(0, 1))


# -- series --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ProcessesConfig(GeneratedConfig):
    """Time series of several channels that follow one kind of process, each with its own pace.

    Attributes:
        channels: Of the series.
        steps: Its length.
        ahead: Further steps of the first channel, which ``meta["future"]`` holds.
        noise: Deviation of the noise of a value; values have deviations near 1.
    """

    kind: ClassVar[str] = "processes"
    labels: ClassVar[tuple[str, ...]] = ("sine", "square", "saw", "chirp", "walk", "spikes")

    channels: int = 7
    steps: int = 96
    ahead: int = 24
    noise: float = 0.3

    def open(self, image_size: int | None) -> Processes:
        if min(self.channels, self.steps, self.ahead) < 1:
            raise ConfigError("data.channels, data.steps and data.ahead must be 1 or more")
        return Processes(self, self.channels, self.steps, self.ahead, self.noise)


class Processes(Generated):
    """See `ProcessesConfig`."""

    config: ProcessesConfig

    def make(self, id: str, label: str, draw: Draw) -> Sample:
        c = self.config
        rows = np.stack([_process(label, c.steps + c.ahead, draw) for _ in range(c.channels)])
        rows = rows + c.noise * draw.standard_normal(rows.shape)
        future = rows[0, c.steps :].astype(np.float32)
        return _sample(id, label, "time-series", rows[:, : c.steps], future=future)


def _process(label: str, steps: int, draw: Draw) -> Map:
    time, period, phase = np.arange(steps), draw.uniform(12, 32), draw.uniform()
    turns = time / period + phase
    if label == "walk":
        walk = np.cumsum(draw.standard_normal(steps))
        steady: Map = (walk - walk.mean()) / max(1e-6, float(walk.std()))
        return steady
    if label == "spikes":
        spikes: Map = 4.0 * (draw.uniform(size=steps) < 1 / period) * draw.choice([-1.0, 1.0], steps)
        return spikes
    shapes: dict[str, Callable[[], Map]] = {
        "sine": lambda: np.sqrt(2) * np.sin(2 * np.pi * turns),
        "square": lambda: np.where(turns % 1 < 0.5, 1.0, -1.0),
        "saw": lambda: np.sqrt(3) * (2 * (turns % 1) - 1),
        "chirp": lambda: (
            np.sqrt(2) * np.sin(2 * np.pi * (phase + time / 40 + (time / steps) ** 2 * steps / period / 2))
        ),
    }
    return shapes[label]()


# -- graphs --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class GraphsConfig(GeneratedConfig):
    """Graphs of 8 to 16 nodes in any order; all nodes and edges have the same value, so that only the structure tells.

    Attributes:
        chords: Edges that are added between nodes drawn at random, at most.
    """

    kind: ClassVar[str] = "graph-families"
    labels: ClassVar[tuple[str, ...]] = ("ring", "path", "star", "tree", "grid", "clique")

    chords: int = 1

    def open(self, image_size: int | None) -> Graphs:
        return Graphs(self, self.chords)


class Graphs(Generated):
    """See `GraphsConfig`."""

    config: GraphsConfig

    def make(self, id: str, label: str, draw: Draw) -> Sample:
        n = int(draw.integers(8, 17))
        n = 4 * (n // 4) if label == "grid" else min(n, 12) if label == "clique" else n
        edges: list[tuple[int, int]]
        if label == "ring":
            edges = [(i, (i + 1) % n) for i in range(n)]
        elif label == "path":
            edges = [(i, i + 1) for i in range(n - 1)]
        elif label == "star":
            edges = [(0, i) for i in range(1, n)]
        elif label == "tree":
            edges = [((i - 1) // 2, i) for i in range(1, n)]
        elif label == "grid":
            edges = [(i, i + 1) for i in range(n) if i % 4 < 3] + [(i, i + 4) for i in range(n) if i + 4 < n]
        else:
            edges = [(i, j) for i in range(n) for j in range(i)]
        known = {frozenset(edge) for edge in edges}
        for _ in range(int(draw.integers(self.config.chords + 1))):
            a, b = (int(v) for v in draw.choice(n, 2, replace=False))
            if frozenset((a, b)) not in known:
                edges.append((a, b))
        order = draw.permutation(n)
        ends = order[np.array(edges, np.int64)].T  # [2, m]
        graph = Graph(np.zeros((n, 1), np.int64), ends, np.zeros((ends.shape[1], 1), np.int64))
        return Sample(id, None, (label,), {"label": label, "modalities": {"graph": graph}})


# -- text ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SentencesConfig(GeneratedConfig):
    """Short sentences that praise or complain; half of them say it by a negation."""

    kind: ClassVar[str] = "sentences"
    labels: ClassVar[tuple[str, ...]] = ("praise", "complaint")

    def open(self, image_size: int | None) -> Sentences:
        return Sentences(self)


THINGS = (
    "soup",
    "cake",
    "hotel",
    "film",
    "book",
    "song",
    "train",
    "car",
    "garden",
    "dog",
    "cat",
    "sun",
    "house",
    "bread",
)
GOOD = ("good", "lovely", "great", "warm", "fresh", "happy", "beautiful", "sweet")
BAD = ("bad", "awful", "cold", "broken", "angry", "sad", "ugly", "bitter")
OPENINGS = ("the {} was {}", "my {} is {}", "we found the {} {}", "this {} seems {}", "i call that {} {}")


class Sentences(Generated):
    """See `SentencesConfig`. No sentence is in two splits: which one it is in follows from its hash."""

    def make(self, id: str, label: str, draw: Draw) -> Sample:
        training = id.startswith("train")
        while True:
            negated = draw.uniform() < 0.5
            word = str(draw.choice(GOOD if (label == "praise") != negated else BAD))
            said = str(draw.choice(OPENINGS)).format(draw.choice(THINGS), f"not {word}" if negated else word)
            place = stable_hash("sentence", said) % 10  # 0 val, 1 and 2 test, else train
            if training == (place > 2) and (training or id.startswith("val") == (place == 0)):
                break
        return Sample(id, None, (said,), {"label": label, "modalities": {}})
