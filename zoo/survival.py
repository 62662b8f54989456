"""What ends a run before its time, and what is left of it: signals, lost ranks, losses that are no numbers, full disks.

Exit statuses of ``zoo train`` and of a worker: 0 done, 2 failed, ``INTERRUPTED`` after Ctrl-C, ``REQUEUE`` after
SIGTERM, SIGUSR1 or a request by file: a checkpoint was written and the same command goes on from it.
"""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.errors import RunError

INTERRUPTED = 130
"""Exit status after Ctrl-C, the shell's convention."""
REQUEUE = 75
"""Exit status after a request to make room, sysexits' EX_TEMPFAIL: start the same command again."""
LOST = 1
"""Exit status of a rank that lost another: torch elastic starts them all again while it may."""

STOP = "stop"
"""A file in the run directory that asks for what a signal asks for: a checkpoint at the next step, and an end."""
ENDED = "ended.json"
"""How a worker ended for good, so that nothing starts it again: {status, error, signal, rank}."""

ASKING = ("SIGTERM", "SIGUSR1", "SIGHUP")
"""Signals that ask for a checkpoint and an end."""


def asking() -> list[signal.Signals]:
    """Those of ``ASKING`` that this system has and that are not ignored on purpose, as by nohup."""
    known = [getattr(signal, name) for name in ASKING if hasattr(signal, name)]
    return [number for number in known if number.name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN]


class Interrupted(Exception):
    """The user or the scheduler asked the run to stop; a resumable checkpoint was written.

    Attributes:
        signal: The signal's name; ``SIGTERM`` where a file asked.
        agreed: All ranks stopped at one step.
    """

    def __init__(self, where: str, signal: str = "SIGINT", agreed: bool = False) -> None:
        super().__init__(where)
        self.signal, self.agreed = signal, agreed

    @property
    def status(self) -> int:
        return status_of(self.signal)


def status_of(name: str | None) -> int:
    """Exit status of a run that the named signal stopped."""
    return REQUEUE if name in ASKING else INTERRUPTED


class RanksLost(RunError):
    """Other ranks did not answer in time, or are gone."""


class NotFinite(RunError):
    """The loss or the weights are no numbers any more."""


class Stop:
    """What this process was asked for.

    Attributes:
        asked: Number of the signal, 0 = nothing was asked.
        stepping: Whether steps are being taken, at whose ends ``asked`` is looked at; elsewhere a signal ends at once.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.asked = 0
        self.stepping = False
        self.file = None if folder is None else folder / STOP
        self._looked = 0.0

    def hear(self, number: int, frame: Any = None) -> None:
        """A signal's handler. A second Ctrl-C stops at once."""
        if number == signal.SIGINT and (self.asked or not self.stepping):
            raise KeyboardInterrupt
        self.asked = self.asked or number
        if not self.stepping:
            raise Interrupted("a moment between steps", signal.Signals(number).name)

    def poll(self) -> int:
        """The signal asked for, also by file; the file is looked for once a second and is gone afterwards."""
        now = time.monotonic()
        if not self.asked and self.file is not None and now - self._looked >= 1:
            self._looked = now
            if self.file.exists():
                self.asked = int(signal.SIGTERM)
                with suppress(OSError):
                    self.file.unlink()
        return self.asked

    def install(self) -> dict[Any, Any]:
        """Hear the signals; returns the handlers there were. In a thread nothing is heard."""
        before = {}
        with suppress(ValueError):  # not the main thread (a notebook's kernel thread, say)
            for number in (signal.SIGINT, *asking()):
                before[number] = signal.signal(number, self.hear)
        return before

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear the signals in this block."""
        before = self.install()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def requeue() -> str | None:
    """Have Slurm start this job again, where it runs under Slurm and ``ZOO_REQUEUE=1`` asks for it.

    Call it last: Slurm ends the job at once.

    Returns:
        A line about what was done, or None.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if not job or os.environ.get("ZOO_REQUEUE") != "1":
        return None
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"job {job} could not be requeued ({error}): submit it again"
    if done.returncode:
        return f"job {job} could not be requeued ({done.stderr.strip()}): submit it again"
    return f"job {job} is requeued"


# -- several processes ---------------------------------------------------------------------------------------------


@dataclass
class Processes:
    """The processes of a run.

    Attributes:
        control: A gloo group for what they agree on.
        saving: One for checkpoints, which are written while steps go on.
        roll: One for asking who is there, when another has failed.
        timeout: Seconds after which a collective fails.
    """

    rank: int = 0
    world: int = 1
    timeout: float = 0.0
    control: Any = None
    saving: Any = None
    roll: Any = None

    @property
    def several(self) -> bool:
        return self.world > 1

    def largest(self, value: int) -> int:
        """The largest of the ranks' values."""
        if not self.several:
            return value
        import torch
        import torch.distributed as dist

        out = torch.tensor(value)
        dist.all_reduce(out, op=dist.ReduceOp.MAX, group=self.control)
        return int(out)

    def gathered(self, value: Any) -> list[Any]:
        """Every rank's value, in order."""
        if not self.several:
            return [value]
        import torch.distributed as dist

        out: list[Any] = [None] * self.world
        dist.all_gather_object(out, value, group=self.control)
        return out

    def missing(self, error: BaseException) -> RanksLost | None:
        """What to say of an error that is a collective's: who did not come; None of any other error."""
        if not self.several or isinstance(error, RunError) or not COLLECTIVE.search(f"{type(error).__name__}: {error}"):
            return None
        import datetime

        import torch.distributed as dist

        late = "imed out" in str(error)
        how = f"did not arrive within {self.timeout:g} seconds (trainer.timeout)" if late else "is gone"
        try:
            dist.monitored_barrier(self.roll, timeout=datetime.timedelta(seconds=ROLL), wait_all_ranks=True)
        except RuntimeError as told:  # rank 0 hears who is missing, the others only whether rank 0 answers
            named = re.search(r"[Rr]anks? ([\d, ]+?),? failed to pass", str(told))
            who = named.group(1) if named else "0, or one that it waits for," if self.rank else "unknown"
            return RanksLost(
                f"rank {who} {how}, says rank {self.rank}: look there for what stopped it; the last checkpoint is kept"
            )
        return RanksLost(
            f"all {self.world} ranks are there, but a collective of rank {self.rank} failed "
            f"({' '.join(str(error).split())[:150]}): they waited for each other in different places"
        )


COLLECTIVE = re.compile(
    r"Timed out waiting|Connection (closed|reset|refused)|gloo|Gloo|NCCL|DistBackendError|DistNetworkError|"
    r"Broken pipe|Socket Timeout|monitoredBarrier"
)
"""What errors of collectives say: torch raises RuntimeError for gloo's."""
ROLL = 10.0
"""Seconds in which the others answer when one rank's collective failed."""


def join(timeout: float, cuda: bool) -> Processes:
    """Bring the processes of torch.distributed.run together, before the Trainer, which takes what it finds.

    Args:
        timeout: Seconds after which a collective fails.

    Raises:
        RanksLost: Not all of them came.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return Processes()
    import datetime

    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    limit = datetime.timedelta(seconds=timeout)
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        if not dist.is_initialized():
            store, rank, size = next(iter(rendezvous("env://", timeout=limit)))
            if os.environ.get("LOCAL_WORLD_SIZE") == str(world):
                # torch elastic keeps its store when it starts ranks again, and with it the addresses of those that are
                # gone. Agents of several nodes count restarts each for itself, and make a new store (zoo.worker).
                store = PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
            backend = "nccl" if cuda else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
        groups = [dist.new_group(backend="gloo", timeout=limit) for _ in range(3)]
    except RuntimeError as error:
        own = os.environ.get("RANK", "0")
        reason = " ".join(str(error).split())[:150]
        raise RanksLost(f"rank {own} did not find all {world} ranks within {timeout:g} seconds: {reason}") from error
    return Processes(dist.get_rank(), world, timeout, *groups)


# -- how a worker ended --------------------------------------------------------------------------------------------


def write_ended(folder: Path, status: str, rank: int, error: str | None = None, signal: str | None = None) -> None:
    """Note that a run ended for good: elastic's next attempt ends at once."""
    values = {"status": status, "error": error, "signal": signal, "rank": rank}
    partial = folder / f"{ENDED}.{rank}.partial"
    with suppress(OSError):  # a full disk has its line elsewhere
        partial.write_text(json.dumps(values), encoding="utf-8")
        partial.replace(folder / ENDED)


def read_ended(folder: Path) -> Mapping[str, Any] | None:
    """What ``write_ended`` noted; None where nothing is."""
    try:
        values = json.loads((folder / ENDED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def full_disk(error: BaseException, folder: Path) -> RunError | None:
    """One line about a disk without room or a folder that cannot be written; None of any other error."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
        return RunError(
            f"cannot write to {folder}: {error.strerror or error}; the last checkpoint is intact: free space and repeat"
        )
    return None
