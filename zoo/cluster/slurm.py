"""What is asked of Slurm, by its own commands: submit, what is in the queue, how what left it ended."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from zoo.errors import RunError

TIMEOUT = 120.0
"""Seconds that a command of Slurm's may take: a controller under load answers late, one that is gone never does."""


@dataclass(frozen=True)
class Queued:
    """A task of a job array that waits or runs.

    Attributes:
        task: ``123_4``: the array's job id and the task's index.
        state: As Slurm writes it: PENDING, RUNNING, COMPLETING, REQUEUED, ...
        reason: Why it waits: Priority, Resources, Dependency, ReqNodeNotAvail, ...
    """

    task: str
    state: str
    reason: str

    @property
    def index(self) -> int:
        return int(self.task.partition("_")[2])


def check_slurm() -> None:
    """Refuse to begin where Slurm's commands are missing.

    Raises:
        RunError: sbatch or squeue is not on PATH.
    """
    for program in ("sbatch", "squeue"):
        if shutil.which(program) is None:
            raise RunError(
                f"{program} is not on PATH: --slurm works on a login node of a Slurm cluster; without --slurm the sweep"
                " runs here, and --slurm --dry-run shows what would be submitted"
            )


def submit(command: Sequence[str]) -> str:
    """Run an ``sbatch --parsable`` command; returns the job's id.

    Raises:
        RunError: Slurm refused; its own words are the message.
    """
    done = _run(command)
    if done.returncode:
        raise RunError(f"sbatch refused: {words(done.stderr, 'sbatch') or f'status {done.returncode}'}")
    return done.stdout.strip().splitlines()[-1].partition(";")[0]  # ID or ID;CLUSTER


def queue(names: Iterable[str]) -> dict[str, list[Queued]]:
    """Job name -> its tasks that wait or run, of this user.

    Raises:
        RunError: Slurm does not say: what is queued is then unknown, and submitting again might run it twice.
    """
    found: dict[str, list[Queued]] = {name: [] for name in names}
    if not found:
        return found
    command = ["squeue", "--noheader", "--array", f"--user={os.getuid()}", f"--name={','.join(found)}"]
    done = _run([*command, "--format=%i|%T|%r|%j"])
    if done.returncode:
        raise RunError(
            f"squeue does not say what is queued: {words(done.stderr, 'squeue') or f'status {done.returncode}'};"
            " nothing was submitted, give the command again when Slurm answers"
        )
    for line in done.stdout.splitlines():
        task, state, reason, name = [*line.strip().split("|", 3), "", "", ""][:4]
        if name in found and task.partition("_")[2].isdigit():
            found[name].append(Queued(task, state, "" if reason == "None" else reason))
    return found


def ended(tasks: Sequence[str]) -> dict[str, str]:
    """Task -> the state it ended in (TIMEOUT, OUT_OF_MEMORY, NODE_FAIL, CANCELLED, ...), as far as Slurm knows.

    sacct tells where the cluster keeps accounts; else scontrol, which forgets after some minutes (MinJobAge).
    """
    if not tasks:
        return {}
    wanted, found = set(tasks), {}
    done = _run(["sacct", "-n", "-P", "-X", "--format=JobID,State", f"--jobs={','.join(tasks)}"], missing=1)
    for line in done.stdout.splitlines() if not done.returncode else ():
        task, _, state = line.partition("|")
        if task in wanted and state:
            found[task] = state.split()[0]  # CANCELLED by 1000
    for array in sorted({task.partition("_")[0] for task in wanted - set(found)}):
        done = _run(["scontrol", "--oneliner", "show", "job", array], missing=1)
        for line in done.stdout.splitlines() if not done.returncode else ():
            fields = dict(pair.split("=", 1) for pair in line.split() if "=" in pair)
            task = f"{fields.get('ArrayJobId')}_{fields.get('ArrayTaskId')}"
            if task in wanted and "JobState" in fields:
                found.setdefault(task, fields["JobState"])
    return found


def words(text: str, program: str) -> str:
    """A command's message in one line, without its name and the word error before every part."""
    parts = [line.strip().removeprefix(f"{program}:").strip().removeprefix("error:") for line in text.splitlines()]
    return "; ".join(dict.fromkeys(part.strip() for part in parts if part.strip()))


def _run(command: Sequence[str], missing: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands.

    Args:
        missing: The status to pretend where the program is not installed; None raises.
    """
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT)
    except FileNotFoundError as error:
        if missing is None:
            raise RunError(f"{command[0]} is not on PATH: give the command on a login node of the cluster") from error
        return subprocess.CompletedProcess(list(command), missing, "", "")
    except subprocess.TimeoutExpired as error:
        raise RunError(f"{command[0]} did not answer within {TIMEOUT:.0f} seconds: is the controller up?") from error
