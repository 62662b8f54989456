"""zoo compare: one command from a sweep to its page, whatever fails, whatever kills it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import zoo.train
from tests.compare.conftest import fabricate
from zoo.cli import main
from zoo.cli.commands.compare import default_page, is_setting, split_options
from zoo.cli.experiments import Experiment, placed, read_experiment, references, split_first
from zoo.cli.overrides import run_config
from zoo.curve import read_lines
from zoo.errors import ConfigError, RunError

SMALL = [
    "scale=tiny", "batch_size=8", "encoder.width=32", "encoder.depth=2", "encoder.ffn=64",
    "trainer.accelerator=cpu", "trainer.log_every=1", "trainer.checkpoint_every=1",
]  # fmt: skip
CLIP = [
    "model=clip", *SMALL, "text_encoder.width=32", "text_encoder.depth=1", "text_encoder.ffn=64",
    "evaluation.tasks={retrieval: {items: 16}}",
]  # fmt: skip
LLAVA = [
    "model=llava", *SMALL, "decoder.width=32", "decoder.depth=1", "decoder.ffn=64", "stages=joint",
    "evaluation.tasks={caption-likelihood: {items: 8}}",
]  # fmt: skip


def manifests(out: Path) -> dict[int, dict[str, Any]]:
    found = [json.loads(file.read_text()) for file in out.glob("*/seed=*/manifest.json")]
    return {manifest["seed"]: manifest for manifest in found}


def test_it_goes_on_after_a_kill_repeats_nothing_and_reports_its_own_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs"
    command = ["compare", *CLIP, "seed=0,1", f"out={out}"]
    long = "budget.value=40"
    fabricate(out, "another")  # a run that is there and no part of the sweep
    second = run_config([*CLIP, "seed=1", long]).directory(out)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "zoo", *command, long], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
    )
    for _ in range(4800):  # until the first is done and the second in its midst
        if len(read_lines(second / "curve.jsonl")) >= 3 or process.poll() is not None:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = manifests(out)
    assert (found[0]["status"], found[1]["status"]) == ("done", "running")
    first = run_config([*CLIP, "seed=0", long]).directory(out)
    before = {file: file.stat().st_mtime_ns for file in first.rglob("*") if file.is_file() and file.name != "run.yaml"}
    taken = json.loads((second / "manifest.json").read_text())["versions"]

    capsys.readouterr()
    assert main([*command, long]) == 0
    said = capsys.readouterr().out
    assert f"{first} is done already" in said.replace("\n", "")
    assert "2 of 2 runs are done" in said
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert [line["step"] for line in read_lines(second / "curve.jsonl")] == list(range(1, 41))
    assert manifests(out)[1]["versions"] == taken
    page = (out / "compare.html").read_text()
    assert "another" not in page
    assert "seed" in page

    assert main([*command, long]) == 0
    said = capsys.readouterr().out.replace("\n", "")
    assert f"{first} is done already" in said
    assert f"{second} is done already" in said


def test_a_failing_variant_is_named_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = zoo.train.train

    def second_fails(folder: Path, config: Any, *rest: Any) -> None:
        if config.seed == 1:
            raise ValueError("the wheels came off")
        real(folder, config, *rest)

    command = ["compare", *CLIP, "seed=0,1,2", "budget.value=2", f"out={tmp_path}", "--out", str(tmp_path / "my.html")]
    with monkeypatch.context() as patch:
        patch.setattr(zoo.train, "train", second_fails)
        assert main(command) == 2
    captured = capsys.readouterr()
    assert "2 of 3 runs are done" in captured.out
    assert "failed" in captured.out
    assert "the wheels came off" in captured.out
    assert "the wheels came off" in (tmp_path / "my.html").read_text()
    assert {seed: m["status"] for seed, m in manifests(tmp_path).items()} == {0: "done", 1: "failed", 2: "done"}
    assert main(command) == 0
    assert capsys.readouterr().out.count("is done already") == 2
    assert "the wheels came off" not in (tmp_path / "my.html").read_text()


def test_a_variant_whose_every_trial_fails_leaves_the_others_to_finish(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = zoo.train.train

    def linear_fails(folder: Path, config: Any, *rest: Any) -> None:
        if config.recipe.parts["connector"][0] == "linear":
            raise ValueError("it diverged")
        real(folder, config, *rest)

    monkeypatch.setattr(zoo.train, "train", linear_fails)
    search = ["tune=lr3", "tune.metric=caption-likelihood/bits_per_byte", "tune.factors=[1.0,3.0]"]
    assert main(["compare", *LLAVA, "connector=linear,mlp", *search, "budget.value=2", f"out={tmp_path}"]) == 2
    captured = capsys.readouterr()
    assert "1 of 2 runs are done" in captured.out
    page = (tmp_path / "compare.html").read_text()
    assert "it diverged" in page
    assert "connector=mlp" in page
    statuses = {m["name"]: m["status"] for m in map(json.loads, _texts(tmp_path.glob("*/seed=*/manifest.json")))}
    assert sorted(statuses.values()) == ["done", "failed"]


def _texts(files: Any) -> list[str]:
    return [file.read_text() for file in files]


def test_runs_that_are_there_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [fabricate(tmp_path, name, quality=0.4 + 0.1 * n) for n, name in enumerate(("clip", "llava", "albef"))]
    assert main(["compare", str(runs[0]), str(runs[1]), "--baseline", "clip"]) == 0
    page = (tmp_path / "compare.html").read_text()
    assert "llava" in page
    assert "albef" not in page
    assert "zoo compare" in page
    assert "the whole comparison" in capsys.readouterr().out
    with pytest.raises(RunError, match="does not exist"):
        main_raises(["outputs/nowhere/seed=0-12345678"])
    with pytest.raises(ConfigError, match="is a run and scale=tiny a setting"):
        main_raises([str(runs[0]), "scale=tiny"])
    with pytest.raises(ConfigError, match="--baseline needs a value"):
        main_raises([str(runs[0]), "--baseline"])


def main_raises(argv: list[str]) -> None:
    from zoo.cli.commands.compare import main as compare

    compare(argv)


def test_command_lines_are_told_apart() -> None:
    assert split_options(["a=1", "--out", "p.html", "--baseline=x+y=z"]) == (
        ["a=1"], {"--out": "p.html", "--baseline": "x+y=z"},
    )  # fmt: skip
    assert is_setting("hydra/launcher=joblib")
    assert is_setting("first.eye.budget.value=3")
    assert not is_setting("outputs/clip/seed=0-1")
    assert default_page(["experiment=unified", "out=here"]) == Path("here/unified.html")


# -- experiments ---------------------------------------------------------------------------------------------------


def test_an_experiment_may_state_a_sweep_which_the_user_can_narrow() -> None:
    def commands(*overrides: str) -> list[list[str]]:
        return [command[len(overrides) :] for command in read_experiment(overrides).commands(overrides)]

    assert commands("model=clip", "seed=3") == [[]]
    assert commands("experiment=understanding", "scale=tiny") == [
        ["model=clip,albef,blip,coca,vlmo,beit3", "seed=0,1,2"]
    ]
    assert commands("experiment=understanding", "model=clip") == [["seed=0,1,2"]]
    with pytest.raises(ConfigError, match=r"understandng.*understanding"):
        read_experiment(["experiment=understandng"])


def test_parts_of_an_experiment_have_axes_and_settings_of_their_own() -> None:
    file = Experiment(
        "e", {"seed": [0, 1]}, ({"model": ["a", "b"], "init": "@x", "depth": 2}, {"model": ["c"], "init": "@y"})
    )
    assert file.commands(["scale=tiny"]) == [
        ["scale=tiny", "seed=0,1", "model=a,b", "init='@x'", "depth=2"],
        ["scale=tiny", "seed=0,1", "model=c", "init='@y'"],
    ]
    assert file.commands(["model=b,c", "seed=7"]) == [
        ["model=b", "seed=7", "init='@x'", "depth=2"],
        ["model=c", "seed=7", "init='@y'"],
    ]
    assert file.commands(["model=c", "init=mine", "seed=7"]) == [["model=c", "init='mine'", "seed=7"]]
    with pytest.raises(ConfigError, match=r"no part of experiment 'e'.*model=a,b; model=c"):
        file.commands(["model=d"])


def test_first_runs_share_scale_and_folder_and_can_be_changed() -> None:
    file = Experiment(first={"eye": ["model=clip", "budget.value=600"]})
    others, changes = split_first(
        ["scale=tiny", "first.eye.budget.value=5", "model=llava", "out=here", "trainer.workers=2"]
    )
    assert others == ["scale=tiny", "model=llava", "out=here", "trainer.workers=2"]
    assert file.first_command("eye", others, changes) == [
        "scale=tiny", "out=here", "trainer.workers=2", "model=clip", "budget.value=5",
    ]  # fmt: skip
    plain = {"init": "@eye", "evaluation": {"tasks": {"t": {"evaluator": "@judge", "items": 3}}}}
    assert references(plain) == ["eye", "judge"]
    assert placed(plain["evaluation"], {"judge": "out/clip"}) == {"tasks": {"t": {"evaluator": "out/clip", "items": 3}}}
    with pytest.raises(ConfigError, match=r"'@eye'.*known: @judge"):
        placed(plain["init"], {"judge": "x"})


def test_one_command_resolves_the_unified_models_with_what_comes_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from zoo.cli.commands.train import resolved

    asked = ["experiment=unified", "scale=tiny", "seed=0", "model=show-o,transfusion", f"out={tmp_path}"]
    firsts, sweeps = resolved(asked, True)
    assert list(firsts) == ["judge", "codes", "latents"]
    places = {name: str(next(iter(sweep.configs))) for name, sweep in firsts.items()}
    runs = [config for sweep in sweeps for config in sweep.configs.values()]
    assert [(run.recipe.model, run.init) for run in runs] == [
        ("show-o", places["codes"]), ("transfusion", places["latents"]),
    ]  # fmt: skip
    assert runs[0].recipe.parts["image_tokenizer"][0] == "vq"
    assert {run.evaluation.tasks["text-to-image"]["evaluator"] for run in runs} == {places["judge"]}
    firsts, _ = resolved([*asked, "init=null"], True)
    assert list(firsts) == ["judge"]
    judge = "evaluation.tasks.text-to-image.evaluator=outputs/clip/seed=0-1"
    firsts, _ = resolved([*asked, "init=outputs/lfq/seed=0-2", judge], True)
    assert list(firsts) == []
    with pytest.raises(ConfigError, match=r"first\.jugde.*judge"):
        resolved([*asked, "first.jugde.budget.value=3"], True)


def test_what_comes_first_is_trained_first_and_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "compare", "experiment=connectors", "scale=tiny", "connector=mlp", "wiring.visual_tokens=4", "seed=0",
        "tune=none", "batch_size=8", "budget.value=2", "trainer.accelerator=cpu", "first.eye.budget.value=2",
        "first.eye.batch_size=8", "first.eye.evaluation.tasks={retrieval: {items: 16}}", f"out={tmp_path}",
        "evaluation.tasks.caption-likelihood.items=4", "evaluation.tasks.question-answering.items=2",
    ]  # fmt: skip
    assert main(command) == 0
    (start,) = tmp_path.glob("llava*/seed=*/init.json")
    assert json.loads(start.read_text())["source"].startswith(str(tmp_path / "clip+encoder=clip-vit-l-14"))
    page = (tmp_path / "connectors.html").read_text()
    assert "llava" in page
    capsys.readouterr()
    assert main(command) == 0
    assert capsys.readouterr().out.count("is done already") == 2


def test_a_run_that_fails_before_it_says_anything_is_named_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights cannot be built, or its worker was killed: no manifest says so but that of the command."""
    from zoo.cli.jobs import outcome_of, prepare_folder, record, run_folder
    from zoo.errors import WeightsError

    def broken(*rest: Any) -> Any:
        raise WeightsError("the checkpoint is damaged")

    config = run_config([*CLIP, "budget.value=2"])
    folder = config.directory(tmp_path)
    prepare_folder(folder, config)
    with monkeypatch.context() as patch:
        patch.setattr("zoo.api.build_module", broken)
        assert run_folder(folder, config).status == "failed"
    assert (outcome_of(folder).status, outcome_of(folder).error) == ("failed", "the checkpoint is damaged")
    assert main(["compare", str(folder)]) == 0
    assert "the checkpoint is damaged" in " ".join(capsys.readouterr().out.split())
    two = run_config([*CLIP, "budget.value=2", "trainer.devices=2"])
    killed = tmp_path / "killed"
    prepare_folder(killed, two)
    (killed / "manifest.json").write_text(json.dumps({"status": "running", "name": "clip", "seed": 0}))
    monkeypatch.setattr("zoo.worker.launch", lambda *rest: -9)
    assert run_folder(killed, two).status == "failed"
    assert "status -9" in str(outcome_of(killed).error)
    assert json.loads((killed / "manifest.json").read_text())["name"] == "clip"
    assert record(killed, two, "failed", "later").error == "later"
    assert "status -9" in str(outcome_of(killed).error)  # what the run said first stays
