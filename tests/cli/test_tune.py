"""Equal learning-rate search: what is tried, what is chosen, and that the runs are those of the chosen rate."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from zoo.cli import tune as tuning
from zoo.cli.commands.train import train
from zoo.cli.overrides import run_config
from zoo.cli.tune import TuneConfig, choose, trials, variant
from zoo.compare.rundir import find_runs
from zoo.errors import ConfigError, RunError
from zoo.run_config import RunConfig, times_lr

RUN = [
    "model=llava",
    "scale=tiny",
    "stages=joint",
    "batch_size=8",
    "encoder.width=32",
    "encoder.depth=2",
    "encoder.ffn=64",
    "decoder.width=32",
    "decoder.depth=1",
    "decoder.ffn=64",
    "trainer.accelerator=cpu",
    "budget.value=3",
    "++evaluation.tasks={caption-likelihood:{items:24}}",
]
METRIC = "caption-likelihood/bits_per_byte"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "weights" / "model.safetensors")


def trial_curve(out: Path, name: str, factor: float) -> list[dict[str, Any]]:
    for file in (out / ".tune").rglob("manifest.json"):
        manifest = json.loads(file.read_text())
        if manifest["name"] == name and manifest["lr_factor"] == factor:
            return [json.loads(line) for line in file.with_name("curve.jsonl").read_text().splitlines()]
    raise AssertionError(f"{name} did not try {factor}")


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two connectors and two seeds, tuned over two factors."""
    out = tmp_path_factory.mktemp("tuned")
    axes = ["connector=linear,mlp", "seed=0,1", "-m"]
    outcomes = train([*RUN, *axes, "tune=lr3", f"tune.metric={METRIC}", "tune.factors=[0.1,3.0]", f"out={out}"])
    assert [o.status for o in outcomes] == ["done"] * 4
    return out


def test_every_variant_tries_the_same_factors_on_one_seed(swept: Path) -> None:
    tried = sorted((swept / ".tune").rglob("manifest.json"))
    found = {(m["name"], m["seed"], m["lr_factor"]) for m in (json.loads(f.read_text()) for f in tried)}
    names = {name for name, _, _ in found}
    assert len(names) == 2
    assert found == {(name, 0, factor) for name in names for factor in (0.1, 3.0)}
    splits = {RunConfig.read(f.with_name("run.yaml")).evaluation.split for f in tried}
    assert splits == {"val"}


def test_runs_have_their_variants_best_factor_and_say_so(swept: Path) -> None:
    runs = find_runs([swept])
    assert len(runs) == 4  # the trials are not among them
    for run in runs:
        record = json.loads((run.path / "tuning.json").read_text())
        best = min(record["tried"], key=lambda f: record["tried"][f])
        assert float(best) == record["factor"] == run.manifest["lr_factor"]
        assert record["at_edge"] is True
        assert record["metric"] == METRIC
        rate = {factor: max(line["lr"] for line in trial_curve(swept, run.name, factor)) for factor in (0.1, 3.0)}
        assert rate[3.0] == pytest.approx(30 * rate[0.1])
        assert max(line["lr"] for line in run.curve) == rate[record["factor"]]


def test_weights_of_trials_that_lost_are_not_kept(swept: Path) -> None:
    for run in find_runs([swept]):
        record = json.loads((run.path / "tuning.json").read_text())
        chosen = swept / record["trial"]
        assert (chosen / "weights").is_dir()
        others = [folder for folder in chosen.parent.iterdir() if folder != chosen]
        assert len(others) == 1
        assert not (others[0] / "weights").exists()
        assert not (others[0] / "checkpoint").exists()
        assert (others[0] / "curve.jsonl").is_file()  # what it came to stays


def test_the_tried_seed_is_not_trained_again(swept: Path, tmp_path: Path) -> None:
    """Its run is the trial's end, evaluated on the test split; trained anew it comes out the same."""
    run = next(r for r in find_runs([swept]) if r.seed == "0")
    record = json.loads((run.path / "tuning.json").read_text())
    trial = swept / record["trial"]
    assert all(torch.equal(a, weights(trial)[name]) for name, a in weights(run.path).items())
    connector = RunConfig.read(run.path / "run.yaml").recipe.parts["connector"][0]
    (anew,) = train([*RUN, f"connector={connector}", f"lr_factor={record['factor']}", f"out={tmp_path}"])
    assert all(torch.equal(a, weights(anew.folder)[name]) for name, a in weights(run.path).items())
    assert json.loads((anew.folder / "metrics.json").read_text()) == json.loads((run.path / "metrics.json").read_text())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["tune=lr3"], ["tune.metric=TASK/METRIC"]),
        (["tune=lr4", f"tune.metric={METRIC}"], ["lr4", "lr3"]),
        (["tune=lr3", "tune.metric=caption-likelyhood/bits_per_byte"], ["caption-likelihood"]),
        (["tune=lr3", "tune.metric=caption-likelihood/bits_per_bite"], ["bits_per_byte"]),
        (["tune=lr3", f"tune.metric={METRIC}", "tune.split=test"], ["tune.split", "'test'", "choose another"]),
        (["tune=lr3", f"tune.metric={METRIC}", "lr_factor=3"], ["lr_factor", "tune"]),
        (["lr_factor=0"], ["lr_factor", "above 0"]),
        ([f"tune.metric={METRIC}"], ["no factors", "tune=lr3"]),
        (["tune=null"], ["tune=null", "lr3, lr3-up, none"]),
    ],
)
def test_mistakes_are_found_before_the_first_trial(changes: list[str], words: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        train([*RUN, *changes, f"out={tmp_path}"])
    assert all(word in str(error.value) for word in words), error.value
    assert not any(tmp_path.rglob("run.yaml"))


def test_an_experiments_search_can_be_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["experiment=connectors", "scale=tiny", "connector=mlp", "seed=0", "wiring.visual_tokens=4"]
    train([*base, f"out={tmp_path}", "--dry-run"])
    assert capsys.readouterr().out.count("recipe:") == 5  # the eye, three trials and the run
    train([*base, "tune=none", f"out={tmp_path}", "--dry-run"])
    assert capsys.readouterr().out.count("recipe:") == 2
    train([*base, "tune=none", "init=null", f"out={tmp_path}", "--dry-run"])
    assert capsys.readouterr().out.count("recipe:") == 1


def test_rates_of_stages_and_paths_are_multiplied_too() -> None:
    recipe = run_config(["model=llava-1.5", "scale=tiny"]).recipe
    stages = tuple(
        dataclasses.replace(s, optimizer={"lr": 2e-3, "clip": 1.0}, lr={"connector": 4e-3}) for s in recipe.stages
    )
    scaled = times_lr(dataclasses.replace(recipe, stages=stages), 0.5)
    assert scaled.optimizer.lr == recipe.optimizer.lr / 2
    assert all(s.optimizer == {"lr": 1e-3, "clip": 1.0} and s.lr == {"connector": 2e-3} for s in scaled.stages)


def test_a_trial_without_a_number_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config(RUN)
    search = TuneConfig(metric=METRIC, factors=[1.0, 3.0])
    folders = {run.lr_factor: folder for folder, run in trials([config], search, tmp_path).items()}

    def write(factor: float, value: Any) -> None:
        folders[factor].mkdir(parents=True, exist_ok=True)
        (folders[factor] / "metrics.json").write_text(json.dumps({"caption-likelihood": {"bits_per_byte": value}}))

    write(3.0, float("nan"))
    assert "factor" not in choose([config], search, tmp_path)[variant(config)]
    with pytest.raises(RunError, match="no trial"):
        tuning.tuned(config, tmp_path)
    write(1.0, 2.5)
    chosen = choose([config], search, tmp_path)
    assert chosen[variant(config)]["factor"] == 1.0
    assert chosen[variant(config)]["tried"] == {"1": 2.5}
    assert tuning.tuned(config, tmp_path)[0].lr_factor == 1.0
