"""From samples of any modality to a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zoo.data.sample import Sample
from zoo.data_tokenizers.base import DataTokenizerConfig
from zoo.errors import DataError, near

IGNORE = -100
"""The label of what has none."""


class ModalityProcessor:
    """What a tokenizer's ``collate`` makes, and targets.

    Args:
        predicts: ``labels``, ``values`` or ``elements``.
        labels: Names of the labels.
        label_key: Where a sample's ``meta`` has what is predicted.
        outputs: Number of labels or values.
    """

    def __init__(
        self,
        config: DataTokenizerConfig,
        predicts: str,
        labels: Sequence[str],
        label_key: str,
        outputs: int,
        seed: int = 0,
    ) -> None:
        self.config, self.predicts, self.label_key = config, predicts, label_key
        self.outputs, self.seed = outputs, seed
        self.place = {name: place for place, name in enumerate(labels)}

    def __call__(
        self,
        samples: Sequence[Sample],
        train: bool = False,
        draws: Sequence[int] | None = None,
        pixels: NDArray[np.uint8] | None = None,
    ) -> dict[str, Tensor]:
        """Return the tokenizer's inputs, and ``label_targets`` [B, C] float (1 at the label), ``value_targets`` [B, C],
        or ``element_labels`` [B, E] int64 (-100 = none).

        Args:
            pixels: The samples' images as ``[B, H, W, 3]`` bytes, in place of ``sample.image``.

        Raises:
            DataError: A sample without the modality or without what is predicted, or with a label of another name.
        """
        if pixels is not None:
            from PIL import Image

            shown = zip(samples, pixels, strict=True)
            samples = [dataclasses.replace(s, image=Image.fromarray(p)) for s, p in shown]
        batch = self.config.collate(samples, train, draws, self.seed)
        if self.predicts == "labels":
            targets = torch.zeros(len(samples), self.outputs)
            for row, sample in enumerate(samples):
                targets[row, self.label_of(sample)] = 1.0
            return {**batch, "label_targets": targets}
        found = [self._found(sample) for sample in samples]
        if self.predicts == "values":
            values = [np.asarray(value, np.float32).reshape(-1) for value in found]
            for sample, value in zip(samples, values, strict=True):
                if len(value) != self.outputs or not np.isfinite(value).all():
                    raise DataError(
                        f"sample {sample.id!r}: {self.label_key}: {len(value)} values, expected {self.outputs} finite"
                        " ones (wiring.classes)"
                    )
            return {**batch, "value_targets": torch.from_numpy(np.stack(values))}
        rows = [
            [self._place(sample, str(name)) for name in names] for sample, names in zip(samples, found, strict=True)
        ]
        labels = torch.full((len(rows), max(map(len, rows))), IGNORE)
        for i, places in enumerate(rows):
            labels[i, : len(places)] = torch.tensor(places)
        return {**batch, "element_labels": labels}

    def label_of(self, sample: Sample) -> int:
        """The number of a sample's label.

        Raises:
            DataError: It has none, or one of another name.
        """
        return self._place(sample, str(self._found(sample)))

    def _found(self, sample: Sample) -> Any:
        found = sample.meta.get(self.label_key)
        if found is None:
            raise DataError(
                f"sample {sample.id!r} has no {self.label_key!r}{near(self.label_key, sample.meta)}: set"
                " wiring.label_key"
            )
        return found

    def _place(self, sample: Sample, name: str) -> int:
        if name not in self.place:
            raise DataError(
                f"sample {sample.id!r}: the {self.label_key} {name!r} is none of the {len(self.place)} labels"
                f"{near(name, self.place)}: set wiring.labels or wiring.labels_of to those of the data"
            )
        return self.place[name]
