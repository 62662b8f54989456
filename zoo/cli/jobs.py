"""The runs of a command, one at a time: checked, prepared, run here or by workers, and how each one ended."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from zoo.errors import ConfigError, RunError, ZooError
from zoo.run_config import RunConfig, starts
from zoo.survival import INTERRUPTED, REQUEUE, Interrupted, read_ended


@dataclass
class Outcome:
    """How one job of a command ended.

    Attributes:
        signal: Name of the signal that interrupted it; None = Ctrl-C.
    """

    folder: Path
    status: str
    error: str | None = None
    signal: str | None = None


def check_offline(config: RunConfig, pending: Collection[str] = ()) -> None:
    """What can be checked at once: data and weights from outside, the tasks' own files, and whether features can be
    cached.

    Args:
        pending: Directories of runs that come first: what leans on them cannot be looked at yet.
    """
    from zoo.budget import open_source, plan
    from zoo.evaluation.run import check_tasks
    from zoo.frozen_features import check_cacheable
    from zoo.plugin import catalogue
    from zoo.strategies import check_shardable

    config.tracking.check_installed()
    check_shardable(config.trainer, config.recipe)
    check_cacheable(config)
    for start in starts(config.init):
        if start not in pending:
            from zoo.weights.start import checkpoint_of

            checkpoint_of(start)
    ready = {name: v for name, v in config.evaluation.tasks.items() if not set(map(str, v.values())) & set(pending)}
    check_tasks([catalogue()["task"].parse(name, v, name).build() for name, v in ready.items()])
    source = open_source(config)
    for split in ("train", config.evaluation.split):
        if not source.ids(split):
            raise ConfigError(f"data {config.data['name']!r} has no samples in its {split} split")
    if not config.budget.fixed_order:  # the others were looked at when the configuration was made
        plan(config, source=source)


def prepare_folder(folder: Path, config: RunConfig) -> None:
    """Make the run directory and write run.yaml, or find that it is there already.

    Raises:
        RunError: The folder cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        config.write(folder / "run.yaml.partial")
        (folder / "run.yaml.partial").replace(folder / "run.yaml")
    except OSError as error:
        raise RunError(f"cannot write to {folder}: {error.strerror}; choose another folder with out=FOLDER") from error


def record(
    folder: Path, config: RunConfig, status: str, error: str | None = None, signal: str | None = None
) -> Outcome:
    """Make a run's manifest say how it ended, where the run did not come to it itself, so that a report names it."""
    from zoo.manifest import read_manifest, unstarted_manifest, write_json

    values = read_manifest(folder) or unstarted_manifest(config)
    if values.get("status") != status:
        with suppress(RunError):  # a full disk has had its line
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "manifest.json", {**values, "status": status, "error": error, "stopped_by": signal})
    return Outcome(folder, status, error, signal)


def outcome_of(folder: Path) -> Outcome:
    """How the run in ``folder`` stands, whichever process ran it."""
    from zoo.compare.rundir import Run

    manifest = Run.read(folder).manifest
    return Outcome(
        folder, str(manifest.get("status", "not started")), manifest.get("error"), manifest.get("stopped_by")
    )


def done(folder: Path) -> Outcome:
    """A finished run; what its evaluation left out is told, of which metrics.json says nothing."""
    from zoo.compare.rundir import Run

    for task, reason in dict(Run.read(folder).manifest.get("skipped") or {}).items():
        print(f"{folder}: {task} skipped, {reason}")
    print(f"{folder}: done")
    return Outcome(folder, "done")


def run_folder(folder: Path, config: RunConfig) -> Outcome:
    """Run one prepared folder here, or on several devices through workers; a failure is returned: a sweep goes on."""
    from zoo.compare.rundir import Run

    if Run.read(folder).manifest.get("status") == "done":
        print(f"{folder} is done already; delete it to run it again")
        return Outcome(folder, "done")
    outcome = _attempt(folder, config)
    return (
        outcome if outcome.status == "done" else record(folder, config, outcome.status, outcome.error, outcome.signal)
    )


def _attempt(folder: Path, config: RunConfig) -> Outcome:
    from zoo.cli.progress import Bars

    devices = config.trainer.devices * config.trainer.nodes
    if devices > 1:
        from zoo.worker import launch

        try:
            status = launch(folder, config.trainer.devices, config.trainer.nodes, config.trainer.restarts)
        except RunError as error:  # there are not as many nodes
            return Outcome(folder, "failed", str(error))
        if status == 0:
            return done(folder)
        if status in (INTERRUPTED, REQUEUE):
            return Outcome(folder, "interrupted", signal=(read_ended(folder) or {}).get("signal"))
        told = (read_ended(folder) or {}).get("error")
        return Outcome(folder, "failed", told or f"a worker ended with status {status}; its message is above")
    from zoo.train import run

    try:
        with Bars(f"{config.name} seed={config.seed}") as bars:
            run(folder, progress=bars)
        return done(folder)
    except Interrupted as stop:
        print(f"\ninterrupted at {stop}; the same command goes on from there ({folder})")
        return Outcome(folder, "interrupted", signal=stop.signal)
    except KeyboardInterrupt:
        print(f"\ninterrupted; the same command goes on from the last checkpoint ({folder})")
        return Outcome(folder, "interrupted")
    except ZooError as error:
        return Outcome(folder, "failed", str(error))
    except Exception as error:  # an error of ours or of a library: the traceback is kept with the run
        import traceback

        with suppress(OSError):
            (folder / "traceback.txt").write_text(traceback.format_exc(), encoding="utf-8")
        text = f"{type(error).__name__}: {' '.join(str(error).split())} (see {folder / 'traceback.txt'})"
        return Outcome(folder, "failed", text)
