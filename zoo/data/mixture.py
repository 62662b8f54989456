"""Several sources as one, each drawn at its own rate: balanced sampling of datasets of unequal size."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from zoo.data.order import HASHED, Draw, Order, SampleOrder
from zoo.data.sample import Sample, Source, SourceConfig
from zoo.errors import ConfigError, DataError, near

BLOCK = 1024
"""Places whose sources are drawn together, at least: in each, every source has its exact share."""

BALANCES = {"sqrt": 0.5, "size": 1.0, "equal": 0.0}
"""Name -> power of a dataset's size that its rate is proportional to."""


@dataclass(frozen=True, kw_only=True)
class MixtureConfig(SourceConfig):
    """Several sources as one.

    ``sources`` is name -> the fields of a source with its registered ``name``. ``balance`` gives each a share of the
    training samples: ``sqrt`` of its size (InstructBLIP, arXiv 2305.06500, section 2.4), its ``size``, or ``equal``;
    ``factors`` then multiply the shares of single sources, as InstructBLIP adjusts by hand. Val and test are all
    samples of all sources. Ids are ``NAME/id``.
    """

    kind: ClassVar[str] = "mixture"
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)
    balance: Literal["sqrt", "size", "equal"] = "sqrt"
    factors: dict[str, float] = field(default_factory=dict)

    def open(self, image_size: int | None) -> Mixture:
        """Open every source.

        Raises:
            ConfigError: No source, an unknown one, a name with a slash, or a factor of nothing or not above 0.
        """
        from zoo.plugin import catalogue

        if not self.sources:
            raise ConfigError("data=mixture needs sources: data.sources.NAME.name=openmoji, and so on")
        opened: dict[str, Source] = {}
        for name, fields in self.sources.items():
            values = dict(fields)
            kind = values.pop("name", None)
            if "/" in name or kind is None:
                raise ConfigError(f"data.sources.{name}: expected a name without '/' and a field 'name', e.g. openmoji")
            opened[name] = catalogue()["data"].parse(str(kind), values, f"data.sources.{name}").build(image_size)
        for name, factor in self.factors.items():
            if name not in opened:
                raise ConfigError(f"data.factors has {name!r}, which is no source{near(name, opened)}")
            if not 0 < factor < math.inf:
                raise ConfigError(f"data.factors.{name} = {factor} must be above 0")
        return Mixture(opened, BALANCES[self.balance], self.factors)


class Mixture:
    """See :class:`MixtureConfig`; ``order`` is what training draws by.

    Args:
        sources: name -> source.
        power: of the size of a source's training split, which its rate is proportional to.
        factors: name -> factor on that.
    """

    name = "mixture"

    def __init__(self, sources: Mapping[str, Source], power: float, factors: Mapping[str, float]) -> None:
        self.sources = dict(sources)
        self.power = power
        self.factors = dict(factors)
        self.licence = "; ".join(f"{name}: {source.licence}" for name, source in self.sources.items())
        self.max_bad = sum(source.max_bad for source in self.sources.values())
        plain = [f"{name}={s.name}:{s.version}*{self.factors.get(name, 1.0)}" for name, s in self.sources.items()]
        self.version = f"{power}/" + hashlib.sha256("\0".join(plain).encode()).hexdigest()[:16]

    def ids(self, split: str) -> list[str]:
        """Return the ids of all sources, one source after another."""
        return [f"{name}/{id}" for name, source in self.sources.items() for id in source.ids(split)]

    def sample(self, id: str) -> Sample:
        """Return the sample under its id in the mixture.

        Raises:
            DataError: there is no such source.
        """
        name, _, inner = id.partition("/")
        if name not in self.sources:
            raise DataError(f"unknown sample {id!r}: its source is none of {', '.join(self.sources)}")
        found = self.sources[name].sample(inner)
        meta = dict(found.meta)
        if "cluster" in meta:
            meta["cluster"] = f"{name}/{meta['cluster']}"
        return Sample(id, found.image, found.texts, meta)

    def rates(self) -> dict[str, float]:
        """Return name -> share of the training samples; p_d = S_d^power * factor_d, divided by their sum."""
        sizes = {name: len(source.ids("train")) for name, source in self.sources.items()}
        raw = {name: size**self.power * self.factors.get(name, 1.0) if size else 0.0 for name, size in sizes.items()}
        total = sum(raw.values())
        if not total:
            raise DataError("no source of the mixture has a training sample")
        return {name: value / total for name, value in raw.items()}

    def order(self, split: str, seed: int) -> MixtureOrder:
        """Return the order of training samples."""
        rates = {name: rate for name, rate in self.rates().items() if rate}
        orders = {name: source_order(self.sources[name], split, seed, name) for name in rates}
        return MixtureOrder(orders, rates, seed)


def source_order(source: Source, split: str, seed: int, name: str) -> Order:
    """The order of one source of a mixture: its own where it has one (shards by windows), and a stream of its own, so
    that two sources of one size are not read in step."""
    seed = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "big")
    own: Any = getattr(source, "order", None)
    order: Order = own(split, seed) if own is not None else SampleOrder(source.ids(split), seed)
    return order


class MixtureOrder:
    """An endless sequence of (id, draw) in which every source has its share of every block, to within one sample.

    The places of a block are dealt out in a random order keyed by (seed, block); the samples of one source follow its
    own order, so that none is repeated before all were seen. Any place is found without those before it.

    Args:
        orders: source -> the order of its samples.
        rates: source -> share, adding up to 1.
        seed: of the order.
    """

    def __init__(self, orders: Mapping[str, Order], rates: Mapping[str, float], seed: int = 0) -> None:
        self.names = tuple(orders)
        self.rates = tuple(rates[name] for name in self.names)
        self.seed = seed
        self.orders = tuple(orders.values())
        self.block = max(BLOCK, math.ceil(2 / min(self.rates)))  # a share of one sample or more in each
        self._dealt = lru_cache(maxsize=4)(self._deal)

    def _before(self, block: int) -> NDArray[np.int64]:
        """Samples of each source in the blocks before ``block``."""
        edges = np.floor(np.cumsum(self.rates) * self.block * block + 1e-9).astype(np.int64)
        edges[-1] = self.block * block
        return np.diff(edges, prepend=0)

    def _deal(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The source of each place of a block, and its place in that source's own order."""
        first, last = self._before(block), self._before(block + 1)
        source = np.repeat(np.arange(len(self.names)), last - first)
        keys = np.random.PCG64(np.random.SeedSequence((self.seed, block, 1))).random_raw(len(source))
        source = source[np.argsort(keys, kind="stable")]
        place = np.empty_like(source)
        for number in range(len(self.names)):
            own = source == number
            place[own] = first[number] + np.arange(own.sum())
        return source, place

    def slice(self, start: int, stop: int) -> list[Draw]:
        """Return the places ``start`` (included) to ``stop`` (excluded)."""
        draws: list[Draw] = []
        for at in range(start, stop):
            source, place = self._dealt(at // self.block)
            number, inner = int(source[at % self.block]), int(place[at % self.block])
            (drawn,) = self.orders[number].slice(inner, inner + 1)
            draws.append(Draw(f"{self.names[number]}/{drawn.id}", drawn.draw))
        return draws

    def hash(self, count: int) -> str:
        """Return the sha256 (hex) over the ids of the first places, as ``SampleOrder.hash``; the rest is stated."""
        digest = hashlib.sha256()
        for id, _ in self.slice(0, min(count, HASHED)):
            digest.update(id.encode() + b"\0")
        if count > HASHED:
            digest.update(f"{count}/{self.seed}/{self.rates}/{self.block}\0".encode())
            for order in self.orders:
                digest.update(order.hash(HASHED + 1).encode() + b"\0")  # says all ids
        return digest.hexdigest()

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key != "_dealt"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._dealt = lru_cache(maxsize=4)(self._deal)
