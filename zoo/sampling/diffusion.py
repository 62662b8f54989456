"""From noise to latents: the ways back of every noising process, over any model of the noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.diffusion import ode
from zoo.diffusion.noising import DDPM, Flow, Process
from zoo.diffusion.times import LEVELS
from zoo.errors import ConfigError, near
from zoo.sampling.passes import passed

SAMPLERS = tuple(dict.fromkeys((*DDPM.samplers, *Flow.samplers)))
"""Names of the ways back, of all processes."""

SPACINGS = ("leading", "trailing", "linspace")
"""How the steps of DDPM and DDIM are spread over the levels, in diffusers' words."""

Predict = Callable[[Tensor, Tensor], Tensor]
"""Noisy latents [N, C, h, w] and their noise level [N] (``Process.level``) -> prediction [N, C, h, w]."""


@dataclass(frozen=True, kw_only=True)
class Denoising:
    """How latents are drawn.

    Attributes:
        sampler: ``ddpm`` or ``ddim`` for DDPM; ``euler``, ``midpoint`` (two evaluations a step) or ``rk45`` (adaptive,
            arXiv 2210.02747 uses it) for a flow; empty = the process's first.
        steps: Of the sampler; ``rk45`` tries 1 / steps first and then chooses its own.
        eta: Of DDIM: 0 is deterministic, 1 has DDPM's variance (arXiv 2010.02502, equation 16).
        spacing: Of DDPM and DDIM: ``leading`` starts a step below the last level; ``trailing`` starts there (arXiv
            2305.08891), where the cosine schedule's signal is 5e-5 and an error of predicted noise is multiplied by its
            inverse: for the other predictions; ``linspace`` has both ends.
        rtol, atol: Error that ``rk45`` allows in a step.
    """

    sampler: str = ""
    steps: int = 250
    eta: float = 0.0
    spacing: str = "leading"
    rtol: float = 1e-3
    atol: float = 1e-4

    def __post_init__(self) -> None:
        if self.sampler and self.sampler not in SAMPLERS:
            raise ConfigError(f"unknown sampler {self.sampler!r}{near(self.sampler, SAMPLERS)}")
        if not 1 <= self.steps <= LEVELS:
            raise ConfigError(f"steps = {self.steps} must lie in 1 to {LEVELS}")
        if self.spacing not in SPACINGS:
            raise ConfigError(f"spacing = {self.spacing!r} must be one of {', '.join(SPACINGS)}")
        if self.eta < 0 or self.rtol <= 0 or self.atol <= 0:
            raise ConfigError(
                f"eta = {self.eta}, rtol = {self.rtol}, atol = {self.atol}: expected eta >= 0, others > 0"
            )

    def of(self, process: Process) -> str:
        """The sampler's name for a process.

        Raises:
            ConfigError: The sampler goes back another kind of process.
        """
        name = self.sampler or process.samplers[0]
        if name not in process.samplers:
            kind = "a flow" if isinstance(process, Flow) else "DDPM"
            raise ConfigError(f"sampler = {name!r} does not fit {kind}: choose {' or '.join(process.samplers)}")
        return name


def denoise(
    process: Process,
    predict: Predict,
    noise: Tensor,
    how: Denoising,
    generators: Sequence[torch.Generator] | None = None,
) -> Tensor:
    """Go back from ``noise`` [N, C, h, w] to clean latents of the same shape.

    Args:
        predict: Is called with all N items, in order.
        generators: One an item, for the noise that DDPM, and DDIM with eta above 0, add on their way.

    Raises:
        ConfigError: The sampler does not fit the process, or misses its generators.
    """
    name = how.of(process)

    def run(x: Tensor, level: Tensor) -> Tensor:
        passed(len(x))
        return predict(x, level)

    if isinstance(process, Flow):

        def field(x: Tensor, time: Tensor) -> Tensor:
            return run(x, process.level(time))

        if name == "rk45":
            return ode.rk45(field, noise, how.steps, rtol=how.rtol, atol=how.atol)
        return (ode.euler if name == "euler" else ode.midpoint)(field, noise, how.steps)
    assert isinstance(process, DDPM)
    if generators is None and (name == "ddpm" or how.eta):
        raise ConfigError(f"sampler = {name!r} draws noise on its way: give it one generator an item")
    scheduler = _scheduler(process, name, how.spacing)
    scheduler.set_timesteps(how.steps)
    drawn: dict[str, Any] = {"generator": list(generators) if generators is not None else None}
    if name == "ddim":
        drawn["eta"] = how.eta
    x = noise
    for time in scheduler.timesteps:
        out = run(x, time.to(x.device).float().expand(len(x)))
        x = scheduler.step(out, time, x, **drawn).prev_sample
    return x


def gaussian(generators: Sequence[torch.Generator], shape: Sequence[int], device: torch.device) -> Tensor:
    """Noise [N, ...] of ``shape``, item n out of generator n."""
    rows = [torch.randn(tuple(shape), generator=generator) for generator in generators]
    return torch.stack(rows).to(device) if rows else torch.zeros(0, *shape, device=device)


def _scheduler(process: DDPM, name: str, spacing: str) -> Any:
    from diffusers import DDIMScheduler, DDPMScheduler

    if name == "ddpm":
        return DDPMScheduler(**process.fields(), timestep_spacing=spacing)
    return DDIMScheduler(**process.fields(), timestep_spacing=spacing, set_alpha_to_one=True)
