"""Trackers see what curve.jsonl and metrics.json hold, and cannot harm a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from zoo.cli import main
from zoo.cli.overrides import run_config
from zoo.curve import read_lines
from zoo.errors import ConfigError, MissingExtra
from zoo.resuming import Keeper
from zoo.run_config import RunConfig
from zoo.survival import Interrupted
from zoo.tracking import (
    Guarded,
    MLflow,
    Tracked,
    Tracker,
    TrackingConfig,
    WandB,
    flat_metrics,
    open_tracker,
)
from zoo.train import run

SMALL = [
    "model=clip", "scale=tiny", "batch_size=8", "encoder.width=32", "encoder.depth=1", "encoder.ffn=64",
    "text_encoder.width=32", "text_encoder.depth=1", "text_encoder.ffn=64", "trainer.accelerator=cpu",
    "trainer.log_every=1", "trainer.checkpoint_every=2", "budget.value=6", "evaluation.split=val",
    "evaluation.tasks={retrieval: {items: 20}}",
]  # fmt: skip


def prepared(folder: Path, *overrides: str) -> RunConfig:
    folder.mkdir(parents=True)
    config = run_config([*SMALL, *overrides])
    config.write(folder / "run.yaml")
    return config


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / "tensorboard"))
    read.Reload()
    return {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


class Recorder(Tracker):
    """Remembers what it is told; fails at the third line if asked to."""

    def __init__(self, fails: bool = False) -> None:
        self.lines: list[tuple[int, Mapping[str, float]]] = []
        self.metrics: dict[str, float] = {}
        self.status = ""
        self.fails = fails

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if self.fails and len(self.lines) == 2:
            raise OSError("no space left\non device")
        self.lines.append((step, values))

    def result(self, metrics: Mapping[str, float]) -> None:
        self.metrics = dict(metrics)

    def close(self, status: str) -> None:
        self.status = status


def test_tensorboard_has_the_curve_and_the_metrics_also_after_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    prepared(folder)
    kept = Keeper.on_train_batch_end

    def stop(self: Keeper, trainer: Any, *rest: Any) -> None:
        kept(self, trainer, *rest)
        if trainer.global_step == 5:
            raise Interrupted("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(Keeper, "on_train_batch_end", stop)
        with pytest.raises(Interrupted):
            run(folder, say=lambda text: None)
    run(folder, say=lambda text: None)
    lines = read_lines(folder / "curve.jsonl")
    found = events(folder)
    assert [step for step, _ in found["train/loss"]] == [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [value for _, value in found["train/loss"]] == pytest.approx([line["loss"] for line in lines], rel=1e-5)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert found["test/retrieval/i2t_r1"][0][1] == pytest.approx(metrics["retrieval"]["i2t_r1"])


def test_no_result_depends_on_tracking() -> None:
    names = [
        run_config([*SMALL, *more]).directory("out") for more in ([], ["tracking=none"], ["tracking=wandb-offline"])
    ]
    assert len(set(names)) == 1
    old = run_config(SMALL).to_plain()
    old.pop("tracking")  # run.yaml of before there were trackers
    assert RunConfig.from_plain(old).tracking.name == "none"
    assert run_config(SMALL).tracking.name == "tensorboard"


def test_none_writes_nothing(tmp_path: Path) -> None:
    prepared(tmp_path / "run", "tracking=none", "budget.value=1", "evaluation.tasks={}")
    run(tmp_path / "run", say=lambda text: None)
    assert not (tmp_path / "run" / "tensorboard").exists()
    assert len(read_lines(tmp_path / "run" / "curve.jsonl")) == 1


def test_a_tracker_that_fails_is_said_once_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    broken = Recorder(fails=True)
    monkeypatch.setattr("zoo.train.open_tracker", lambda config, told, say: Guarded(broken, said.append))
    prepared(tmp_path / "run")
    assert run(tmp_path / "run", say=lambda text: None)["status"] == "done"
    assert [step for step, _ in broken.lines] == [1, 2]
    assert broken.status == ""
    assert said == ["Recorder is left out from here on (no space left on device); curve.jsonl has everything"]


def test_what_a_tracker_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = Recorder()
    monkeypatch.setattr("zoo.train.open_tracker", lambda config, told, say: Guarded(heard, say))
    prepared(tmp_path / "run", "budget.value=2")
    run(tmp_path / "run", say=lambda text: None)
    assert set(heard.lines[0][1]) >= {"loss", "lr", "samples", "seconds", "tokens"}
    assert not {"step", "stage"} & set(heard.lines[0][1])
    assert heard.metrics == flat_metrics(json.loads((tmp_path / "run" / "metrics.json").read_text()))
    assert heard.status == "done"


def told(folder: Path) -> Tracked:
    return Tracked("clip+x=1", 3, folder, {"recipe": {"model": "clip"}, "seed": 3})


def test_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="needs the extra wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    tracker = open_tracker(TrackingConfig(name="wandb", mode="offline"), told(tmp_path))
    assert isinstance(tracker, Guarded)
    assert isinstance(tracker.tracker, WandB)
    for step in (1, 2):
        tracker.log(step, {"step": step, "loss": 1.0 / step, "stage": "x"})  # type: ignore[dict-item]
    tracker.result({"retrieval/i2t_r1": 0.5})
    assert tracker.tracker.run.summary["test/retrieval/i2t_r1"] == 0.5
    assert tracker.tracker.run.name == "clip+x=1 seed 3"
    tracker.close("done")
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="needs the extra mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    config = TrackingConfig(name="mlflow", project="p", uri=(tmp_path / "store").as_uri())
    for rate in (0.5, 0.25):  # the second goes on with the run of the first
        tracker = open_tracker(config, told(tmp_path))
        assert isinstance(tracker, Guarded)
        inner = tracker.tracker
        assert isinstance(inner, MLflow)
        tracker.log(1, {"loss": rate})
        tracker.close("done")
    (found,) = inner.client.search_runs([inner.client.get_experiment_by_name("p").experiment_id])
    assert found.data.metrics["train/loss"] == 0.25
    assert found.data.params["recipe.model"] == "clip"
    assert found.info.status == "FINISHED"


def test_one_that_cannot_begin_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> Any:
        raise PermissionError("not yours")

    monkeypatch.setattr("zoo.tracking.TensorBoard", refuse)
    said: list[str] = []
    assert type(open_tracker(TrackingConfig(), told(tmp_path), said.append)) is Tracker
    assert said == ["tracking=tensorboard cannot begin (not yours); curve.jsonl has everything"]


def test_bad_settings_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="mode = 'offlin'; did you mean offline"):
        run_config([*SMALL, "tracking=wandb", "tracking.mode=offlin"])
    assert main(["train", *SMALL, "tracking=wandbb"]) == 2
    assert "unknown tracking 'wandbb'; did you mean wandb" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"tracking=mlflow needs the package mlflow.*mmzoo\[mlflow\]"):
        TrackingConfig(name="mlflow").check_installed()
