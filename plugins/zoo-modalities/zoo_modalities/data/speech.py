"""Spoken names: by the program espeak-ng where it is installed, else by a synthesizer of letters, which is simulated.

The synthesizer says a text letter by letter: vowels and hums are harmonics of the voice's pitch under the letter's
formants, fricatives are bands of noise, stops are a gap and a burst. It is no speech; it keeps of speech that the same
word sounds alike and that sounds follow each other in the order of what is written.
"""

from __future__ import annotations

import shutil
import subprocess
import unicodedata
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from zoo.data.images import uniforms
from zoo.errors import ConfigError, DataError
from zoo_modalities.data.signal import Signal, read_wav, resample

RATE = 16000
SECONDS = 2.0
"""Longest spoken name of the synthesizer; longer ones are spoken faster."""
PITCHES = (105.0, 135.0, 180.0, 220.0)
"""Fundamental frequency of each voice, Hz."""

Voice = Literal["auto", "simulated", "espeak-ng"]
Wave = NDArray[np.float64]

# formants in Hz, near the means of Peterson and Barney (1952) where there is one
_VOWELS = {
    "a": (730, 1090, 2440),
    "e": (530, 1840, 2480),
    "i": (270, 2290, 3010),
    "o": (570, 840, 2410),
    "u": (300, 870, 2240),
    "y": (435, 1600, 2240),
}
_HUMS = {
    "m": (250, 950, 2200),
    "n": (250, 1450, 2300),
    "l": (360, 1300, 2700),
    "r": (330, 1060, 1380),
    "w": (290, 610, 2150),
    "j": (260, 2070, 3020),
}
_NOISES = {  # middle and width of the band
    "s": (6000, 1500),
    "z": (5000, 900),
    "f": (3800, 2500),
    "v": (3000, 700),
    "h": (1500, 1200),
    "x": (2600, 400),
    "c": (4400, 500),
}
_BURSTS = {"p": 700, "b": 450, "t": 4200, "d": 3200, "k": 1900, "g": 1300, "q": 2300}
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_LENGTHS = {"vowel": 0.075, "hum": 0.055, "noise": 0.06, "burst": 0.05, "pause": 0.045}


def resolve_voice(voice: Voice) -> Literal["simulated", "espeak-ng"]:
    """Which voice ``auto`` is on this machine.

    Raises:
        ConfigError: espeak-ng is asked for by name and not installed.
    """
    if voice == "simulated":
        return "simulated"
    if shutil.which("espeak-ng"):
        return "espeak-ng"
    if voice == "espeak-ng":
        raise ConfigError(
            "data.voice = 'espeak-ng': the program espeak-ng is not installed; install it (apt install espeak-ng), or"
            " set data.voice=simulated"
        )
    return "simulated"


def espeak(text: str, speed: int = 160) -> Signal:
    """A text spoken by espeak-ng, at 16 kHz.

    Raises:
        DataError: The program fails, or is gone.
    """
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "spoken.wav"
        try:
            subprocess.run(
                ["espeak-ng", "-v", "en", "-s", str(speed), "-w", str(path), "--", text],
                check=True, capture_output=True, timeout=30,
            )  # fmt: skip
        except (OSError, subprocess.SubprocessError) as error:
            raise DataError(f"espeak-ng cannot speak {text!r}: {error}") from error
        return resample(read_wav(path), RATE)


def letters(text: str) -> str:
    """The letters a to z and spaces of a text: accents dropped, digits spelled, other signs as spaces, never empty."""
    plain = unicodedata.normalize("NFKD", text.lower())
    plain = "".join(f" {_DIGITS[int(c)]} " if "0" <= c <= "9" else c for c in plain if not unicodedata.combining(c))
    spoken = "".join(
        c if "a" <= c <= "z" else chr(ord("a") + ord(c) % 26) if c.isalpha() else " " for c in plain
    ).split()
    return " ".join(spoken) or "a"


def simulated(text: str, voice: int = 0) -> Signal:
    """A text said by the synthesizer of letters, at 16 kHz and at most ``SECONDS`` long; equal inputs give equal waves.

    Args:
        voice: One of the ``PITCHES``.
    """
    said = letters(text)
    lengths = np.array([_LENGTHS[_kind(c)] for c in said])
    pace = min(1.0, (SECONDS - 0.05) / lengths.sum())
    pieces = []
    for letter, length in zip(said, lengths * pace, strict=True):
        count = max(8, int(length * RATE))
        pieces.append(_phone(letter, voice % len(PITCHES))[:count] * _fade(count))
    wave = np.concatenate(pieces)
    return Signal((0.25 * wave).clip(-1, 1).astype(np.float32), float(RATE))


def _kind(letter: str) -> str:
    tables: dict[str, Mapping[str, object]] = {"vowel": _VOWELS, "hum": _HUMS, "noise": _NOISES, "burst": _BURSTS}
    return next((kind for kind, table in tables.items() if letter in table), "pause")


@lru_cache(maxsize=4096)
def _fade(count: int) -> Wave:
    """Rises and falls within 4 ms, so that phones do not click."""
    ramp = min(64, count // 2)
    out = np.ones(count)
    rise = 0.5 - 0.5 * np.cos(np.pi * (np.arange(ramp) + 0.5) / ramp)
    out[:ramp], out[count - ramp :] = rise, rise[::-1]
    return out


@lru_cache(maxsize=256)
def _phone(letter: str, voice: int) -> Wave:
    """One letter in one voice, as long as the longest, root mean square about 1 (a pause is silent)."""
    count = int(max(_LENGTHS.values()) * RATE)
    kind = _kind(letter)
    if kind == "pause":
        return np.zeros(count)
    if kind in ("vowel", "hum"):
        wave = _voiced((_VOWELS | _HUMS)[letter], PITCHES[voice], count) * (1.0 if kind == "vowel" else 0.5)
    elif kind == "noise":
        wave = 0.5 * _noise(*_NOISES[letter], count, letter)
        if letter in "zv":  # voiced fricatives
            wave = wave + 0.5 * _voiced((250, 1400, 2400), PITCHES[voice], count)
    else:
        gap = int(0.02 * RATE)
        wave = np.zeros(count)
        burst = _noise(_BURSTS[letter], 0.3 * _BURSTS[letter], count - gap, letter)
        wave[gap:] = 1.5 * burst * np.exp(-np.arange(count - gap) / (0.012 * RATE))
        if letter in "bdg":
            wave[:gap] = 0.3 * _voiced((180, 400, 800), PITCHES[voice], gap)
    return wave


def _voiced(formants: tuple[int, int, int], pitch: float, count: int) -> Wave:
    time = np.arange(count) / RATE
    frequency = pitch * np.arange(1, int(4500 / pitch) + 1)  # [K]
    weights = np.zeros(len(frequency))
    for formant, strength in zip(formants, (1.0, 0.6, 0.3), strict=True):
        weights += strength * np.exp(-0.5 * ((frequency - formant) / (60 + 0.06 * formant)) ** 2)
    wave: Wave = weights @ np.sin(2 * np.pi * frequency[:, None] * time)
    return wave / max(1e-9, float(np.sqrt((wave**2).mean())))


def _noise(middle: float, width: float, count: int, letter: str) -> Wave:
    """Noise of a band, Gaussian in frequency, with the letter's own phases."""
    bins = count // 2 + 1
    frequency = np.arange(bins) * RATE / count
    shape = np.exp(-0.5 * ((frequency - middle) / width) ** 2)
    phase = 2 * np.pi * uniforms(bins, "phone", letter)
    wave = np.fft.irfft(shape * np.exp(1j * phase), count)
    return wave / float(np.sqrt((wave**2).mean()))
