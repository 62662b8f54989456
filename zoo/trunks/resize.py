"""Stored positions of a multiway trunk for images of another size."""

from __future__ import annotations

import torch
from torch import Tensor

EXTRA = 3
"""Rows behind the offsets between patches: class token to patch, patch to class token, class token to itself."""


def resize_relative(table: Tensor, old: int, new: int) -> Tensor:
    """Resample the image's rows of a relative table for another number of patches a side.

    As BEiT and VLMo do (unilm beit/run_class_finetuning.py): the stored offsets are taken to lie at 0, ±1, ±(1 + q),
    ±(1 + q + q^2), ..., with q such that they span the new offsets, so that near ones keep their places; between them
    runs the interpolating cubic spline. The released code calls SciPy's interp2d, whose rule on a grid this is.

    Args:
        table: [rows, ...]: (2*old - 1)^2 offsets row by row, three class-token rows, and whatever follows, which stays.
        old, new: Patches a side.

    Returns:
        [(2*new - 1)^2 + rows - (2*old - 1)^2, ...].
    """
    if old == new:
        return table
    source, target = 2 * old - 1, 2 * new - 1
    places = geometric(source, target)
    wanted = torch.arange(target, dtype=torch.float64) - target // 2
    weights = spline(places, wanted.clamp(places[0], places[-1]))  # [target, source]
    grid = table[: source**2].double().view(source, source, -1)
    grid = torch.einsum("ai,ijc,bj->abc", weights, grid, weights)
    rest = table[source**2 :]
    return torch.cat([grid.reshape(target**2, *table.shape[1:]).to(table.dtype), rest])


def geometric(source: int, target: int) -> Tensor:
    """``source`` places, symmetric about 0, whose steps grow by a factor q in [1.01, 1.5] to span ``target`` ones."""
    left, right = 1.01, 1.5
    half, wanted = source // 2, target // 2
    while right - left > 1e-6:
        q = (left + right) / 2
        if (1 - q**half) / (1 - q) > wanted:
            right = q
        else:
            left = q
    steps = torch.tensor([q**i for i in range(half)], dtype=torch.float64).cumsum(0)
    return torch.cat([-steps.flip(0), torch.zeros(1, dtype=torch.float64), steps])


def spline(x: Tensor, at: Tensor) -> Tensor:
    """Weights [len(at), len(x)] of the cubic spline through values at ``x`` (ascending), not-a-knot at both ends as
    FITPACK's; with fewer than four values the straight lines between them.

    The values' second derivatives m solve h_{i-1} m_{i-1} + 2(h_{i-1} + h_i) m_i + h_i m_{i+1} = 6(s_i - s_{i-1}) with
    slopes s, and the third derivative is continuous at the second and the last but one place.
    """
    n = len(x)
    x, at = x.double(), at.double()
    values = torch.eye(n, dtype=torch.float64)
    h = x[1:] - x[:-1]
    second = torch.zeros(n, n, dtype=torch.float64)
    if n >= 4:
        system = torch.zeros(n, n, dtype=torch.float64)
        right = torch.zeros(n, n, dtype=torch.float64)
        slopes = (values[1:] - values[:-1]) / h[:, None]
        for i in range(1, n - 1):
            system[i, i - 1], system[i, i], system[i, i + 1] = h[i - 1], 2 * (h[i - 1] + h[i]), h[i]
            right[i] = 6 * (slopes[i] - slopes[i - 1])
        system[0, :3] = torch.stack([h[1], -(h[0] + h[1]), h[0]])
        system[-1, -3:] = torch.stack([h[-1], -(h[-2] + h[-1]), h[-2]])
        second = torch.linalg.solve(system, right)
    place = (torch.searchsorted(x, at, right=True) - 1).clamp(0, n - 2)
    step, b = h[place][:, None], ((at - x[place]) / h[place])[:, None]
    a = 1 - b
    curve = ((a**3 - a) * second[place] + (b**3 - b) * second[place + 1]) * step**2 / 6
    return a * values[place] + b * values[place + 1] + curve
