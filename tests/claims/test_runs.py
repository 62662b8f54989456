"""What claims run: every run of every claim composes, is built on the meta device and can do what is measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from zoo.api import build_module
from zoo.claims.claim import Claim, claim_files, read_claims
from zoo.claims.plan import ONE, read_plan
from zoo.cli import claim_runs
from zoo.cli import main as zoo
from zoo.cli.claim_runs import Resolved, Resolver
from zoo.cli.commands.train import Sweep
from zoo.cli.jobs import Outcome
from zoo.errors import ConfigError
from zoo.frozen_features import check_cacheable
from zoo.manifest import write_json
from zoo.plugin import catalogue, conf_dir
from zoo.run_config import RunConfig

OUT = Path("outputs")


@pytest.fixture(scope="module")
def resolved() -> dict[str, Resolved]:
    """The zoo's own claims; those of plugins that happen to be installed are resolved by their own tests."""
    resolver = Resolver("tiny", [0], OUT)
    own = [name for name, file in claim_files().items() if conf_dir() in file.parents]
    return {claim.name: resolver.claim(claim) for claim in read_claims(own)}


def configs(found: Resolved, first: bool = True) -> dict[Path, RunConfig]:
    sweeps = [s for runs in found.all for s in (*(runs.firsts.values() if first else ()), runs.sweep)]
    return {folder: config for sweep in sweeps for folder, config in sweep.configs.items()}


def folder(found: Resolved, role: str, point: str = ONE) -> Path:
    (place,) = found.arms[role][point].configs
    return place


def test_every_run_is_built_and_offers_what_its_claim_measures(resolved: dict[str, Resolved]) -> None:
    built: dict[Path, Any] = {}
    for name, found in resolved.items():
        own = configs(found, first=False)
        for place, config in configs(found).items():
            if place not in built:
                assert config.recipe.scale == "tiny"
                check_cacheable(config)
                with torch.device("meta"):
                    built[place] = build_module(config.recipe, 0).model
            task = found.claim.task
            if place in own and task:
                assert task in config.evaluation.tasks, (name, place)
                missing = catalogue()["task"].parse(task, config.evaluation.tasks[task], task).build().missing
                assert missing(built[place]) == (), (name, place)
    assert len(built) > 50


def test_equal_runs_of_several_claims_are_one_folder(resolved: dict[str, Resolved]) -> None:
    assert folder(resolved["F1"], "variant") == folder(resolved["F5"], "variant") == folder(resolved["F4"], "variant")
    assert folder(resolved["F6"], "variant") == folder(resolved["F7"], "variant")
    assert folder(resolved["T6"], "variant") == folder(resolved["T10"], "baseline")
    assert folder(resolved["T6"], "variant") == folder(resolved["T1"], "variant", "600")
    assert folder(resolved["T7"], "baseline") == folder(resolved["T7-less"], "than.baseline")
    assert folder(resolved["B12"], "variant") == folder(resolved["B13"], "variant")
    assert folder(resolved["B7"], "variant") == folder(resolved["B11"], "baseline")
    assert folder(resolved["S4"], "baseline") == folder(resolved["S5"], "baseline")
    (stage,) = resolved["B2"].arms["variant"][ONE].firsts["stage1"].configs
    assert folder(resolved["B3"], "variant") == stage  # a run of one claim is what another starts from
    assert folder(resolved["F6"], "baseline") != folder(resolved["F6"], "variant")
    both = {place for found in resolved.values() for place in configs(found, first=False)}
    arms = sum(len(points) for found in resolved.values() for points in found.arms.values())
    assert len(both) < 0.7 * arms


def test_runs_that_come_first_are_the_same_wherever_they_are_named(resolved: dict[str, Resolved]) -> None:
    places: dict[str, set[Path]] = {}
    for found in resolved.values():
        for runs in found.all:
            for name, sweep in runs.firsts.items():
                places.setdefault(name, set()).update(sweep.configs)
    assert all(len(folders) == 1 for folders in places.values()), places
    assert set(places) == {
        *("eye", "weak", "language", "weak-language", "aligned", "stage1"),
        *("judge", "latents", "codes", "unified"),
        *("draws-judge", "draws-texts", "draws-latents", "draws-drawer"),
    }
    assert list(resolved["B11"].arms["variant"][ONE].firsts) == ["eye", "language", "aligned"]
    assert list(resolved["B11"].arms["baseline"][ONE].firsts) == ["eye", "language"]
    assert resolved["F6"].arms["variant"][ONE].firsts == {}


def test_what_runs_share(resolved: dict[str, Resolved]) -> None:
    """Arms differ in what the claim is about: never in budget (but parity's points), batch or evaluation."""
    for name, found in resolved.items():
        own = list(configs(found, first=False).values())
        assert len({config.batch_size for config in own}) == 1, name
        assert len({str(config.evaluation) for config in own}) == 1, name
        assert len({config.budget for config in own}) == max(1, len(found.claim.config.points)) or (
            found.claim.config.along == "passes"
        ), name
        data = {str(config.data) for config in own}
        assert len(data) == 1 or found.claim.config.evaluate_on, name


def test_cleaned_data_lie_in_the_baselines_run(resolved: dict[str, Resolved]) -> None:
    found = resolved["F13"]
    (config,) = found.arms["variant"][ONE].configs.values()
    assert found.clean == folder(found, "baseline") / "capfilt-200"
    assert config.data["root"] == str(found.clean)
    assert config.data["name"] == "folder"


def test_an_arm_that_does_not_compose_is_named(make_claim: Callable[..., Claim]) -> None:
    claim = make_claim(variant={"experts": ["model=vlmo", "trunk.deph=2"]}, baseline={"shared": ["model=vlmo"]})
    with pytest.raises(ConfigError, match=r"claim F10, experts: .*did you mean depth"):
        Resolver("tiny", [0], OUT).claim(claim)
    swept = make_claim(experiment="understanding")
    with pytest.raises(ConfigError, match="experiment=understanding sweeps"):
        Resolver("tiny", [0], OUT).claim(swept)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Runs are written as done in place of being trained, but those with ``coca-base+objective`` in their name fail."""
    ran: list[Path] = []

    def run(self: Sweep) -> list[Outcome]:
        outcomes = []
        for place, config in self.configs.items():
            ran.append(place)
            state = "failed" if "coca-base+objective=contrastive" in str(place) else "done"
            place.mkdir(parents=True, exist_ok=True)
            values = {
                "name": config.name,
                "seed": config.seed,
                "status": state,
                "error": "lost" if state != "done" else None,
            }
            write_json(place / "manifest.json", values)
            write_json(place / "metrics.json", {})
            outcomes.append(Outcome(place, state, "lost" if state != "done" else None))
        return outcomes

    monkeypatch.setattr(Sweep, "run", run)
    monkeypatch.setattr("zoo.cli.jobs.check_offline", lambda config, pending=(): None)
    return ran


def test_a_failing_run_keeps_nothing_else_from_running_and_nothing_is_repeated(
    launched: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = zoo(["claims", "run", "F1", "F1-retrieval", "F2", "--seeds", "0", "--out", str(tmp_path)])
    said = capsys.readouterr()
    assert status == 2
    names = [place.parent.name for place in launched]
    assert names.count("coca-base") == 1
    assert names.count("coca-base+objective=contrastive") == 1  # two claims have it, and it is tried once
    assert "claim F1 failed" in said.out
    assert "claim F2 failed" not in said.out
    assert "F1 unfinished" in said.out
    (claim,) = read_claims(["F2"])
    plan = read_plan(claim, "tiny", tmp_path)
    assert plan is not None
    assert all(
        (tmp_path / place / "manifest.json").is_file() for arm in plan.runs.values() for place in arm[ONE].values()
    )
    launched.clear()
    zoo(["claims", "run", "F2", "--seeds", "0", "--out", str(tmp_path)])
    assert launched == []
    zoo(["claims", "run", "F1", "--seeds", "0", "--out", str(tmp_path)])
    assert [place.parent.name for place in launched] == ["coca-base+objective=contrastive"]


def test_first_runs_go_first(launched: list[Path], tmp_path: Path) -> None:
    assert zoo(["claims", "run", "B11", "--seeds", "0,1", "--out", str(tmp_path)]) == 0
    names = [place.parent.name for place in launched]
    assert [name.split("+")[0] for name in names] == ["clip", "llava", "llava", "llava", "llava", "llava", "llava"]
    assert names[1].endswith("data.text_only=true+init=clip")
    assert "stages=align" in names[4]


def test_interruption_ends_the_command(
    launched: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Sweep, "run", lambda self: [Outcome(place, "interrupted") for place in self.configs])
    assert zoo(["claims", "run", "F1", "F2", "--seeds", "0", "--out", str(tmp_path)]) == 130
    said = capsys.readouterr().out
    assert "interrupted; the same command goes on" in said
    assert "claim F2" not in said


def test_evaluations_beyond_the_runs_own(launched: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr("zoo.cli.commands.eval.main", lambda argv: asked.append(list(argv)))
    cleaned: list[list[str]] = []
    monkeypatch.setattr("zoo.cli.commands.data.main", lambda argv: cleaned.append(list(argv)))
    zoo(["claims", "run", "F13", "S1", "--seeds", "0", "--out", str(tmp_path)])
    (made,) = cleaned
    assert made[0] == "capfilt"
    assert made[3] == f"{made[1]}/capfilt-200"
    assert [argv[1:] for argv in asked[:2]] == [["--data", "openmoji", "--tasks", "retrieval"]] * 2
    assert [argv[1:] for argv in asked[2:]] == [["--sweep", "steps=2,4,8,16,32", "--tasks", "text-to-image"]] * 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "F99"], "unknown claim 'F99'"),
        (["run", "F1", "--seeds", "a"], "--seeds a: expected numbers"),
        (["run", "F1", "--seeds", "1,1"], "expected different seeds"),
        (["report", "F99"], "unknown claim 'F99'"),
        (["list", "--scale", "tiny", "T999"], "unknown claim 'T999'"),
    ],
)
def test_one_line_errors(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert zoo(["claims", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_list_and_report_know_claims_that_were_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert zoo(["claims", "list", "--out", str(tmp_path)]) == 0
    assert zoo(["claims", "report", "--markdown", "--out", str(tmp_path)]) == 0
    page = tmp_path / "claims.html"
    assert zoo(["claims", "report", "T6", "--html", str(page), "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert f"{len(read_claims())} claims" in said
    assert f"{len(read_claims())} not yet run" in said
    assert "61.3 → 20.3" in page.read_text()
    assert 'id="claim-T6"' in page.read_text()


def test_a_claim_runs_for_real(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--set", "budget.value=2", "--set", "batch_size=4", "--set", "evaluation.tasks={retrieval:{items:8}}"]
    assert zoo(["claims", "run", "F1", "--seeds", "0", "--out", str(tmp_path), *small]) == 0
    said = capsys.readouterr().out
    assert "F1 contradicted" in said or "F1 reproduced" in said
    assert "×, counted" in said
    assert "budget.value=2" in said


def test_the_estimate_follows_the_budget(resolved: dict[str, Resolved]) -> None:
    import dataclasses

    (config,) = resolved["F1"].arms["baseline"][ONE].configs.values()
    twice = dataclasses.replace(config, budget=dataclasses.replace(config.budget, value=2 * config.budget.value))
    assert claim_runs.expected_seconds(twice) == pytest.approx(2 * claim_runs.expected_seconds(config))
