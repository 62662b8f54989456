"""Step batches in a fixed order, whatever the workers, ranks and resumes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from zoo.data.order import Draw, Order, share
from zoo.data.packing import Fill, pack
from zoo.data.processor import Processor
from zoo.data.sample import ArraySource, BadSample, BadSamples, Sample, Source
from zoo.errors import ConfigError, DataError, ZooError

if TYPE_CHECKING:
    from zoo.data.feature_cache import CachedFeatures

Batch = dict[str, Tensor]


@dataclass
class _Step:
    """What a worker sends: a batch or the error that ended it, and the bad samples met on the way."""

    batch: Batch | None
    error: ZooError | None
    bad: tuple[tuple[str, str], ...]

    def pin_memory(self) -> _Step:
        """Pin the batch: the DataLoader pins what it knows, and any other object that offers this method."""
        batch = None if self.batch is None else {name: value.pin_memory() for name, value in self.batch.items()}
        return _Step(batch, self.error, self.bad)


class StepDataset(Dataset[_Step]):
    """The batch of a step is a pure function of the step, so that any worker may make any of them."""

    def __init__(
        self,
        source: Source,
        processor: Processor,
        order: Order,
        batch_size: int,
        rank: int,
        world_size: int,
        train: bool,
        features: CachedFeatures | None = None,
        pack: int = 0,
    ) -> None:
        self.source = source
        self.processor = processor if features is None else features.over(processor)
        self.order = order
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.train = train
        self.features = features
        self.pack = pack
        placeholder = getattr(processor, "image_token_id", None)
        self.image = None if placeholder is None else (int(placeholder), int(getattr(processor, "image_tokens", 0)))

    def __getitem__(self, step: int) -> _Step:
        bad: dict[str, str] = {}
        try:
            batch = self._batch(step, bad)
        except ZooError as error:  # as a value: a raised one would arrive as a traceback
            return _Step(None, error, tuple(bad.items()))
        return _Step(batch, None, tuple(bad.items()))

    def _batch(self, step: int, bad: dict[str, str]) -> Batch:
        start, stop = share(step, self.batch_size, self.rank, self.world_size)
        places = self.order.slice(start, stop)
        ids = [place.id for place in places]
        batch = self._rows(places, ids, start, bad)
        return pack(batch, self.pack, ids, self.image) if self.pack else batch

    def _rows(self, places: list[Draw], ids: list[str], start: int, bad: dict[str, str]) -> Batch:
        draws = [place.draw for place in places]
        if self.features is not None:
            marked = [self._marked(self.features, place, start + i, bad) for i, place in enumerate(places)]
            return self.features.tokens(self.processor(marked, self.train, draws))
        if isinstance(self.source, ArraySource):
            samples = [self.source.text_sample(id) for id in ids]
            return self.processor(samples, self.train, draws, self.source.images(ids))
        return self.processor([self._good(place, start + i, bad) for i, place in enumerate(places)], self.train, draws)

    def _marked(self, features: CachedFeatures, place: Draw, position: int, bad: dict[str, str]) -> Sample:
        """The sample of a place with cached images; where the source can tell the rest, no image is read."""
        alone = getattr(self.source, "text_sample", None)
        if alone is not None and features.knows(place.id):
            return features.mark(alone(place.id), known=True, place=position)
        return features.mark(self._good(place, position, bad), place=position)

    def _good(self, place: Draw, position: int, bad: dict[str, str]) -> Sample:
        """Return the sample of a place, or of the same place in the next steps until one can be read.

        Steps, not the neighbouring places: those are in this batch already, and a contrastive loss must not see a pair
        twice. The rule depends on the order and on what is damaged, so every worker and every resume follows it alike.
        """
        for _ in range(self.source.max_bad + 2):
            if place.id not in bad:
                try:
                    return self.source.sample(place.id)
                except BadSample as error:
                    bad[error.id] = error.reason
            position += self.batch_size
            place = self.order.slice(position, position + 1)[0]
        raise DataError(
            f"{self.source.name}: no readable sample found in place of {place.id!r}; the last reason was "
            f"{bad.get(place.id, next(iter(bad.values()), 'unknown'))}"
        )


class _Steps(Sampler[int]):
    def __init__(self, start: int, stop: int | None) -> None:
        self.start = start
        self.stop = stop

    def __iter__(self) -> Iterator[int]:
        step = self.start
        while self.stop is None or step < self.stop:
            yield step
            step += 1

    def __len__(self) -> int:
        if self.stop is None:
            raise TypeError("the order of samples has no end")
        return max(0, self.stop - self.start)


class StepLoader(DataLoader[Any]):
    """A DataLoader over steps; ``bad`` counts the samples that were skipped, by id, ``fill`` what packing saved."""

    bad: BadSamples
    fill: Fill | None = None

    def __iter__(self) -> Any:
        steps: Iterator[_Step] = super().__iter__()
        return self._checked(steps)

    def _checked(self, steps: Iterator[_Step]) -> Iterator[Batch]:
        try:
            for step in steps:
                for id, reason in step.bad:
                    self.bad.add(id, reason)
                if step.error is not None:
                    raise step.error
                assert step.batch is not None
                if self.fill is not None:
                    self.fill.add(step.batch)
                yield step.batch
        finally:
            # a traceback keeps this frame, and workers left to the garbage collector take five seconds each to end
            end = getattr(steps, "_shutdown_workers", None)
            if end is not None:
                end()


def loader(
    source: Source,
    processor: Processor,
    order: Order,
    batch_size: int,
    *,
    start_step: int = 0,
    stop_step: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    train: bool = True,
    pin_memory: bool = False,
    features: CachedFeatures | None = None,
    pack: int = 0,
) -> StepLoader:
    """Return the batches of steps ``start_step`` to ``stop_step`` (None: without end) for one rank.

    A resume at step s with ``start_step=s`` continues as if never interrupted.

    Args:
        batch_size: of all ranks together.
        workers: processes that prepare batches; 0 prepares them in this one.
        train: augment, and draw one of several captions; False is as in evaluation.
        features: read ``image_tokens`` of a frozen encoder from here in place of ``pixel_values``.
        pack: length of the sequences that a rank's rows of a step are packed into (``zoo.data.packing``); 0 = a row
            each, padded. The model must read them: ``zoo.data.packing.check_packing``.

    Raises:
        ConfigError: the batch cannot be shared by the ranks.
        DataError: (on iteration) more samples than ``source.max_bad`` cannot be read.
    """
    share(start_step, batch_size, rank, world_size)
    if start_step < 0 or workers < 0:
        raise ConfigError(f"start_step={start_step} and workers={workers} must not be negative")
    prepare = getattr(source, "prepare", None)
    if callable(prepare):
        prepare()
    if workers:
        # forked workers use the tokenizer of their parent; its own threads would not survive the fork
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    made = StepLoader(
        StepDataset(source, processor, order, batch_size, rank, world_size, train, features, pack),
        batch_size=None,
        sampler=_Steps(start_step, stop_step),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=pin_memory,
    )
    made.bad = BadSamples(source.name, source.max_bad)
    made.fill = Fill(pack) if pack else None
    return made


def to_device(batch: Mapping[str, Tensor], device: Any) -> Batch:
    """Return the batch on ``device``."""
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}
