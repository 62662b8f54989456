"""Sound, hyper-spectral pixels, time series, motion sensors and tables: one token a patch, band, step or column."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from zoo.data.sample import Sample
from zoo.data_tokenizers.base import DataTokenizer, DataTokenizerConfig, DataTokens, Sequenced
from zoo.errors import DataError
from zoo_modalities.data.signal import Signal
from zoo_modalities.fbank import fbank
from zoo_modalities.meta_transformer.reading import example_samples, example_signal, item_of, values_of

SINUSOIDS = 5000
"""Rows of the released table of positions."""
CALENDAR = (("month", 13), ("day", 32), ("weekday", 7), ("hour", 24), ("minute", 4))
"""Columns of a calendar in the order of the marks, and rows of each one's table (Data2Seq/Time_Series.py)."""


# -- sound ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class AudioTokensConfig(DataTokenizerConfig):
    """Overlapping patches of a log mel spectrogram (the card's section 2; AST, arXiv 2104.01778, section 2.1).

    Attributes:
        rate: Samples a second; a sound of another rate is refused.
        bins: Mel bands.
        frames: Windows of 25 ms every 10 ms; shorter sounds get zeros behind them before they are normalised, longer
            ones cut (AST on Speech Commands: 128).
        patch: Side of a patch.
        stride: Between patches, in both directions.
        mean, std: Of the log energies: (x - mean) / (2 std), as AST; defaults of Speech Commands V2.
        cls: Put a learned class token first.
    """

    modality: ClassVar[str] = "audio"

    rate: int = 16000
    bins: int = 128
    frames: int = 128
    patch: int = 16
    stride: int = 10
    mean: float = -6.845978
    std: float = 5.5654526
    cls: bool = True

    def __post_init__(self) -> None:
        if self.patch > min(self.bins, self.frames) or self.stride < 1:
            raise ValueError(f"patch = {self.patch} must fit into bins = {self.bins} and frames = {self.frames}")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches in frequency and in time."""
        return ((self.bins - self.patch) // self.stride + 1, (self.frames - self.patch) // self.stride + 1)

    def build(self, width: int) -> AudioTokens:
        return AudioTokens(width, self)

    def collate(
        self, samples: Sequence[Sample], train: bool = False, draws: Sequence[int] | None = None, seed: int = 0
    ) -> dict[str, Tensor]:
        """``audio`` [B, bins, frames], normalised."""
        least = self.rate * 25 // 1000
        rows = []
        for sample in samples:
            wave = values_of(sample, "audio", 1, rate=self.rate, least=least)
            energies = fbank(torch.from_numpy(wave - wave.mean()), self.rate, self.bins)[: self.frames]  # [t, bins]
            energies = nn.functional.pad(energies, (0, 0, 0, self.frames - len(energies)))
            rows.append((energies.T - self.mean) / (2 * self.std))
        return {"audio": torch.stack(rows)}

    def example(self, batch_size: int = 1) -> dict[str, Tensor]:
        return {"audio": torch.zeros(batch_size, self.bins, self.frames)}

    def examples(self, count: int) -> list[Sample]:
        return example_samples(count, "audio", self.rate, rate=float(self.rate))


class AudioTokens(DataTokenizer):
    """``patch``: Conv2d(1, D, patch, stride); frequency first, as transformers' ``ASTPatchEmbeddings``."""

    def __init__(self, width: int, config: AudioTokensConfig) -> None:
        super().__init__()
        c = config
        self.width, self.cls = width, c.cls
        self.patch = nn.Conv2d(1, width, c.patch, c.stride)
        patches = c.grid[0] * c.grid[1]
        self.sequence = Sequenced(width, patches, cls=c.cls, positions=True)
        self.tokens = patches + int(c.cls)

    def forward(self, inputs: Mapping[str, Tensor]) -> DataTokens:
        """[B, bins, frames] -> [B, (1 +) patches, D]."""
        patches = self.patch(inputs["audio"][:, None]).flatten(2).transpose(1, 2)  # [B, f t, D]
        return DataTokens(self.sequence(patches)[0])


# -- hyper-spectral pixels -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class HyperspectralTokensConfig(DataTokenizerConfig):
    """One token a band: the pixels around the one to be classified in this band and its neighbours (the release's
    Hyper-spectrum/metatransformer.py, after SpectralFormer, arXiv 2107.02988, section III-B).

    Attributes:
        bands: Of the spectrum (Indian Pines: 200).
        pixels: Side of the square around the pixel; odd.
        near: Bands a token reads, itself in the middle; odd. The first and the last are neighbours.
        dropout: Of the tokens, in training.
    """

    modality: ClassVar[str] = "hyperspectral"

    bands: int = 200
    pixels: int = 7
    near: int = 3
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.near % 2 == 0 or self.near > self.bands:
            raise ValueError(f"near = {self.near} must be odd and at most bands = {self.bands}")

    def build(self, width: int) -> HyperspectralTokens:
        return HyperspectralTokens(width, self.bands, self.near * self.pixels**2, self.dropout)

    def collate(
        self, samples: Sequence[Sample], train: bool = False, draws: Sequence[int] | None = None, seed: int = 0
    ) -> dict[str, Tensor]:
        """``hyperspectral`` [B, bands, near * pixels²]: groups of bands."""
        rows = []
        for sample in samples:
            cube = values_of(sample, "hyperspectral", 3)
            if cube.shape != (self.bands, self.pixels, self.pixels):
                raise DataError(
                    f"sample {sample.id!r}: hyperspectral: the values have shape {cube.shape}, expected"
                    f" {(self.bands, self.pixels, self.pixels)}: bands, height, width (data_tokenizer.bands, .pixels)"
                )
            rows.append(torch.from_numpy(cube))
        return {"hyperspectral": band_groups(torch.stack(rows), self.near)}

    def example(self, batch_size: int = 1) -> dict[str, Tensor]:
        return {"hyperspectral": torch.zeros(batch_size, self.bands, self.near * self.pixels**2)}

    def examples(self, count: int) -> list[Sample]:
        return example_samples(count, "hyperspectral", self.bands, self.pixels, self.pixels)


def band_groups(cubes: Tensor, near: int) -> Tensor:
    """Cubes [B, bands, h, w] -> [B, bands, near h w]: with each band its neighbours, lowest first, around the ends."""
    half = near // 2
    flat = cubes.flatten(2)  # [B, bands, h w]
    return torch.cat([flat.roll(half - i, 1) for i in range(near)], 2)


class HyperspectralTokens(DataTokenizer):
    """``patch``: Linear(values of a group, D), a class token, positions that start as N(0, 1), dropout."""

    def __init__(self, width: int, bands: int, values: int, dropout: float) -> None:
        super().__init__()
        self.width, self.cls, self.tokens = width, True, bands + 1
        self.patch = nn.Linear(values, width)
        self.sequence = Sequenced(width, bands, cls=True, positions=True, std=1.0)
        self.dropout = nn.Dropout(dropout)

    def forward(self, inputs: Mapping[str, Tensor]) -> DataTokens:
        """[B, bands, values] -> [B, 1 + bands, D]."""
        x, _ = self.sequence(self.patch(inputs["hyperspectral"]))
        return DataTokens(self.dropout(x))


# -- series --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SeriesTokensConfig(DataTokenizerConfig):
    """One token a time step (Data2Seq/Time_Series.py, ``DataEmbedding``), or one a patch of a channel
    (``PatchEmbedding``).

    Attributes:
        channels: Of the series (ETT: 7).
        steps: Its length (96).
        window: Steps that are averaged before all else.
        calendar: ``none``, ``fixed`` (sinusoid tables of month, day, weekday, hour and quarter of an hour, which
            samples carry as ``calendar`` [5, steps]) or ``features`` (``calendar`` [4, steps] of numbers, one matrix).
        patch: Steps of a patch; 0 = a token a step.
        stride: Between patches.
        cls: Put a learned class token first.
        dropout: Of the tokens, in training.
    """

    modality: ClassVar[str] = "time-series"

    channels: int = 7
    steps: int = 96
    window: int = 1
    calendar: Literal["none", "fixed", "features"] = "none"
    patch: int = 0
    stride: int = 0
    cls: bool = False
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.window < 1 or self.steps % self.window:
            raise ValueError(f"steps = {self.steps} must be a multiple of window = {self.window}")
        if bool(self.patch) != bool(self.stride) or self.patch > self.length:
            raise ValueError(f"patch = {self.patch} and stride = {self.stride}: give both, within {self.length} steps")
        if self.patch and self.calendar != "none":
            raise ValueError("patches have no calendar: set calendar=none or patch=0 stride=0")

    @property
    def length(self) -> int:
        """Steps after averaging."""
        return self.steps // self.window

    @property
    def patches(self) -> int:
        """Patches of a channel: the last value is repeated ``stride`` times behind the series."""
        return (self.length + self.stride - self.patch) // self.stride + 1 if self.patch else 0

    def build(self, width: int) -> SeriesTokens:
        return SeriesTokens(width, self)

    def read(self, sample: Sample) -> NDArray[np.float32]:
        """The values [channels, steps] of a sample."""
        values = values_of(sample, self.modality, 2, rows=self.channels)
        if values.shape[1] != self.steps:
            raise DataError(
                f"sample {sample.id!r}: {self.modality}: {values.shape[1]} steps, expected {self.steps}"
                " (data_tokenizer.steps)"
            )
        return values

    def collate(
        self, samples: Sequence[Sample], train: bool = False, draws: Sequence[int] | None = None, seed: int = 0
    ) -> dict[str, Tensor]:
        """``series`` [B, T, channels], and ``calendar`` [B, T, 5 or 4] where it is read."""
        rows = torch.from_numpy(np.stack([self.read(sample) for sample in samples]))
        batch = {"series": rows.view(len(rows), self.channels, self.length, self.window).mean(3).transpose(1, 2)}
        if self.calendar != "none":
            marks = [self._calendar(sample) for sample in samples]
            batch["calendar"] = torch.from_numpy(np.stack(marks))[:, :: self.window]
        return batch

    def _calendar(self, sample: Sample) -> NDArray[Any]:
        fixed = self.calendar == "fixed"
        marks = values_of(sample, "calendar", 2, rows=len(CALENDAR) if fixed else 4)
        if marks.shape[1] != self.steps:
            raise DataError(f"sample {sample.id!r}: calendar: {marks.shape[1]} steps, expected {self.steps}")
        if not fixed:
            return marks.T
        whole = marks.T.astype(np.int64)
        for column, (name, rows) in enumerate(CALENDAR):
            if (whole[:, column] < 0).any() or (whole[:, column] >= rows).any():
                raise DataError(f"sample {sample.id!r}: calendar: a {name} is not within 0 to {rows - 1}")
        return whole

    def example(self, batch_size: int = 1) -> dict[str, Tensor]:
        batch = {"series": torch.zeros(batch_size, self.length, self.channels)}
        if self.calendar == "fixed":
            batch["calendar"] = torch.zeros(batch_size, self.length, len(CALENDAR), dtype=torch.long)
        elif self.calendar == "features":
            batch["calendar"] = torch.zeros(batch_size, self.length, 4)
        return batch

    def examples(self, count: int) -> list[Sample]:
        samples = example_samples(count, self.modality, self.channels, self.steps)
        if self.calendar != "none":
            marks = Signal(np.zeros((len(CALENDAR) if self.calendar == "fixed" else 4, self.steps), np.float32))
            return [replace(s, meta={"modalities": {**s.meta["modalities"], "calendar": marks}}) for s in samples]
        return samples


@dataclass(frozen=True, kw_only=True)
class IMUTokensConfig(SeriesTokensConfig):
    """A motion sensor: a series of acceleration and rotation, averaged over windows.

    Attributes:
        rate: Samples a second; a recording of another rate is refused.
        units: What each channel is divided by: m/s² and rad/s to numbers near 1.
    """

    modality: ClassVar[str] = "imu"

    channels: int = 6
    steps: int = 2000
    window: int = 20
    rate: float = 400.0
    units: list[float] = field(default_factory=lambda: [10.0, 10.0, 10.0, 5.0, 5.0, 5.0])

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.units) != self.channels or not all(unit > 0 for unit in self.units):
            raise ValueError(f"units = {self.units}: expected {self.channels} numbers above 0, one a channel")

    def read(self, sample: Sample) -> NDArray[np.float32]:
        """The first ``steps`` of a recording, in units."""
        values = values_of(sample, "imu", 2, rate=self.rate, rows=self.channels, least=self.steps)[:, : self.steps]
        return (values / np.array(self.units, np.float32)[:, None]).astype(np.float32)

    def examples(self, count: int) -> list[Sample]:
        return example_samples(count, "imu", self.channels, self.steps, rate=self.rate)


def sinusoid(rows: int, width: int) -> Tensor:
    """The fixed table [rows, width]: sines in the even places, cosines in the odd ones, of position over
    10000^(i/D)."""
    place = torch.arange(rows).float()[:, None]
    frequency = (torch.arange(0, width, 2).float() * -(math.log(10000.0) / width)).exp()
    table = torch.zeros(rows, width)
    table[:, 0::2] = torch.sin(place * frequency)
    table[:, 1::2] = torch.cos(place * frequency)[:, : width // 2]
    return table


class SeriesTokens(DataTokenizer):
    """``value``: Conv1d of kernel 3, around the ends and without bias (or Linear of a patch), plus the sinusoid of the
    step, plus the calendar's; then dropout. A class token stands before them without a position of its own."""

    def __init__(self, width: int, config: SeriesTokensConfig) -> None:
        super().__init__()
        c = self.config = config
        self.width, self.cls = width, c.cls
        self.value: nn.Module
        if c.patch:
            self.value = nn.Linear(c.patch, width, bias=False)
            length = c.patches
        else:
            convolution = nn.Conv1d(c.channels, width, 3, padding=1, padding_mode="circular", bias=False)
            nn.init.kaiming_normal_(convolution.weight, mode="fan_in", nonlinearity="leaky_relu")
            self.value, length = convolution, c.length
        self.register_buffer("positions", sinusoid(length, width), persistent=False)
        self.calendar = nn.Linear(4, width, bias=False) if c.calendar == "features" else None
        if c.calendar == "fixed":
            tables = torch.cat([sinusoid(rows, width) for _, rows in CALENDAR])
            self.register_buffer("tables", tables, persistent=False)
        self.sequence = Sequenced(width, length, cls=c.cls, positions=False)
        self.dropout = nn.Dropout(c.dropout)
        self.tokens = (c.channels * c.patches if c.patch else c.length) + int(c.cls)

    def forward(self, inputs: Mapping[str, Tensor]) -> DataTokens:
        """[B, T, channels] -> [B, (1 +) T, D]; of patches [B, (1 +) channels patches, D], a channel after the other."""
        x, c = inputs["series"], self.config
        positions: Tensor = self.get_buffer("positions")
        if c.patch:
            padded = nn.functional.pad(x.transpose(1, 2), (0, c.stride), mode="replicate")  # [B, C, T + stride]
            tokens = self.value(padded.unfold(2, c.patch, c.stride)) + positions  # [B, C, patches, D]
            tokens = tokens.flatten(1, 2)
        else:
            tokens = self.value(x.transpose(1, 2)).transpose(1, 2) + positions  # [B, T, D]
        if self.calendar is not None:
            tokens = tokens + self.calendar(inputs["calendar"])
        elif c.calendar == "fixed":
            first = torch.tensor([0, *np.cumsum([rows for _, rows in CALENDAR])[:-1]], device=x.device)
            tokens = tokens + self.get_buffer("tables")[inputs["calendar"] + first].sum(2)
        tokens, _ = self.sequence(self.dropout(tokens))
        place = torch.arange(tokens.shape[1], device=x.device) - int(self.cls)
        return DataTokens(tokens, place=None if c.patch else place.clamp(min=-1).expand(len(x), -1))


# -- tables --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """A row of a table: what ``Sample.meta["modalities"]["tabular"]`` holds where it has columns of categories.

    Attributes:
        numbers: [numeric] float.
        categories: [columns] int, the number of each column's value; -1 where it is missing.
    """

    numbers: NDArray[Any]
    categories: NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class TabularTokensConfig(DataTokenizerConfig):
    """One token a column (the paper follows TabTransformer, arXiv 2012.06678; the release has no code of it).

    Attributes:
        numeric: Columns of numbers, each through a vector and a bias of its own; sources standardise them.
        categories: How many values each column of categories has.
        cls: Put a learned class token first.
        dropout: Of the tokens, in training.
    """

    modality: ClassVar[str] = "tabular"

    numeric: int = 30
    categories: list[int] = field(default_factory=list)
    cls: bool = True
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.numeric < 0 or not self.numeric + len(self.categories):
            raise ValueError("a row must have at least one column: numeric or categories")
        if any(values < 1 for values in self.categories):
            raise ValueError(f"categories = {self.categories}: a column has at least one value")

    def build(self, width: int) -> TabularTokens:
        return TabularTokens(width, self)

    def collate(
        self, samples: Sequence[Sample], train: bool = False, draws: Sequence[int] | None = None, seed: int = 0
    ) -> dict[str, Tensor]:
        """``numbers`` [B, numeric] and ``categories`` [B, columns] int64: 0 for a missing or an unknown value, else the
        value's number and 1."""
        numbers, categories = [], []
        for sample in samples:
            item = item_of(sample, "tabular")
            given = item.categories if isinstance(item, Row) else np.empty(0, np.int64)
            row = replace(sample, meta={"modalities": {"tabular": item.numbers}}) if isinstance(item, Row) else sample
            if len(given) != len(self.categories):
                raise DataError(
                    f"sample {sample.id!r}: tabular: {len(given)} columns of categories, expected"
                    f" {len(self.categories)} (data_tokenizer.categories)"
                )
            numbers.append(values_of(row, "tabular", 1, rows=self.numeric) if self.numeric else np.empty(0, np.float32))
            limits, values = np.array(self.categories, np.int64), np.asarray(given, np.int64)
            categories.append(np.where((values >= 0) & (values < limits), values + 1, 0))
        return {
            "numbers": torch.from_numpy(np.stack(numbers)),
            "categories": torch.from_numpy(np.stack(categories)),
        }

    def example(self, batch_size: int = 1) -> dict[str, Tensor]:
        return {
            "numbers": torch.zeros(batch_size, self.numeric),
            "categories": torch.zeros(batch_size, len(self.categories), dtype=torch.long),
        }

    def examples(self, count: int) -> list[Sample]:
        def row(i: int) -> Row:
            values = [(i + column) % (size + 1) - 1 for column, size in enumerate(self.categories)]
            return Row(example_signal(i, self.numeric, low=-1), np.array(values, np.int64))

        return [Sample(f"example-{i}", meta={"modalities": {"tabular": row(i)}}) for i in range(count)]


class TabularTokens(DataTokenizer):
    """``weight`` and ``bias`` of every numeric column, ``table`` of all categories, ``column`` of every column."""

    def __init__(self, width: int, config: TabularTokensConfig) -> None:
        super().__init__()
        c = config
        columns = c.numeric + len(c.categories)
        self.width, self.cls, self.tokens = width, c.cls, columns + int(c.cls)
        std = width**-0.5
        self.weight = nn.Parameter(std * torch.randn(c.numeric, width)) if c.numeric else None
        rows = sum(c.categories) + len(c.categories)
        self.table = nn.Embedding(rows, width, _weight=std * torch.randn(rows, width)) if rows else None
        first = torch.tensor([0, *np.cumsum([values + 1 for values in c.categories])[:-1]], dtype=torch.long)
        self.register_buffer("first", first[: len(c.categories)], persistent=False)
        self.column = nn.Parameter(std * torch.randn(columns, width))
        self.sequence = Sequenced(width, columns, cls=c.cls, positions=False)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, inputs: Mapping[str, Tensor]) -> DataTokens:
        """``numbers`` [B, n] and ``categories`` [B, m] -> [B, (1 +) n + m, D]."""
        parts = []
        if self.weight is not None:
            parts.append(inputs["numbers"][..., None] * self.weight)  # [B, n, D]
        if self.table is not None:
            parts.append(self.table(inputs["categories"] + self.get_buffer("first")))  # [B, m, D]
        tokens, _ = self.sequence(self.dropout(torch.cat(parts, 1) + self.column))
        return DataTokens(tokens)


__all__ = [
    "AudioTokensConfig",
    "HyperspectralTokensConfig",
    "IMUTokensConfig",
    "Row",
    "SeriesTokensConfig",
    "TabularTokensConfig",
    "band_groups",
    "sinusoid",
]
