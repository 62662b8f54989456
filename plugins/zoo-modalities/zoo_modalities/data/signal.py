"""What a sample carries of a modality: an array and how fast it was sampled, and what refuses a wrong one.

``Sample.meta["modalities"]`` maps names to signals:

=============  ======================  ==========================================================
name           shape and dtype         values
=============  ======================  ==========================================================
audio          [n] float32             mono waveform in -1..1; ``rate`` = samples a second
depth          [H, W] float32          disparity in 0..1, 1 the nearest
thermal        [H, W] float32          temperature in 0..1, 1 the warmest
video          [T, H, W, 3] uint8      RGB frames; ``rate`` = frames a second
imu            [6, T] float32          acceleration x, y, z (m/s²), rotation x, y, z (rad/s); ``rate``
=============  ======================  ==========================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zoo.errors import DataError


@dataclass(frozen=True, slots=True, eq=False)
class Signal:
    """An array of one modality.

    Attributes:
        values: As the table of this module says.
        rate: Samples or frames a second, where there is time in it.
    """

    values: NDArray[Any]
    rate: float | None = None


class LazySignals(Mapping[str, Signal]):
    """Signals that are made when they are asked for, each once.

    Args:
        makers: Name -> function that makes it.
    """

    def __init__(self, makers: Mapping[str, Callable[[], Signal]]) -> None:
        self._makers = makers
        self._made: dict[str, Signal] = {}

    def __getitem__(self, name: str) -> Signal:
        if name not in self._made:
            self._made[name] = self._makers[name]()
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def signals_of(sample: Any) -> Mapping[str, Signal]:
    """The signals of a sample by name; none where it carries none."""
    found: Mapping[str, Signal] = sample.meta.get("modalities", {})
    return found


def check(
    item: Any, name: str, ndim: int, *, rate: float | None = None, rows: int | None = None, least: int = 1
) -> NDArray[np.float32]:
    """Return an item's values as float32, refusing what no encoder of this modality can read.

    Args:
        item: A ``Signal``, or an array where the modality has no rate.
        name: Of the modality, for messages.
        ndim: Axes that the values must have.
        rate: Samples a second that the reader was made for; None = it has no rate.
        rows: Length of the first axis, where it is fixed.
        least: Least length of the last axis.

    Raises:
        DataError: Another shape or rate, too short, or values that are not finite.
    """
    if isinstance(item, Signal):
        values, found = np.asarray(item.values), item.rate
    else:
        values, found = np.asarray(item), None
        if rate is not None:
            raise DataError(f"{name}: an array alone does not tell its rate; give Signal(values, rate={rate:g})")
    if values.dtype == object or values.dtype.kind not in "fiub":
        raise DataError(f"{name}: expected numbers, got {values.dtype}")
    if values.ndim != ndim or 0 in values.shape or (rows is not None and values.shape[0] != rows):
        wanted = f"{ndim} axes" + (f", {rows} rows" if rows is not None else "")
        raise DataError(f"{name}: the values have shape {tuple(values.shape)}, expected {wanted}")
    if rate is not None and found != rate:
        told = "no rate" if found is None else f"{found:g} samples a second"
        raise DataError(
            f"{name}: {told}, the encoder reads {rate:g}: resample it first (zoo_modalities.data.signal.resample)"
        )
    if values.shape[-1] < least:
        raise DataError(f"{name}: {values.shape[-1]} samples are too few, expected at least {least}")
    out = values.astype(np.float32)
    if not np.isfinite(out).all():
        place = tuple(int(i) for i in np.argwhere(~np.isfinite(out))[0])
        raise DataError(f"{name}: the value at {place} is {out[place]}, expected finite numbers; repair the recording")
    return out


def resample(signal: Signal, rate: int) -> Signal:
    """Return the signal at another rate (whole numbers), low-passed by ``scipy.signal.resample_poly`` along its last
    axis.

    Raises:
        DataError: It has no whole rate.
    """
    from math import gcd

    from scipy.signal import resample_poly  # type: ignore[import-untyped]

    if signal.rate is None or signal.rate != int(signal.rate) or rate < 1:
        raise DataError(f"a signal of rate {signal.rate} cannot be resampled to {rate}: whole numbers are needed")
    old = int(signal.rate)
    common = gcd(old, rate)
    values = resample_poly(signal.values.astype(np.float64), rate // common, old // common, axis=-1)
    return Signal(values.astype(np.float32), float(rate))


def read_wav(path: Path | str) -> Signal:
    """Read a WAV file of 16-bit samples; several channels are averaged.

    Raises:
        DataError: There is no such file, or it is of another kind.
    """
    import wave

    try:
        with wave.open(str(path), "rb") as file:
            channels, width, rate = file.getnchannels(), file.getsampwidth(), file.getframerate()
            data = file.readframes(file.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise DataError(f"{str(path)!r} cannot be read as a WAV file: {error}") from error
    if width != 2:
        raise DataError(f"{str(path)!r} has samples of {8 * width} bits, expected 16: convert it first")
    values = np.frombuffer(data[: len(data) // (2 * channels) * 2 * channels], "<i2").reshape(-1, channels)
    return Signal((values.mean(1) / 32768).astype(np.float32), float(rate))
