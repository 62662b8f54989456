"""What a run counts while it trains: steps, samples, positions and seconds, and the lines of curve.jsonl."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from zoo.positions import positions
from zoo.torchvision_ops import ensure
from zoo.tracking import Tracker

ensure()  # lightning imports torchmetrics, which imports torchvision

from lightning.pytorch.callbacks import Callback  # noqa: E402

METER = "zoo_meter"
"""Where a checkpoint keeps the meter."""


class Meter(Callback):
    """Counts what training costs, over all stages and resumes, and ends a stage whose budget is in seconds.

    What it counted is in every checkpoint, so that a resumed run goes on from what its weights have cost; steps that a
    kill threw away count no more, nor does their time.

    Attributes:
        steps: Optimizer steps of each stage.
        positions: [2] of text and of images, over all ranks (``zoo.positions``).
        seconds: Of training in each stage: from the first batch's reading to the end of the last step, reading of data
            and writing of checkpoints included; on several ranks those of the first.
    """

    def __init__(self, stages: int) -> None:
        self.steps = [0] * stages
        self.seconds = [0.0] * stages
        self.positions = [0, 0]
        self.stage = 0
        self.limit: float | None = None
        self._own: Any = 0  # this rank's positions since they were last summed
        self._clock = 0.0

    def begin(self, stage: int, limit: float | None) -> None:
        """Go on with a stage; ``limit`` are its seconds, where the clock ends it."""
        self.stage, self.limit = stage, limit

    def over(self, stage: int, steps: int | None, limit: float | None) -> bool:
        """Whether a stage of ``steps`` steps or ``limit`` seconds has had them."""
        return self.seconds[stage] >= limit if limit is not None else self.steps[stage] >= (steps or 0)

    def to_plain(self) -> dict[str, Any]:
        return {"steps": list(self.steps), "seconds": list(self.seconds), "positions": list(self.positions)}

    def load(self, plain: Mapping[str, Any]) -> None:
        """Go on from what ``to_plain`` gave."""
        self.steps, self.seconds = list(plain["steps"]), list(plain["seconds"])
        self.positions = list(plain["positions"])

    # -- hooks -----------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self._own = 0
        self._clock = time.perf_counter()
        if self.limit is not None:
            self._expect(module)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._own = self._own + positions(module.model, batch)
        if self.limit is not None and torch.cuda.is_available():
            torch.cuda.synchronize()  # a step is over when the device is done with it, not when it was handed over
        now = time.perf_counter()
        self.seconds[self.stage] += now - self._clock
        self._clock = now
        self.steps[self.stage] = trainer.global_step
        if self.limit is None or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if trainer.world_size > 1:  # all ranks take equally many steps at equal rates: the first one's clock counts
            self.seconds[self.stage] = trainer.strategy.broadcast(self.seconds[self.stage])
        self._expect(module)
        if self.seconds[self.stage] >= self.limit:
            trainer.should_stop = True

    def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        self.sum(trainer)
        checkpoint[METER] = self.to_plain()

    def sum(self, trainer: Any) -> list[int]:
        """Positions of text and images so far, over all ranks, which must all call this."""
        if isinstance(self._own, torch.Tensor):
            own = self._own
            if trainer.world_size > 1:
                own = trainer.strategy.reduce(own, reduce_op="sum")
            self.positions = [a + b for a, b in zip(self.positions, own.tolist(), strict=True)]
            self._own = 0
        return self.positions

    def _expect(self, module: Any) -> None:
        """Tell the schedules how many steps the stage will come to at the pace so far."""
        assert self.limit is not None
        share = min(1.0, self.seconds[self.stage] / self.limit)
        module.expect(self.steps[self.stage] / share if share and self.steps[self.stage] else float("inf"))


class Curve(Callback):
    """Appends to curve.jsonl every ``every`` steps; after a resume, lines past the resumed step are dropped first.

    Args:
        offset: Steps of the stages before.
        tracker: Gets every line as well.
    """

    def __init__(
        self,
        path: Path,
        every: int,
        offset: int,
        batch_size: int,
        stage: str,
        meter: Meter,
        progress: Any,
        tracker: Tracker,
        write: bool,
    ) -> None:
        self.path, self.every, self.offset, self.batch_size = path, every, offset, batch_size
        self.stage, self.meter, self.progress, self.tracker, self.writes = stage, meter, progress, tracker, write
        self.seen = -1

    def on_train_start(self, trainer: Any, module: Any) -> None:
        if self.writes:
            start = self.offset + trainer.global_step
            kept = [line for line in read_lines(self.path) if line["step"] <= start]
            text = "".join(json.dumps(line) + "\n" for line in kept)
            partial = self.path.with_name(self.path.name + ".partial")
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, self.path)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.seen:  # a micro-batch of an accumulated step
            return
        self.seen = trainer.global_step
        step = self.offset + trainer.global_step
        last = trainer.global_step == trainer.max_steps or trainer.should_stop
        if step % self.every and step != 1 and not last:
            return
        values = torch.stack([value.float().reshape(()) for value in module.report.values()])
        if trainer.world_size > 1:  # every rank's share counts alike: the loss of the whole batch
            values = trainer.strategy.reduce(values, reduce_op="mean")
        line = {
            "step": step,
            "samples": step * self.batch_size,
            "tokens": sum(self.meter.sum(trainer)),
            "seconds": round(sum(self.meter.seconds), 3),
            "stage": self.stage,
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            **{key: round(value, 6) for key, value in zip(module.report, values.tolist(), strict=True)},
        }
        if self.writes:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            self.tracker.log(step, line)
        if self.progress is not None:
            self.progress(step, line)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a jsonl file; a line cut by a crash is left out."""
    lines = []
    if path.is_file():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
    return lines
