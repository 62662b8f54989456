"""``python -m zoo.cluster.task SWEEP.json INDEX``: one task of a job array runs the run of its index."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it here, or by torch.distributed.run on its devices and nodes.

    Returns:
        0 when it is done, ``zoo.survival.INTERRUPTED`` when it stopped on request and can go on, else 2.
    """
    signal.signal(signal.SIGTERM, stop)  # before and after training, which listens itself
    signal.signal(signal.SIGUSR1, lambda number, frame: signal.raise_signal(signal.SIGTERM))
    # Where one process finds this variable, Lightning requeues jobs of Slurm; the script does so here.
    os.environ.pop("SLURM_NTASKS", None)
    record, index = (sys.argv[1:] if arguments is None else arguments)[:2]
    from zoo.survival import INTERRUPTED

    try:
        from zoo.cli.jobs import run_folder
        from zoo.cluster.sweep import SlurmSweep
        from zoo.errors import ZooError
        from zoo.run_config import RunConfig

        try:
            jobs = {job.index: job for job in SlurmSweep.read(Path(record).parent).jobs}
            folder = Path(jobs[int(index)].directory)
            outcome = run_folder(folder, RunConfig.read(folder / "run.yaml"))
        except ZooError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    if outcome.error:
        print(f"error: {outcome.folder}: {outcome.error}", file=sys.stderr)
    return {"done": 0, "interrupted": INTERRUPTED}.get(outcome.status, 2)


def stop(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    raise SystemExit(main())
