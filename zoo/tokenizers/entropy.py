"""The entropy terms that make a tokenizer sure of each code and even over all of them.

For p(c | x) = softmax over codes c of -|x - c|^2 / tau, the loss is E_x[H(p(c | x))] - gamma * H(E_x[p(c | x)])
(arXiv 2310.05737, section 3.1): the first term is small where every vector is sure of its code, the second is large
where the batch uses all codes. With codes of +-1, |x - c|^2 is -2 x.c and a constant, and p is a product over bits with
P(bit = +1) = sigmoid(4 x / tau); so the first term is a sum of binary entropies, and the second needs the 2^K codes but
never a row of 2^K for every vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

FLOOR = 1e-5
"""Keeps the logarithm of a code's share finite; the value of every release."""

DISTANCES = 2**22
"""Entries of a table of vectors by codes that stand in memory at once, by default."""


@dataclass
class Entropies:
    """In nats.

    Attributes:
        sample: Mean over vectors of the entropy of each, a scalar.
        batch: Entropy of the mean distribution, over all ranks, a scalar.
    """

    sample: Tensor
    batch: Tensor


class _MeanOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x / dist.get_world_size()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].clone()
        dist.all_reduce(gradient)
        return gradient / dist.get_world_size()


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of a tensor over all ranks, with its gradient; the tensor itself where there is one rank."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x
    return cast("Tensor", _MeanOverRanks.apply(x))  # type: ignore[no-untyped-call]


def _floored(p: Tensor, floor: str) -> Tensor:
    """-p log p, elementwise, with the floor added to p or p clamped to it."""
    return -p * (p + FLOOR if floor == "add" else p.clamp(min=FLOOR)).log()


def binary_entropy(logits: Tensor) -> Tensor:
    """The entropy of a bit with P(1) = sigmoid(logits), elementwise; exact far from 0 too."""
    size = logits.abs()
    return F.softplus(-size) + size * torch.sigmoid(-size)


def _products(logits: Tensor) -> Tensor:
    """P of every pattern of bits: [N, k] log-odds to [N, 2^k]; the first bit is the most significant of the pattern."""
    p = logits.new_ones(len(logits), 1)
    for bit in logits.unbind(1):
        pair = torch.sigmoid(torch.stack((-bit, bit), -1))  # [N, 2]
        p = (p[:, :, None] * pair[:, None, :]).flatten(1)
    return p


def code_entropies(bits: Tensor, temperature: float, floor: str = "add") -> Entropies:
    """Over all 2^K codes of +-1 (Open-MAGVIT2, vector_quantize_pytorch).

    Args:
        bits: [N, K] fp32, before the sign.
        temperature: tau.
        floor: ``add``: log(p + 1e-5), in the batch term only (Open-MAGVIT2); ``clamp``: log(max(p, 1e-5)), in both
            (vector_quantize_pytorch), which needs every vector's 2^K shares, a few vectors at a time.

    The mean distribution is a matrix product of the two halves' distributions, [2^(K/2), N] x [N, 2^(K/2)]: exact, and
    of N * 2^(K/2) memory.
    """
    logits = 4 / temperature * bits
    half = bits.shape[1] // 2
    first, second = _products(logits[:, :half]), _products(logits[:, half:])
    mean = mean_over_ranks(first.T @ second / len(bits))  # [2^half, 2^(K - half)]
    batch = _floored(mean, floor).sum()
    if floor == "add":
        return Entropies(binary_entropy(logits).sum(1).mean(), batch)

    def total(a: Tensor, b: Tensor) -> Tensor:
        return _floored(a[:, :, None] * b[:, None, :], floor).sum()

    chunk = max(1, DISTANCES // mean.numel())
    sums = [
        checkpoint(total, a, b, use_reentrant=False)
        for a, b in zip(torch.split(first, chunk), torch.split(second, chunk), strict=True)
    ]
    return Entropies(torch.stack(sums).sum() / len(bits), batch)


def bit_entropies(bits: Tensor, temperature: float) -> Entropies:
    """Of single bits, meaned over them, in place of codes: no pattern is seen, and nothing grows with K (Show-o).

    Args:
        bits: [N, K] fp32, before the sign.
        temperature: tau; Show-o has 1.
    """
    logits = 4 / temperature * bits
    p = mean_over_ranks(torch.sigmoid(logits).mean(0))  # [K]
    both = torch.stack((p, 1 - p))
    batch = -(both * both.clamp(min=torch.finfo(p.dtype).eps).log()).sum(0).mean()
    return Entropies(binary_entropy(logits).mean(), batch)


def softmax_entropies(x: Tensor, table: Tensor, temperature: float, chunk: int | None = None) -> Entropies:
    """Of softmax(-d / tau), d the squared distances to a table of codes (LlamaGen's compute_entropy_loss).

    Args:
        x: [N, C] fp32.
        table: [K, C] fp32.
        temperature: tau.
        chunk: Vectors at a time; their distances are computed again in the backward pass. None = about 4 million
            distances at a time.
    """
    chunk = chunk or max(1, DISTANCES // len(table))

    def part(rows: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        squared = rows.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * rows @ codes.T
        log_p = F.log_softmax(-squared / temperature, -1)
        p = log_p.exp()
        return p.sum(0), -(p * log_p).sum()

    parts = torch.split(x, chunk)
    sums: list[tuple[Tensor, Tensor]] = [checkpoint(part, rows, table, use_reentrant=False) for rows in parts]
    mean = mean_over_ranks(torch.stack([share for share, _ in sums]).sum(0) / len(x))
    sample = torch.stack([entropy for _, entropy in sums]).sum() / len(x)
    return Entropies(sample, _floored(mean, "add").sum())
