"""Stopping and going on: when checkpoints are written and read, what ends a run, and a quiet Trainer."""

from __future__ import annotations

import logging
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from zoo.checkpoints import MODELS, Checkpoint, state_of
from zoo.data.order import Order, share
from zoo.errors import RunError
from zoo.part import derived_seed
from zoo.survival import Interrupted, NotFinite, Processes, Stop, full_disk
from zoo.torchvision_ops import ensure

ensure()  # lightning imports torchmetrics, which imports torchvision

from lightning.pytorch.callbacks import Callback  # noqa: E402


class Saver:
    """Writes checkpoints, one at a time, beside the steps that follow.

    Args:
        folder: ``checkpoint`` of the run directory.
        identity: What a checkpoint belongs to (``identity_of``).
        keep: How many are kept.
    """

    def __init__(self, folder: Path, identity: str, keep: int, processes: Processes) -> None:
        self.folder, self.identity, self.keep, self.processes = folder, identity, keep, processes
        self._writing: Any = None

    def save(self, trainer: Any, stage: int, step: int) -> None:
        """Copy the Trainer's state and begin to write it; waits for the checkpoint before.

        Args:
            step: Of all stages.

        Raises:
            RunError: The one before could not be written (a full disk, say); those before it are intact.
        """
        from zoo import checkpoint_storage as storage

        self.wait()
        if self.processes.rank == 0:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise self._failed(error) from error
        buffers = {f"{model}/{name}" for model in MODELS for name, _ in trainer.lightning_module.named_buffers()}
        first = self.processes.rank == 0
        with quiet_lightning():
            self._writing = storage.save(
                self.folder / storage.NAME.format(step),
                state_of(trainer),
                {
                    "identity": self.identity,
                    "stage": stage,
                    "step": step,
                    "stage_step": trainer.global_step,
                    "processes": self.processes.world,
                },
                keep=self.keep,
                # of buffers, which ranks may change apart, the first one's count, as in DDP
                leave_out=lambda name: not first and name in buffers,
                group=self.processes.saving,
                several=self.processes.several,
            )

    def clear(self) -> None:
        """Remove what an attempt that was killed left half-written."""
        from zoo.checkpoint_storage import clear_partial

        if self.processes.rank == 0:
            clear_partial(self.folder)

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """Let a checkpoint that is being written come to its end when the steps in this block fail on all ranks."""
        try:
            yield
        except Exception as error:
            if isinstance(error, NotFinite) or not self.processes.several:
                with suppress(RunError):  # the first error says more
                    self.wait()
            raise

    def finish(self) -> None:
        """Wait for the last checkpoint of a run, and leave that one alone."""
        from zoo.checkpoint_storage import prune

        self.wait()
        if self.processes.rank == 0:
            prune(self.folder, 1)

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk.

        Raises:
            RunError: As ``save``.
        """
        if self._writing is None:
            return
        from torch.distributed.checkpoint.api import CheckpointException

        writing, self._writing = self._writing, None
        try:
            writing.result()
        except (Exception, CheckpointException) as error:  # DCP's is no Exception
            raise self._failed(error) from error

    def _failed(self, error: BaseException) -> Exception:
        """One line for what a writer raised; DCP wraps the errors of each rank."""
        causes = [cause[0] if isinstance(cause, tuple) else cause for cause in getattr(error, "failures", {}).values()]
        for cause in (*causes, error):
            lost = self.processes.missing(cause)
            if lost is not None:
                return lost
            if isinstance(cause, OSError):
                line = full_disk(cause, self.folder)
                return line or RunError(
                    f"cannot write the checkpoint to {self.folder}: {cause}; the one before is kept"
                )
        return RunError(
            f"cannot write the checkpoint to {self.folder}: {(causes or [error])[0]}; the one before is kept"
        )


class Seeds(Callback):
    """Seeds every step, so that a resumed run draws as the unbroken one without any state of a generator."""

    def __init__(self, seed: int, stage: int) -> None:
        self.seed, self.stage = seed, stage

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        # dropout and the like draw from the global stream
        torch.manual_seed(derived_seed(self.seed, f"step/{self.stage}/{batch_idx}/{trainer.global_rank}"))


class Keeper(Seeds):
    """Seeds every step, writes and reads the resumable checkpoint, and stops cleanly when asked to.

    Args:
        every: Steps between two checkpoints; 0 = only when asked to stop.
        offset: Steps of the stages before.
        resume: The checkpoint that this stage goes on from.
        watch: Has its say before a checkpoint is written.
    """

    def __init__(
        self,
        saver: Saver,
        every: int,
        seed: int,
        stage: int,
        offset: int = 0,
        stop: Stop | None = None,
        resume: Checkpoint | None = None,
        watch: Watch | None = None,
    ) -> None:
        super().__init__(seed, stage)
        self.saver, self.every, self.offset = saver, every, offset
        self.stop = Stop() if stop is None else stop
        self.resume, self.watch = resume, watch
        self.saved = -1

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        if self.resume is not None:
            self.resume.restore(trainer, self.saver.processes)
            self.resume = None

    def on_train_start(self, trainer: Any, module: Any) -> None:
        # again: Lightning puts a handler of SIGTERM before ours that calls a collective wherever the signal finds it
        self.stop.install()
        self.stop.stepping = True

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step == self.saved or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if step == trainer.max_steps or trainer.should_stop:  # the end of the stage saves, when averages are in place
            return
        asked = self.saver.processes.largest(self.stop.poll())  # all ranks stop at one step
        if asked or (self.every and step % self.every == 0):
            self.saved = step
            trainer.should_stop = bool(asked)
            self._save(trainer, module, asked)

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self._save(trainer, module, self.saver.processes.largest(self.stop.poll()))
        self.stop.stepping = False

    def _save(self, trainer: Any, module: Any, asked: int) -> None:
        if self.watch is not None:
            self.watch.check(module)
        self.saver.save(trainer, self.stage, self.offset + trainer.global_step)
        if asked:
            self.saver.wait()
            raise Interrupted(f"step {trainer.global_step}", signal.Signals(asked).name, agreed=True)

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        self.stop.stepping = False


class Watch(Callback):
    """Ends a run whose loss or weights are no numbers, before anything of it is saved.

    On a CPU the loss is looked at after every step; on other devices, where looking waits for the device, every
    ``every`` steps and before a checkpoint.

    Args:
        order: Of the samples: says which ones a step read.
        batch_size: Of a micro-batch, of all ranks together.
        offset: Micro-batches of the stages before.
    """

    def __init__(
        self, order: Order, batch_size: int, offset: int, every: int, stage: str, processes: Processes
    ) -> None:
        self.order, self.batch_size, self.offset, self.every = order, batch_size, offset, every
        self.stage, self.processes = stage, processes
        self.first: Any = None  # the first micro-batch without a number for a loss, on the device
        self.last = 0

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = module.report["loss"]
        if self.first is None:
            self.first = torch.full((), NEVER, dtype=torch.long, device=loss.device)
        self.first = torch.minimum(self.first, torch.where(torch.isfinite(loss), NEVER, batch_idx))
        self.last = batch_idx
        whole = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if whole and (loss.device.type == "cpu" or trainer.global_step % self.every == 0):
            self.check()

    def check(self, module: torch.nn.Module | None = None) -> None:
        """Look at the losses since the last look, and at the weights of ``module``; of all ranks together.

        Raises:
            NotFinite: One is no number.
        """
        mine = NEVER if self.first is None else int(self.first)
        if mine == NEVER and module is not None and not finite(module):
            mine = self.last
        if self.processes.largest(int(mine != NEVER)):
            self._tell(self.processes.gathered(mine))

    def _tell(self, firsts: list[int]) -> None:
        batch = min(firsts)
        ranks = [rank for rank, first in enumerate(firsts) if first == batch]
        told = []
        for rank in ranks[:SHOWN]:
            start, stop = share(self.offset + batch, self.batch_size, rank, self.processes.world)
            ids = [place.id for place in self.order.slice(start, stop)]
            more = f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else ""
            told.append(f"rank {rank}: {', '.join(ids[:SHOWN])}{more}")
        if len(ranks) > SHOWN:
            told.append(f"and {len(ranks) - SHOWN} more ranks")
        raise NotFinite(
            f"the loss or the weights are no numbers after batch {batch + 1} of stage {self.stage!r}, which read "
            f"{'; '.join(told)}; nothing of it was saved, the checkpoint before it is kept: look at these samples, or"
            " lower optimizer.lr"
        )


NEVER = 2**62
SHOWN = 16
"""Ids that a line names at most of a rank, and ranks."""


def finite(module: torch.nn.Module) -> bool:
    """Whether all weights that learn are numbers."""
    sums = [parameter.detach().abs().max() for parameter in module.parameters() if parameter.requires_grad]
    sums = [value.to_local() if hasattr(value, "to_local") else value for value in sums if value.numel()]
    return bool(torch.isfinite(torch.stack([value.float() for value in sums])).all())


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Keep Lightning's and DCP's hints (workers, loggers, devices) off the terminal; warnings and errors stay."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for text in (
            ".*does not have many workers.*",
            ".*`srun` command is available.*",
            ".*GPU available but not used.*",
            ".*no `val_dataloader`.*",
            ".*LeafSpec.*",
            ".*in eval mode at the start of training.*",
            ".*torch.distributed is disabled, unavailable or uninitialized.*",
        ):
            warnings.filterwarnings("ignore", message=text)
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
