"""Drawing latents with a denoiser: guidance, steps, and what is known of the image beforehand, in one place for every
model that draws this way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zoo.denoisers.base import Denoiser
from zoo.diffusion.noising import Process
from zoo.part import Features
from zoo.sampling.diffusion import Denoising, Tell, denoise, gaussian
from zoo.sampling.guidance import mixed, rescaled


def draw_latents(
    denoiser: Denoiser,
    process: Process,
    condition: Features,
    how: Denoising,
    mix: Sequence[float],
    generators: Sequence[torch.Generator],
    *,
    grid: tuple[int, int],
    rescale: float = 0.0,
    size_ids: Tensor | None = None,
    noise: Tensor | None = None,
    known: Tensor | None = None,
    unknown: Tensor | None = None,
    strength: float = 1.0,
    tell: Tell | None = None,
) -> Tensor:
    """Clean latents [N, C, h, w] of N images.

    Args:
        condition: ``tokens`` [branches N, S, D], ``mask`` [branches N, S] and ``pooled`` [branches N, P]: all rows of
            the first branch of guidance, then all of the next (``branches`` below puts them so).
        mix: The weight of each branch (``zoo.sampling.guidance.weights``).
        generators: One an image: its noise, and what samplers add on their way, come from it alone.
        grid: Height and width of the latents.
        rescale: phi of ``zoo.sampling.guidance.rescaled``; 0.7 in its paper.
        size_ids: [branches N, 6], of a denoiser that reads sizes.
        noise: [N, C, h, w] to start from instead of the generators'.
        known, unknown, strength, tell: As of ``zoo.sampling.diffusion.denoise``.

    Raises:
        ConfigError: A sampler that does not fit the process.
    """
    count = len(condition.tokens) // len(mix)
    device = condition.tokens.device
    if noise is None:
        noise = gaussian(generators, (denoiser.channels, *grid), device)
    if not count:
        return noise
    weight = next(denoiser.parameters())  # steps are taken in fp32 whatever the weights' precision
    tokens = condition.tokens.to(weight.dtype)
    pooled = None if condition.pooled is None else condition.pooled.to(weight.dtype)

    def predict(x: Tensor, level: Tensor) -> Tensor:
        both = x.to(weight.dtype).repeat(len(mix), 1, 1, 1)  # [branches N, C, h, w]
        out = denoiser(both, level.repeat(len(mix)), tokens, condition.mask, pooled, size_ids).to(x.dtype)
        guided = mixed(out, mix)
        return rescaled(guided, out[:count], rescale) if rescale and len(mix) > 1 else guided

    more = {"known": known, "unknown": unknown, "strength": strength, "tell": tell}
    with denoiser.remembering():
        return denoise(process, predict, noise, how, generators, **more)  # type: ignore[arg-type]


def branches(conditions: Sequence[Features]) -> Features:
    """The rows of several conditions, one behind the other, as ``draw_latents`` takes the branches of guidance.

    Shorter ones are padded, and what is padding is masked; one of a single row stands for as many as the first has.
    """
    count = len(conditions[0].tokens)
    length = max(c.tokens.shape[1] for c in conditions)
    ragged = any(c.mask is not None or c.tokens.shape[1] < length for c in conditions)
    tokens, masks, pooled = [], [], []
    for one in conditions:
        rows, at, width = one.tokens.shape
        more = length - at
        filled = torch.cat([one.tokens, one.tokens.new_zeros(rows, more, width)], 1)
        real = torch.ones(rows, at, dtype=torch.bool, device=filled.device) if one.mask is None else one.mask.bool()
        tokens.append(filled.expand(count, -1, -1))
        masks.append(torch.cat([real, real.new_zeros(rows, more)], 1).expand(count, -1))
        if one.pooled is not None:
            pooled.append(one.pooled.expand(count, -1))
    return Features(
        torch.cat(tokens),
        torch.cat(masks) if ragged else None,
        torch.cat(pooled) if len(pooled) == len(conditions) else None,
    )
