"""The log mel filter bank of Kaldi, as ImageBind and the Audio Spectrogram Transformer read sound.

``kaldi-asr/kaldi`` feat/feature-fbank.cc through ``torchaudio.compliance.kaldi.fbank(htk_compat=True, use_energy=False,
window_type="hanning", dither=0)``, without torchaudio.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

PREEMPHASIS = 0.97
LOW_FREQUENCY = 20.0
FLOOR = 1.1920928955078125e-07
"""Energies are not below the smallest step of float32 at 1."""


def frames_of(samples: int, rate: int, length: float = 0.025, shift: float = 0.010) -> int:
    """How many whole windows lie within so many samples; 0 where it is shorter than one."""
    size, hop = int(rate * length), int(rate * shift)
    return 0 if samples < size else 1 + (samples - size) // hop


def fbank(wave: Tensor, rate: int, bins: int, length: float = 0.025, shift: float = 0.010) -> Tensor:
    """Log energies of mel bands.

    Each window loses its mean, is emphasised (x[t] - 0.97 x[t - 1], the first sample against itself) and weighted by a
    Hann window; the power spectrum over the next power of two is summed by triangles that are equal in mel, from 20 Hz
    to half the rate; logarithms are natural.

    Args:
        wave: [..., n] float.
        rate: Samples a second.
        bins: Bands.
        length, shift: Of windows, seconds.

    Returns:
        [..., frames, bins] float32.
    """
    size, hop = int(rate * length), int(rate * shift)
    padded = 1 << (size - 1).bit_length()
    # in double precision: what stands beside a pure tone is ten orders of magnitude below it
    windows = wave.double().unfold(-1, size, hop)  # [..., frames, size]
    windows = windows - windows.mean(-1, keepdim=True)
    before = torch.cat([windows[..., :1], windows[..., :-1]], -1)
    windows = (windows - PREEMPHASIS * before) * torch.hann_window(size, periodic=False, dtype=torch.float64)
    power = torch.fft.rfft(windows, padded).abs().square()  # [..., frames, padded / 2 + 1]
    energies = power[..., :-1] @ _triangles(bins, padded, rate)
    logarithms: Tensor = energies.clamp(min=FLOOR).log().float()
    return logarithms


@lru_cache(maxsize=16)
def _triangles(bins: int, padded: int, rate: int) -> Tensor:
    """[padded / 2, bins]: the weight of every frequency below half the rate in every band."""

    def mel(frequency: np.ndarray) -> np.ndarray:
        return 1127.0 * np.log1p(frequency / 700.0)

    low, high = mel(np.array(LOW_FREQUENCY)), mel(np.array(rate / 2))
    step = (high - low) / (bins + 1)
    left = low + np.arange(bins) * step  # [bins]
    place = mel(rate / padded * np.arange(padded // 2))[:, None]  # [padded / 2, 1]
    up, down = (place - left) / step, (left + 2 * step - place) / step
    return torch.from_numpy(np.maximum(0.0, np.minimum(up, down)))
