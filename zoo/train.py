"""One run: stages of training from a run.yaml, resumable to the bit, then evaluation; everything kept in the run
directory.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from zoo.compare import record
from zoo.compare.flops import count_recipe
from zoo.errors import RunError, WeightsError
from zoo.frozen_features import RunFeatures, open_features
from zoo.part import derived_seed
from zoo.run_config import PRECISIONS, RunConfig, digest
from zoo.torchvision_ops import ensure

ensure()  # lightning imports torchmetrics, which imports torchvision

from lightning.pytorch import Trainer  # noqa: E402
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging  # noqa: E402

if TYPE_CHECKING:
    from zoo.data.sample import Source
    from zoo.module import ZooModule

Say = Callable[[str], None]


class Interrupted(Exception):
    """The user or the scheduler asked the run to stop; a resumable checkpoint was written."""


class Manifest:
    """``manifest.json``, rewritten whole on every change."""

    def __init__(self, folder: Path, values: dict[str, Any], write: bool = True) -> None:
        self.path = folder / "manifest.json"
        self.values = values
        self.writes = write

    def update(self, **values: Any) -> None:
        self.values.update(values)
        if self.writes:
            write_json(self.path, self.values)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically.

    Raises:
        RunError: The folder cannot be written or the disk is full.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(json.dumps(value, indent=1), encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error.strerror}; free space or choose another folder with out=FOLDER"
        ) from error


class Curve(Callback):
    """Appends to curve.jsonl every ``every`` steps; after a resume, lines past the resumed step are dropped first."""

    def __init__(
        self, path: Path, every: int, offset: int, batch_size: int, stage: str, progress: Any, write: bool
    ) -> None:
        self.path, self.every, self.offset, self.batch_size = path, every, offset, batch_size
        self.stage, self.progress, self.writes = stage, progress, write
        self.seconds = 0.0
        self.tokens: Any = 0
        self.seen = -1

    def on_train_start(self, trainer: Any, module: Any) -> None:
        start = self.offset + trainer.global_step
        kept = [line for line in read_lines(self.path) if line["step"] <= start]
        if kept:
            self.seconds = kept[-1]["seconds"]
            self.tokens = kept[-1].get("tokens", 0)
        if self.writes:
            text = "".join(json.dumps(line) + "\n" for line in kept)
            partial = self.path.with_name(self.path.name + ".partial")
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, self.path)
        self.clock = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        ids = batch.get("attention_mask")
        if ids is not None:
            self.tokens = self.tokens + ids.sum().detach() * trainer.world_size
        if trainer.global_step == self.seen:  # a micro-batch of an accumulated step
            return
        self.seen = trainer.global_step
        step = self.offset + trainer.global_step
        last = trainer.global_step == trainer.max_steps
        if step % self.every and step != 1 and not last:
            return
        now = time.perf_counter()
        self.seconds += now - self.clock
        self.clock = now
        self.tokens = int(self.tokens)
        values = torch.stack([value.float().reshape(()) for value in module.report.values()])
        if trainer.world_size > 1:  # every rank's share counts alike: the loss of the whole batch
            values = trainer.strategy.reduce(values, reduce_op="mean")
        line = {
            "step": step,
            "samples": step * self.batch_size,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "stage": self.stage,
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            **{key: round(value, 6) for key, value in zip(module.report, values.tolist(), strict=True)},
        }
        if self.writes:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
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


class Keeper(Callback):
    """Seeds every step, writes the resumable checkpoint, and stops cleanly when asked to."""

    def __init__(self, path: Path, every: int, seed: int, stage: int) -> None:
        self.path, self.every, self.seed, self.stage = path, every, seed, stage
        self.asked = False
        self.saved = -1

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        # Dropout and the like draw from the global stream; seeding it by step makes a resumed run equal without storing
        # it.
        torch.manual_seed(derived_seed(self.seed, f"step/{self.stage}/{batch_idx}/{trainer.global_rank}"))

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step == self.saved or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        asked = self.asked
        if trainer.world_size > 1:
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
        if asked or (self.every and step % self.every == 0 and step < trainer.max_steps):
            self.saved = step
            if asked:
                trainer.should_stop = True
            save_checkpoint(trainer, self.path)
            if asked:
                raise Interrupted(f"step {step}")

    def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["zoo_stage"] = self.stage

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Turn the first Ctrl-C or SIGTERM into a checkpoint at the end of the step; a second Ctrl-C stops at once."""

        def ask(number: int, frame: Any) -> None:
            if self.asked and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.asked = True

        before = {}
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                before[number] = signal.signal(number, ask)
        except ValueError:  # not the main thread (a notebook's kernel thread, say)
            pass
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Keep Lightning's hints (workers, loggers, devices) off the terminal; its warnings and errors stay."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for text in (
            ".*does not have many workers.*",
            ".*GPU available but not used.*",
            ".*no `val_dataloader`.*",
            ".*LeafSpec.*",
            ".*in eval mode at the start of training.*",
        ):
            warnings.filterwarnings("ignore", message=text)
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def save_checkpoint(trainer: Trainer, path: Path) -> None:
    """Write the Trainer's state atomically.

    Raises:
        RunError: The disk is full or the folder cannot be written; the previous checkpoint is intact.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with quiet_lightning():
            trainer.save_checkpoint(partial)  # with the optimizer's state
        if trainer.is_global_zero:
            os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error) and "write" not in str(error):
            raise
        partial.unlink(missing_ok=True)
        kept = "; the checkpoint before it is intact" if path.exists() else ""
        raise RunError(f"cannot write the checkpoint to {path.parent}: {error}{kept}; free space and repeat") from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a resumable checkpoint without running any code it might hold.

    Raises:
        WeightsError: It is damaged, or needs unpickling of other than tensors and plain values.
    """
    import pickle

    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(f"{path} holds pickled code and was refused; delete it to start the run again") from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise WeightsError(f"{path} is damaged ({type(error).__name__}); delete it to start the run again") from error
    return state


def make_trainer(config: RunConfig, folder: Path, steps: int, callbacks: list[Callback]) -> Trainer:
    """The Lightning Trainer of one stage; the loop, devices and precision are its business, files are ours."""
    trainer = config.trainer
    several = trainer.devices * trainer.nodes > 1
    with quiet_lightning():
        return Trainer(
            accelerator=trainer.accelerator,
            devices=trainer.devices,
            num_nodes=trainer.nodes,
            strategy="ddp" if several else "auto",
            precision=PRECISIONS[trainer.precision],  # type: ignore[arg-type]
            max_steps=steps,
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
    from zoo.plugin import catalogue

    folder = Path(folder)
    config = RunConfig.read(folder / "run.yaml")
    main = int(os.environ.get("RANK", "0")) == 0
    ranks = config.trainer.devices * config.trainer.nodes
    present = int(os.environ.get("WORLD_SIZE", "1"))
    if present != ranks:  # Lightning would train on what there is, with half the data and no error
        raise RunError(f"the run is for {ranks} devices but {present} processes were started: start it with zoo train")
    values = {k: v for k, v in config.data.items() if k != "name"}
    source = catalogue()["data"].parse(config.data["name"], values, "data").build(config.recipe.image_size)
    fresh = config.init and not (folder / "checkpoint" / "last.ckpt").is_file()  # what is resumed needs no start
    module = build_module(config.trained_recipe, config.seed, config.init if fresh else None)
    manifest = Manifest(folder, start_manifest(config, module, source), main)
    if fresh:
        start: Any = module.load_report
        if main:
            write_json(folder / "init.json", start.to_plain())
            say(str(start))
    manifest.update(status="running")
    try:
        train(folder, config, module, source, manifest, progress if main else None)
        if torch.distributed.is_initialized():  # one process evaluates; metrics must not wait for the others
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
        if main:
            from zoo.weights import save

            save(module, config.trained_recipe, folder / "weights")
            manifest.update(status="trained")
            evaluate_run(folder, config, module, source, manifest, progress)
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
    return manifest.values


def start_manifest(config: RunConfig, module: ZooModule, source: Source) -> dict[str, Any]:
    """What is known of a run before its first step."""
    from zoo.data.order import training_order
    from zoo.data.sample import data_hash

    plain = config.to_plain()
    order = training_order(source, config.seed)
    samples = sum(config.stage_steps()) * config.batch_size
    trained = [name for name, parameter in module.model.named_parameters() if parameter.requires_grad]
    parts = [
        {
            "path": path,
            "name": config.recipe.parts[path][0] if path in config.recipe.parts else type(part).__name__,
            "parameters": sum(p.numel() for p in part.parameters()),
            "trained": any(name.startswith(path + ".") for name in trained),
        }
        for path, part in module.model.parts().items()
    ]
    return {
        "format": 1,
        "name": config.name,
        "model": config.recipe.model,
        "scale": config.recipe.scale,
        "changed": [list(pair) for pair in config.recipe.changed],
        "seed": config.seed,
        "lr_factor": config.lr_factor,
        "control": bool(config.data.get("blank_images")),
        "status": "starting",
        "error": None,
        "command": record.command(),
        "versions": record.versions(),
        "git": record.git_state(),
        "hardware": record.hardware(),
        "licence": source.licence,
        "parts": parts,
        "parameters": {
            "total": sum(p.numel() for name, p in module.named_parameters() if not name.startswith("objectives.")),
            "trainable": sum(p.numel() for p in module.parameters() if p.requires_grad),
        },
        "budget": plain["budget"],
        "stages": [s.name for s in config.recipe.stages],
        "batch_size": config.batch_size,
        "layout": "\n\n".join(f"{name}\n{layout.draw()}" for name, layout in module.model.layouts().items()),
        "hashes": {
            "data": data_hash(source, "train"),
            "order": order.hash(samples),
            "budget": digest([plain["budget"], config.batch_size])[:16],
            "recipe": digest(config.recipe.to_plain())[:16],
        },
    }


def training_flops(config: RunConfig, cached: RunFeatures | None = None) -> dict[str, Any]:
    """FLOPs of one sample in each stage, and of the whole run.

    With cached features a step has no forward pass of the encoder; one for every image the run reads is added, whether
    this run made it or one before: variants of a sweep then compare whichever came first.
    """
    stages = count_recipe(config.recipe, cached=cached is not None)
    steps = config.stage_steps()
    total = sum(f.per_sample * n * config.batch_size for f, n in zip(stages, steps, strict=True))
    plain = {**stages[-1].to_plain(), "stages": [f.to_plain() for f in stages]}
    if cached is not None:
        encoder = count_recipe(config.recipe)[0].forward - stages[0].forward  # what is frozen costs no backward
        plain["features"] = {"images": cached.images, "forward": encoder, "total": encoder * cached.images}
        total += encoder * cached.images
    return {**plain, "total": total}


def train(
    folder: Path, config: RunConfig, module: ZooModule, source: Source, manifest: Manifest, progress: Any
) -> None:
    """Run the stages that are not complete yet."""
    record.reset_peak_memory()
    for objective in module.objectives.values():
        objective.open(module.model)  # type: ignore[operator]
    from zoo.data.loader import loader
    from zoo.data.order import training_order

    path = folder / "checkpoint" / "last.ckpt"
    state = load_checkpoint(path) if path.is_file() else None
    done = int(state["zoo_stage"]) if state else 0
    steps = config.stage_steps()
    order = training_order(source, config.seed)
    cached = open_features(config, module, source, state, progress) if config.trainer.cache_features else None
    manifest.update(flops=training_flops(config, cached), features=None if cached is None else cached.to_plain())
    if config.trainer.compile:
        module.model.compile()
    ranks = config.trainer.devices * config.trainer.nodes
    curve: Curve | None = None
    for index in range(done, len(steps)):
        offset = sum(steps[:index])
        start = int(state["global_step"]) if state is not None else 0
        module.set_stage(index)
        module.steps = steps[index]
        if state is not None and start >= steps[index]:  # this stage was complete
            module.load_state_dict(state["state_dict"])
            state = None
            continue
        report = (lambda step, line: progress("train", step, sum(steps), line)) if progress else None
        name = config.recipe.stages[index].name
        curve = Curve(
            folder / "curve.jsonl", config.trainer.log_every, offset, config.batch_size, name, report, manifest.writes
        )
        keeper = Keeper(path, config.trainer.checkpoint_every, config.seed, index)
        callbacks: list[Callback] = [curve, keeper]
        if config.trainer.ema:
            callbacks.insert(0, EMAWeightAveraging(decay=config.trainer.ema, use_buffers=False))
        trainer = make_trainer(config, folder, steps[index], callbacks)
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
        )
        with keeper.listening(), quiet_lightning():
            trainer.fit(module, batches, ckpt_path=str(path) if state is not None else None, weights_only=True)
        save_checkpoint(trainer, path)
        state = None
    lines = read_lines(folder / "curve.jsonl")
    seconds = lines[-1]["seconds"] if lines else 0.0
    samples = sum(steps) * config.batch_size
    manifest.update(
        steps=sum(steps),
        samples=samples,
        tokens=lines[-1].get("tokens", 0) if lines else 0,
        seconds=seconds,
        samples_per_second=round(samples / seconds, 2) if seconds else None,
        peak_memory_bytes=record.peak_memory_bytes(),
    )


def evaluate_run(
    folder: Path, config: RunConfig, module: ZooModule, source: Source, manifest: Manifest, progress: Any
) -> dict[str, Any]:
    """Evaluate a trained module and write metrics, items and samples into its run directory."""
    from zoo.evaluation.run import evaluate
    from zoo.plugin import catalogue

    tasks = [catalogue()["task"].parse(name, fields, name).build() for name, fields in config.evaluation.tasks.items()]
    module.eval()

    def tell(task: str, done: int, total: int) -> None:
        if progress:
            progress(task, done, total, {})

    started = time.perf_counter()
    result = evaluate(module.model, source, config.evaluation.split, tasks, folder, tell)
    manifest.values["hashes"]["evaluation"] = result["hash"]
    manifest.update(skipped=result["skipped"], evaluation_seconds=round(time.perf_counter() - started, 3))
    metrics: dict[str, Any] = result["metrics"]
    return metrics
