"""gIoU and cIoU of masks, as ``torchmetrics.Metric`` whose states are sums."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.evaluation.metrics import MeanOf
from zoo.evaluation.torchmetrics_base import Metric


def overlaps(found: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels in both and in either, [N] int64 each, of masks [N, H, W] bool.

    Raises:
        ValueError: other shapes or dtypes.
    """
    if found.shape != wanted.shape or found.ndim != 3 or {found.dtype, wanted.dtype} != {torch.bool}:
        raise ValueError(
            f"masks are {tuple(found.shape)} {found.dtype} and {tuple(wanted.shape)} {wanted.dtype}: expected bool"
            " [N, H, W] of one shape"
        )
    return (found & wanted).flatten(1).sum(1), (found | wanted).flatten(1).sum(1)


def ious(intersection: Tensor, union: Tensor) -> Tensor:
    """Intersection over union [N] float64; an empty union, nothing wanted and nothing found, counts 1."""
    return torch.where(union > 0, intersection.double() / union.clamp(min=1), 1.0)


class GIoU(MeanOf):
    """The mean over targets of intersection over union; an empty union counts 1 (``acc_iou[union_i == 0] += 1`` of
    LISA's train_ds.py, Lai et al. 2024, section 4.1, without its 1e-5 below the line).

    Not torchmetrics' ``GeneralizedIntersectionOverUnion``, a measure of boxes with the same abbreviation.
    """

    def update(self, found: Tensor, wanted: Tensor) -> None:  # type: ignore[override]
        """Add masks [N, H, W] bool."""
        super().update(ious(*overlaps(found, wanted)))


class CIoU(Metric):
    """All intersections over all unions: large targets weigh more (the same source).

    Not torchmetrics' ``CompleteIntersectionOverUnion``, a measure of boxes with the same abbreviation.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    intersection: Tensor
    union: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("intersection", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("union", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, found: Tensor, wanted: Tensor) -> None:
        """Add masks [N, H, W] bool."""
        intersection, union = overlaps(found, wanted)
        self.intersection += intersection.sum().to(self.intersection.device)
        self.union += union.sum().to(self.union.device)

    def compute(self) -> Tensor:
        """Return the ratio as a float64 scalar; 1 where all unions are empty."""
        return ious(self.intersection[None], self.union[None])[0]
