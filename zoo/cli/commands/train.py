"""zoo train: Hydra composes and sweeps, each job becomes a run directory, and ``zoo.train`` (or a worker a device)
runs it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.cli.tune import TRIALS, TuneConfig, adopt, checked, choose, trial, trials, tuned
from zoo.errors import ConfigError, RunError, ZooError
from zoo.registry import parse
from zoo.run_config import RunConfig

USAGE = """usage: zoo train model=NAME [KEY=VALUE ...] [-m]

  model=llava connector=mlp scale=tiny        choose parts by name (zoo list connector)
  encoder.width=96 optimizer.lr=3e-4          set fields (zoo show NAME lists them)
  connector=linear,mlp,qformer seed=0,1 -m    sweep: every combination is a run
  tune=lr3 tune.metric=TASK/METRIC            every variant's best of three learning rates, found on its first seed
  experiment=NAME                             settings, and perhaps a sweep, from conf/experiment/NAME.yaml
  stages=joint                                train every part at once, from scratch
  budget.value=500 batch_size=64              how long (budget.unit=steps or samples), samples a step
  trainer.devices=2 trainer.precision=bf16    how to run
  data=folder data.root=PATH                  your own images and captions
  init=RUN_OR_CHECKPOINT                      start from the weights of another model, as far as it has the same parts
  out=FOLDER                                  where run directories go (default: outputs)

The same command goes on where an interrupted one stopped. --dry-run prints the resolved runs and stops."""


@dataclass
class Outcome:
    """How one job of a command ended."""

    folder: Path
    status: str
    error: str | None = None


def main(argv: Sequence[str]) -> int:
    """Train; returns 0 when all runs are done, 2 when one failed for a reason named in one line, 130 when
    interrupted.
    """
    if not argv or "-h" in argv or "--help" in argv:
        print(USAGE)
        return 0
    outcomes = train(argv)
    failed = [o for o in outcomes if o.status not in ("done", "interrupted")]
    if len(outcomes) > 1:
        print(f"{sum(o.status == 'done' for o in outcomes)} of {len(outcomes)} runs are done")
        leaderboard([o.folder for o in outcomes if o.status == "done"])
    if any(o.status == "interrupted" for o in outcomes):
        return 130
    return 2 if failed else 0


def train(argv: Sequence[str]) -> list[Outcome]:
    """Run one or more jobs, given as on the command line.

    Raises:
        ZooError: Any job of the command is wrong; found before the first one starts.
    """
    from zoo.cli.overrides import composed, expand, is_sweep, prepare, to_run, with_quotes, with_sweep, written_keys

    flags = {"-m", "--multirun", "--dry-run"}
    unknown = [a for a in argv if a.startswith("-") and a not in flags]
    if unknown:
        raise ConfigError(f"unknown option {unknown[0]!r}: zoo train takes KEY=VALUE, -m and --dry-run")
    typed = with_quotes([a for a in argv if a not in flags])
    overrides = with_sweep(typed)
    multirun = "-m" in argv or "--multirun" in argv or overrides != typed
    prepared = prepare(overrides)
    if is_sweep(overrides) and not multirun:
        raise ConfigError("several values for one key are a sweep: add -m")
    jobs = list(expand(prepared)) if multirun else [prepared]
    configs: dict[Path, RunConfig] = {}
    tune = None
    for job in jobs:  # everything that can be wrong is found before the first run starts
        plain, choices = composed(job)
        config = to_run(plain, choices, written_keys(overrides))
        tune = to_tune(plain)
        if tune:
            checked(tune, config)
        check_offline(config)
        configs[config.directory(str(plain["out"]))] = config
    out, written = str(plain["out"]), written_keys(overrides)
    hydra = f"hydra.sweep.dir='{out}/.hydra'"
    tries = trials(configs.values(), tune, out) if tune else {}
    if "--dry-run" in argv:
        show({**tries, **configs})
        return []
    if tune:
        for folder, config in tries.items():
            prepare_folder(folder, config)
        axis = f"++lr_factor={','.join(map(str, tune.factors))}"
        launch([*prepared, axis, hydra], True, written, tries)
        choose(configs.values(), tune, out)
        configs = {run.directory(out): run for run, _ in (tuned(config, out) for config in configs.values())}
    for folder, config in configs.items():
        prepare_folder(folder, config)
    launch([*prepared, hydra], multirun, written)
    return [outcome_of(folder) for folder in configs]


def to_tune(plain: Mapping[str, Any]) -> TuneConfig | None:
    """The learning-rate search that a composed job asks for; None where it asks for none."""
    values = dict(plain.get("tune") or {})
    if values and "factors" not in values:
        raise ConfigError("tune has no factors: choose tune=lr3, and tune.factors=[0.3,1,3] for others")
    if not values.get("factors"):
        return None
    if "metric" not in values:
        raise ConfigError("tune needs tune.metric=TASK/METRIC: what decides on validation data")
    tune: TuneConfig = parse(TuneConfig, values, "tune")
    return tune


def leaderboard(folders: Sequence[Path]) -> None:
    """Print how the finished runs of a sweep compare."""
    from zoo.compare.leaderboard import build_leaderboard
    from zoo.compare.rundir import find_runs
    from zoo.compare.tables import print_leaderboard

    if len(folders) > 1:
        print_leaderboard(build_leaderboard(find_runs(folders)))


def check_offline(config: RunConfig) -> None:
    """What can be checked at once: data and weights from outside, the tasks' own files, and whether features can be
    cached."""
    from zoo.evaluation.run import check_tasks
    from zoo.frozen_features import check_cacheable
    from zoo.plugin import catalogue

    check_cacheable(config)
    if config.init:
        from zoo.weights.start import checkpoint_of

        checkpoint_of(config.init)
    check_tasks([catalogue()["task"].parse(name, v, name).build() for name, v in config.evaluation.tasks.items()])
    values = {k: v for k, v in config.data.items() if k != "name"}
    source = catalogue()["data"].parse(config.data["name"], values, "data").build(config.recipe.image_size)
    for split in ("train", config.evaluation.split):
        if not source.ids(split):
            raise ConfigError(f"data {config.data['name']!r} has no samples in its {split} split")


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


def show(configs: dict[Path, RunConfig]) -> None:
    import yaml
    from rich.console import Console
    from rich.markup import escape
    from rich.syntax import Syntax

    for folder, config in configs.items():
        # a name may hold what rich reads as markup: decoder.lora_targets=[q_proj]
        Console().print(
            f"\n[bold]{escape(str(folder))}[/bold]  {sum(config.stage_steps())} steps of {config.batch_size}"
        )
        Console().print(Syntax(yaml.safe_dump(config.to_plain(), sort_keys=False), "yaml", background_color="default"))


def launch(
    prepared: Sequence[str], multirun: bool, written: Sequence[str], only: Mapping[Path, RunConfig] | None = None
) -> None:
    """Hand the checked jobs to Hydra's launcher, whichever it is; each job reads its own file again and runs it.

    Args:
        only: The trials of a learning-rate search, which the jobs then are; other jobs (further seeds) end at once.
    """
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import DictConfig, OmegaConf

    from zoo.cli.overrides import store_parts, to_run
    from zoo.plugin import conf_dir

    stopped: list[Path] = []

    def job(config: DictConfig) -> str:
        if stopped:  # Ctrl-C ends the sweep, not only its current job
            return "interrupted"
        plain: Any = OmegaConf.to_container(config)
        out, run = str(plain["out"]), to_run(plain, dict(HydraConfig.get().runtime.choices), written)
        tune = to_tune(plain)
        if only is not None and tune is not None:
            run = trial(run, tune, run.lr_factor)
            folder = run.directory(Path(out) / TRIALS)
            if folder not in only:
                return "another seed decides"
        else:
            run, record = tuned(run, out) if tune else (run, None)
            folder = run.directory(out)
            if record:
                adopt(folder, record, run, out)
        outcome = run_folder(folder, run)
        if outcome.error:
            print(f"error: {outcome.folder}: {outcome.error}", file=sys.stderr)
        if outcome.status == "interrupted":
            stopped.append(outcome.folder)
        return outcome.status

    store_parts()
    before = sys.argv
    sys.argv = ["zoo", *prepared, *(["--multirun"] if multirun else [])]
    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="train")(job)()
    finally:
        sys.argv = before


def outcome_of(folder: Path) -> Outcome:
    """How the run in ``folder`` stands, whichever process ran it."""
    from zoo.compare.rundir import Run

    manifest = Run.read(folder).manifest
    return Outcome(folder, str(manifest.get("status", "not started")), manifest.get("error"))


def _done(folder: Path) -> Outcome:
    """A finished run; what its evaluation left out is told, of which metrics.json says nothing."""
    from zoo.compare.rundir import Run

    for task, reason in dict(Run.read(folder).manifest.get("skipped") or {}).items():
        print(f"{folder}: {task} skipped, {reason}")
    print(f"{folder}: done")
    return Outcome(folder, "done")


def run_folder(folder: Path, config: RunConfig) -> Outcome:
    """Run one prepared folder here, or on several devices through workers; a failure is returned: a sweep goes on."""
    from zoo.cli.progress import Bars
    from zoo.compare.rundir import Run

    if Run.read(folder).manifest.get("status") == "done":
        print(f"{folder} is done already; delete it to run it again")
        return Outcome(folder, "done")
    devices = config.trainer.devices * config.trainer.nodes
    if devices > 1:
        from zoo.worker import INTERRUPTED, launch

        status = launch(folder, config.trainer.devices, config.trainer.nodes)
        if status == 0:
            return _done(folder)
        if status == INTERRUPTED:
            return Outcome(folder, "interrupted")
        return Outcome(folder, "failed", f"a worker ended with status {status}; its message is above")
    from zoo.train import Interrupted, run

    try:
        with Bars(f"{config.name} seed={config.seed}") as bars:
            run(folder, progress=bars)
        return _done(folder)
    except Interrupted as stop:
        print(f"\ninterrupted at {stop}; the same command goes on from there ({folder})")
        return Outcome(folder, "interrupted")
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
