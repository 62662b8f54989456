"""Trackers: the lines of curve.jsonl and the metrics of a run in TensorBoard, Weights & Biases or MLflow as well.

The run directory stays the record: nothing of the zoo reads a tracker, and of one that fails (no network, no space) it
is said once, and training goes on without.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.errors import MissingExtra, near
from zoo.part import PartConfig

NAMES = ("none", "tensorboard", "wandb", "mlflow")
MODES = ("online", "offline")
MODULES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
"""Tracker -> its module; TensorBoard comes with mmzoo, the others by the extra of their name."""

AXES = frozenset({"step", "stage"})
"""Keys of a line that are no curves."""

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class TrackingConfig(PartConfig):
    """Where a run can be watched; no result depends on it, nor does the name of the run directory.

    Attributes:
        name: ``none``, ``tensorboard`` (RUN/tensorboard), ``wandb`` or ``mlflow``.
        project: W&B's project, MLflow's experiment.
        mode: of W&B: ``offline`` writes RUN/wandb, for ``wandb sync`` later.
        uri: of MLflow: the tracking server; empty = MLflow's own choice (``MLFLOW_TRACKING_URI``).
    """

    name: str = "tensorboard"
    project: str = "zoo"
    mode: str = "online"
    uri: str = ""

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"name = {self.name!r}{near(self.name, NAMES)}")
        if self.mode not in MODES:
            raise ValueError(f"mode = {self.mode!r}{near(self.mode, MODES)}")
        if not self.project:
            raise ValueError("project must not be empty")

    def check_installed(self) -> None:
        """Raises MissingExtra where the tracker's package is not there; to be asked before any work begins."""
        from importlib.util import find_spec

        module = MODULES.get(self.name)
        if module is not None and find_spec(module) is None:
            raise MissingExtra(module, None if self.name == "tensorboard" else self.name, f"tracking={self.name}")


@dataclass(frozen=True)
class Tracked:
    """What a tracker is told of a run: ``name`` over all seeds, ``seed``, the run directory, and run.yaml's content."""

    name: str
    seed: int
    folder: Path
    plain: Mapping[str, Any]

    @property
    def title(self) -> str:
        return f"{self.name} seed {self.seed}"


class Tracker:
    """The base, which does nothing: ``tracking=none``."""

    def resume(self, step: int) -> None:
        """Training goes on behind this step; called before the first ``log``, with 0 in a new run."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Curves at an optimizer step, counted over all stages."""

    def result(self, metrics: Mapping[str, float]) -> None:
        """Metrics of the finished run, ``task/metric`` -> value."""

    def close(self, status: str) -> None:
        """The run has ended: ``done``, ``failed`` or ``interrupted``."""


class TensorBoard(Tracker):
    """Event files in RUN/tensorboard; ``tensorboard --logdir outputs`` shows all runs."""

    def __init__(self, run: Tracked) -> None:
        self.folder = str(run.folder / "tensorboard")
        self.writer = self._open(None)

    def _open(self, purge_step: int | None) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(self.folder, purge_step=purge_step)

    def resume(self, step: int) -> None:
        if step:  # what was logged past it, before a kill, counts no more
            self.writer.close()
            self.writer = self._open(step + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self.writer.add_scalar(f"train/{key}", value, step)

    def result(self, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            self.writer.add_scalar(f"test/{key}", value)

    def close(self, status: str) -> None:
        self.writer.close()


class WandB(Tracker):
    """A run of Weights & Biases; an interrupted one goes on as the same run."""

    def __init__(self, run: Tracked, config: TrackingConfig) -> None:
        import hashlib

        import wandb

        mode: Any = config.mode
        self.run: Any = wandb.init(
            project=config.project,
            name=run.title,
            group=run.name[:128],
            id=hashlib.sha256(f"{run.name}/{run.folder.name}".encode()).hexdigest()[:16],
            resume="allow",
            mode=mode,
            dir=str(run.folder),
            config=dict(run.plain),
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log({f"train/{key}": value for key, value in values.items()}, step=step)

    def result(self, metrics: Mapping[str, float]) -> None:
        self.run.summary.update({f"test/{key}": value for key, value in metrics.items()})

    def close(self, status: str) -> None:
        self.run.finish(exit_code=0 if status == "done" else 1)


class MLflow(Tracker):
    """A run of an MLflow experiment; an interrupted one is found again by the tag ``zoo.run``."""

    def __init__(self, run: Tracked, config: TrackingConfig) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric

        self._metric = Metric
        self.client: Any = MlflowClient(tracking_uri=config.uri or None)
        found = self.client.get_experiment_by_name(config.project)
        experiment = found.experiment_id if found else self.client.create_experiment(config.project)
        tag = f"{run.name}/{run.folder.name}"
        before = self.client.search_runs([experiment], f"tags.`zoo.run` = '{_quoted(tag)}'", max_results=1)
        if before:
            self.id = before[0].info.run_id
            self.client.update_run(self.id, status="RUNNING")
            return
        made = self.client.create_run(experiment, run_name=run.title[:250], tags={"zoo.run": _quoted(tag)})
        self.id = made.info.run_id
        for key, value in _flat(run.plain).items():
            self.client.log_param(self.id, key[:250], str(value)[:500])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._batch({f"train/{key}": value for key, value in values.items()}, step)

    def result(self, metrics: Mapping[str, float]) -> None:
        self._batch({f"test/{key}": value for key, value in metrics.items()}, 0)

    def close(self, status: str) -> None:
        names = {"done": "FINISHED", "interrupted": "KILLED"}
        self.client.set_terminated(self.id, names.get(status, "FAILED"))

    def _batch(self, values: Mapping[str, float], step: int) -> None:
        import time

        now = int(1000 * time.time())
        self.client.log_batch(self.id, [self._metric(key, value, now, step) for key, value in values.items()])


class Guarded(Tracker):
    """A tracker whose failures are said once and end it, not the run."""

    def __init__(self, tracker: Tracker, say: Say) -> None:
        self.tracker: Tracker | None = tracker
        self.say = say

    def resume(self, step: int) -> None:
        self._try(lambda tracker: tracker.resume(step))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        numbers = {k: float(v) for k, v in values.items() if k not in AXES and _is_number(v)}
        self._try(lambda tracker: tracker.log(step, numbers))

    def result(self, metrics: Mapping[str, float]) -> None:
        self._try(lambda tracker: tracker.result(metrics))

    def close(self, status: str) -> None:
        self._try(lambda tracker: tracker.close(status))

    def _try(self, call: Callable[[Tracker], None]) -> None:
        if self.tracker is None:
            return
        try:
            call(self.tracker)
        except Exception as error:  # of a foreign library, its network or its disk
            name, self.tracker = type(self.tracker).__name__, None
            self.say(
                f"{name} is left out from here on ({' '.join(str(error).split())[:200]}); curve.jsonl has everything"
            )


def open_tracker(config: TrackingConfig, run: Tracked, say: Say = print) -> Tracker:
    """Begin tracking a run; where that fails, say so and go on without."""
    if config.name == "none":
        return Tracker()
    kinds: dict[str, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoard(run),
        "wandb": lambda: WandB(run, config),
        "mlflow": lambda: MLflow(run, config),
    }
    try:
        return Guarded(kinds[config.name](), say)
    except Exception as error:  # no network, no account, no space
        say(f"tracking={config.name} cannot begin ({' '.join(str(error).split())[:200]}); curve.jsonl has everything")
        return Tracker()


def flat_metrics(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """``{task: {metric: value}}`` as ``{"task/metric": value}``, numbers only."""
    return {
        f"{task}/{name}": float(value)
        for task, values in metrics.items()
        for name, value in values.items()
        if _is_number(value)
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _quoted(text: str) -> str:
    return text.replace("'", "").replace('"', "")


def _flat(plain: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in plain.items():
        if isinstance(value, Mapping):
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out
