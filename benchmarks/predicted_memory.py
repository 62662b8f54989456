"""What ``zoo show --memory`` predicts against what torch's allocator hands out in a training step on a CPU.

python benchmarks/predicted_memory.py                  # one process
python benchmarks/predicted_memory.py --devices 2 4    # gloo processes, under ddp and fsdp; the rank that takes most
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.data import DataLoader

from zoo.api import build_module
from zoo.compare.memory import measure_recipe, predict_recipe
from zoo.recipe import resolve
from zoo.resuming import Seeds, quiet_lightning
from zoo.run_config import RunConfig, TrainerConfig
from zoo.testing.processes import fork
from zoo.train import make_trainer

from lightning.pytorch.callbacks import Callback  # isort: skip  # behind zoo.train, which looks after torchvision

RUNS = (
    ("clip", "tiny", 64),
    ("llava", "tiny", 32),
    ("coca", "tiny", 64),
    ("coca", "small", 16),
    ("blip2-opt", "tiny", 16),
    ("vlmo", "small", 8),
    ("transfusion", "tiny", 32),
    ("transfusion", "small", 8),
)
STEPS = 3
"""The last is looked at: by then optimizers and buckets are there."""


class Mark(Callback):
    """The last step, by name in the profile."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == STEPS - 1:
            self.last = record_function("last step")
            self.last.__enter__()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == STEPS - 1:
            self.last.__exit__(None, None, None)


def one_rank(config: RunConfig, batch_size: int, out: Path, rank: int) -> None:
    """Train as one of several; writes the most that was handed out during the last step, from the process's start."""
    torch.set_num_threads(1)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        module = build_module(config.recipe, 0)
        module.spread(0, config.trainer)
        module.set_stage(0)
        module.expect(STEPS)
        batches: Any = [module.model.example_batch(batch_size)] * STEPS
        with tempfile.TemporaryDirectory() as folder, quiet_lightning():
            trainer = make_trainer(config, Path(folder), STEPS, [Seeds(0, 0), Mark()])
            trainer.fit(module, DataLoader(batches, batch_size=None))
    results: Any = profiler.profiler
    events = sorted(results.kineto_results.events(), key=lambda event: int(event.start_ns()))
    step = next(event for event in events if event.name() == "last step")
    start, end = step.start_ns(), step.start_ns() + step.duration_ns()
    now = most = 0
    for event in events:
        if event.name() == "[memory]":
            before, now = now, now + event.nbytes()
            if start <= event.start_ns() <= end:
                most = max(most, before, now)
    (out / str(rank)).write_text(str(most))


def measure_shared(name: str, scale: str, batch_size: int, trainer: TrainerConfig) -> int:
    """The most that any of several processes holds in a step, in bytes."""
    config = RunConfig(
        recipe=resolve(name, scale=scale), data={"name": "openmoji"}, batch_size=batch_size * trainer.devices,
        trainer=trainer,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as out:
        if fork(partial(one_rank, config, batch_size, Path(out)), trainer.devices):
            raise SystemExit(f"{name} at scale {scale} did not train in {trainer.devices} processes")
        return max(int(file.read_text()) for file in Path(out).iterdir())


def row(cells: tuple[Any, ...], predicted: int, took: int) -> None:
    shown = (*cells, f"{predicted / 1e6:.1f}", f"{took / 1e6:.1f}", f"{predicted / took:.3f}")
    print("| " + " | ".join(map(str, shown)) + " |", flush=True)


def alone() -> None:
    print("| model | scale | batch | precision | predicted MB | measured MB | ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, scale, batch_size in RUNS:
        for precision in ("fp32", "bf16"):
            recipe = resolve(name, scale=scale)
            predicted = predict_recipe(recipe, batch_size, precision, "cpu")[0].peak
            row((name, scale, batch_size, precision), predicted, measure_recipe(recipe, batch_size, precision))


def together(devices: list[int]) -> None:
    print("| model | scale | batch of one | strategy | devices | predicted MB | measured MB | ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, scale, batch_size in RUNS:
        for strategy in ("ddp", "fsdp"):
            for count in devices:
                trainer = TrainerConfig(accelerator="cpu", devices=count, strategy=strategy)
                recipe = resolve(name, scale=scale)
                stages = predict_recipe(recipe, batch_size, "fp32", "cpu", devices=count, strategy=strategy)
                predicted = stages[0].peak
                took = measure_shared(name, scale, batch_size, trainer)
                row((name, scale, batch_size, strategy, count), predicted, took)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", help="processes; one by default")
    devices = parser.parse_args().devices
    together(devices) if devices else alone()


if __name__ == "__main__":
    main()
