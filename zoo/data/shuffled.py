"""Any source with a stated fraction of its training captions exchanged: known noise, for methods that clean data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from zoo.data.sample import ArraySource, Sample, Source, Wrapped, stable_hash

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class ShuffledCaptions(Wrapped):
    """The source with the texts of some training samples handed on in a ring, so that none of these keeps its own.

    Which samples these are depends on a hash of their ids alone. A part of the training samples can be ``trusted``:
    they keep their texts, and their ``meta`` says so, as pairs that people wrote. Other splits stay as they are.

    Args:
        fraction: of the training samples that are not trusted.
        trusted: fraction of the training samples.
    """

    def __init__(self, source: Source, fraction: float, trusted: float = 0.0) -> None:
        self.source = source
        self.fraction = fraction
        self.trusted_fraction = trusted
        ids = source.ids("train")
        self.trusted = frozenset(id for id in ids if stable_hash("trusted", id) / 2**64 < trusted)
        ring = [id for id in ids if id not in self.trusted and stable_hash("shuffled", id) / 2**64 < fraction]
        ring.sort(key=lambda id: stable_hash("ring", id))
        self.taken_from = dict(zip(ring, [*ring[1:], *ring[:1]], strict=True)) if len(ring) > 1 else {}
        if isinstance(source, ArraySource):
            self.images = self._images
            self.text_sample = self._text_sample

    @property
    def version(self) -> str:
        return f"{self.source.version}/shuffled={self.fraction:g}/trusted={self.trusted_fraction:g}"

    def sample(self, id: str) -> Sample:
        return self._exchanged(self.source.sample(id))

    def truth(self, id: str) -> tuple[str, ...]:
        """The sample's own texts, whatever it shows; for measuring, never for training."""
        return self._texts(id)

    def _texts(self, id: str) -> tuple[str, ...]:
        alone: Any = getattr(self.source, "text_sample", self.source.sample)
        texts: tuple[str, ...] = alone(id).texts
        return texts

    def _exchanged(self, sample: Sample) -> Sample:
        other = self.taken_from.get(sample.id)
        texts = sample.texts if other is None else self._texts(other)
        return replace(sample, texts=texts, meta={**sample.meta, "trusted": sample.id in self.trusted})

    def _text_sample(self, id: str) -> Sample:
        assert isinstance(self.source, ArraySource)
        return self._exchanged(self.source.text_sample(id))

    def _images(self, ids: Sequence[str]) -> NDArray[np.uint8]:
        assert isinstance(self.source, ArraySource)
        return self.source.images(ids)
