"""An order for places where jumps are slow: nearly sequential reading, shuffled within a window."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from zoo.data.order import SampleOrder


class WindowOrder(SampleOrder):
    """An order that stays within ``window`` blocks at a time (shards, row groups): blocks in an order drawn for the
    epoch, samples shuffled among those of a window. As every order a pure function of ids and seed, so that readers and
    resumes agree.

    Args:
        blocks: the numbers of the ids in each block; all together each id once.
    """

    def __init__(self, ids: list[str], seed: int, blocks: list[NDArray[np.int64]], window: int) -> None:
        super().__init__(ids, seed)
        self.blocks, self.window = blocks, window

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        keys = np.random.PCG64(np.random.SeedSequence((self.seed, epoch))).random_raw(len(self.ids) + len(self.blocks))
        shards = np.argsort(keys[len(self.ids) :], kind="stable")
        out = []
        for first in range(0, len(shards), self.window):
            rows = np.concatenate([self.blocks[n] for n in shards[first : first + self.window]])
            out.append(rows[np.argsort(keys[rows], kind="stable")])
        return np.concatenate(out)

    def hash(self, count: int) -> str:
        return f"{super().hash(count)}/window={self.window}" if self.window else super().hash(count)

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "blocks": self.blocks, "window": self.window}
