"""``python spread.py SPECIFICATION OUT 1 2 4`` trains tiny models in one, two and four processes, and writes losses.

All models of a number of processes go through one set of processes, and all sets are forks of one that has imported
torch and the zoo: starting costs more than training them.
SPECIFICATION is JSON: a list of {name, recipe, data, batch_size, steps, strategies: {processes: [...]}, values,
choices, trainer, stages, lr}.
OUT-RANKS-RANK gets a line of JSON for each: {name, strategy, seconds, losses: [[loss of a step] of a stage], weights:
{name: sum of squares}}, or {..., error}.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from zoo.api import build_module
from zoo.averaging import WeightAverage
from zoo.budget import open_source
from zoo.data.loader import loader
from zoo.data.order import training_order
from zoo.recipe import resolve
from zoo.resuming import Seeds, quiet_lightning
from zoo.run_config import RunConfig, TrainerConfig
from zoo.strategies import gathered, is_divided
from zoo.train import make_trainer

from lightning.pytorch.callbacks import Callback  # isort: skip  # behind zoo.train, which looks after torchvision

LEARNING_RATE = 1e-3
"""Of AdamW, whose step is as large for a small gradient as for a large one: a wrong one shows in the next loss."""


class Losses(Callback):
    """Every rank's report of every optimizer step, the loss as the mean over ranks."""

    def __init__(self) -> None:
        self.seen: list[float] = []
        self.step = 0
        self.sum = 0.0

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        value = module.report["loss"].float().reshape(())
        if trainer.world_size > 1:
            value = trainer.strategy.reduce(value, reduce_op="mean")
        self.sum += float(value) / trainer.accumulate_grad_batches
        if trainer.global_step != self.step:
            self.step = trainer.global_step
            self.seen.append(self.sum)
            self.sum = 0.0


class Prepared:
    """What every process starts from: forks share it, so that it is read and built once."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec = spec
        values = {**spec.get("values", {}), "optimizer": {"lr": spec.get("lr", LEARNING_RATE), "warmup": 0.0}}
        self.recipe = resolve(spec["recipe"], scale="micro", values=values, choices=spec.get("choices"))
        self.data = spec.get("data", {"name": "openmoji"})
        self.source = open_source(self.config("single", 1))
        self.order = training_order(self.source, 0)
        self.module = build_module(self.recipe, 0)

    def config(self, strategy: str, ranks: int) -> RunConfig:
        trainer = TrainerConfig(accelerator="cpu", devices=ranks, strategy=strategy, **self.spec.get("trainer", {}))
        return RunConfig(recipe=self.recipe, data=self.data, batch_size=self.spec["batch_size"], trainer=trainer)


def train(prepared: Prepared, strategy: str, rank: int, ranks: int) -> dict[str, Any]:
    """Train one model; the losses of each stage's steps, and what its weights came to."""
    spec, module, config = prepared.spec, prepared.module, prepared.config(strategy, ranks)
    module.spread(0, config.trainer)
    found = []
    for index in spec.get("stages", range(len(prepared.recipe.stages))):
        module.set_stage(index)
        module.expect(spec["steps"])
        losses = Losses()
        with tempfile.TemporaryDirectory() as folder:
            callbacks: list[Any] = [Seeds(0, index), losses]
            if config.trainer.ema:
                callbacks.append(WeightAverage(config.trainer.ema))
            trainer = make_trainer(config, Path(folder), spec["steps"], callbacks)
            batches = loader(
                prepared.source,
                module.processor,
                prepared.order,
                batch_size=config.batch_size // config.trainer.accumulate,
                start_step=0,
                rank=rank,
                world_size=ranks,
            )
            with quiet_lightning():
                trainer.fit(module, batches)
        assert trainer.world_size == ranks
        assert ranks == 1 or torch.distributed.get_world_size() == ranks
        found.append(losses.seen)
    assert is_divided(module) == (strategy == "fsdp")
    plain = gathered(module, lambda: build_module(prepared.recipe, 0))
    weights = {n: float(p.detach().double().square().sum()) for n, p in plain.model.named_parameters()}
    return {"losses": found, "weights": {} if rank else weights}


def one_rank(models: list[Prepared], strategy: str, rank: int, ranks: int, out: str) -> None:
    """Train all models as one of ``ranks``; a line of OUT-RANKS-RANK for each."""
    torch.set_num_threads(1)
    for prepared in models:
        started = time.process_time()
        try:
            result = train(prepared, strategy, rank, ranks)
        except BaseException:
            result = {"error": traceback.format_exc()}
        name, seconds = prepared.spec["name"], time.process_time() - started
        with Path(f"{out}-{ranks}-{rank}").open("a") as file:
            file.write(json.dumps({"name": name, "strategy": strategy, "seconds": seconds, **result}) + "\n")
        if ranks > 1 and "error" in result:  # the others wait for this rank: what follows would mean nothing
            raise SystemExit(1)


def main(specification: str, out: str, *worlds: str) -> int:
    """Fork every number of processes in turn, for every strategy."""
    models = [Prepared(spec) for spec in json.loads(Path(specification).read_text())]
    for ranks in map(int, worlds):
        for strategy in ("single",) if ranks == 1 else ("ddp", "fsdp"):
            asked = [m for m in models if ranks == 1 or strategy in m.spec["strategies"].get(str(ranks), [])]
            if asked and fork(asked, strategy, ranks, out):
                return 1
    return 0


def fork(models: list[Prepared], strategy: str, ranks: int, out: str) -> int:
    """Run ``one_rank`` in ``ranks`` processes; returns how many of them failed."""
    port, children = free_port(), []
    for rank in range(ranks):
        child = os.fork()
        if not child:
            status = 1
            try:
                if ranks > 1:  # what torch.distributed.run tells its processes
                    os.environ |= {
                        "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "WORLD_SIZE": str(ranks),
                        "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                        "TORCHELASTIC_RUN_ID": "spread",
                    }  # fmt: skip
                one_rank(models, strategy, rank, ranks, out)
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    failed = 0
    for _ in children:
        _, status = os.wait()
        if status:
            failed += 1
            print(f"a process of {ranks} ended with status {status}", file=sys.stderr)
            for child in children:
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
    return failed


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
    return port


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
