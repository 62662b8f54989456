"""The commands as a user types them: results, and one line with status 2 for every mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from zoo.builtin_commands import COMMANDS
from zoo.cli import main
from zoo.cli.commands.train import train
from zoo.cli.overrides import expand, prepare, run_config

TINY = [
    "scale=tiny",
    "batch_size=8",
    "encoder.width=32",
    "encoder.depth=2",
    "encoder.ffn=64",
    "trainer.accelerator=cpu",
    "budget.value=2",
    "evaluation.split=val",
]


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run a command that must fail, and return its one line."""
    status = main(list(argv))
    captured = capsys.readouterr()
    assert status == 2, captured
    lines = [line for line in captured.err.splitlines() if line.strip() and "skipped sample" not in line]
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("error: ")
    assert "Traceback" not in captured.out
    return lines[0]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["trian"], ["trian", "train"]),
        (["train", "model=clop"], ["clop", "clip"]),
        (["train", "model=llava", "connector=qfromer"], ["qfromer", "qformer"]),
        (["train", "model=clip", "encoder=timm-vti"], ["timm-vit"]),
        (["train", "model=clip", "encoder.wdth=96"], ["wdth", "width"]),
        (["train", "model=clip", "encoder.width=wide"], ["encoder.width", "'wide'", "integer"]),
        (["train", "model=clip", "optimizer.lr=-1"], ["lr", "-1"]),
        (["train", "model=clip", "data=openmojy"], ["openmojy", "openmoji"]),
        (["train", "model=clip", "scale=tyni"], ["tyni", "tiny"]),
        (["train", "model=clip", "seed=one"], ["seed", "one"]),
        (["train", "model=clip", "trainer.precision=fp8"], ["precision", "fp16"]),
        (["train", "model=clip", "dta.root=x"], ["dta", "data"]),
        (["train", "model=clip", "connector=mlp"], ["clip", "connector"]),
        (["train", "model=clip", "seed=0,1"], ["-m"]),
        (["train", "model=clip", "--multi"], ["--multi"]),
        (["train", "scale=tiny"], ["model=NAME"]),
        (["train", "model=clip", "evaluation.tasks=[retreival]"], ["retreival", "retrieval"]),
        (["train", "model=clip", "encoder._target_=os.system"], ["_target_", "refused"]),
        (["train", "model=clip", "hydra.launcher._target_=os.system"], ["_target_", "refused"]),
        (["train", "model=clip", "+encoder={_target_: os.system}"], ["_target_", "refused"]),
        (["train", "model=clip", "data=folder", "data.root=/does/not/exist"], ["/does/not/exist"]),
        (["show", "qfromer"], ["qfromer", "qformer"]),
        (["show", "clip", "scale=tiny", "encoder.dpth=3"], ["dpth", "depth"]),
        (["list", "conector"], ["conector", "connector"]),
        (["eval", "/does/not/exist"], ["/does/not/exist"]),
        (["generate", "/does/not/exist", "--image", "/no/image.png"], ["/no/image.png"]),
        (["report", "/does/not/exist"], ["/does/not/exist"]),
    ],
)
def test_a_mistake_is_one_line_that_helps(
    argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    if argv[0] == "train":
        argv = [*argv, f"out={tmp_path}"]
    line = refused(capsys, *argv)
    for word in words:
        assert word in line
    assert list(tmp_path.iterdir()) == []  # nothing was begun


def test_a_missing_optional_package_names_the_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if "hydra_plugins" in name else real(name, *a)
    )
    line = refused(capsys, "train", "model=clip", "hydra/launcher=joblib", "seed=0,1", "-m")
    assert "hydra-joblib-launcher" in line
    assert "mmzoo[joblib]" in line


def test_an_output_folder_that_cannot_be_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    line = refused(capsys, "train", "model=clip", *TINY, f"out={tmp_path / 'file' / 'runs'}")
    assert "out=FOLDER" in line


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full to play a full disk")
def test_a_full_output_folder(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config(["model=clip", *TINY])
    folder = config.directory(tmp_path)
    folder.mkdir(parents=True)
    (folder / "run.yaml.partial").symlink_to("/dev/full")
    line = refused(capsys, "train", "model=clip", *TINY, f"out={tmp_path}")
    assert "No space left" in line


def pictures(root: Path, captions: int = 24) -> None:
    root.mkdir()
    rows = []
    for i in range(captions):
        Image.new("RGB", (40, 40), (10 * i % 256, 90, 200 - 5 * i)).save(root / f"{i}.png")
        rows.append({"image": f"{i}.png", "text": f"colour number {i}", "split": "test" if i % 6 == 0 else "train"})
    (root / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_folder_without_images(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    line = refused(capsys, "train", "model=clip", *TINY, "data=folder", f"data.root={tmp_path / 'empty'}")
    assert "empty" in line


def test_truncated_images_are_skipped_up_to_a_limit_then_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    root = tmp_path / "photos"
    pictures(root)
    torn = root / "1.png"
    torn.write_bytes(torn.read_bytes()[:60])
    arguments = [
        "model=clip", *TINY, "data=folder", f"data.root={root}", "data.split_column=split", "evaluation.split=test",
        "evaluation.tasks=[retrieval]", "budget.value=3",
    ]  # fmt: skip
    assert main(["train", *arguments, "data.max_bad=1", f"out={tmp_path / 'skips'}"]) == 0
    capsys.readouterr()
    line = refused(capsys, "train", *arguments, "data.max_bad=0", f"out={tmp_path / 'stops'}")
    assert "1.png" in line
    assert "max_bad" in line


def test_a_checkpoint_with_code_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.system, ("touch " + str(tmp_path / "ran"),))

    torch.save({"state_dict": Evil()}, tmp_path / "clip.pt")
    line = refused(capsys, "eval", str(tmp_path / "clip.pt"), "--model", "clip")
    assert "clip.pt" in line
    assert not (tmp_path / "ran").exists()


def test_a_sweep_runs_every_job_records_a_failure_and_goes_on(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import zoo.train

    real = zoo.train.train

    def second_fails(folder: Path, config: Any, *rest: Any) -> None:
        if config.seed == 1:
            raise ValueError("the second job is broken")
        real(folder, config, *rest)

    monkeypatch.setattr(zoo.train, "train", second_fails)
    outcomes = train(["model=clip", "-m", *TINY, "seed=0,1,2", "evaluation.tasks=[retrieval]", f"out={tmp_path}"])
    assert [o.status for o in outcomes] == ["done", "failed", "done"]
    assert "the second job is broken" in (outcomes[1].folder / "traceback.txt").read_text()
    manifest = json.loads((outcomes[1].folder / "manifest.json").read_text())
    assert (manifest["status"], manifest["error"]) == ("failed", "ValueError: the second job is broken")
    monkeypatch.setattr(zoo.train, "train", real)
    again = train(["model=clip", *TINY, "seed=0,1,2", "-m", "evaluation.tasks=[retrieval]", f"out={tmp_path}"])
    assert [o.status for o in again] == ["done"] * 3
    assert "is done already" in capsys.readouterr().out


def test_a_bridge_trains_evaluates_generates_and_reports(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    argv = [
        "model=llava", "connector=linear,mlp", "stages=joint", *TINY, "decoder.depth=1", f"out={tmp_path}", "-m",
        "evaluation.tasks={caption-likelihood: {items: 8}, naming: {items: 2, candidates: 3}}",
    ]  # fmt: skip
    assert main(["train", *argv]) == 0
    runs = sorted(tmp_path.glob("llava*/*"))
    assert len(runs) == 2
    assert [("connector=mlp" in run.parent.name) for run in runs] == [True, False]
    metrics = json.loads((runs[0] / "metrics.json").read_text())
    assert metrics["caption-likelihood"]["bits_per_byte"] > 0
    capsys.readouterr()
    Image.new("RGB", (30, 50), (200, 10, 10)).save(tmp_path / "red.png")
    assert main(["generate", str(runs[0]), "--image", str(tmp_path / "red.png"), "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.endswith("\n")
    assert main(["eval", str(runs[0]), "--tasks", "caption-likelihood"]) == 0
    again = json.loads((runs[0] / "eval" / "openmoji-val" / "metrics.json").read_text())
    assert again["caption-likelihood"] == metrics["caption-likelihood"]  # the saved weights are the trained ones
    assert main(["report", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "connector=mlp" in page


def test_list_and_show_tell_names_sizes_and_layout(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--plain"]) == 0
    names = capsys.readouterr().out.split()
    assert {"clip", "llava", "llava-1.5", "blip2-opt"} <= set(names)
    assert main(["show", "blip2-opt", "scale=tiny"]) == 0
    shown = capsys.readouterr().out
    for word in ("eva-vit-g", "qformer", "opt-2.7b", "frozen", "FLOPs", "layout"):
        assert word in shown
    assert main(["show", "qformer"]) == 0
    assert "connector.queries = 32" in capsys.readouterr().out


def test_list_imports_no_torch() -> None:
    code = "import sys; from zoo.cli import main; main(['list', 'all']); print({'torch', 'hydra'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("set()")


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for word in COMMANDS:
        with suppress(SystemExit):  # argparse leaves this way
            main([word.name, "--help"])
        captured = capsys.readouterr()
        assert "usage" in captured.out
        assert captured.err == ""


def test_overrides_are_prepared_and_expanded_as_hydra_sweeps_them() -> None:
    prepared = [o for o in prepare(["model=clip", "encoder.width=96", "seed=1,2"]) if not o.startswith("hydra")]
    assert prepared == ["model=clip", "++encoder.width=96", "++seed=1,2"]
    assert list(expand(prepared)) == [
        ["model=clip", "++encoder.width=96", "++seed=1"],
        ["model=clip", "++encoder.width=96", "++seed=2"],
    ]


def test_what_the_user_writes_wins_over_the_scale_and_the_scale_over_the_recipe() -> None:
    config = run_config(["model=clip", "scale=tiny", "encoder.width=96", "optimizer.lr=5e-4"])
    assert config.recipe.parts["encoder"][1].width == 96  # type: ignore[attr-defined]
    assert config.recipe.parts["text_encoder"][1].width == 128  # type: ignore[attr-defined]
    assert config.recipe.optimizer.lr == 5e-4  # what the recipe file says too, yet written by the user
    assert run_config(["model=clip", "scale=tiny"]).recipe.optimizer.lr == 1e-3
    assert config.recipe.name == "clip+encoder.width=96+optimizer.lr=0.0005"


def test_notebook_and_command_line_resolve_alike() -> None:
    import zoo
    from zoo.recipe import resolve

    for model in zoo.list_models():
        for scale in ("published", "tiny"):
            assert run_config([f"model={model}", f"scale={scale}"]).recipe == resolve(model, scale=scale), (
                model,
                scale,
            )
    line = run_config(["model=llava", "connector=qformer", "scale=tiny", "stages=joint", "connector.queries=4"]).recipe
    assert (
        line
        == zoo.build(
            "llava", connector="qformer", scale="tiny", stages="joint", options={"connector.queries": 4}
        ).recipe
    )
