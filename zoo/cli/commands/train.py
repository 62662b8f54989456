"""zoo train: Hydra composes and sweeps, each job becomes a run directory, and ``zoo.train`` (or a worker a device)
runs it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zoo.cli.experiments import read_experiment, split_first
from zoo.cli.jobs import Outcome, check_offline, outcome_of, prepare_folder, record, run_folder
from zoo.cli.tune import TRIALS, TuneConfig, adopt, checked, choose, trial, trials, tuned
from zoo.errors import ConfigError, RunError, near
from zoo.registry import parse, to_plain
from zoo.run_config import RunConfig, starts
from zoo.survival import REQUEUE, requeue, status_of

USAGE = """usage: zoo train model=NAME [KEY=VALUE ...] [-m]

  model=llava connector=mlp scale=tiny        choose parts by name (zoo list connector)
  encoder.width=96 optimizer.lr=3e-4          set fields (zoo show NAME lists them)
  connector=linear,mlp,qformer seed=0,1 -m    sweep: every combination is a run
  tune=lr3 tune.metric=TASK/METRIC            every variant's best of three learning rates, found on its first seed
  match=parameters match.reference=qformer    connectors at the reference's number of parameters
  experiment=NAME                             settings, and perhaps sweeps, from conf/experiment/NAME.yaml
  stages=joint                                train every part at once, from scratch
  budget.value=500 batch_size=64              how many steps, samples a step
  budget=samples|tokens|flops|seconds         what budget.value counts instead; stages share any of them
  trainer.devices=2 trainer.precision=bf16    how to run; strategy=fsdp divides the weights among the devices
  data=folder data.root=PATH                  your own images and captions
  init=RUN_OR_CHECKPOINT                      start from the weights of another model, as far as it has the same parts
  init="RUN + RUN"                            of several; a later one wins where two have a part
  out=FOLDER                                  where run directories go (default: outputs)

The same command goes on where an interrupted one stopped. --dry-run prints the resolved runs and stops.
zoo compare does the same and writes the report of these runs; zoo sweep --slurm hands them to a cluster."""


def main(argv: Sequence[str]) -> int:
    """Train; returns 0 when all runs are done, 2 when one failed for a reason named in one line, 130 or 75 when
    interrupted (``exit_status``).
    """
    if not argv or "-h" in argv or "--help" in argv:
        print(USAGE)
        return 0
    outcomes = train(argv)
    if len(outcomes) > 1:
        print(f"{sum(o.status == 'done' for o in outcomes)} of {len(outcomes)} runs are done")
        leaderboard([o.folder for o in outcomes if o.status == "done"])
    return exit_status(outcomes)


def exit_status(outcomes: Sequence[Outcome]) -> int:
    """0 when all runs are done, 130 when one was interrupted, 75 when a signal to make room did that, else 2.

    Under Slurm with ``ZOO_REQUEUE=1`` the job is requeued then.
    """
    stopped = [o for o in outcomes if o.status == "interrupted"]
    if stopped:
        status = max(map(status_of, (o.signal for o in stopped)), key=lambda status: status == REQUEUE)
        told = requeue() if status == REQUEUE else None
        if told:
            print(told, file=sys.stderr)
        return status
    return 2 if any(o.status != "done" for o in outcomes) else 0


@dataclass
class Sweep:
    """One sweep of a command, or one run: everything resolved before anything starts.

    Attributes:
        prepared: Overrides as Hydra takes them.
        written: Keys among them that win over the scale.
        multirun: Whether Hydra sweeps.
        out: Folder of the runs.
        configs: Folder -> run.
        tune: The learning-rate search, or None.
        places: Directories of the experiment's first runs.
    """

    prepared: list[str]
    written: list[str]
    multirun: bool
    out: str
    configs: dict[Path, RunConfig]
    tune: TuneConfig | None = None
    places: dict[str, str] = field(default_factory=dict)

    @property
    def tries(self) -> dict[Path, RunConfig]:
        return trials(self.configs.values(), self.tune, self.out) if self.tune else {}

    def run(self) -> list[Outcome]:
        """Trials, then runs; a variant without one good trial is recorded as failed, and the others go on."""
        failures: list[Outcome] = []
        configs = self.configs
        if self.tune:
            for folder, config in self.tries.items():
                prepare_folder(folder, config)
            self._launch([f"++lr_factor={','.join(map(str, self.tune.factors))}"], trying=True)
            if any(outcome_of(folder).status == "interrupted" for folder in self.tries):
                signals = [outcome_of(folder).signal for folder in self.tries]
                return [Outcome(folder, "interrupted", signal=next(filter(None, signals), None)) for folder in configs]
            choose(configs.values(), self.tune, self.out)
            configs = {}
            for folder, config in self.configs.items():
                try:
                    run = tuned(config, self.out)[0]
                except RunError as error:
                    failures.append(record(folder, config, "failed", str(error)))
                    print(f"error: {folder}: {error}", file=sys.stderr)
                else:
                    configs[run.directory(self.out)] = run
        for folder, config in configs.items():
            prepare_folder(folder, config)
        self._launch()
        return [*map(outcome_of, configs), *failures]

    def _launch(self, axes: Sequence[str] = (), trying: bool = False) -> None:
        """Hand the checked jobs to Hydra's launcher, whichever it is; each job reads its own file again and runs it.

        Args:
            axes: Further overrides.
            trying: The jobs are the trials of a learning-rate search; other jobs (further seeds) end at once.
        """
        import hydra
        from hydra.core.hydra_config import HydraConfig
        from omegaconf import DictConfig, OmegaConf

        from zoo.cli.overrides import store_parts, to_run
        from zoo.plugin import conf_dir

        stopped: list[Path] = []
        written, places, tries = self.written, self.places, self.tries if trying else {}
        configs = self.configs  # a launcher may send this function to another process, with what it holds

        def job(config: DictConfig) -> str:
            if stopped:  # Ctrl-C ends the sweep, not only its current job
                return "interrupted"
            plain: Any = OmegaConf.to_container(config)
            out, run = str(plain["out"]), to_run(plain, dict(HydraConfig.get().runtime.choices), written, places)
            tune = to_tune(plain)
            if trying and tune is not None:
                run = trial(run, tune, run.lr_factor)
                folder = run.directory(Path(out) / TRIALS)
                if folder not in tries:
                    return "another seed decides"
            else:
                try:
                    run, found = tuned(run, out) if tune else (run, None)
                except RunError:  # said already
                    return "failed"
                folder = next((place for place, known in configs.items() if known == run), run.directory(out))
                if found:
                    adopt(folder, found, run, out)
            outcome = run_folder(folder, run)
            if outcome.error:
                print(f"error: {outcome.folder}: {outcome.error}", file=sys.stderr)
            if outcome.status == "interrupted":
                stopped.append(outcome.folder)
            return outcome.status

        store_parts()
        before = sys.argv
        multirun = self.multirun or trying
        given = [*self.prepared, *axes, f"hydra.sweep.dir='{self.out}/.hydra'"]
        sys.argv = ["zoo", *given, *(["--multirun"] if multirun else [])]
        try:
            hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="train")(job)()
        finally:
            sys.argv = before


def train(argv: Sequence[str]) -> list[Outcome]:
    """Run one or more jobs, given as on the command line, after the runs that the experiment wants first.

    Returns:
        How each job ended; of the runs that came first only one that was interrupted.

    Raises:
        ZooError: Any job of the command is wrong, found before the first one starts; or a run that came first failed.
    """
    flags = {"-m", "--multirun", "--dry-run"}
    unknown = [a for a in argv if a.startswith("-") and a not in flags]
    if unknown:
        raise ConfigError(f"unknown option {unknown[0]!r}: zoo train takes KEY=VALUE, -m and --dry-run")
    firsts, sweeps = planned([a for a in argv if a not in flags], "-m" in argv or "--multirun" in argv)
    if "--dry-run" in argv:
        show({f: c for sweep in (*firsts.values(), *sweeps) for f, c in {**sweep.tries, **sweep.configs}.items()})
        return []
    if not any(text.startswith("hydra/launcher=") for text in argv):  # a launcher's jobs run on other machines
        from zoo.strategies import check_devices

        for sweep in (*firsts.values(), *sweeps):
            for config in sweep.configs.values():
                check_devices(config.trainer)
    for name, sweep in firsts.items():
        (outcome,) = sweep.run()
        if outcome.status == "interrupted":
            return [outcome]
        if outcome.status != "done":
            raise RunError(f"@{name}, which other runs start from or are judged by, failed: {outcome.error}")
    for sweep in sweeps if firsts else ():
        for config in sweep.configs.values():
            check_offline(config)
    outcomes: list[Outcome] = []
    for sweep in sweeps:
        outcomes += sweep.run()
        if any(o.status == "interrupted" for o in outcomes):
            break
    return outcomes


def planned(overrides: Sequence[str], multirun: bool) -> tuple[dict[str, Sweep], list[Sweep]]:
    """As ``resolved``, every run of it checked as far as that takes no training.

    Raises:
        ZooError: Anything that can be found wrong before the first run starts.
    """
    firsts, sweeps = resolved(overrides, multirun)
    pending = {str(folder) for sweep in firsts.values() for folder in sweep.configs}
    for sweep in (*firsts.values(), *sweeps):
        for config in sweep.configs.values():
            check_offline(config, pending)
    return firsts, sweeps


def resolved(overrides: Sequence[str], multirun: bool) -> tuple[dict[str, Sweep], list[Sweep]]:
    """The experiment's first runs that something names, in its order, and the sweeps of a command.

    Raises:
        ConfigError: As ``resolve``, or a change of a first run that the experiment does not have.
    """
    from zoo.cli.overrides import with_quotes

    typed, changes = split_first(overrides)
    typed = with_quotes(typed)
    experiment = read_experiment(typed)
    for name in changes:
        if name not in experiment.first:
            raise ConfigError(f"first.{name}: the experiment has no first run {name!r}{near(name, experiment.first)}")
    firsts: dict[str, Sweep] = {}
    for name in experiment.first:
        firsts[name] = resolve(with_quotes(experiment.first_command(name, typed, changes)), False, places(firsts))
    commands = experiment.commands(typed)
    found = [resolve(command, multirun or command != typed, places(firsts)) for command in commands]
    used: set[str] = set()
    for sweep in [*found, *reversed(firsts.values())]:  # a first run may name those before it
        if sweep in found or any(str(folder) in used for folder in sweep.configs):
            used |= {text for config in sweep.configs.values() for text in leaned_on(config)}
    return {name: sweep for name, sweep in firsts.items() if any(str(f) in used for f in sweep.configs)}, found


def places(firsts: Mapping[str, Sweep]) -> dict[str, str]:
    """Name -> run directory of first runs."""
    return {name: str(next(iter(sweep.configs))) for name, sweep in firsts.items()}


def leaned_on(config: RunConfig) -> list[str]:
    """Run directories that a run starts from or is judged by."""
    fields = [str(value) for values in config.evaluation.tasks.values() for value in values.values()]
    return [*starts(config.init), *fields]


def resolve(overrides: list[str], multirun: bool, places: Mapping[str, str]) -> Sweep:
    """One sweep with all its jobs.

    Raises:
        ConfigError: Any job is wrong, or several values for one key without ``-m``.
    """
    from zoo.cli.overrides import composed, expand, is_sweep, prepare, to_run, written_keys

    prepared, written = prepare(overrides), written_keys(overrides)
    if is_sweep(overrides) and not multirun:
        raise ConfigError("several values for one key are a sweep: add -m")
    runs: list[RunConfig] = []
    tune, out = None, "outputs"
    for job in expand(prepared) if multirun else [prepared]:
        plain, choices = composed(job)
        config = to_run(plain, choices, written, places)
        tune, out = to_tune(plain), str(plain["out"])
        if tune:
            checked(tune, config)
        runs.append(config)
    return Sweep(prepared, written, multirun, out, in_folders(runs, out), tune, dict(places))


def in_folders(runs: Sequence[RunConfig], out: str) -> dict[Path, RunConfig]:
    """Folder -> run. Runs that differ only in how they are executed (``trainer.devices=1,2``) have one hash, hence one
    folder; in a sweep over that they are runs of their own, told apart by what differs.
    """
    same: dict[Path, list[RunConfig]] = {}
    for run in runs:
        found = same.setdefault(run.directory(out), [])
        if run.trainer not in [other.trainer for other in found]:
            found.append(run)
    configs: dict[Path, RunConfig] = {}
    for folder, found in same.items():
        plain = [to_plain(run.trainer) for run in found]
        differ = [key for key in plain[0] if any(values[key] != plain[0][key] for values in plain)]
        for run, values in zip(found, plain, strict=True):
            told = "".join(f"-{key}={values[key]}".replace("/", "-") for key in differ)
            configs[folder.with_name(folder.name + told)] = run
    return configs


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


def show(configs: dict[Path, RunConfig]) -> None:
    import yaml
    from rich.console import Console
    from rich.markup import escape
    from rich.syntax import Syntax

    from zoo.budget import plan

    for folder, config in configs.items():
        # a name may hold what rich reads as markup: decoder.lora_targets=[q_proj]
        found = plan(config)
        length = f"{sum(found.seconds):.6g} seconds" if found.seconds else f"{found.total} steps"
        Console().print(f"\n[bold]{escape(str(folder))}[/bold]  {length} of {config.batch_size} samples a step")
        Console().print(Syntax(yaml.safe_dump(config.to_plain(), sort_keys=False), "yaml", background_color="default"))
