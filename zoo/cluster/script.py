"""The script of a sweep's job array, and the sbatch commands that submit parts of it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from zoo.cluster.sweep import Job, SlurmSweep

BODY = """
task="${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
echo "task $task on $(hostname), restart ${{SLURM_RESTART_COUNT:-0}}, $(date)"
{python} -m zoo.cluster.task {record} "$SLURM_ARRAY_TASK_ID" &
run=$!

# Slurm signals this shell: USR1 ahead of the time limit, TERM when the task is preempted or cancelled.
limit=
trap 'limit=near; kill -USR1 "$run"' USR1
trap 'kill -TERM "$run"' TERM

# A trap ends `wait` early: the run is over when it is gone.
wait "$run"
status=$?
while kill -0 "$run" 2>/dev/null; do
    wait "$run"
    status=$?
done

# It wrote a checkpoint because the time was nearly over: the same task again, which goes on from there. After TERM
# Slurm itself requeues what was preempted, and what a user cancelled stays cancelled.
if [ "$status" -eq {interrupted} ] && [ -n "$limit" ]; then
    scontrol requeue "$task"
fi
exit "$status"
"""


@dataclass(frozen=True)
class Options:
    """What the user says of the jobs; empty leaves it to the cluster.

    Attributes:
        partition: As sbatch's.
        time: As sbatch's; a run that needs more goes on in the same task, requeued.
        mem: Memory a node, as sbatch's.
        gpus: GPUs a node; None asks for ``trainer.devices`` where ``trainer.accelerator=gpu``.
        cpus: CPU cores a node; None asks for one a device and one a data worker.
        parallel: Tasks of an array at once; 0 leaves it to the cluster.
        grace: Seconds between the signal and the time limit: what a step and a checkpoint take.
        further: Other options of sbatch, as ``--account=abc``.
    """

    partition: str = ""
    time: str = ""
    mem: str = ""
    gpus: int | None = None
    cpus: int | None = None
    parallel: int = 0
    grace: int = 120
    further: tuple[str, ...] = ()


def script(sweep: SlurmSweep, options: Options) -> str:
    """The whole job script; each task of the array runs the run of its index."""
    from zoo.survival import INTERRUPTED

    logs = str(sweep.folder.resolve() / "logs").replace("%", "%%")
    head = {
        "job-name": sweep.job_name,
        "chdir": sweep.cwd,
        "output": f"{logs}/%A_%a.txt",
        "open-mode": "append",
        "requeue": "",
        "signal": f"B:USR1@{options.grace}",
        "kill-on-invalid-dep": "yes",
        "partition": options.partition,
        "time": options.time,
        "mem": options.mem,
    }
    lines = [
        f"#SBATCH --{name}={quoted(value)}" if value else f"#SBATCH --{name}"
        for name, value in head.items()
        if value or name == "requeue"
    ]
    said = " ".join(sweep.command.split())
    return "\n".join(
        [
            "#!/bin/sh",
            "# One task of the array is one run of sweep.json beside this file. Written by:",
            f"#   {said}",
            *lines,
            *(f"#SBATCH {option}" for option in options.further),
            BODY.format(
                python=shlex.quote(sys.executable),
                record=shlex.quote(str(sweep.path.resolve())),
                interrupted=INTERRUPTED,
            ),
        ]
    )


def quoted(value: str) -> str:
    """A value as #SBATCH lines take it."""
    return f'"{value}"' if any(c.isspace() for c in value) else value


@dataclass(frozen=True)
class Submission:
    """A part of the array that goes to sbatch in one command: the same resources, the same runs before it."""

    jobs: tuple[Job, ...]
    options: Options

    @property
    def after(self) -> Sequence[int]:
        return self.jobs[0].after

    def command(self, sweep: SlurmSweep, tasks: Mapping[int, str]) -> list[str]:
        """The sbatch command.

        Args:
            tasks: Index -> task, of first runs that are on their way; others are done.
        """
        first = self.jobs[0]
        parallel = f"%{self.options.parallel}" if self.options.parallel else ""
        waits = [tasks[index] for index in self.after if index in tasks]
        return [
            "sbatch",
            "--parsable",
            f"--array={ranges(job.index for job in self.jobs)}{parallel}",
            f"--nodes={first.nodes}",
            "--ntasks-per-node=1",  # torch.distributed.run starts the ranks of a node
            f"--cpus-per-task={first.cpus}",
            *([f"--gpus-per-node={first.gpus}"] if first.gpus else []),
            *([f"--dependency=afterok:{':'.join(waits)}"] if waits else []),
            str(sweep.script.resolve()),
        ]


def submissions(jobs: Iterable[Job], options: Options) -> list[Submission]:
    """Divide jobs into what one sbatch command can take; first runs come before what waits for them."""

    def alike(job: Job) -> tuple[list[int], int, int, int]:
        return job.after, job.nodes, job.cpus, job.gpus

    found = [Submission(tuple(group), options) for _, group in groupby(sorted(jobs, key=alike), alike)]
    return sorted(found, key=lambda part: part.jobs[0].index)


def ranges(indices: Iterable[int]) -> str:
    """``0-3,5``: indices as sbatch writes them."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
