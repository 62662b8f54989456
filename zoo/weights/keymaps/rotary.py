"""Rotary embeddings in other orders: the trunk rotates half-split, checkpoints may pair neighbours.

A fixed permutation of the rows of q and k (weights, biases and the affine of a QK-norm; not v, not the output) turns
one into the other, because scores are sums over the dimensions of a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zoo.weights.keymaps import Rule, regroup


def neighbours_to_half(tensor: Tensor, head: int, dims: int | None = None) -> Tensor:
    """Reorder q or k rows from pairs (0, 1), (2, 3), ... to pairs (i, i + dims / 2).

    For LlamaGen, and the official files of Chameleon and Llama.

    Args:
        tensor: ``[heads * head, ...]`` rows (flatten a per-head affine first), or ``[head]`` shared by the heads.
        head: width of a head.
        dims: rotated dimensions of a head, all by default.
    """
    return _reordered(tensor, head, _order(head, dims or head))


def half_to_neighbours(tensor: Tensor, head: int, dims: int | None = None) -> Tensor:
    """Undo :func:`neighbours_to_half`."""
    return _reordered(tensor, head, torch.argsort(_order(head, dims or head)))


def split_neighbours(source: str, targets: Sequence[str], heads: int, kv_heads: int, head: int) -> Rule:
    """Cut a fused ``[q | k | v]`` matrix and reorder q and k to half-split rotary.

    Args:
        source: template of the fused tensor.
        targets: templates of q, k and v.
        heads: attention heads.
        kv_heads: heads of keys and values.
        head: width of a head.
    """
    sizes = [heads * head, kv_heads * head, kv_heads * head]

    def to(fused: Tensor) -> tuple[Tensor, ...]:
        q, k, v = torch.split(fused, sizes)
        return neighbours_to_half(q, head), neighbours_to_half(k, head), v.contiguous()

    def back(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([half_to_neighbours(q, head), half_to_neighbours(k, head), v])

    return regroup(source, targets, to, back)


def two_halves_to_axes(tensor: Tensor, head: int) -> Tensor:
    """Reorder q or k rows of ChatGLM: each half of a head is rotated half-split with a position of its own."""
    return _reordered(tensor, head, _axes_order(head))


def axes_to_two_halves(tensor: Tensor, head: int) -> Tensor:
    """Undo :func:`two_halves_to_axes`."""
    return _reordered(tensor, head, torch.argsort(_axes_order(head)))


def _order(head: int, dims: int) -> Tensor:
    rotated = torch.arange(dims)
    return torch.cat([rotated[0::2], rotated[1::2], torch.arange(dims, head)])


def _axes_order(head: int) -> Tensor:
    # old: [a1 a2 | b1 b2] with pairs (a1, a2), (b1, b2); ours: [a1 b1 | a2 b2]
    return torch.arange(head).view(2, 2, head // 4).transpose(0, 1).reshape(-1)


def _reordered(tensor: Tensor, head: int, order: Tensor) -> Tensor:
    return tensor.view(-1, head, *tensor.shape[1:])[:, order.to(tensor.device)].reshape(tensor.shape)
