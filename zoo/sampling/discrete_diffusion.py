"""Discrete diffusion by its own maths: D3PM's transitions, posterior and weights, and discrete flow matching.

Masked decoding (``zoo.sampling.masked``) is what published image models sample with; these are the processes it stands
for: the absorbing chain of D3PM (arXiv 2107.03006) and the mixture path from the mask (arXiv 2407.15595).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import ConfigError, near
from zoo.sampling.guidance import drawn

KINDS = ("uniform", "absorbing")


def transition(kind: str, beta: float, classes: int) -> Tensor:
    """D3PM's matrix of one step, [V, V] float64, whose row x_{t-1} is the distribution of x_t.

    ``uniform`` (1 - b)I + b/V · 11'; ``absorbing`` (1 - b)I + b · 1e_m', with the last class m as the mask.

    Raises:
        ConfigError: Another kind, or b outside [0, 1].
    """
    if kind not in KINDS:
        raise ConfigError(f"kind = {kind!r}: expected one of {', '.join(KINDS)}{near(kind, KINDS)}")
    if not 0 <= beta <= 1:
        raise ConfigError(f"beta = {beta}: expected a probability")
    step = (1 - beta) * torch.eye(classes, dtype=torch.float64)
    if kind == "uniform":
        return step + beta / classes
    step[:, -1] += beta
    return step


def posterior(x_t: Tensor, p0: Tensor, step: Tensor, before: Tensor) -> Tensor:
    """q(x_{t-1} | x_t) where x_0 follows ``p0``: the sum over x_0 of p0 · Q_t[·, x_t] · Qbar_{t-1}[x_0, ·] /
    Qbar_t[x_0, x_t] (arXiv 2107.03006, equations 3 and 4).

    Args:
        x_t: [...] int64.
        p0: [..., V] the model's distribution of x_0; its mass must lie on classes that x_t can have come from.
        step: [V, V] Q_t.
        before: [V, V] Qbar_{t-1}, the product of the steps before.

    Returns:
        [..., V], summing to 1.
    """
    reached = (before @ step).mT[x_t]  # [..., V] Qbar_t[x_0, x_t]
    share = torch.where(reached > 0, p0.to(reached) / reached.clamp(min=torch.finfo(reached.dtype).tiny), 0.0)
    return step.mT[x_t] * (share @ before)


def absorbing_posterior(x_t: Tensor, p0: Tensor, alive: float, alive_before: float) -> Tensor:
    """``posterior`` of the absorbing chain in closed form: a masked token stays masked with (1 - abar_{t-1}) / (1 -
    abar_t) and else follows ``p0``; any other never changes.

    Args:
        x_t: [...] int64; the mask is the last class.
        p0: [..., V], 0 at the mask.
        alive, alive_before: abar_t and abar_{t-1}, the share of tokens not yet masked.
    """
    mask = p0.shape[-1] - 1
    stays = (1 - alive_before) / (1 - alive)
    revealed = (1 - stays) * p0 + stays * F.one_hot(torch.full_like(x_t, mask), mask + 1).to(p0)
    return torch.where((x_t == mask)[..., None], revealed, F.one_hot(x_t, mask + 1).to(p0))


def elbo_weight(alive: Tensor, alive_before: Tensor) -> Tensor:
    """Weight of a masked token's cross-entropy in the absorbing chain's bound, (abar_{t-1} - abar_t) / (1 - abar_t):
    1/t for abar_t = 1 - t/T."""
    return (alive_before - alive) / (1 - alive)


def reverse_step(
    x_t: Tensor, p0: Tensor, alive: float, alive_before: float, generators: Sequence[torch.Generator]
) -> Tensor:
    """One step back of the absorbing chain, [B, n] int64, row b drawn from its own generator; arguments as of
    ``absorbing_posterior``."""
    p = absorbing_posterior(x_t, p0, alive, alive_before)
    numbers = torch.stack([torch.rand(x_t.shape[1], generator=g, dtype=torch.float64) for g in generators])
    return drawn(p.flatten(0, 1), numbers.to(p.device).flatten()).view_as(x_t)


class MixturePath:
    """x_t is x_1 (data) with probability t^power and x_0 (the mask, say) otherwise (arXiv 2407.15595, section 3).

    Args:
        power: n of kappa_t = t^n.
    """

    def __init__(self, power: float = 1.0) -> None:
        if power <= 0:
            raise ConfigError(f"power = {power} must be above 0")
        self.power = power

    def kappa(self, time: Tensor) -> Tensor:
        """The share of tokens that are data at ``time`` [B] in [0, 1]."""
        return time**self.power

    def rate(self, time: Tensor) -> Tensor:
        """kappa' / (1 - kappa) [B]: how fast what is left turns to data."""
        return self.power * time ** (self.power - 1) / (1 - self.kappa(time))

    def noised(self, x_0: Tensor, x_1: Tensor, time: Tensor, uniform: Tensor) -> Tensor:
        """x_t [B, n]: x_0 where ``uniform`` [B, n] is below 1 - kappa."""
        return torch.where(uniform < 1 - self.kappa(time)[:, None], x_0, x_1)

    def velocity(self, x_t: Tensor, p1: Tensor, time: Tensor) -> Tensor:
        """kappa' / (1 - kappa) · (p_1 - one-hot of x_t), [B, n, V], where ``p1`` [B, n, V] is the model's data."""
        return self.rate(time)[:, None, None] * (p1 - F.one_hot(x_t, p1.shape[-1]).to(p1))

    def loss(self, logits: Tensor, x_1: Tensor, x_t: Tensor, time: Tensor) -> Tensor:
        """The generalised KL of the path's rates (arXiv 2407.15595, section 4, as flow_matching's
        MixturePathGeneralizedKL), a scalar.

        Args:
            logits: [B, n, V].
            x_1, x_t: [B, n] int64.
            time: [B] in [0, 1).
        """
        log_p = logits.float().log_softmax(-1)
        of_data = log_p.gather(-1, x_1[..., None])[..., 0]  # [B, n]
        of_now = log_p.gather(-1, x_t[..., None])[..., 0].exp()
        same = (x_1 == x_t).to(of_data)
        return (-self.rate(time)[:, None] * (of_now - same + (1 - same) * of_data)).mean()

    def euler_step(
        self, x_t: Tensor, p1: Tensor, time: float, step: float, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """x at ``time + step``, [B, n]: a token jumps with probability 1 - exp(-step · rate · [x_1 differs]), to x_1
        drawn from ``p1`` [B, n, V] (flow_matching's MixtureDiscreteEulerSolver); at 1 all are data."""
        numbers = torch.stack([torch.rand(2, x_t.shape[1], generator=g, dtype=torch.float64) for g in generators])
        numbers = numbers.to(p1.device)
        x_1 = drawn(p1.flatten(0, 1), numbers[:, 0].flatten()).view_as(x_t)
        if time + step >= 1:
            return x_1
        jumps = 1 - torch.exp(-step * self.rate(torch.tensor(time, dtype=torch.float64)))
        return torch.where(numbers[:, 1] < jumps, x_1, x_t)
