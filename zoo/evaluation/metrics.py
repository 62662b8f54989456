"""Metrics as ``torchmetrics.Metric`` whose states are sums, so that they add up over ranks and hold no lists."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from zoo.evaluation.task import COSINE_TIE
from zoo.evaluation.torchmetrics_base import Metric


def ranks_of(scores: Tensor, positives: Sequence[Sequence[int]], tie: float) -> Tensor:
    """Rank the best positive of each row, counting ties against it.

    A negative that scores as high as the best positive, or less than ``tie`` below it, counts as ranked before it: a
    model that gives all candidates one score gets the last rank, not a lucky first. Other positives never count.

    Args:
        scores: [B, N] float.
        positives: for each row the columns that are right, at least one.
        tie: scores closer than this are equal.

    Returns:
        [B] int64, 1 is best.

    Raises:
        ValueError: a row has no positive.
    """
    mask = torch.zeros(scores.shape, dtype=torch.bool)  # [B, N]
    for row, columns in enumerate(positives):
        if not columns:
            raise ValueError(f"row {row} has no right candidate")
        mask[row, torch.as_tensor(columns)] = True
    mask = mask.to(scores.device)
    best = scores.masked_fill(~mask, -math.inf).amax(1, keepdim=True)  # [B, 1]
    return 1 + ((scores >= best - tie) & ~mask).sum(1)  # [B]


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """Dot products [N, M] of vectors [N, D] and [M, D]; of items with several, [N, Q, D], the greatest of the Q.

    One query vector at a time, so that no more than [N, M] is held twice.
    """
    if b.ndim == 3:
        return similarity(b, a).T
    if a.ndim == 2:
        return a @ b.T
    best = a[:, 0] @ b.T
    for q in range(1, a.shape[1]):
        best = torch.maximum(best, a[:, q] @ b.T)
    return best


def retrieval_ranks(
    queries: Tensor,
    gallery: Tensor,
    positives: Sequence[Sequence[int]],
    chunk: int = 512,
    tie: float = COSINE_TIE,
) -> Tensor:
    """Rank the best positive of every query by ``similarity``, ``chunk`` queries at a time: never more than [chunk, N].

    Args:
        queries: [Q, D]; gallery: [N, D]; either may have several vectors an item. Compared in float32 or better.
        positives: for each query the right rows of the gallery.

    Returns:
        [Q] int64 on the CPU, 1 is best. The result does not depend on ``chunk``: see `COSINE_TIE`.
    """
    gallery = gallery.to(torch.promote_types(gallery.dtype, torch.float32))
    ranks = []
    for start in range(0, len(queries), chunk):
        part = queries[start : start + chunk].to(gallery)  # [c, D]
        scores = similarity(part, gallery)  # [c, N]
        ranks.append(ranks_of(scores, positives[start : start + chunk], tie).cpu())
    return torch.cat(ranks) if ranks else torch.zeros(0, dtype=torch.int64)


class RankMetric(Metric):
    """Hit rates, median and mean reciprocal rank from one sum state: the histogram of ranks.

    ``compute`` returns ``r<k>`` (share of ranks <= k), ``median_rank`` (lower median, as an actual rank), ``mrr``.
    Equal to ``torchmetrics.retrieval.RetrievalHitRate(top_k=k)`` where there are no ties, at O(candidates) memory.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    counts: Tensor

    def __init__(self, candidates: int, ks: Sequence[int] = (1, 5, 10)) -> None:
        super().__init__()
        self.ks = tuple(ks)
        self.add_state("counts", torch.zeros(candidates, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, ranks: Tensor) -> None:
        """Add ranks [B] in 1..candidates."""
        self.counts += torch.bincount(ranks.to(self.counts.device) - 1, minlength=len(self.counts))

    def compute(self) -> dict[str, Tensor]:
        """Return the metrics as float64 scalars; NaN when nothing was added."""
        counts = self.counts.double()
        total = counts.sum()
        cumulative = counts.cumsum(0)
        places = torch.arange(1, len(counts) + 1, dtype=torch.float64, device=counts.device)
        nothing = torch.full((), math.nan, dtype=torch.float64)
        median = places[torch.searchsorted(cumulative, total / 2)] if total > 0 else nothing
        return {
            **{f"r{k}": cumulative[min(k, len(counts)) - 1] / total for k in self.ks},
            "median_rank": median,
            "mrr": (counts / places).sum() / total,
        }


class BitsPerByte(Metric):
    """Total negative log-likelihood in bits over total UTF-8 bytes: comparable between tokenizers.

    ``bits_per_byte = sum(nats) / ln 2 / sum(bytes)``, a ratio of sums, not a mean of ratios: long captions weigh more.
    """

    higher_is_better = False
    is_differentiable = False
    full_state_update = False
    nats: Tensor
    bytes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nats", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("bytes", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, log_likelihood: Tensor, byte_counts: Tensor) -> None:
        """Add log p [B] in nats and the texts' lengths [B] in bytes."""
        self.nats -= log_likelihood.to(self.nats.device).double().sum()
        self.bytes += byte_counts.to(self.bytes.device).sum()

    def compute(self) -> Tensor:
        """Return bits per byte as a float64 scalar."""
        return self.nats / math.log(2) / self.bytes


class MeanOf(Metric):
    """Mean of values, as two sums."""

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        """Add values [B], bool or number."""
        self.total += values.to(self.total.device).double().sum()
        self.count += values.numel()

    def compute(self) -> Tensor:
        """Return the mean as a float64 scalar."""
        return self.total / self.count
