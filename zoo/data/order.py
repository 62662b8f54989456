"""The order in which samples are seen: a pure function of (ids, seed) and of nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from zoo.errors import ConfigError, DataError


class Draw(NamedTuple):
    """One place in the order: which sample, and how many times it was drawn before."""

    id: str
    draw: int


class Order(Protocol):
    """What the loader needs; a mixture of several sources by weight is another implementation of it."""

    def slice(self, start: int, stop: int) -> list[Draw]: ...
    def hash(self, count: int) -> str: ...


HASHED = 200_000
"""Places of an order that its hash draws one by one."""


class SampleOrder:
    """An endless sequence of (id, draw): epoch e is a permutation of the ids keyed by (seed, e).

    The permutation sorts raw 64-bit outputs of PCG64, whose stream NumPy guarantees between versions (that of
    ``Generator.permutation`` it does not), so an order recorded today can be rebuilt later.

    Args:
        ids: distinct ids in the source's own order.
        seed: of the order; independent of the seed of the weights.
        shuffle: False keeps every epoch in the source's order.

    Raises:
        DataError: there are no ids, or one occurs twice.
    """

    def __init__(self, ids: Sequence[str], seed: int = 0, *, shuffle: bool = True) -> None:
        if not ids:
            raise DataError("no samples to order: the split is empty; choose another split or other fractions")
        if len(set(ids)) != len(ids):
            repeated = next(id for id in ids if list(ids).count(id) > 1)
            raise DataError(f"the sample id {repeated!r} occurs more than once; ids must be distinct")
        if seed < 0:
            raise ConfigError(f"the seed of an order must not be negative, got {seed}")
        self.ids = tuple(ids)
        self.seed = seed
        self.shuffle = shuffle
        self._epoch = lru_cache(maxsize=2)(self._permutation)

    def __len__(self) -> int:
        """Return the number of samples in one epoch."""
        return len(self.ids)

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        if not self.shuffle:
            return np.arange(len(self.ids))
        keys = np.random.PCG64(np.random.SeedSequence((self.seed, epoch))).random_raw(len(self.ids))
        return np.argsort(keys, kind="stable")

    def slice(self, start: int, stop: int) -> list[Draw]:
        """Return the places ``start`` (included) to ``stop`` (excluded)."""
        n = len(self.ids)
        draws: list[Draw] = []
        place = start
        while place < stop:
            epoch, first = divmod(place, n)
            last = min(n, first + stop - place)
            draws += [Draw(self.ids[i], epoch) for i in self._epoch(epoch)[first:last].tolist()]
            place += last - first
        return draws

    def hash(self, count: int) -> str:
        """Return the sha256 (hex) over the ids of the first ``count`` places.

        Beyond ``HASHED`` places what follows is stated, not drawn: it is a function of the ids, the seed and the rule,
        and drawing the places of a published budget would take longer than the start of a run may.
        """
        digest = hashlib.sha256()
        for id, _ in self.slice(0, min(count, HASHED)):
            digest.update(id.encode() + b"\0")
        if count > HASHED:
            digest.update(f"{count}/{self.seed}/{self.shuffle}/PCG64\0".encode())
            for id in self.ids:
                digest.update(id.encode() + b"\0")
        return digest.hexdigest()

    def __iter__(self) -> Iterator[Draw]:
        """Iterate without end."""
        place = 0
        while True:
            yield from self.slice(place, place + len(self.ids))
            place += len(self.ids)

    def __getstate__(self) -> dict[str, object]:
        return {"ids": self.ids, "seed": self.seed, "shuffle": self.shuffle}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._epoch = lru_cache(maxsize=2)(self._permutation)


def training_order(source: Any, seed: int) -> Order:
    """Return the order in which training reads a source: its own ``order(split, seed)`` where it has one (mixtures),
    else a ``SampleOrder`` of its training split.

    Raises:
        DataError: as ``SampleOrder``.
    """
    own = getattr(source, "order", None)
    return own("train", seed) if own is not None else SampleOrder(source.ids("train"), seed)


def share(step: int, batch_size: int, rank: int = 0, world_size: int = 1) -> tuple[int, int]:
    """Return the places (start, stop) that ``rank`` reads at ``step`` of global batch ``batch_size``.

    Step s takes places [s*B, (s+1)*B); rank r of R takes the r-th contiguous share of them.

    Raises:
        ConfigError: the global batch does not divide evenly among the ranks.
    """
    if batch_size < 1 or world_size < 1 or not 0 <= rank < world_size:
        raise ConfigError(
            f"batch_size={batch_size}, rank={rank}, world_size={world_size}: "
            "expected batch_size >= 1 and 0 <= rank < world_size"
        )
    if batch_size % world_size:
        raise ConfigError(
            f"the global batch of {batch_size} cannot be shared by {world_size} devices; use a multiple of {world_size}"
        )
    local = batch_size // world_size
    start = step * batch_size + rank * local
    return start, start + local
