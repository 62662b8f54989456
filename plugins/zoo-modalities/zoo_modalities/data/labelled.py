"""What the sources of labelled items share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from zoo.data.sample import Sample, SourceConfig, check_split, stable_hash
from zoo.errors import ConfigError, DataError

RULES = 1
"""Raised whenever the same fields make other items."""


@dataclass(frozen=True, kw_only=True)
class GeneratedConfig(SourceConfig):
    """Fields of sources that make their items by rules: nothing in them was measured.

    Attributes:
        train_items, val_items, test_items: Items of each split.
        seed: Of all that is drawn. An item depends on this, the source's other fields and its id alone.
        labels: Names of the classes.
    """

    labels: ClassVar[tuple[str, ...]] = ()

    train_items: int = 2000
    val_items: int = 200
    test_items: int = 500
    seed: int = 0


class Generated:
    """Items by number, equally many of each label in expectation.

    Raises:
        ConfigError: A split without items.
    """

    licence = "made by rules of zoo-modalities (Apache-2.0): simulated, nothing in it was measured"
    max_bad = 0

    def __init__(self, config: GeneratedConfig, *fields: object) -> None:
        for name in ("train_items", "val_items", "test_items"):
            if getattr(config, name) < 1:
                raise ConfigError(f"data.{name} = {getattr(config, name)} must be 1 or more")
        self.config = config
        self.name = type(config).kind
        self.labels = type(config).labels
        self.version = "/".join(map(str, (RULES, config.seed, *fields)))
        counts = {"train": config.train_items, "val": config.val_items, "test": config.test_items}
        self._ids = {split: [f"{split}-{i:05d}" for i in range(count)] for split, count in counts.items()}
        self._known = {id for ids in self._ids.values() for id in ids}

    def ids(self, split: str) -> list[str]:
        """Return the ids of a split, ordered."""
        check_split(split)
        return list(self._ids[split])

    def sample(self, id: str) -> Sample:
        """Return one item; ``meta`` has its ``label``.

        Raises:
            DataError: There is no such id.
        """
        if id not in self._known:
            raise DataError(f"{self.name} has no item {id!r}: its ids are train-00000, val-00000, test-00000 and on")
        draw = np.random.Generator(np.random.PCG64(stable_hash(self.name, self.version, id)))
        return self.make(id, self.labels[int(draw.integers(len(self.labels)))], draw)

    def make(self, id: str, label: str, draw: np.random.Generator) -> Sample:
        """Make the item of a label."""
        raise TypeError(f"{type(self).__name__} defines no make")
