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
    """Run ``folder`` on several devices of this machine and wait; returns the exit status.

    On several nodes, start the same command on each with torchrun's rendezvous options; this starts the local ranks
    only.
    """
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={devices}", f"--nnodes={nodes}"]
    if nodes == 1:
        command.append("--standalone")
    return subprocess.run([*command, "-m", "zoo.worker", str(folder)], check=False).returncode


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
