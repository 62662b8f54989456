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
"""How the steps of a DDPM process are spread over the levels, in diffusers' words."""

Predict = Callable[[Tensor, Tensor], Tensor]
"""Noisy latents [N, C, h, w] and their noise level [N] (``Process.level``) -> prediction [N, C, h, w]."""

Tell = Callable[[int, float], None]
"""Hears of every prediction, before it is made: its number from 0, and its noise level."""


@dataclass(frozen=True, kw_only=True)
class Denoising:
    """How latents are drawn.

    Attributes:
        sampler: For DDPM ``ddpm``, ``ddim``, ``dpm-solver`` (DPM-Solver++ of second order, multistep, arXiv
            2211.01095), ``euler`` (of arXiv 2206.00364, as SDXL) or ``pndm`` (arXiv 2202.09778 without its Runge-Kutta
            steps, as Stable Diffusion 1); for a flow ``euler``, ``midpoint`` (two evaluations a step) or ``rk45``
            (adaptive, arXiv 2210.02747 uses it); empty = the process's first.
        steps: Of the sampler; ``rk45`` tries 1 / steps first and then chooses its own.
        eta: Of DDIM: 0 is deterministic, 1 has DDPM's variance (arXiv 2010.02502, equation 16).
        spacing: Of a DDPM process: ``leading`` starts a step below the last level; ``trailing`` starts there (arXiv
            2305.08891), where the cosine schedule's signal is 5e-5 and an error of predicted noise is multiplied by its
            inverse: for the other predictions; ``linspace`` has both ends.
        offset: Added to the levels of ``leading`` (diffusers' ``steps_offset``; 1 in Stable Diffusion).
        clean_end: The last step of ``ddim`` and ``pndm`` ends at no noise; otherwise at that of level 0 (diffusers'
            ``set_alpha_to_one``; false in Stable Diffusion).
        rtol, atol: Error that ``rk45`` allows in a step.
    """

    sampler: str = ""
    steps: int = 250
    eta: float = 0.0
    spacing: str = "leading"
    offset: int = 0
    clean_end: bool = True
    rtol: float = 1e-3
    atol: float = 1e-4

    def __post_init__(self) -> None:
        if self.sampler and self.sampler not in SAMPLERS:
            raise ConfigError(f"unknown sampler {self.sampler!r}{near(self.sampler, SAMPLERS)}")
        if not 1 <= self.steps <= LEVELS:
            raise ConfigError(f"steps = {self.steps} must lie in 1 to {LEVELS}")
        if self.spacing not in SPACINGS:
            raise ConfigError(f"spacing = {self.spacing!r} must be one of {', '.join(SPACINGS)}")
        if self.offset not in (0, 1):
            raise ConfigError(f"offset = {self.offset} must be 0 or 1")
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
    *,
    known: Tensor | None = None,
    unknown: Tensor | None = None,
    strength: float = 1.0,
    tell: Tell | None = None,
) -> Tensor:
    """Go back from ``noise`` [N, C, h, w] to clean latents of the same shape.

    Args:
        predict: Is called with all N items, in order.
        generators: One an item, for the noise that DDPM, and DDIM with eta above 0, add on their way.
        known: Clean latents [N, C, h, w], which are there already.
        unknown: [N, 1 or C, h, w] bool, True = draw. Elsewhere the latents are the known ones, made noisy by ``noise``
            to the level of every step (the blending of arXiv 2201.09865 without its jumps), and clean and bit-equal
            after the last; None = all is drawn.
        strength: Above 0 to 1: share of the steps that are taken, from ``known`` made noisy to where they begin
            (SDEdit, arXiv 2108.01073).

    Raises:
        ConfigError: The sampler does not fit the process, or misses its generators; no step is left to take.
    """
    name = how.of(process)
    first = first_step(how.steps, strength)
    if known is None and (first or unknown is not None):
        raise ConfigError("drawing on from an image needs its latents: give known")
    if known is not None:
        known = known.to(noise)
    number = 0

    def run(x: Tensor, level: Tensor) -> Tensor:
        nonlocal number
        if tell is not None and len(level):
            tell(number, float(level[0]))
        number += 1
        passed(len(x))
        return predict(x, level)

    if isinstance(process, Flow):

        def field(x: Tensor, time: Tensor) -> Tensor:
            return run(x, process.level(time))

        def at(time: float) -> Tensor:
            return process.corrupt(known, noise, noise.new_full((len(noise),), time))  # type: ignore[arg-type]

        def after(x: Tensor, time: float) -> Tensor:
            if unknown is None or known is None:
                return x
            return torch.where(unknown, x, known if time == 1 else at(time))

        if name == "rk45":
            if first or unknown is not None:
                raise ConfigError(
                    "sampler = 'rk45' chooses its own steps: choose midpoint or euler to draw on from one"
                )
            return ode.rk45(field, noise, how.steps, rtol=how.rtol, atol=how.atol)
        x = at(first / how.steps) if first else noise
        return (ode.euler if name == "euler" else ode.midpoint)(field, x, how.steps, first=first, after=after)
    assert isinstance(process, DDPM)
    if generators is None and (name == "ddpm" or (how.eta and name == "ddim")):
        raise ConfigError(f"sampler = {name!r} draws noise on its way: give it one generator an item")
    scheduler = scheduler_of(process, how)
    scheduler.set_timesteps(how.steps)
    drawn: dict[str, Any] = {}
    if name in ("ddpm", "ddim"):
        drawn["generator"] = list(generators) if generators is not None else None
    if name == "ddim":
        drawn["eta"] = how.eta
    times = scheduler.timesteps[first * scheduler.order :]
    if first and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first * scheduler.order)
    x = _noisy(scheduler, known, noise, times[0]) if first else noise * scheduler.init_noise_sigma
    for n, time in enumerate(times):
        level = time.to(x.device).float().expand(len(x))
        out = run(scheduler.scale_model_input(x, time), level)
        x = scheduler.step(out, time, x, **drawn).prev_sample
        if unknown is not None and known is not None:
            last = n + 1 == len(times)
            x = torch.where(unknown, x, known if last else _noisy(scheduler, known, noise, times[n + 1]))
    return x


def first_step(steps: int, strength: float) -> int:
    """The step with which a way of ``steps`` begins that is taken for its last ``strength`` only.

    Raises:
        ConfigError: A strength outside (0, 1], or one that leaves no step.
    """
    if not 0 < strength <= 1:
        raise ConfigError(f"strength = {strength} must lie above 0 and be at most 1")
    taken = int(steps * strength + 1e-9)  # 0.7 * 10 is 7
    if not taken:
        raise ConfigError(f"strength = {strength} of {steps} steps leaves none to take: raise one of them")
    return steps - taken


def gaussian(generators: Sequence[torch.Generator], shape: Sequence[int], device: torch.device) -> Tensor:
    """Noise [N, ...] of ``shape``, item n out of generator n."""
    rows = [torch.randn(tuple(shape), generator=generator) for generator in generators]
    return torch.stack(rows).to(device) if rows else torch.zeros(0, *shape, device=device)


def scheduler_of(process: DDPM, how: Denoising) -> Any:
    """diffusers' scheduler of a DDPM process.

    Raises:
        ConfigError: One that cannot follow the process back.
    """
    import diffusers

    name = how.of(process)
    fields: dict[str, Any] = {
        **process.fields(),
        "timestep_spacing": how.spacing,
        "steps_offset": how.offset,
    }
    if name == "ddpm":
        return diffusers.DDPMScheduler(**fields)
    if name == "ddim":
        return diffusers.DDIMScheduler(**fields, set_alpha_to_one=how.clean_end)
    del fields["clip_sample"]
    if name == "dpm-solver":
        return diffusers.DPMSolverMultistepScheduler(**fields)
    if name == "euler":
        return diffusers.EulerDiscreteScheduler(**fields)
    if fields.pop("rescale_betas_zero_snr") or process.prediction == "sample":
        raise ConfigError("sampler = 'pndm' knows neither zero_snr nor prediction = 'sample': choose ddim")
    return diffusers.PNDMScheduler(**fields, skip_prk_steps=True, set_alpha_to_one=how.clean_end)


def _noisy(scheduler: Any, clean: Tensor | None, noise: Tensor, time: Tensor) -> Tensor:
    """``clean`` at a scheduler's level, on the scale of its steps."""
    noisy: Tensor = scheduler.add_noise(clean, noise, time.expand(len(noise)))
    return noisy
