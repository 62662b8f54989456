"""``python -m torch.distributed.run ... -m zoo.worker RUN_DIRECTORY``: one rank of a run on several devices.

Lightning's own launcher starts its processes by repeating the command line, which inside a Hydra sweep repeats the
sweep. This
worker reads the resolved run.yaml, imports no Hydra, and so all ranks of all jobs read the same configuration.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from zoo.survival import (
    ENDED,
    INTERRUPTED,
    LOST,
    STOP,
    Interrupted,
    RanksLost,
    asking,
    read_ended,
    status_of,
    write_ended,
)

OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""Has the agents of several nodes agree on a new store whenever they start ranks again. By default torch elastic keeps
one, with the addresses of ranks that are gone; and there is no number of the attempt that all nodes share, under which
new ones could be looked for, as ``zoo.survival.join`` does on one node."""


def launch(folder: Path, devices: int, nodes: int = 1, restarts: int = 3) -> int:
    """Run ``folder`` on several devices of this machine and wait; returns the exit status (``zoo.survival``).

    A signal to this process becomes a request by file, which the ranks find at the end of a step: torchrun itself would
    end them after 30 seconds. On several nodes, start the same command on each with torchrun's rendezvous options; this
    starts the local ranks only.

    Args:
        restarts: How often torch elastic starts all ranks again, from the last checkpoint, when one was lost.
    """
    command = start_command(folder, devices, nodes, restarts)
    for name in (ENDED, STOP):  # of an attempt before
        (folder / name).unlink(missing_ok=True)
    before = {}
    with suppress(ValueError):  # not the main thread
        # torchrun inherits that they are ignored, and must: Slurm may send SIGUSR1 to it too, which would end it
        before = {number: signal.signal(number, signal.SIG_IGN) for number in asking()}
    # a group of its own: Ctrl-C in a terminal reaches this process alone
    apart = 0 if os.name == "posix" else None
    own_store = {OWN_STORE: "1"} if nodes > 1 else {}
    agent = subprocess.Popen(command, process_group=apart, env={**os.environ, **own_store})
    asked: list[int] = []

    def ask(number: int, frame: object) -> None:
        if signal.SIGINT in asked and number == signal.SIGINT:
            agent.terminate()
        asked.append(number)
        with suppress(OSError):
            (folder / STOP).touch()

    with suppress(ValueError):
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, *before)} | before
    try:
        status = agent.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        (folder / STOP).unlink(missing_ok=True)
    ended = read_ended(folder)
    if ended is None:
        return status_of(signal.Signals(asked[0]).name) if asked and status else status
    if ended["status"] == "interrupted":
        return INTERRUPTED if signal.SIGINT in asked else status_of(ended["signal"])
    return 2


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
            f" '{OWN_STORE}=1 torchrun --nnodes={nodes} --nproc-per-node={devices} --rdzv-backend=c10d"
            f" --rdzv-endpoint=HOST:PORT -m zoo.worker {folder}'"
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
    folder = Path((arguments or sys.argv[1:])[0])
    rank = int(os.environ.get("RANK", "0"))
    elastic = "TORCHELASTIC_RUN_ID" in os.environ
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if again and read_ended(folder) is not None:
        return 0  # what ended the run would end it again
    if rank == 0 and not again:
        (folder / ENDED).unlink(missing_ok=True)
    from zoo.cli.progress import Bars
    from zoo.errors import ZooError
    from zoo.run_config import RunConfig
    from zoo.train import run

    try:
        if rank:
            run(folder)
        else:
            config = RunConfig.read(folder / "run.yaml")
            with Bars(f"{config.name} seed={config.seed}") as bars:
                run(folder, progress=bars)
            print(f"{folder}: done")
    except KeyboardInterrupt:  # before the first step, or asked twice
        return INTERRUPTED
    except Interrupted as stop:
        if elastic and not stop.agreed:
            return LOST  # torchrun sends SIGTERM to the others when it lost one: that is no request of the user's
        if rank == 0:
            print(f"\ninterrupted at {stop}; the same command goes on from there ({folder})")
            write_ended(folder, "interrupted", rank, signal=stop.signal)
        return 0 if elastic else stop.status  # torch elastic takes every other status for a failure
    except RanksLost as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(LOST)  # at once: a checkpoint's thread may wait for ranks that are gone
    except ZooError as error:
        print(f"error: {error}", file=sys.stderr)
        write_ended(folder, "failed", rank, error=str(error) if rank == 0 else f"rank {rank}: {error}")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
