"""zoo sweep: every run of a sweep, here or, with --slurm, as one job array of a cluster that this shell may leave."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import sleep, strftime
from typing import TYPE_CHECKING, Any

from zoo.errors import ConfigError, RunError, near

if TYPE_CHECKING:
    from zoo.cli.commands.train import Sweep
    from zoo.cluster.script import Options
    from zoo.cluster.sweep import Job, SlurmSweep
    from zoo.run_config import RunConfig

USAGE = """usage: zoo sweep KEY=VALUE ... [--slurm [OPTIONS]]
       zoo sweep --status [NAME ...] [out=FOLDER]
       zoo sweep --wait [NAME ...] [out=FOLDER]

  zoo sweep model=clip,albef seed=0,1,2 scale=small                  here, one after the other, as zoo train -m
  zoo sweep experiment=understanding --slurm --partition gpu --time 8:00:00
  zoo sweep experiment=understanding --slurm --dry-run               the script, the sbatch commands, the runs

  --slurm              submit one job array: a run is a task; the shell may be closed
  --partition P        as sbatch takes it, and so --time T and --mem M (of a node); a run that needs longer than T
                       writes a checkpoint before and goes on in the same task
  --gpus N             GPUs a node (default: trainer.devices where trainer.accelerator=gpu)
  --cpus N             CPU cores a node (default: one a device and one a data worker)
  --array-parallel K   at most K tasks at once
  --grace SECONDS      how long before the time limit a run is told to stop (120)
  --sbatch OPTION      any other option of sbatch, as --sbatch=--account=abc; may be repeated
  --name NAME          of the record, OUT/.slurm/NAME (default: the experiment or models, and a hash of the runs)
  --dry-run            print what would be submitted and stop
  --wait               after submitting, or alone, wait until nothing of the sweep is queued or running
  --status             where every run stands

All that is wrong with any run is said before anything is submitted. The same command again says what failed and why,
and submits only what is missing: not done, not queued, not running. Runs that come first (those of an experiment) are
tasks that others wait for. Of a learning-rate search (tune=...) the trials are submitted, and the runs when the command
is given again behind them; with --wait by itself. Settings are those of zoo train."""

VALUED = (
    "--partition",
    "--time",
    "--mem",
    "--gpus",
    "--cpus",
    "--array-parallel",
    "--grace",
    "--sbatch",
    "--name",
)
FLAGS = ("--slurm", "--dry-run", "--wait", "--status", "-m", "--multirun")

POLL = 15.0
"""Seconds between two looks at the queue."""


def main(argv: Sequence[str]) -> int:
    """Returns 0 when all was submitted or, with --wait or without --slurm, when all runs are done; 2 when one failed,
    130 when interrupted.
    """
    if not argv or "-h" in argv or "--help" in argv:
        print(USAGE)
        return 0
    settings, flags, values = split_options(argv)
    if "--status" not in flags and "--slurm" in flags:
        return on_slurm(settings, flags, values, argv)
    if values:
        raise ConfigError(f"{next(iter(values))} goes with submitting: zoo sweep KEY=VALUE ... --slurm")
    if {"--status", "--wait"} & flags:
        return asked(settings, flags)
    from zoo.cli.commands.train import main as train

    return train([*settings, "-m", *(["--dry-run"] if "--dry-run" in flags else [])])


def on_slurm(settings: Sequence[str], flags: set[str], values: Mapping[str, Sequence[str]], argv: Sequence[str]) -> int:
    """Submit what is missing, and with --wait stay until it is over."""
    sweep, trying = submitted(settings, flags, values, argv)
    if "--dry-run" in flags or "--wait" not in flags:
        return 0
    while trying:
        wait([sweep])
        sweep, trying = submitted(settings, flags, values, argv)
    wait([sweep])
    return show([sweep])


def asked(texts: Sequence[str], flags: set[str]) -> int:
    """--status and --wait of sweeps that were submitted."""
    names = [text for text in texts if not text.startswith("out=")]
    for text in names:
        if "=" in text:
            raise ConfigError(f"{text}: --status, and --wait without --slurm, take names of sweeps and out=FOLDER")
    sweeps = recorded(names, Path(next((text[4:] for text in texts if text.startswith("out=")), "outputs")))
    if "--wait" in flags:
        wait(sweeps)
    status = show(sweeps)
    return status if "--wait" in flags else 0


def split_options(argv: Sequence[str]) -> tuple[list[str], set[str], dict[str, list[str]]]:
    """Tell settings from flags and from options with values.

    Raises:
        ConfigError: An unknown option, or one without its value.
    """
    settings: list[str] = []
    flags: set[str] = set()
    values: dict[str, list[str]] = {}
    texts = iter(argv)
    for text in texts:
        name, equals, value = text.partition("=")
        if text in FLAGS:
            flags.add(text)
        elif name in VALUED:
            value = value if equals else next(texts, "")
            if not value:
                raise ConfigError(f"{name} needs a value")
            if name in values and name != "--sbatch":
                raise ConfigError(f"{name} is given twice")
            values.setdefault(name, []).append(value)
        elif text.startswith("-"):
            raise ConfigError(f"unknown option {text!r}{near(name, (*FLAGS, *VALUED))}")
        else:
            settings.append(text)
    return settings, flags, values


def options(values: Mapping[str, Sequence[str]]) -> Options:
    """What the command says of the jobs.

    Raises:
        ConfigError: A count that is none.
    """
    from zoo.cluster.script import Options

    def count(name: str, least: int) -> int | None:
        if name not in values:
            return None
        text = values[name][0]
        if not text.isdigit() or int(text) < least:
            raise ConfigError(f"{name} {text}: expected a whole number of {least} or more")
        return int(text)

    for text in values.get("--sbatch", ()):
        if not text.startswith("-"):
            raise ConfigError(f"--sbatch {text}: expected an option of sbatch, as --sbatch=--account=abc")
    grace = count("--grace", 1)
    return Options(
        partition=values.get("--partition", [""])[0],
        time=values.get("--time", [""])[0],
        mem=values.get("--mem", [""])[0],
        gpus=count("--gpus", 0),
        cpus=count("--cpus", 1),
        parallel=count("--array-parallel", 1) or 0,
        grace=120 if grace is None else grace,
        further=tuple(values.get("--sbatch", ())),
    )


def submitted(
    settings: Sequence[str], flags: set[str], values: Mapping[str, Sequence[str]], argv: Sequence[str]
) -> tuple[SlurmSweep, bool]:
    """Resolve the whole sweep, then submit what is missing of it, or show that (--dry-run).

    Returns:
        The sweep, and whether these are the trials of a learning-rate search, behind which the runs come.

    Raises:
        ZooError: Any run is wrong, Slurm is not there, does not answer or refuses.
    """
    from zoo.cli.commands.train import planned
    from zoo.cli.jobs import prepare_folder
    from zoo.cli.tune import adopt
    from zoo.cluster.script import script, submissions
    from zoo.cluster.slurm import check_slurm, submit
    from zoo.cluster.sweep import on_their_way, refresh, run_state, sweeps_of

    chosen, dry = options(values), "--dry-run" in flags
    if not dry:
        check_slurm()  # the cheapest reason to refuse comes first
    firsts, sweeps = planned(settings, multirun=True)
    out = Path(sweeps[0].out)
    before = {folder: config for sweep in firsts.values() for folder, config in sweep.configs.items()}
    trying = any(not over(sweep.tries) for sweep in sweeps)
    configs, rates = (trials_of(sweeps), {}) if trying else runs_of(sweeps, dry)
    sweep = record_of(before, configs, out, chosen, values, argv)
    if sweep.path.is_file():
        sweep = continued(sweep)
    if dry:
        print(script(sweep, chosen))
        jobs = [job for job in sweep.jobs if run_state(Path(job.directory))[0] != "done"]
        for part in submissions(jobs, chosen):
            print(shlex.join(part.command(sweep, {job.index: f"ID_{job.index}" for job in jobs})))
        for job in jobs:
            print(f"{job.index:>4}  {job.directory}")
        return sweep, trying
    warn_of_local(out)
    others = [other for other in sweeps_of(out) if other.folder.resolve() != sweep.folder.resolve()]
    queued = refresh([sweep, *others])
    taken = on_their_way(others)
    for job in sweep.jobs:
        if job.missing and (task := taken.get(Path(job.directory).resolve())):
            job.state, job.note = "queued", f"by another sweep, as {task}"
    missing = [job for job in sweep.jobs if job.missing]
    for job in missing:
        if job.state in ("failed", "interrupted"):
            print(f"{job.state}: {job.directory}" + (f": {job.note}" if job.note else ""))
    counts = {state: sum(job.state == state for job in sweep.jobs) for state in ("done", "running", "queued")}
    already = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    what = "trials of the learning-rate search" if trying else "runs"
    if not missing:
        print(f"nothing to submit of {len(sweep.jobs)} {what}: {already}")
        return sweep, trying
    for job in missing:
        folder = Path(job.directory)
        config = {**before, **configs}[folder]
        prepare_folder(folder, config)
        if folder in rates:
            adopt(folder, rates[folder], config, out)
    tasks = {task.index: task.task for task in queued[sweep.job_name]}
    sweep.script.write_text(script(sweep, chosen), encoding="utf-8")
    for part in submissions(missing, chosen):
        array = submit(part.command(sweep, tasks))
        for job in part.jobs:
            job.task, job.state, job.note = f"{array}_{job.index}", "queued", ""
            tasks[job.index] = job.task
        sweep.write()  # at once: what is submitted is known whatever happens to this process
        print(f"submitted {array}: {counted(len(part.jobs))}{' that come first' if is_first(part.jobs, sweep) else ''}")
    print(f"{len(missing)} of {len(sweep.jobs)} {what} submitted" + (f" ({already})" if already else ""))
    if trying and "--wait" not in flags:
        print("give the same command again when they are over: it submits the runs at the rates that were best")
    print(f"zoo sweep --status {sweep.folder.name} out={out}")
    return sweep, trying


def over(tries: Mapping[Path, RunConfig]) -> bool:
    """Whether a learning-rate search has come to its end; a trial that failed counts, as it does in zoo train."""
    from zoo.cluster.sweep import run_state

    return all(run_state(folder)[0] in ("done", "failed") for folder in tries)


def trials_of(sweeps: Sequence[Sweep]) -> dict[Path, RunConfig]:
    return {folder: config for sweep in sweeps for folder, config in sweep.tries.items()}


def runs_of(sweeps: Sequence[Sweep], dry: bool) -> tuple[dict[Path, RunConfig], dict[Path, Mapping[str, Any]]]:
    """Folder -> run, at the learning rates that trials found, and folder -> what was found; a variant without one good
    trial is recorded as failed.
    """
    from zoo.cli.jobs import record
    from zoo.cli.tune import choose, tuned

    found: dict[Path, RunConfig] = {}
    rates: dict[Path, Mapping[str, Any]] = {}
    for sweep in sweeps:
        if sweep.tune is None:
            found |= sweep.configs
            continue
        choose(sweep.configs.values(), sweep.tune, sweep.out)
        for folder, config in sweep.configs.items():
            try:
                run, rate = tuned(config, sweep.out)
            except RunError as error:
                print(f"error: {folder}: {error}", file=sys.stderr)
                if not dry:
                    record(folder, config, "failed", str(error))
            else:
                found[run.directory(sweep.out)] = run
                rates[run.directory(sweep.out)] = rate
    return found, rates


def record_of(
    before: Mapping[Path, RunConfig],
    configs: Mapping[Path, RunConfig],
    out: Path,
    chosen: Options,
    values: Mapping[str, Sequence[str]],
    argv: Sequence[str],
) -> SlurmSweep:
    """The record of a sweep nothing of which was submitted.

    Args:
        before: Runs that come first.
        configs: The others.

    Raises:
        ConfigError: A --name that is no folder's.
    """
    from zoo.cli.tune import TRIALS
    from zoo.cluster.sweep import HOME, SlurmSweep
    from zoo.run_config import digest

    places: dict[str, int] = {}
    jobs: list[Job] = []
    for folder, config in {**before, **configs}.items():
        jobs.append(job_of(len(jobs), folder, config, places, chosen))
        if folder in before:
            places[str(folder)] = jobs[-1].index
    name = values.get("--name", [""])[0]
    if "/" in name or name.startswith("."):
        raise ConfigError(f"--name {name}: expected the name of a folder, without / and not beginning with a dot")
    if not name:
        texts = [t.partition("=")[2] for t in argv if t.partition("=")[0] in ("experiment", "model")]
        label = "".join(c if c.isalnum() or c in "-_." else "+" for c in (texts[0] if texts else "sweep"))[:60]
        name = f"{label}-{digest(sorted(job.directory for job in jobs))[:8]}"
    if any(TRIALS in folder.parts for folder in configs):
        name += "-trials"
    return SlurmSweep(out / HOME / name, shlex.join(["zoo", "sweep", *argv]), str(Path.cwd()), jobs)


def job_of(index: int, folder: Path, config: RunConfig, places: Mapping[str, int], chosen: Options) -> Job:
    """A run as a task of the array, with what it needs of a node."""
    from zoo.cli.commands.train import leaned_on
    from zoo.cluster.sweep import Job

    trainer = config.trainer
    gpus = trainer.devices if trainer.accelerator == "gpu" else 0
    return Job(
        index,
        str(folder),
        nodes=trainer.nodes,
        cpus=trainer.devices * (1 + trainer.workers) if chosen.cpus is None else chosen.cpus,
        gpus=gpus if chosen.gpus is None else chosen.gpus,
        after=sorted({places[text] for text in leaned_on(config) if text in places}),
    )


def continued(sweep: SlurmSweep) -> SlurmSweep:
    """The same sweep with what its record knows of earlier submissions.

    Raises:
        RunError: The record is that of another sweep.
    """
    from zoo.cluster.sweep import SlurmSweep

    before = SlurmSweep.read(sweep.folder)
    if before.cwd != sweep.cwd or [job.directory for job in before.jobs] != [job.directory for job in sweep.jobs]:
        raise RunError(
            f"{sweep.path} is the record of another sweep ({before.command}, in {before.cwd}): choose another --name"
        )
    for job, known in zip(sweep.jobs, before.jobs, strict=True):
        job.task, job.state, job.note = known.task, known.state, known.note
    return sweep


def recorded(names: Sequence[str], out: Path) -> list[SlurmSweep]:
    """Sweeps by name, all where there is no name, with their jobs as they stand.

    Raises:
        RunError: A name that no record has, or no record at all.
    """
    from zoo.cluster.sweep import HOME, refresh, sweeps_of

    found = {sweep.folder.name: sweep for sweep in sweeps_of(out)}
    if not found:
        raise RunError(f"no sweep was submitted with out={out}: {out / HOME} holds none")
    for name in names:
        if name not in found:
            raise RunError(f"no sweep {name!r} in {out / HOME}{near(name, found)}")
    chosen = [found[name] for name in names] or list(found.values())
    refresh(chosen)
    return chosen


def wait(sweeps: Sequence[SlurmSweep]) -> None:
    """Return when nothing is queued or running; a line tells of every change."""
    from zoo.cluster.sweep import refresh

    said = ""
    while True:
        refresh(sweeps)
        jobs = [job for sweep in sweeps for job in sweep.jobs]
        states = sorted({job.state for job in jobs})
        line = ", ".join(f"{sum(job.state == state for job in jobs)} {state}" for state in states)
        if line != said:
            print(f"{strftime('%H:%M:%S')}  {line}", flush=True)
            said = line
        if not any(job.state in ("queued", "running") for job in jobs):
            return
        sleep(POLL)


def show(sweeps: Sequence[SlurmSweep]) -> int:
    """Where every run stands, and why, in lines that a terminal may wrap: folders can be copied.

    Returns:
        0 when all runs are done, else 2.
    """
    for sweep in sweeps:
        print(sweep.command)
        width = max(len(job.task) for job in sweep.jobs)
        for job in sweep.jobs:
            print(f"{job.index:>4}  {job.task:<{width}}  {job.state:<13}  {job.directory}")
            if job.note:
                print(f"      {job.note}")
        done = sum(job.state == "done" for job in sweep.jobs)
        print(f"{sweep.folder.name}: {done} of {len(sweep.jobs)} runs are done")
    return 2 if any(job.state != "done" for sweep in sweeps for job in sweep.jobs) else 0


def warn_of_local(out: Path) -> None:
    """Say so when other nodes will hardly see the folder of the runs."""
    from tempfile import gettempdir

    local = {Path(folder).resolve() for folder in (gettempdir(), "/tmp", "/var/tmp", "/dev/shm")}
    here = out.resolve()
    held = next((folder for folder in sorted(local) if here == folder or folder in here.parents), None)
    if held is not None:
        print(
            f"warning: {out} lies in {held}, which is every node's own as a rule: tasks on other nodes will not find"
            " their runs; choose out=FOLDER on a disk that all nodes share",
            file=sys.stderr,
        )


def counted(runs: int) -> str:
    return "1 run" if runs == 1 else f"{runs} runs"


def is_first(jobs: Sequence[Job], sweep: SlurmSweep) -> bool:
    """Whether others wait for these."""
    return any(job.index in other.after for job in jobs for other in sweep.jobs)
