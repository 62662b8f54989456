"""Distances of sets against closed forms, torchmetrics, and what an unbiased estimate must do."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from zoo.evaluation.distances import (
    BANDWIDTH,
    CMMD_SCALE,
    FrechetDistance,
    KernelDistance,
    distances,
    gaussian_kernel,
    polynomial_kernel,
    squared_mmd,
)


def normal(count: int, width: int, seed: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def frechet(first: Tensor, second: Tensor) -> float:
    return float(FrechetDistance(first.shape[1]).add(first, second).compute())


def test_frechet_of_equal_sets_is_nought() -> None:
    x = normal(50, 8, 0) @ normal(8, 8, 1) + 3
    assert abs(frechet(x, x)) < 1e-8
    assert abs(frechet(x, x.flip(0))) < 1e-8
    few = normal(5, 16, 2)  # fewer rows than dimensions: covariances without full rank
    assert abs(frechet(few, few)) < 1e-5


def test_frechet_of_shifted_and_stretched_sets_is_exact() -> None:
    x = normal(60, 6, 3) @ normal(6, 6, 4)
    shift = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0, -1.0], dtype=torch.float64)
    assert frechet(x, x + shift) == pytest.approx(float(shift @ shift), rel=1e-9)
    stretched = (x - x.mean(0)) * 1.7 + x.mean(0)  # C2 = 1.7^2 C1
    assert frechet(x, stretched) == pytest.approx(0.7**2 * float(x.T.cov().trace()), rel=1e-9)


def test_frechet_of_covariances_that_do_not_commute() -> None:
    x, y = normal(80, 5, 5) @ normal(5, 5, 6), normal(70, 5, 7) @ normal(5, 5, 8) + 0.3
    a, b = x.T.cov(), y.T.cov()

    def root(c: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(c)
        return vectors * values.clamp(min=0).sqrt() @ vectors.T

    trace = (a + b - 2 * root(root(a) @ b @ root(a))).trace()  # the symmetric form of the same root
    assert frechet(x, y) == pytest.approx(float((x.mean(0) - y.mean(0)).square().sum() + trace), rel=1e-8)


def test_polynomial_is_torchmetrics_kernel_distance() -> None:
    from torch import nn
    from torchmetrics.image.kid import KernelInceptionDistance

    x, y = (nn.functional.normalize(normal(40, 12, seed) + seed, dim=1) for seed in (1, 2))
    theirs = KernelInceptionDistance(feature=nn.Identity(), subsets=1, subset_size=40)
    theirs.update(x * math.sqrt(12), real=True)
    theirs.update(y * math.sqrt(12), real=False)
    assert float(squared_mmd(x, y, polynomial_kernel)) == pytest.approx(float(theirs.compute()[0]), rel=1e-9)


def test_gaussian_by_hand() -> None:
    x, y = torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([[0.0, 1.0], [0.0, 0.0], [6.0, 8.0]])

    def k(squared: float) -> float:
        return math.exp(-squared / (2 * BANDWIDTH**2))

    within_x, within_y = k(25), (k(1) + k(36 + 49) + k(100)) / 3
    between = (k(1) + k(0) + k(100) + k(9 + 9) + k(25) + k(25)) / 6
    metric = KernelDistance("gaussian")
    metric.update(x[:1], y[:2])
    metric.update(x[1:], y[2:])  # in batches
    assert float(metric.compute()) == pytest.approx(CMMD_SCALE * (within_x + within_y - 2 * between), rel=1e-9)


def test_gaussian_meets_the_closed_form() -> None:
    """x - y of two normals is normal with twice the variance, so that the kernels' means are known."""
    width, shift = 4, torch.tensor([6.0, 0.0, -6.0, 3.0], dtype=torch.float64)
    c = (BANDWIDTH**2 / (BANDWIDTH**2 + 2)) ** (width / 2)
    expected = 2 * c * (1 - math.exp(-float(shift @ shift) / (2 * (BANDWIDTH**2 + 2))))
    values = torch.stack(
        [
            squared_mmd(normal(60, width, 2 * n), normal(45, width, 2 * n + 1) + shift, gaussian_kernel)
            for n in range(60)
        ]
    )
    error = float(values.std()) / math.sqrt(len(values))
    assert abs(float(values.mean()) - expected) < 4 * error
    assert error < expected / 50


@pytest.mark.parametrize("kernel", [polynomial_kernel, gaussian_kernel])
def test_equal_distributions_are_nought_in_the_mean_whatever_the_sizes(kernel: object) -> None:
    def unit(count: int, seed: int) -> Tensor:
        return torch.nn.functional.normalize(normal(count, 6, seed) + 1, dim=1)

    values = torch.stack([squared_mmd(unit(12, 2 * n), unit(7, 2 * n + 1), kernel) for n in range(400)])  # type: ignore[arg-type]
    error = float(values.std()) / math.sqrt(len(values))
    assert abs(float(values.mean())) < 4 * error
    assert bool((values < 0).any())
    x, y = unit(12, 0), unit(7, 1)
    biased = kernel(x, x).mean() + kernel(y, y).mean() - 2 * kernel(x, y).mean()  # type: ignore[operator]
    assert float(biased) > 20 * error  # with the diagonal it would not be


def test_what_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="two of each"):
        squared_mmd(normal(1, 3, 0), normal(5, 3, 1), gaussian_kernel)
    both = distances([(normal(9, 3, 0), normal(9, 3, 1)), (normal(9, 3, 2), normal(9, 3, 3))])
    alone = [distances([(normal(9, 3, n), normal(9, 3, n + 1))]) for n in (0, 2)]
    for key in ("frechet", "kernel", "cmmd"):
        assert both[key] == pytest.approx((alone[0][key] + alone[1][key]) / 2)


def gaussian(count: int, mean: Tensor, root: Tensor, seed: int) -> Tensor:
    """Rows of a Gaussian with covariance ``root root^T``."""
    return normal(count, len(mean), seed) @ root.T + mean


MEANS = torch.tensor([0.5, -1.0, 0.0], dtype=torch.float64), torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
ROOTS = (
    torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0], [-0.3, 0.5, 1.2]], dtype=torch.float64),
    torch.tensor([[0.5, 0.0, 0.0], [-0.4, 1.5, 0.0], [0.2, -0.7, 0.9]], dtype=torch.float64),
)
"""Two Gaussians whose covariances do not commute."""


def test_frechet_of_drawn_gaussians_comes_to_the_closed_form() -> None:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of the Gaussians themselves, the trace of the root by eigenvalues."""
    first, second = (root @ root.T for root in ROOTS)
    assert float((first @ second - second @ first).abs().max()) > 0.1
    root_trace = torch.linalg.eigvals(first @ second).real.sqrt().sum()
    expected = float((MEANS[0] - MEANS[1]).square().sum() + (first + second).trace() - 2 * root_trace)
    errors = []
    for count in (200, 20000):
        drawn = [gaussian(count, MEANS[n], ROOTS[n], seed=10 + n) for n in range(2)]
        errors.append(abs(frechet(*drawn) - expected))
    assert expected > 3
    assert errors[1] < 0.05
    assert errors[1] < errors[0]


def test_polynomial_kernel_of_drawn_gaussians_comes_to_the_closed_form() -> None:
    """(z + 1)^3 of z = x.y, x and y independent with means nought: E z = E z^3 = 0, E z^2 = tr(C1 C2), so that the
    squared MMD is 3 |C1 - C2|^2 (Frobenius)."""
    first, second = (root @ root.T for root in ROOTS)
    expected = 3 * float((first - second).square().sum())
    nought = torch.zeros(3, dtype=torch.float64)
    values = torch.stack(
        [
            squared_mmd(
                gaussian(150, nought, ROOTS[0], 2 * n), gaussian(110, nought, ROOTS[1], 2 * n + 1), polynomial_kernel
            )
            for n in range(200)
        ]
    )
    error = float(values.std()) / math.sqrt(len(values))
    assert abs(float(values.mean()) - expected) < 4 * error
    assert error < expected / 20
