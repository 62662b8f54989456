"""How latents are made noisy and what is predicted of them: DDPM on a schedule of 1,000 levels, or a straight path.

DDPM is diffusers' ``DDPMScheduler``; times are its indices, 0 to 999, where the papers count 1 to 1,000. A path runs
from noise at time 0 to data at time 1, as in flow matching (arXiv 2210.02747, and CondOT of facebookresearch's
flow_matching); diffusers' flow schedulers count the other way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoo.diffusion.times import LEVELS
from zoo.draws import rand, randn

if TYPE_CHECKING:
    from diffusers import DDPMScheduler

SCHEDULES = ("squaredcos_cap_v2", "linear", "scaled_linear")
RANGED = ("linear", "scaled_linear")
"""Schedules that are made from a first and a last beta."""

PREDICTIONS = ("epsilon", "v_prediction", "sample")


class Process:
    """Base of noising processes; they own no parameters and no state.

    Attributes:
        samplers: Names of the ways back (``zoo.sampling.diffusion``), the default first.
    """

    samplers: tuple[str, ...] = ()

    def times(self, uniform: Tensor, limit: Tensor) -> Tensor:
        """A time [N] for each image.

        Args:
            uniform: [N] uniform numbers in [0, 1).
            limit: [N] in (0, 1], the largest share of the noise levels that an image may get.
        """
        raise TypeError(f"{type(self).__name__} defines no times")

    def corrupt(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """Latents [N, C, h, w] at the times [N]."""
        raise TypeError(f"{type(self).__name__} defines no corrupt")

    def target(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """What is to be predicted of them: [N, C, h, w]."""
        raise TypeError(f"{type(self).__name__} defines no target")

    def level(self, time: Tensor) -> Tensor:
        """Times [N] as noise levels [N] of 0 (clean) to ``LEVELS``, as patch codecs take them."""
        raise TypeError(f"{type(self).__name__} defines no level")


@dataclass(frozen=True)
class DDPM(Process):
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps (arXiv 2006.11239, equation 4).

    Attributes:
        schedule: ``squaredcos_cap_v2`` (cosine, arXiv 2102.09672, betas capped at 0.999), ``linear`` (1e-4 to 0.02), or
            ``scaled_linear`` (linear in the root, 0.00085 to 0.012, as Stable Diffusion).
        prediction: ``epsilon``, ``v_prediction`` (sqrt(abar) eps - sqrt(1 - abar) x_0, arXiv 2202.00512) or ``sample``
            (x_0).
        zero_snr: Betas rescaled so that the last level is noise alone (arXiv 2305.08891, algorithm 1); draw with
            ``trailing`` steps then, which begin there.
    """

    schedule: str = "squaredcos_cap_v2"
    prediction: str = "epsilon"
    zero_snr: bool = False

    samplers = ("ddpm", "ddim", "dpm-solver", "euler", "pndm")

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule = {self.schedule!r} must be one of {', '.join(SCHEDULES)}")
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"prediction = {self.prediction!r} must be one of {', '.join(PREDICTIONS)}")
        if self.zero_snr and self.prediction == "epsilon":
            raise ValueError(
                "zero_snr = true leaves noise alone at the last level, of which predicted noise tells no image: set"
                " prediction=v_prediction or sample"
            )

    def fields(self) -> dict[str, Any]:
        """What diffusers' schedulers are made with; latents are never clipped."""
        low, high = (0.00085, 0.012) if self.schedule == "scaled_linear" else (1e-4, 0.02)
        return {
            "num_train_timesteps": LEVELS,
            "beta_schedule": self.schedule,
            "beta_start": low,
            "beta_end": high,
            "prediction_type": self.prediction,
            "rescale_betas_zero_snr": self.zero_snr,
            "clip_sample": False,
        }

    @cached_property
    def scheduler(self) -> DDPMScheduler:
        """diffusers' scheduler of all levels; importing diffusers takes a second."""
        from diffusers import DDPMScheduler

        with torch.device("cpu"):  # also while the shapes of a model are looked at on "meta"
            return DDPMScheduler(**self.fields())

    def times(self, uniform: Tensor, limit: Tensor) -> Tensor:
        return (uniform * limit * LEVELS).long().clamp(max=LEVELS - 1)

    def corrupt(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        noisy: Tensor = self._alone(clean).add_noise(clean, noise, time)
        return noisy

    def target(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return clean
        velocity: Tensor = self._alone(clean).get_velocity(clean, noise, time)
        return velocity

    def level(self, time: Tensor) -> Tensor:
        return time.float()

    def snr(self, level: Tensor) -> Tensor:
        """Signal to noise, abar / (1 - abar), at noise levels [N]: [N] float32, 0 where all is noise."""
        share: Tensor = self._alone(level).alphas_cumprod.to(level.device)[level.long()]  # [N]
        return share / (1 - share)

    def _alone(self, like: Tensor) -> DDPMScheduler:
        """The scheduler, or where ``like`` has no values one of its own: diffusers moves its table to the input's
        device and leaves it there."""
        if not like.is_meta:
            return self.scheduler
        from diffusers import DDPMScheduler

        return DDPMScheduler(**self.fields())


@dataclass(frozen=True)
class Flow(Process):
    """x_t = (1 - t) eps + t x_0, of which the velocity x_0 - eps is predicted (arXiv 2210.02747, section 4.1)."""

    samplers = ("midpoint", "euler", "rk45")

    def times(self, uniform: Tensor, limit: Tensor) -> Tensor:
        return 1 - uniform * limit

    def corrupt(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        share = time.to(clean.dtype)[:, None, None, None]  # [N, 1, 1, 1]
        return (1 - share) * noise + share * clean

    def target(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        return clean - noise

    def level(self, time: Tensor) -> Tensor:
        return (1 - time) * LEVELS


EVALUATED = 0
"""Seed of times and noise outside training: losses of different models and seeds are then of the same noise."""


def times_and_noise(
    process: Process,
    clean: Tensor,
    batch: Mapping[str, Tensor],
    training: bool,
    limit: Tensor | None = None,
    blank: bool = False,
) -> tuple[Tensor, Tensor]:
    """A time [N] and noise [N, C, h, w] for each of the clean latents [N, C, h, w].

    From torch's global stream in training, always alike otherwise; or those the batch brings: ``image_time`` [N], a
    time of the process, and ``image_noise`` [N, C, h, w].

    Args:
        limit: [N] in (0, 1], the largest share of the noise levels that an image may get; None = all of them.
        blank: The latents are those of the one blank image that a batch without images runs: it has no part in the
            draws that ranks share (``zoo.draws``).
    """
    noise, time = batch.get("image_noise"), batch.get("image_time")
    if noise is not None and time is not None and len(time):
        return time, noise
    count, device = len(clean), clean.device
    if training or device.type == "meta":
        if noise is None or time is None:  # all ranks of a step come here, or none
            rows = 0 if blank else count
            uniform, noise = rand((rows,), device), randn((rows, *clean.shape[1:]), device).to(clean)
        if blank:
            uniform, noise = clean.new_full((count,), 0.5, dtype=torch.float32), torch.zeros_like(clean)
    else:
        generator = torch.Generator().manual_seed(EVALUATED)
        uniform = torch.rand(count, generator=generator).to(device)
        noise = torch.randn(clean.shape, generator=generator).to(clean)
    return process.times(uniform, torch.ones_like(uniform) if limit is None else limit), noise
