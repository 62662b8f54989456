"""How a model is told the noise level."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LEVELS = 1000
"""Noise levels run from 0 (clean) to this (noise alone), whatever the process."""


def sinusoid(level: Tensor, width: int) -> Tensor:
    """Cosines, then sines, of a noise level at geometric frequencies from 1 to 1/10,000.

    That of DDPM (arXiv 2006.11239, appendix B) in the order diffusers calls ``flip_sin_to_cos`` with shift 0.

    Args:
        level: [N], of 0 to ``LEVELS``; may be fractional.
        width: Of the embedding; an odd one ends with a zero.

    Returns:
        [N, width] float32.
    """
    half = width // 2
    frequency = torch.exp(-math.log(10000.0) / max(half, 1) * torch.arange(half, device=level.device))  # [half]
    angle = level.float()[:, None] * frequency  # [N, half]
    parts = [angle.cos(), angle.sin()]
    if width % 2:
        parts.append(angle.new_zeros(len(angle), 1))
    return torch.cat(parts, dim=1)
