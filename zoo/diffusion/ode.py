"""Following a velocity field from time 0 to time 1: Euler, midpoint, and Runge-Kutta 4(5) with steps of its own size.

Every item of a batch has its own time, so that an item's path does not depend on what shares its batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from zoo.errors import ConfigError

Field = Callable[[Tensor, Tensor], Tensor]
"""Items [N, ...] and their times [N] -> velocities [N, ...]."""

# Dormand and Prince (1980), table 2: nodes, stages, and the fifth order minus the embedded fourth order
_NODES = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES: tuple[tuple[float, ...], ...] = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


After = Callable[[Tensor, float], Tensor]
"""Items at the end of a step and its time -> the items that the next step starts from."""


def euler(field: Field, x: Tensor, steps: int, *, first: int = 0, after: After | None = None) -> Tensor:
    """Equal steps of first order from time ``first / steps`` to 1."""
    for n in range(first, steps):
        x = x + field(x, _times(x, n / steps)) / steps
        x = x if after is None else after(x, (n + 1) / steps)
    return x


def midpoint(field: Field, x: Tensor, steps: int, *, first: int = 0, after: After | None = None) -> Tensor:
    """Equal steps of second order from time ``first / steps`` to 1, two evaluations each."""
    for n in range(first, steps):
        half = x + field(x, _times(x, n / steps)) / (2 * steps)
        x = x + field(half, _times(x, (n + 0.5) / steps)) / steps
        x = x if after is None else after(x, (n + 1) / steps)
    return x


def rk45(field: Field, x: Tensor, steps: int, *, rtol: float = 1e-3, atol: float = 1e-4) -> Tensor:
    """Adaptive steps of fifth order from time 0 to 1 (Dormand and Prince, 1980; Hairer, Norsett and Wanner, II.4).

    Args:
        x: [N, ...]; every item chooses its own steps, and those that have arrived wait.
        steps: The first step tried is 1 / steps.
        rtol: Error of a step that is allowed, relative to the largest value of its two ends.
        atol: The same, absolute.

    Raises:
        ConfigError: An item does not arrive within 10,000 evaluations: the field is too rough for the tolerance.
    """
    time = torch.zeros(len(x), dtype=torch.float64, device=x.device)  # [N]
    step = torch.full_like(time, 1 / steps)
    slope = field(x, time.to(x.dtype))  # k1; of an accepted step's end it is the next one's
    for _ in range(10_000 // 6):
        step = torch.minimum(step, 1 - time)
        slopes = [slope]
        for node, stage in zip(_NODES[1:], _STAGES[1:], strict=True):
            at = x + _of(step, x) * _sum(stage, slopes)
            slopes.append(field(at, (time + node * step).to(x.dtype)))
        error = _of(step, x) * _sum(_ERROR, slopes)
        scale = atol + rtol * torch.maximum(x.abs(), at.abs())  # `at` is the fifth-order end
        ratio = (error / scale).flatten(1).double().square().mean(1).sqrt()  # [N]; at most 1 is good
        good = ratio <= 1
        x = torch.where(_of(good, x), at, x)
        slope = torch.where(_of(good, x), slopes[-1], slope)
        time = torch.where(good, time + step, time)
        if bool((time >= 1 - 1e-9).all()):
            return x
        step = step * (0.9 * ratio.clamp(min=1e-10) ** -0.2).clamp(0.2, 5.0)
    raise ConfigError(
        f"the adaptive sampler did not arrive within 10,000 evaluations at rtol = {rtol}, atol = {atol}:"
        " raise the tolerance, or choose sampler=midpoint"
    )


def _sum(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    terms = [weight * slope for weight, slope in zip(weights, slopes, strict=True) if weight]
    return torch.stack(terms).sum(0)


def _of(values: Tensor, like: Tensor) -> Tensor:
    """One value [N] an item, in the shape of ``like`` [N, ...]."""
    values = values if values.dtype == torch.bool else values.to(like.dtype)
    return values.reshape(-1, *(1,) * (like.ndim - 1))


def _times(x: Tensor, time: float) -> Tensor:
    return torch.full((len(x),), time, dtype=x.dtype, device=x.device)
