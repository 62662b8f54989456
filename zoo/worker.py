"""``python -m torch.distributed.run ... -m zoo.worker RUN_DIRECTORY``: one rank of a run on several devices.

Lightning's own launcher starts its processes by repeating the command line, which inside a Hydra sweep repeats the
sweep. This
worker reads the resolved run.yaml, imports no Hydra, and so all ranks of all jobs read the same configuration.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

INTERRUPTED = 130
"""Exit status after a clean stop on request, the shell's convention for Ctrl-C."""


def launch(folder: Path, devices: int, nodes: int = 1) -> int:
    """Run ``folder`` on several devices, of several nodes too, and wait; returns the exit status.

    Raises:
        RunError: As ``start_command``.
    """
    return subprocess.run(start_command(folder, devices, nodes), check=False).returncode


def start_command(folder: Path, devices: int, nodes: int = 1, restarts: int = 0) -> list[str]:
    """What starts the ranks of a run.

    On one node every run has a rendezvous of its own on a port that the system gives, so that any number of runs share
    a machine. On several, which a Slurm allocation names, srun starts one torch.distributed.run a node; they meet at
    the first, on a port that follows from the job's id.

    Args:
        restarts: How often torch elastic starts all ranks again when one was lost.

    Raises:
        RunError: Several nodes outside of an allocation of as many.
    """
    ranks = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={devices}", f"--nnodes={nodes}"]
    ranks.append(f"--max-restarts={restarts}")
    worker = ["-m", "zoo.worker", str(folder)]
    if nodes == 1:
        return [*ranks, "--standalone", *worker]
    from zoo.errors import RunError

    job, given = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_JOB_NUM_NODES", "0")
    if not job or int(given) < nodes:
        here = f"this Slurm job has {given}" if job else "this is no Slurm job"
        raise RunError(
            f"trainer.nodes = {nodes}, but {here}: start it with zoo sweep --slurm, or on each node as"
            f" 'torchrun --nnodes={nodes} --nproc-per-node={devices} --rdzv-backend=c10d --rdzv-endpoint=HOST:PORT"
            f" -m zoo.worker {folder}'"
        )
    cores = os.environ.get("SLURM_CPUS_PER_TASK")  # srun does not take it over from sbatch
    step = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    meet = [f"--rdzv-id={job}", "--rdzv-backend=c10d", f"--rdzv-endpoint={first_host()}:{20000 + int(job) % 20000}"]
    return [*step, *([f"--cpus-per-task={cores}"] if cores else []), *ranks, *meet, *worker]


def first_host() -> str:
    """The name by which the first node of this Slurm job knows itself; Slurm's name for it need not resolve."""

    def scontrol(*words: str) -> list[str]:
        done = subprocess.run(["scontrol", "--oneliner", "show", *words], capture_output=True, text=True, check=True)
        return done.stdout.split()

    first = scontrol("hostnames")[0]
    fields = dict(word.split("=", 1) for word in scontrol("node", first) if "=" in word)
    return fields.get("NodeHostName", first)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one rank."""
    from zoo.cli.progress import Bars
    from zoo.errors import ZooError
    from zoo.resuming import Interrupted
    from zoo.run_config import RunConfig
    from zoo.train import run

    folder = Path((arguments or sys.argv[1:])[0])
    try:
        if int(os.environ.get("RANK", "0")):
            run(folder)
        else:
            config = RunConfig.read(folder / "run.yaml")
            with Bars(f"{config.name} seed={config.seed}") as bars:
                run(folder, progress=bars)
            print(f"{folder}: done")
    except KeyboardInterrupt:  # before the first step, or asked twice
        return INTERRUPTED
    except Interrupted as stop:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"\ninterrupted at {stop}; the same command goes on from there ({folder})")
        return INTERRUPTED
    except ZooError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
