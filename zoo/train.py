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
from zoo.checkpoints import Checkpoint, identity_of, latest
from zoo.compare import record
from zoo.compare.cost import cost
from zoo.curve import METER, Curve, Meter
from zoo.data.packing import check_packing, packing_line
from zoo.errors import RunError
from zoo.frozen_features import fill_device, open_features
from zoo.manifest import Manifest, sample_flops, start_manifest, write_json
from zoo.resuming import Keeper, Saver, Watch, quiet_lightning
from zoo.run_config import PRECISIONS, RunConfig
from zoo.strategies import check_devices, gathered, lightning_strategy
from zoo.survival import STOP, Interrupted, Processes, Stop, full_disk, join
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
        ZooError: Bad data, configuration, weights, no space, a loss that is no number, or other ranks are gone; what is
            on disk stays resumable.
    """
    folder = Path(folder)
    config = RunConfig.read(folder / "run.yaml")
    ranks = config.trainer.devices * config.trainer.nodes
    present = int(os.environ.get("WORLD_SIZE", "1"))
    if present != ranks:  # Lightning would train on what there is, with half the data and no error
        raise RunError(f"the run is for {ranks} devices but {present} processes were started: start it with zoo train")
    check_devices(config.trainer)
    processes = join(config.trainer.timeout, config.trainer.accelerator != "cpu" and torch.cuda.is_available())
    if not processes.several:  # a request to an attempt before; of several processes ``zoo.worker.launch`` removes it
        (folder / STOP).unlink(missing_ok=True)
    stop = Stop(folder if processes.rank == 0 else None)
    try:
        with stop.listening():
            return _run(folder, config, progress, say, stop, processes)
    except (OSError, RuntimeError) as error:
        told = full_disk(error, folder) or processes.missing(error)
        if told is None:
            raise
        raise told from error


def _run(folder: Path, config: RunConfig, progress: Any, say: Say, stop: Stop, processes: Processes) -> dict[str, Any]:
    from zoo.api import build_module

    main = processes.rank == 0
    source = open_source(config)
    state = latest(folder / "checkpoint", identity_of(config), processes, say)
    fresh = config.init and state is None  # what is resumed needs no start
    module = build_module(config.trained_recipe, config.seed, config.init if fresh else None)
    steps = plan(config, module, source)
    manifest = Manifest(folder, start_manifest(config, module, source, steps), main)
    if fresh:
        start: Any = module.load_report
        if main:
            write_json(folder / "init.json", start.to_plain())
            say(str(start))
    manifest.update(status="running", stopped_by=None)
    told = Tracked(config.name, config.seed, folder, config.to_plain())
    tracker = open_tracker(config.tracking, told, say) if main else Tracker()
    try:
        train(
            folder, config, module, source, manifest, progress if main else None, steps, tracker, state, stop, processes
        )
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
    except Interrupted as asked:
        manifest.update(status="interrupted", stopped_by=asked.signal)
        raise
    except BaseException as raised:
        error = full_disk(raised, folder) or processes.missing(raised) or raised
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        text = " ".join(str(error).split())
        with suppress(RunError):  # when the disk is what failed, the first error says more
            manifest.update(status=status, error=f"{type(error).__name__}: {text}"[:500])
        if error is not raised:
            raise error from raised
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
    state: Checkpoint | None,
    stop: Stop,
    processes: Processes,
) -> None:
    """Run the stages that are not complete yet, from where ``state`` stands."""
    if config.trainer.pack:
        check_packing(module.model, config.trainer.pack)
    record.reset_peak_memory()
    for objective in module.objectives.values():
        objective.open(module.model)  # type: ignore[operator]
    from zoo.data.loader import loader
    from zoo.data.order import training_order

    saver = Saver(folder / "checkpoint", identity_of(config), config.trainer.keep, processes)
    saver.clear()
    done = state.stage if state else 0
    meter = Meter(steps.stages)
    if state is not None:
        meter.load(state.plain[METER])
    tracker.resume(sum(meter.steps))
    order = training_order(source, config.seed)
    drawn = None if steps.total is None else steps.total * config.batch_size
    cached = None
    if config.trainer.cache_features:
        weights = state.read("state_dict")["state_dict"] if state else None
        cached = open_features(config, module, source, drawn, weights, progress)
    flops, told = sample_flops(config, cached)
    manifest.update(flops=told, features=None if cached is None else cached.to_plain())
    module.spread(config.seed, config.trainer)
    ranks = config.trainer.devices * config.trainer.nodes
    for index in range(done, steps.stages):
        count = steps.steps[index] if steps.steps else None
        limit = steps.seconds[index] if steps.seconds else None
        start = state.stage_step if state is not None else 0
        offset = sum(meter.steps[:index])
        module.set_stage(index)
        module.expect(count if count is not None else math.inf)
        meter.begin(index, limit)
        if state is not None and meter.over(index, count, limit):
            module.load_state_dict(state.read("state_dict")["state_dict"])
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
        micro = config.batch_size // config.trainer.accumulate
        passed = offset * config.trainer.accumulate
        watch = Watch(order, micro, passed, config.trainer.log_every, config.recipe.stages[index].name, processes)
        keeper = Keeper(saver, config.trainer.checkpoint_every, config.seed, index, offset, stop, state, watch)
        callbacks: list[Callback] = [meter, watch, curve, keeper]
        if config.trainer.ema:
            callbacks.insert(0, WeightAverage(config.trainer.ema))
        trainer = make_trainer(config, folder, count, callbacks)
        batches = loader(
            source,
            module.processor,
            order,
            batch_size=micro,
            start_step=(offset + start) * config.trainer.accumulate,
            rank=int(os.environ.get("RANK", "0")),
            world_size=ranks,
            workers=config.trainer.workers,
            pin_memory=torch.cuda.is_available() and config.trainer.accelerator != "cpu",
            features=None if cached is None else cached.features,
            pack=config.trainer.pack,
        )
        with quiet_lightning(), saver.finishing():
            trainer.fit(module, batches)
        state = None
        if batches.fill is not None:
            manifest.update(packing=batches.fill.to_plain())
    saver.finish()
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
