"""Distances between two sets of images in an evaluator's space: of their Gaussians, and of their kernel means.

The Fréchet distance is torchmetrics' (its sums are kept in float64). Its kernel distance draws random subsets from the
global random stream and needs sets of one size, so the kernel distances here are our own: the whole sets, once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from zoo.evaluation.torchmetrics_base import FrechetInceptionDistance, Metric

if TYPE_CHECKING:
    from collections.abc import Sequence

DEGREE = 3
"""Of the polynomial kernel (Binkowski et al. 2018, "Demystifying MMD GANs", section 4.1)."""
BANDWIDTH = 10.0
"""Sigma of the Gaussian kernel (Jayasumana et al. 2024, "Rethinking FID", section 4, for embeddings of unit length)."""
CMMD_SCALE = 1000.0
"""CMMD is shown times this (the same section, and ``_SCALE`` of its released distance.py)."""


class _Given(nn.Module):
    """Stands where torchmetrics expects a feature extractor: the features are given."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


class FrechetDistance(FrechetInceptionDistance):
    """``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))`` of the sets' means and covariances (Heusel et al. 2017, eq. 6).

    Covariances divide by N - 1. With N near the width of the space or below, the distance of two samples of one
    distribution is far above nought: only distances of sets of equal sizes can be compared.
    """

    def __init__(self, width: int) -> None:
        super().__init__(feature=_Given(width))

    def add(self, first: Tensor, second: Tensor) -> FrechetDistance:
        """Add features [N, D] and [M, D] of the two sets; kept in float64."""
        self.update(first.double(), real=True)
        self.update(second.double(), real=False)
        return self


def polynomial_kernel(x: Tensor, y: Tensor) -> Tensor:
    """``(x . y + 1)^3`` [N, M]: Binkowski's ``(x . y / D + 1)^3`` for features of length sqrt(D) instead of one.

    On unit vectors the division by D would leave nothing but the difference of the means.
    """
    return (x @ y.T + 1) ** DEGREE


def gaussian_kernel(x: Tensor, y: Tensor) -> Tensor:
    """``exp(-|x - y|^2 / (2 sigma^2))`` [N, M] with CMMD's sigma."""
    return torch.exp(-torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square() / (2 * BANDWIDTH**2))


KERNELS: Mapping[str, tuple[Callable[[Tensor, Tensor], Tensor], float]] = {
    "polynomial": (polynomial_kernel, 1.0),
    "gaussian": (gaussian_kernel, CMMD_SCALE),
}
"""Name -> kernel, and what its distance is multiplied by."""


def squared_mmd(x: Tensor, y: Tensor, kernel: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The unbiased estimate of the squared maximum mean discrepancy (Gretton et al. 2012, eq. 3), a float64 scalar.

    It is nought in the mean for two samples of one distribution, of whatever sizes, and so can be below nought.

    Args:
        x: [M, D]; y: [N, D]; at least two rows each.

    Raises:
        ValueError: a set has fewer than two rows.
    """
    m, n = len(x), len(y)
    if min(m, n) < 2:
        raise ValueError(f"sets of {m} and {n}: an unbiased estimate needs two of each")
    x, y = x.double(), y.double()
    within_x, within_y = kernel(x, x), kernel(y, y)  # [M, M], [N, N]
    return (
        (within_x.sum() - within_x.diagonal().sum()) / (m * (m - 1))
        + (within_y.sum() - within_y.diagonal().sum()) / (n * (n - 1))
        - 2 * kernel(x, y).mean()
    )


class KernelDistance(Metric):
    """`squared_mmd` of two sets that come in batches: ``polynomial`` as KID, or ``gaussian`` as CMMD (unbiased, as in
    the paper's eq. 4; its released code keeps the diagonal, which adds about 2000 (1 - k) / N)."""

    higher_is_better = False
    is_differentiable = False
    full_state_update = False
    first: list[Tensor]
    second: list[Tensor]

    def __init__(self, kernel: str) -> None:
        super().__init__()
        self.kernel, self.scale = KERNELS[kernel]
        self.add_state("first", [], dist_reduce_fx="cat")
        self.add_state("second", [], dist_reduce_fx="cat")

    def update(self, first: Tensor, second: Tensor) -> None:
        """Add features [N, D] and [M, D] of the two sets."""
        self.first.append(first)
        self.second.append(second)

    def compute(self) -> Tensor:
        """Return the distance as a float64 scalar."""
        first, second = (
            torch.cat(list(part)) if isinstance(part, list) else part for part in (self.first, self.second)
        )
        return self.scale * squared_mmd(first, second, self.kernel)


def distances(pairs: Sequence[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Return ``frechet``, ``kernel`` and ``cmmd``, each the mean over pairs of sets ([N, D], [M, D])."""
    sums = {"frechet": 0.0, "kernel": 0.0, "cmmd": 0.0}
    for first, second in pairs:
        sums["frechet"] += float(FrechetDistance(first.shape[1]).add(first, second).compute())
        for name, kernel in (("kernel", "polynomial"), ("cmmd", "gaussian")):
            metric = KernelDistance(kernel)
            metric.update(first, second)
            sums[name] += float(metric.compute())
    return {name: value / len(pairs) for name, value in sums.items()}
