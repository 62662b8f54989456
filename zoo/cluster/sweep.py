"""The record of a sweep on Slurm, ``OUT/.slurm/NAME/sweep.json``: array index -> run directory, command, state.

Only the command that submits, waits or asks writes it. A task reads its run directory there and says how it stands in
the run's own manifest, so that no two processes of a cluster write one file.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from zoo.cluster.slurm import Queued, ended, queue
from zoo.errors import RunError

HOME = ".slurm"
"""Folder of the records inside the folder of the runs; reports do not look into it."""

OVER = ("COMPLETED", "FAILED", "COMPLETING")
"""States of Slurm's that say no more than the run's own manifest."""


@dataclass
class Job:
    """One run of the sweep.

    Attributes:
        index: Its place in the array, the same in every submission.
        directory: The run directory, relative to the record's ``cwd`` where it was given so.
        nodes: Nodes it needs.
        cpus: CPU cores a node.
        gpus: GPUs a node.
        after: Indices of the first runs that it starts from or is judged by.
        task: ``JOBID_INDEX`` of its last submission; empty before the first.
        state: not submitted | queued | running | done | failed | interrupted.
        note: Why it waits, or why it failed.
    """

    index: int
    directory: str
    nodes: int = 1
    cpus: int = 1
    gpus: int = 0
    after: list[int] = field(default_factory=list)
    task: str = ""
    state: str = "not submitted"
    note: str = ""

    @property
    def missing(self) -> bool:
        """Whether it is neither done nor on its way."""
        return self.state not in ("done", "queued", "running")


@dataclass
class SlurmSweep:
    """A sweep and where each of its runs stands.

    Attributes:
        folder: Where sweep.json, job.sh and the logs are.
        command: As the user gave it.
        cwd: Where it was given; tasks start there, so that relative paths mean the same.
    """

    folder: Path
    command: str
    cwd: str
    jobs: list[Job]

    @property
    def path(self) -> Path:
        return self.folder / "sweep.json"

    @property
    def script(self) -> Path:
        return self.folder / "job.sh"

    @property
    def job_name(self) -> str:
        """What the queue knows it by; it holds the folder, so that two sweeps of one name are told apart."""
        return f"zoo-{self.folder.name}-{hashlib.sha256(str(self.folder.resolve()).encode()).hexdigest()[:6]}"

    def task_command(self, job: Job) -> str:
        """What the job's task runs, which may be given by hand too."""
        return shlex.join([sys.executable, "-m", "zoo.cluster.task", str(self.path.resolve()), str(job.index)])

    def log(self, job: Job) -> Path:
        return self.folder / "logs" / f"{job.task}.txt"

    def write(self) -> None:
        """Replace sweep.json whole.

        Raises:
            RunError: The folder cannot be written.
        """
        plain: dict[str, Any] = {"format": 1, "command": self.command, "cwd": self.cwd, "job_name": self.job_name}
        plain["jobs"] = {str(job.index): {**asdict(job), "command": self.task_command(job)} for job in self.jobs}
        partial = self.path.with_name("sweep.json.partial")
        try:
            (self.folder / "logs").mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(plain, indent=1), encoding="utf-8")
            os.replace(partial, self.path)
        except OSError as error:
            raise RunError(
                f"cannot write {self.path}: {error.strerror}; choose another folder with out=FOLDER"
            ) from error

    @staticmethod
    def read(folder: Path) -> SlurmSweep:
        """Read a record.

        Raises:
            RunError: There is none, or it is none of ours.
        """
        path = folder / "sweep.json"
        try:
            plain = json.loads(path.read_text(encoding="utf-8"))
            if plain["format"] != 1:
                raise RunError(f"{path} has format {plain['format']!r}, unknown to this version: update mmzoo")
            known = {f.name for f in fields(Job)}
            jobs = [
                Job(**{key: value for key, value in values.items() if key in known})
                for values in plain["jobs"].values()
            ]
            return SlurmSweep(folder, plain["command"], plain["cwd"], jobs)
        except OSError as error:
            raise RunError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(f"{path} is not the record of a sweep: delete it, or choose another --name") from error


def sweeps_of(out: Path) -> list[SlurmSweep]:
    """The records of all sweeps whose runs go to ``out``, by name."""
    return [SlurmSweep.read(path.parent) for path in sorted((out / HOME).glob("*/sweep.json"))]


def refresh(sweeps: Sequence[SlurmSweep]) -> dict[str, list[Queued]]:
    """Find where every job stands, from its run directory and from Slurm, and keep it in the records.

    Returns:
        Job name -> tasks in the queue.

    Raises:
        RunError: Slurm does not answer.
    """
    queued = queue(sweep.job_name for sweep in sweeps)
    for sweep in sweeps:
        waiting = {task.index: task for task in queued[sweep.job_name]}
        for job in sweep.jobs:
            if job.index in waiting:  # the record missed it where the submitting process was killed
                job.task = waiting[job.index].task
        own = {job.index: run_state(Path(sweep.cwd, job.directory)) for job in sweep.jobs}
        gone = [j for j in sweep.jobs if j.task and j.index not in waiting and own[j.index][0] != "done"]
        ends = ended([job.task for job in gone])
        for job in sweep.jobs:
            state, note = own[job.index]
            if state == "done":
                job.state, job.note = "done", ""
            elif job.index in waiting:
                task = waiting[job.index]
                job.state, job.note = ("queued", task.reason) if task.state == "PENDING" else ("running", "")
            elif job.task:
                job.state, job.note = how_it_ended(state, note, ends.get(job.task, ""), sweep.log(job))
            else:
                job.state, job.note = "not submitted", note
        sweep.write()
    return queued


def run_state(directory: Path) -> tuple[str, str]:
    """Status and error of a run's own manifest, empty where there is none; only this is read, as it is asked often."""
    try:
        manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
        return str(manifest.get("status") or ""), str(manifest.get("error") or "")
    except (OSError, ValueError, AttributeError):
        return "", ""


def how_it_ended(state: str, error: str, by_slurm: str, log: Path) -> tuple[str, str]:
    """State and reason of a job that left the queue without being done.

    Args:
        state: Of the run's manifest.
        error: Of the run's manifest.
        by_slurm: The state Slurm gives, empty where it has forgotten.
        log: What the task wrote.
    """
    if by_slurm == "CANCELLED" and not log.exists():
        return "failed", "cancelled before it began: by scancel, or because a run that comes first did not end well"
    if by_slurm and by_slurm not in OVER and state != "interrupted":
        return "failed", f"Slurm ended it: {by_slurm} (see {log})"
    if state == "failed":
        return "failed", error
    if state == "interrupted":
        return "interrupted", f"Slurm: {by_slurm}" if by_slurm and by_slurm not in OVER else ""
    return "failed", f"it ended without a word of its own: {last_line(log)} (see {log})"


def last_line(log: Path) -> str:
    try:
        lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    except OSError:
        return "no log"
    return next((line for line in reversed(lines) if line), "an empty log")[:300]


def on_their_way(sweeps: Iterable[SlurmSweep]) -> dict[Path, str]:
    """Run directory -> the task that has it, of all that is queued or running."""
    return {
        Path(sweep.cwd, job.directory).resolve(): job.task
        for sweep in sweeps
        for job in sweep.jobs
        if job.state in ("queued", "running")
    }
