"""MUSE's score of an answer with several masks (arXiv 2312.02228, section 4.3): each target is compared with the found
mask that suits it best, and what is missing or too much counts as wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Matched:
    """How P found masks of an answer compare with G wanted ones.

    Attributes:
        score: The sum of the pairs' intersections over unions, divided by max(P, G); 1 where both are 0.
        intersection, union: Pixels, summed over the pairs; a mask without a partner adds its pixels to the union.
        pairs: (found, wanted) of the pairs, in order of ``wanted``.
    """

    score: float
    intersection: int
    union: int
    pairs: tuple[tuple[int, int], ...]


def matched(found: Tensor, wanted: Tensor) -> Matched:
    """Match masks one to one so that the sum of their intersections over unions is greatest.

    The released evaluation assigns by cross-entropy plus dice of the logits on 12,544 random points, which agrees
    wherever masks are not near ties, and depends on no logits here.

    Args:
        found: [P, H, W] bool.
        wanted: [G, H, W] bool.

    Raises:
        ValueError: Other dtypes, or masks of different sizes.
    """
    if {found.dtype, wanted.dtype} != {torch.bool} or found.ndim != 3 or found.shape[1:] != wanted.shape[1:]:
        raise ValueError(
            f"masks are {tuple(found.shape)} {found.dtype} and {tuple(wanted.shape)} {wanted.dtype}: expected bool"
            " [P, H, W] and [G, H, W]"
        )
    a, b = found.flatten(1).double(), wanted.flatten(1).double()
    both = a @ b.T  # [P, G]
    own, others = a.sum(1), b.sum(1)
    either = own[:, None] + others - both
    iou = torch.where(either > 0, both / either.clamp(min=1), 1.0)
    pairs = assigned((-iou).tolist())
    total = sum(float(iou[p, g]) for p, g in pairs)
    intersection = sum(int(both[p, g]) for p, g in pairs)
    union = sum(int(either[p, g]) for p, g in pairs)
    union += sum(int(own[p]) for p in set(range(len(a))) - {p for p, _ in pairs})
    union += sum(int(others[g]) for g in set(range(len(b))) - {g for _, g in pairs})
    most = max(len(a), len(b))
    return Matched(total / most if most else 1.0, intersection, union, tuple(sorted(pairs, key=lambda pair: pair[1])))


def assigned(cost: Sequence[Sequence[float]]) -> list[tuple[int, int]]:
    """The (row, column) pairs, as many as the smaller side has, whose costs have the least sum.

    Shortest augmenting paths with potentials (Jonker and Volgenant 1987): every row is added along the path that costs
    least by reduced costs, which are never negative.
    """
    if not cost or not cost[0]:
        return []
    if len(cost) > len(cost[0]):
        return [(row, column) for column, row in assigned([list(line) for line in zip(*cost, strict=True)])]
    columns = len(cost[0])
    row_price, column_price = [0.0] * len(cost), [0.0] * columns
    owner: list[int | None] = [None] * columns
    for start in range(len(cost)):
        distance, before, done = [float("inf")] * columns, [-1] * columns, [False] * columns
        row, last, walked = start, -1, 0.0
        while True:  # grow the tree of shortest paths until a free column is reached
            for column in range(columns):
                if not done[column]:
                    reduced = walked + cost[row][column] - row_price[row] - column_price[column]
                    if reduced < distance[column]:
                        distance[column], before[column] = reduced, last
            last = min((c for c in range(columns) if not done[c]), key=distance.__getitem__)
            walked, done[last] = distance[last], True
            taken = owner[last]
            if taken is None:
                break
            row = taken
        row_price[start] += walked
        for column in range(columns):
            if done[column] and column != last:
                held = owner[column]
                assert held is not None
                row_price[held] += walked - distance[column]
                column_price[column] -= walked - distance[column]
        while last >= 0:  # along the path, every column goes to the row that reached it
            previous = before[last]
            owner[last] = start if previous < 0 else owner[previous]
            last = previous
    return [(row, column) for column, row in enumerate(owner) if row is not None]
