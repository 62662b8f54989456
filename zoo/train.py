"""One run: stages of training from a run.yaml, resumable to the bit, then evaluation; everything kept in the run
directory.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from zoo.averaging import WeightAverage
from zoo.budget import Plan, open_source, plan
from zoo.compare import record
from zoo.compare.cost import cost
from zoo.curve import METER, Curve, Meter, read_lines
from zoo.data.packing import check_packing, packing_line
from zoo.errors import RunError
from zoo.frozen_features import fill_device, open_features
from zoo.manifest import Manifest, sample_flops, start_manifest, write_json
from zoo.resuming import Interrupted, Keeper, load_checkpoint, quiet_lightning, save_checkpoint
from zoo.run_config import PRECISIONS, RunConfig
from zoo.strategies import check_devices, gathered, lightning_strategy
from zoo.torchvision_ops import ensure
from zoo.tracking import Tracked, Tracker, flat_metrics, open_tracker

ensure()  # lightning imports torchmetrics, which imports torchvision

from lightning.pytorch import Trainer  # noqa: E402
from lightning.pytorch.callbacks import Callback  # noqa: E402

if TYPE_CHECKING:
    from zoo.data.sample import Source
    from zoo.module import ZooModule

Say = Callable[[str], None]


def make_trainer(config: RunConfig, folder: Path, steps: int | None, callbacks: list[Callback]) -> Trainer:
    """The Lightning Trainer of one stage; the loop, devices and precision are its business, files are ours.

    Args:
        steps: None where a callback ends the stage.
    """
    trainer = config.trainer
    with quiet_lightning():
        return Trainer(
            accelerator=trainer.accelerator,
            devices=trainer.devices,
            num_nodes=trainer.nodes,
            strategy=lightning_strategy(trainer),
            precision=PRECISIONS[trainer.precision],  # type: ignore[arg-type]
            max_steps=-1 if steps is None else steps,
            max_epochs=-1,
            accumulate_grad_batches=trainer.accumulate,
            deterministic=trainer.deterministic or None,
            callbacks=callbacks,
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )


def run(folder: Path | str, *, progress: Any = None, say: Say = print) -> dict[str, Any]:
    """Train and evaluate what ``folder/run.yaml`` says, from where an earlier attempt stopped.

    Args:
        progress: Called as ``progress(phase, done, total, values)`` from rank 0.
        say: Receives lines for the user.

    Returns:
        The manifest.

    Raises:
        Interrupted: Stopped on request; repeating the call goes on.
        ZooError: Bad data, configuration, weights, or no space; what is on disk stays resumable.
    """
    from zoo.api import build_module

    folder = Path(folder)
    config = RunConfig.read(folder / "run.yaml")
    main = int(os.environ.get("RANK", "0")) == 0
    ranks = config.trainer.devices * config.trainer.nodes
    present = int(os.environ.get("WORLD_SIZE", "1"))
    if present != ranks:  # Lightning would train on what there is, with half the data and no error
        raise RunError(f"the run is for {ranks} devices but {present} processes were started: start it with zoo train")
    check_devices(config.trainer)
    source = open_source(config)
    fresh = config.init and not (folder / "checkpoint" / "last.ckpt").is_file()  # what is resumed needs no start
    module = build_module(config.trained_recipe, config.seed, config.init if fresh else None)
    steps = plan(config, module, source)
    manifest = Manifest(folder, start_manifest(config, module, source, steps), main)
    if fresh:
        start: Any = module.load_report
        if main:
            write_json(folder / "init.json", start.to_plain())
            say(str(start))
    manifest.update(status="running")
    told = Tracked(config.name, config.seed, folder, config.to_plain())
    tracker = open_tracker(config.tracking, told, say) if main else Tracker()
    try:
        train(folder, config, module, source, manifest, progress if main else None, steps, tracker)
        module = gathered(module, lambda: build_module(config.trained_recipe, config.seed))
        if torch.distributed.is_initialized():  # one process evaluates; metrics must not wait for the others
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
        if main:
            from zoo.weights import save

            save(module, config.trained_recipe, folder / "weights")
            manifest.update(status="trained")
            if config.trainer.pack:
                say(packing_line(manifest.values["packing"]))
            tracker.result(flat_metrics(evaluate_run(folder, config, module, source, manifest, progress)))
            manifest.update(status="done", error=None)
    except Interrupted:
        manifest.update(status="interrupted")
        raise
    except BaseException as error:
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        text = " ".join(str(error).split())
        with suppress(RunError):  # when the disk is what failed, the first error says more
            manifest.update(status=status, error=f"{type(error).__name__}: {text}"[:500])
        raise
    finally:
        tracker.close(str(manifest.values["status"]))
    return manifest.values


def train(
    folder: Path,
    config: RunConfig,
    module: ZooModule,
    source: Source,
    manifest: Manifest,
    progress: Any,
    steps: Plan,
    tracker: Tracker,
) -> None:
    """Run the stages that are not complete yet."""
    if config.trainer.pack:
        check_packing(module.model, config.trainer.pack)
    record.reset_peak_memory()
    for objective in module.objectives.values():
        objective.open(module.model)  # type: ignore[operator]
    from zoo.data.loader import loader
    from zoo.data.order import training_order

    path = folder / "checkpoint" / "last.ckpt"
    state = load_checkpoint(path) if path.is_file() else None
    done = int(state["zoo_stage"]) if state else 0
    meter = resumed_meter(state, steps, folder / "curve.jsonl")
    tracker.resume(sum(meter.steps))
    order = training_order(source, config.seed)
    drawn = None if steps.total is None else steps.total * config.batch_size
    cached = None
    if config.trainer.cache_features:
        cached = open_features(config, module, source, drawn, state, progress)
    flops, told = sample_flops(config, cached)
    manifest.update(flops=told, features=None if cached is None else cached.to_plain())
    module.spread(config.seed, config.trainer)
    ranks = config.trainer.devices * config.trainer.nodes
    for index in range(done, steps.stages):
        count = steps.steps[index] if steps.steps else None
        limit = steps.seconds[index] if steps.seconds else None
        start = int(state["global_step"]) if state is not None else 0
        offset = sum(meter.steps[:index])
        module.set_stage(index)
        module.expect(count if count is not None else math.inf)
        meter.begin(index, limit)
        if state is not None and meter.over(index, count, limit):
            module.load_state_dict(state["state_dict"])
            state = None
            continue
        curve = Curve(
            folder / "curve.jsonl",
            config.trainer.log_every,
            offset,
            config.batch_size,
            config.recipe.stages[index].name,
            meter,
            reporter(progress, steps) if progress else None,
            tracker,
            manifest.writes,
        )
        keeper = Keeper(path, config.trainer.checkpoint_every, config.seed, index)
        callbacks: list[Callback] = [meter, curve, keeper]
        if config.trainer.ema:
            callbacks.insert(0, WeightAverage(config.trainer.ema))
        trainer = make_trainer(config, folder, count, callbacks)
        batches = loader(
            source,
            module.processor,
            order,
            batch_size=config.batch_size // config.trainer.accumulate,
            start_step=(offset + start) * config.trainer.accumulate,
            rank=int(os.environ.get("RANK", "0")),
            world_size=ranks,
            workers=config.trainer.workers,
            pin_memory=torch.cuda.is_available() and config.trainer.accelerator != "cpu",
            features=None if cached is None else cached.features,
            pack=config.trainer.pack,
        )
        with keeper.listening(), quiet_lightning():
            trainer.fit(module, batches, ckpt_path=str(path) if state is not None else None, weights_only=True)
        save_checkpoint(trainer, path)
        state = None
        if batches.fill is not None:
            manifest.update(packing=batches.fill.to_plain())
    manifest.update(
        cost=cost(
            steps=meter.steps,
            batch_size=config.batch_size,
            positions=meter.positions,
            flops=flops,
            training=sum(meter.seconds),
            features=told.get("features"),
            feature_seconds=cached.seconds if cached is not None else 0.0,
            peak_memory_bytes=record.peak_memory_bytes(),
        )
    )


def resumed_meter(state: dict[str, Any] | None, steps: Plan, curve: Path) -> Meter:
    """The meter of a checkpoint; of one from before there were meters, as far as its curve tells."""
    meter = Meter(steps.stages)
    if state is None:
        return meter
    if METER in state:
        meter.load(state[METER])
        return meter
    stage, start = int(state["zoo_stage"]), int(state["global_step"])
    meter.steps[:stage] = steps.steps[:stage]
    meter.steps[stage] = start
    lines = [line for line in read_lines(curve) if line["step"] <= sum(meter.steps)]
    if lines:
        meter.seconds[stage] = float(lines[-1]["seconds"])
        meter.positions[0] = int(lines[-1].get("tokens", 0))
    return meter


def reporter(progress: Any, steps: Plan) -> Any:
    """What a curve's line becomes for a progress bar: steps of all steps, or seconds of all seconds."""
    if steps.seconds:
        total = sum(steps.seconds)
        return lambda step, line: progress("train", min(line["seconds"], total), total, line)
    return lambda step, line: progress("train", step, steps.total, line)


def evaluate_run(
    folder: Path, config: RunConfig, module: ZooModule, source: Source, manifest: Manifest, progress: Any
) -> dict[str, Any]:
    """Evaluate a trained module and write metrics, items and samples into its run directory."""
    from zoo.evaluation.run import evaluate
    from zoo.plugin import catalogue

    tasks = [catalogue()["task"].parse(name, fields, name).build() for name, fields in config.evaluation.tasks.items()]
    module.eval()
    module.to(fill_device(config.trainer.accelerator))  # a Trainer leaves what it trained on the CPU

    def tell(task: str, done: int, total: int) -> None:
        if progress:
            progress(task, done, total, {})

    started = time.perf_counter()
    result = evaluate(module.model, source, config.evaluation.split, tasks, folder, tell)
    manifest.values["hashes"]["evaluation"] = result["hash"]
    manifest.values["cost"]["seconds"]["evaluation"] = round(time.perf_counter() - started, 3)
    manifest.update(skipped=result["skipped"], evaluation=result["conditions"])
    metrics: dict[str, Any] = result["metrics"]
    return metrics
