"""Random draws of training that do not depend on the number of processes.

A step's draws are those of its whole batch: noise, times, masks, dropped conditions. One process draws them from
torch's global stream, which a run seeds by step. Several draw equal numbers for the whole batch, each from a generator
with the first rank's seed, and take the rows of their own. They must therefore ask equally often and in equal order,
also a rank that has no rows.

Dropout and stochastic depth are not among them: their kernels draw for what a rank holds, from its own stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Stream:
    """What the ranks of a step draw from, on each device: equal numbers everywhere."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def on(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self._generators[device]


_STREAM: ContextVar[Stream | None] = ContextVar("zoo_draws", default=None)


@contextmanager
def shared(seed: int) -> Iterator[None]:
    """Let the draws of the block be those of the whole batch, where several processes train.

    Args:
        seed: That with which one process would seed the global stream.
    """
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    token = _STREAM.set(Stream(seed) if several else None)
    try:
        yield
    finally:
        _STREAM.reset(token)


def place(count: int, device: torch.device) -> tuple[int, int]:
    """Where the own ``count`` rows begin among those of all ranks, and how many there are; all ranks must ask.

    Outside ``shared`` the own rows are all there are.
    """
    if _STREAM.get() is None:
        return 0, count
    sizes = _sizes((count,), device)
    return int(sizes[: dist.get_rank()].sum()), int(sizes.sum())


def stream(device: torch.device) -> torch.Generator | None:
    """The generator of the whole batch's draws; None = torch's global one."""
    current = _STREAM.get()
    return None if current is None else current.on(device)


def rows(
    make: Callable[..., Tensor], shape: Sequence[int], device: torch.device, *, dim: int = 0, **how: Any
) -> Tensor:
    """``make(shape, device=..., generator=..., **how)`` for the rows of this rank, out of the draw for all ranks.

    Args:
        make: ``torch.rand``, ``torch.randn``, or what takes their arguments.
        shape: Of the own rows. Of other dimensions than ``dim`` the largest of any rank is drawn and cut.
        dim: Which dimension counts the rows.
    """
    generator = stream(device)
    if generator is None:
        return make(tuple(shape), device=device, **how)
    sizes = _sizes(shape, device)  # [R, dims]
    whole = sizes.max(0).values.tolist()
    first, whole[dim] = int(sizes[: dist.get_rank(), dim].sum()), int(sizes[:, dim].sum())
    drawn = make(tuple(whole), device=device, generator=generator, **how)
    for axis, size in enumerate(shape):
        drawn = drawn.narrow(axis, first if axis == dim else 0, size)
    return drawn


def rand(shape: Sequence[int], device: torch.device, *, dim: int = 0) -> Tensor:
    """Uniform numbers in [0, 1)."""
    return rows(torch.rand, shape, device, dim=dim)


def randn(shape: Sequence[int], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Normal numbers."""
    return rows(torch.randn, shape, device, dtype=dtype)


def randint(high: int, shape: Sequence[int], device: torch.device) -> Tensor:
    """int64 in [0, high)."""
    return rows(lambda size, **how: torch.randint(high, size, **how), shape, device)


def choose(weights: Tensor) -> Tensor:
    """A column [N] for each row of ``weights`` [N, M], with probability proportional to it.

    That is ``torch.multinomial`` of one: argmax(w / E) of exponential E.
    """
    generator = stream(weights.device)
    if generator is None:
        return torch.multinomial(weights, 1)[:, 0]

    def exponential(size: Sequence[int], **how: Any) -> Tensor:
        return torch.empty(size, device=how["device"]).exponential_(generator=how["generator"])

    return (weights / rows(exponential, weights.shape, weights.device)).argmax(-1)


def _sizes(shape: Sequence[int], device: torch.device) -> Tensor:
    """The shapes [R, dims] of all ranks, on the CPU."""
    if dist.get_backend() != "nccl":
        device = torch.device("cpu")
    elif device.type == "cpu":
        device = torch.device("cuda", torch.cuda.current_device())
    own = torch.tensor(list(shape), device=device)
    sizes = own.new_empty(dist.get_world_size(), len(own))
    dist.all_gather(list(sizes.unbind(0)), own)
    return sizes.cpu()
