"""Stopping and going on: the resumable checkpoint, what is asked of a run from outside, and a quiet Trainer."""

from __future__ import annotations

import logging
import os
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from zoo.errors import RunError, WeightsError
from zoo.part import derived_seed
from zoo.torchvision_ops import ensure

ensure()  # lightning imports torchmetrics, which imports torchvision

from lightning.pytorch import Trainer  # noqa: E402
from lightning.pytorch.callbacks import Callback  # noqa: E402


class Interrupted(Exception):
    """The user or the scheduler asked the run to stop; a resumable checkpoint was written."""


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
        if asked or (self.every and step % self.every == 0 and step != trainer.max_steps):
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
