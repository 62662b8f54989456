"""Writes down which samples every training step consumed: what a processor was handed travels with its batch to the
step that learns from it, through data workers and ranks. ``python recorder.py RUN LOG`` is one rank of a run."""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from zoo.data.loader import StepDataset
from zoo.module import ZooModule

SEEN = ("seen", "seen_draws", "seen_pixels")


class Witness:
    """A processor that adds to its batches which samples they are of."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["processor"], name)

    def __call__(self, samples: Sequence[Any], train: bool, draws: Sequence[int], *pixels: Any) -> dict[str, Any]:
        batch = self.processor(samples, train, draws, *pixels)
        images = batch.get("pixel_values")
        rows = [] if images is None else [zlib.crc32(image.numpy().tobytes()) for image in images]
        seen = [zlib.crc32(sample.id.encode()) for sample in samples]
        return {**batch, **{k: torch.tensor(v) for k, v in zip(SEEN, (seen, list(draws), rows), strict=True)}}


@contextmanager
def recording(log: Path, patch: Callable[[Any, str, Any], None] = setattr) -> Iterator[None]:
    """Append a line of ``log``-RANK for every micro-batch that is trained on, until the block ends."""
    init, step = StepDataset.__init__, ZooModule.training_step

    def witnessed(self: Any, *arguments: Any, **more: Any) -> None:
        init(self, *arguments, **more)
        self.processor = Witness(self.processor)

    def recorded(self: Any, batch: dict[str, Any], batch_idx: int) -> Any:
        seen, draws, pixels = (batch[key].tolist() for key in SEEN)
        line = {"stage": self.stage, "step": self.trainer.global_step, "seen": seen, "draws": draws, "pixels": pixels}
        with log.with_name(f"{log.name}-{self.trainer.global_rank}").open("a") as file:
            file.write(json.dumps(line) + "\n")
        return step(self, {key: value for key, value in batch.items() if key not in SEEN}, batch_idx)

    patch(StepDataset, "__init__", witnessed)
    patch(ZooModule, "training_step", recorded)
    try:
        yield
    finally:
        patch(StepDataset, "__init__", init)
        patch(ZooModule, "training_step", step)


def consumed(log: Path) -> list[dict[str, Any]]:
    """What every step of a run's weights consumed, in order, the ranks' shares joined; of a step that was taken again
    after a stop, the last time counts."""
    ranks = []
    for file in sorted(log.parent.glob(f"{log.name}-*")):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        ranks.append({(line["stage"], line["step"]): line for line in lines})
    assert ranks, f"nothing was recorded in {log}"
    assert all(rank.keys() == ranks[0].keys() for rank in ranks)
    joined = ("seen", "draws", "pixels")
    return [
        {"stage": key[0], **{name: [v for rank in ranks for v in rank[key][name]] for name in joined}}
        for key in sorted(ranks[0])
    ]


if __name__ == "__main__":
    from zoo.worker import main

    with recording(Path(sys.argv[2])):
        status = main([sys.argv[1]])
    raise SystemExit(status)
