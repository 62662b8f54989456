"""Equal learning-rate search: every variant of a sweep tries the same factors on one seed, on validation data, and all
its seeds then train with its own best; what was tried is kept beside the runs."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zoo.errors import ConfigError, RunError, near
from zoo.part import PartConfig
from zoo.run_config import EvaluationConfig, RunConfig, digest

TRIALS = ".tune"
"""Folder of the trials inside the folder of the runs; reports do not look into it."""


@dataclass(frozen=True, kw_only=True)
class TuneConfig(PartConfig):
    """The search.

    Attributes:
        factors: What every learning rate of the recipe is multiplied by; the same for all variants.
        metric: ``TASK/METRIC`` that decides, one of the run's tasks.
        split: Where it is measured.
    """

    metric: str
    factors: list[float] = field(default_factory=lambda: [1 / 3, 1.0, 3.0])
    split: str = "val"

    def __post_init__(self) -> None:
        if len(self.factors) < 2 or len(set(self.factors)) != len(self.factors) or min(self.factors) <= 0:
            raise ValueError(f"factors = {self.factors} must be two or more different numbers above 0")
        if self.metric.count("/") != 1:
            raise ValueError(f"metric = {self.metric!r} must be TASK/METRIC")


def checked(tune: TuneConfig, config: RunConfig) -> None:
    """Refuse a search that the run's tasks cannot decide.

    Raises:
        ConfigError: The task is not among the run's, the metric not among the task's, or the test split would decide.
    """
    from zoo.evaluation.task import task_metrics

    if config.lr_factor != 1:
        raise ConfigError(f"lr_factor = {config.lr_factor} and tune exclude each other: tune chooses it")
    task, metric = tune.metric.split("/")
    tasks = config.evaluation.tasks
    if task not in tasks:
        raise ConfigError(f"tune.metric = {tune.metric!r}: the run has no task {task!r}{near(task, tasks)}")
    known = task_metrics(task)
    if metric not in known:
        raise ConfigError(f"tune.metric = {tune.metric!r}: task {task!r} has no metric {metric!r}{near(metric, known)}")
    if tune.split == config.evaluation.split:
        raise ConfigError(
            f"tune.split = {tune.split!r} is what the runs are evaluated on: a learning rate chosen there flatters"
            " them; choose another"
        )


def variant(config: RunConfig) -> str:
    """What runs that differ in seed and learning-rate factor share: 16 hex digits."""
    plain = dataclasses.replace(config, seed=0, lr_factor=1.0).to_plain()
    plain["recipe"].pop("changed")
    return digest(plain)[:16]


def trial(config: RunConfig, tune: TuneConfig, factor: float) -> RunConfig:
    """The run that tries ``factor`` for ``config``'s variant, evaluated by the deciding task alone."""
    task = tune.metric.split("/")[0]
    evaluation = EvaluationConfig(split=tune.split, tasks={task: config.evaluation.tasks[task]})
    return dataclasses.replace(config, lr_factor=factor, evaluation=evaluation)


def trials(configs: Iterable[RunConfig], tune: TuneConfig, out: str | Path) -> dict[Path, RunConfig]:
    """Folder -> run of every trial: the first seed of each variant, every factor."""
    first: dict[str, RunConfig] = {}
    for config in configs:
        first.setdefault(variant(config), config)
    runs = [trial(config, tune, factor) for config in first.values() for factor in tune.factors]
    return {run.directory(Path(out) / TRIALS): run for run in runs}


def choose(configs: Iterable[RunConfig], tune: TuneConfig, out: str | Path) -> dict[str, dict[str, Any]]:
    """Read the trials; variant -> what was tried and ``factor``, the best, written to ``OUT/.tune/VARIANT.json``.

    A trial that failed, or whose metric is not a finite number, is left out; a variant none of whose trials gave a
    number has ``error`` in place of a factor. Weights of the trials that were not chosen are deleted: with a frozen
    language model they are most of what a sweep writes, and nothing reads them.
    """
    from zoo.compare.rundir import Run
    from zoo.evaluation.task import task_metrics

    task, metric = tune.metric.split("/")
    better = max if task_metrics(task)[metric].higher_is_better else min
    found: dict[str, dict[str, Any]] = {}
    for config in configs:
        key = variant(config)
        if key in found:
            continue
        values: dict[float, float] = {}
        folders: dict[float, str] = {}
        for factor in tune.factors:
            folder = trial(config, tune, factor).directory(Path(out) / TRIALS)
            value = Run.read(folder).metrics.get(task, {}).get(metric)
            if value is not None and math.isfinite(value):
                values[factor], folders[factor] = value, str(folder.relative_to(out))
        found[key] = {
            "name": config.name,
            "metric": tune.metric,
            "split": tune.split,
            "seed": config.seed,
            "tried": {f"{f:.4g}": value for f, value in values.items()},
        }
        if values:
            factor = better(values, key=lambda f: values[f])
            found[key] |= {
                "factor": factor,
                "at_edge": factor in (min(tune.factors), max(tune.factors)),
                "trial": folders[factor],
            }
            for other in set(folders.values()) - {folders[factor]}:
                for kind in ("checkpoint", "weights"):
                    shutil.rmtree(Path(out) / other / kind, ignore_errors=True)
        else:
            found[key]["error"] = (
                f"no trial of {config.name} gave {tune.metric}{reasons(config, tune, out)}: see the folders in"
                f" {Path(out) / TRIALS}, and leave out tune or choose a metric this model has"
            )
        (Path(out) / TRIALS / f"{key}.json").write_text(json.dumps(found[key], indent=1), encoding="utf-8")
    return found


def reasons(config: RunConfig, tune: TuneConfig, out: str | Path) -> str:
    """Why trials failed, each reason once."""
    from zoo.compare.rundir import Run

    folders = [trial(config, tune, factor).directory(Path(out) / TRIALS) for factor in tune.factors]
    errors = dict.fromkeys(str(error) for folder in folders if (error := Run.read(folder).manifest.get("error")))
    return f" ({'; '.join(errors)})" if errors else ""


def tuned(config: RunConfig, out: str | Path) -> tuple[RunConfig, Mapping[str, Any]]:
    """The run with its variant's factor, and what ``choose`` wrote of it.

    Raises:
        RunError: The variant was not tried, or no trial of it gave a number.
    """
    path = Path(out) / TRIALS / f"{variant(config)}.json"
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {path}, what was tuned for {config.name}: give the command again") from error
    if "factor" not in record:
        raise RunError(str(record["error"]))
    return dataclasses.replace(config, lr_factor=record["factor"]), record


def adopt(folder: Path, record: Mapping[str, Any], config: RunConfig, out: str | Path) -> None:
    """Start a run of the trial's own seed from the trial's end, so that it is only evaluated: training was the same.

    The tuning's record is written into every run's folder as ``tuning.json``.
    """
    from zoo.checkpoint_storage import found
    from zoo.compare.rundir import Run

    if Run.read(folder).status == "done":
        return
    (folder / "tuning.json").write_text(json.dumps(dict(record), indent=1), encoding="utf-8")
    source = Path(out) / record["trial"]
    ends = found(source / "checkpoint")
    if config.seed != record["seed"] or found(folder / "checkpoint") or not ends:
        return
    end = folder / "checkpoint" / ends[0].name
    end.parent.mkdir(parents=True, exist_ok=True)
    if (source / "curve.jsonl").is_file():
        shutil.copyfile(source / "curve.jsonl", folder / "curve.jsonl")
    partial = end.with_name(end.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(ends[0], partial)
    partial.rename(end)
