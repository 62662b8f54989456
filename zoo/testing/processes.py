"""Several processes must train a recipe to the losses of one, under DDP and FSDP2: a contract, for plugins as well.

    from zoo.testing.processes import check_processes

    def test_several_processes_train_to_the_losses_of_one(tmp_path):
        mine = {"recipe": "my-model", "data": {"name": "my-data"}}
        check_processes([mine], tmp_path, plugin=("my-plugin", "my_package"))

All models of a number of processes go through one set of processes, and all sets are forks of one that has imported
torch and the zoo: starting costs more than training them.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.utils.distributed import get_free_port

from zoo.api import build_module
from zoo.averaging import WeightAverage
from zoo.budget import open_source
from zoo.data.loader import loader
from zoo.data.order import training_order
from zoo.recipe import resolve
from zoo.resuming import Seeds, quiet_lightning
from zoo.run_config import RunConfig, TrainerConfig
from zoo.strategies import gathered, is_divided
from zoo.testing.installed import in_catalogue
from zoo.train import make_trainer

from lightning.pytorch.callbacks import Callback  # isort: skip  # behind zoo.train, which looks after torchvision

LEARNING_RATE = 1e-3
"""Of AdamW, whose step is as large for a small gradient as for a large one: a wrong one shows in the next loss."""
WORLDS, STRATEGIES = (2, 4), ("ddp", "fsdp")
TOLERANCE = 1e-5
"""Of a loss in fp32, relative where it is above 1."""

Trained = dict[tuple[str, int, str], dict[str, Any]]
"""(name, processes, strategy) -> what rank 0 wrote; of one process the strategy is ``single``."""


def train_in_processes(
    specs: Sequence[dict[str, Any]], folder: Path, plugin: tuple[str, str] | None = None, timeout: float = 1200.0
) -> Trained:
    """Train tiny models in one, two and four CPU processes (gloo), under DDP and FSDP2.

    Args:
        specs: Models, each ``{recipe}`` and, where the default does not suit: name (the recipe's), data
            (``{"name": "openmoji"}``), batch_size of all processes together (4), steps of a stage (2), stages
            (indices; all), values and choices of the recipe, trainer (fields of ``TrainerConfig``), lr. Recipes are
            built at scale ``micro``. Switch off what every process draws for itself (dropout, ``drop_path``).
        folder: Where reports are written.
        plugin: Entry point and package of the plugin that brings the models, which need not be installed.
        timeout: Seconds after which all processes are stopped.

    Returns:
        For each model, number of processes and strategy: losses (of every step of every stage, the mean over ranks),
        weights (name -> sum of squares after training) and seconds.

    Raises:
        AssertionError: A process failed, with the end of what it printed.
    """
    defaults: dict[str, Any] = {"data": {"name": "openmoji"}, "batch_size": 4, "steps": 2}
    full = [{"name": spec["recipe"], **defaults, **spec} for spec in specs]
    (folder / "models.json").write_text(json.dumps({"plugin": plugin, "models": full}))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", __name__, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=timeout)
    found: Trained = {}
    for ranks in (1, *WORLDS):
        report = folder / f"ranks-{ranks}-0"
        for line in report.read_text().splitlines() if report.exists() else []:
            row = json.loads(line)
            found[row["name"], ranks, row["strategy"]] = row
    if done.returncode:
        errors = "\n".join(f"{key}: {row['error']}" for key, row in found.items() if "error" in row)
        raise AssertionError(f"{errors}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return found


def check_processes(specs: Sequence[dict[str, Any]], folder: Path, plugin: tuple[str, str]) -> None:
    """Check ``train_in_processes`` of all that a plugin wires, in every number of processes and under every strategy.

    Args:
        specs, folder, plugin: As there; each wiring of the plugin must be among the recipes.

    Raises:
        AssertionError: Naming the wirings that are missing, or as ``train_in_processes`` and ``check_losses``.
    """
    name, package = plugin
    with in_catalogue(name, package):
        tried = {resolve(spec["recipe"], scale="micro").wiring[0] for spec in specs}
    brought = {c.name for c in importlib.import_module(package).PLUGIN.components if c.kind == "wiring"}
    assert brought <= tried, f"{name}: no recipe of the wirings {sorted(brought - tried)} is trained"
    found = train_in_processes(specs, folder, plugin)
    for model, ranks, strategy in product((s.get("name", s["recipe"]) for s in specs), WORLDS, STRATEGIES):
        check_losses(found, model, ranks, strategy)


def rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torch.distributed.run tells one of ``ranks`` processes of this machine, which meet at ``port``."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "processes",
    }  # fmt: skip


def check_losses(found: Trained, name: str, ranks: int, strategy: str, tolerance: float = TOLERANCE) -> None:
    """Check what ``train_in_processes`` returned: several processes have the losses of one, and came to its weights.

    Raises:
        AssertionError: Naming the model, the processes, the stage and the step.
    """
    what = f"{name!r} in {ranks} processes under {strategy}"
    one, several = found[name, 1, "single"], found[name, ranks, strategy]
    assert [len(stage) for stage in several["losses"]] == [len(stage) for stage in one["losses"]], what
    for stage, (expected, losses) in enumerate(zip(one["losses"], several["losses"], strict=True)):
        assert len({round(loss, 4) for loss in expected}) > 1, f"{what}: stage {stage} neither learns nor sees new data"
        for step, (right, loss) in enumerate(zip(expected, losses, strict=True)):
            bound = tolerance * max(1.0, abs(right))
            assert abs(loss - right) <= bound, (
                f"{what}: stage {stage}, step {step}: loss {loss}, in one process {right}"
            )
    assert several["weights"].keys() == one["weights"].keys(), f"{what}: other weights than in one process"
    # weights whose gradient is rounding alone (biases of keys) go where AdamW's first steps throw them
    far = [n for n, w in one["weights"].items() if abs(several["weights"][n] - w) > max(1e-4, 1e-2 * abs(w))]
    assert len(far) <= len(one["weights"]) / 10, f"{what}: other weights than in one process: {far}"


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
        self.source = open_source(self.config("single", 1))
        self.order = training_order(self.source, 0)
        self.module = build_module(self.recipe, 0)

    def config(self, strategy: str, ranks: int) -> RunConfig:
        trainer = TrainerConfig(accelerator="cpu", devices=ranks, strategy=strategy, **self.spec.get("trainer", {}))
        return RunConfig(
            recipe=self.recipe, data=self.spec["data"], batch_size=self.spec["batch_size"], trainer=trainer
        )


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


def one_rank(models: list[Prepared], strategy: str, ranks: int, folder: Path, rank: int) -> None:
    """Train all models as one of ``ranks``; a line of FOLDER/ranks-RANKS-RANK for each."""
    torch.set_num_threads(1)
    for prepared in models:
        started = time.process_time()
        try:
            result = train(prepared, strategy, rank, ranks)
        except BaseException:
            result = {"error": traceback.format_exc()}
        name, seconds = prepared.spec["name"], time.process_time() - started
        with (folder / f"ranks-{ranks}-{rank}").open("a") as file:
            file.write(json.dumps({"name": name, "strategy": strategy, "seconds": seconds, **result}) + "\n")
        if "error" in result:  # the others wait for this rank: what follows would mean nothing
            raise SystemExit(1)


def main(folder: Path) -> int:
    """Fork every number of processes in turn, for every strategy."""
    asked = json.loads((folder / "models.json").read_text())
    with ExitStack() as stack:
        if asked["plugin"]:
            stack.enter_context(in_catalogue(*asked["plugin"]))
        models = [Prepared(spec) for spec in asked["models"]]
        for ranks in (1, *WORLDS):
            for strategy in ("single",) if ranks == 1 else STRATEGIES:
                if fork(partial(one_rank, models, strategy, ranks, folder), ranks):
                    return 1
    return 0


def fork(work: Callable[[int], None], ranks: int) -> int:
    """Run ``work(rank)`` in ``ranks`` forks of this process, which find what torch.distributed.run tells its own.

    Returns:
        How many of them failed; when one does, the others are stopped.
    """
    port, children = get_free_port(), []  # type: ignore[no-untyped-call]
    for rank in range(ranks):
        child = os.fork()
        if not child:
            status = 1
            try:
                if ranks > 1:
                    os.environ |= rank_environment(rank, ranks, port)
                work(rank)
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


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
