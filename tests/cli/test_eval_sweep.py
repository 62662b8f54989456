"""zoo eval --sweep: one checkpoint at several numbers of steps, with the forward passes that were really run."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import zoo
from zoo.cli import main
from zoo.evaluation import drawing, text_to_image
from zoo.evaluation.text_to_image import TextToImageConfig
from zoo.sampling.passes import counted, passed

DECODER = {"width": 32, "depth": 1, "heads": 4, "kv_heads": 4, "ffn": 48}
ICON = ["a red apple", "cat", "dog"]


class Judge(torch.nn.Module):
    """Stands in for the evaluator: means of an image's corners, a hash of a text's letters."""

    def embed_images(self, images: Any) -> torch.Tensor:
        import numpy as np

        small = [np.asarray(image.convert("RGB").resize((2, 2)), dtype="float32").ravel() for image in images]
        return torch.nn.functional.normalize(torch.tensor(np.stack(small)) + 1, dim=-1)

    def embed_texts(self, texts: Any) -> torch.Tensor:
        rows = [torch.randn(12, generator=torch.Generator().manual_seed(sum(map(ord, text)))) for text in texts]
        return torch.nn.functional.normalize(torch.stack(rows), dim=-1)


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_to_image, "load_evaluator", lambda *_: Judge())
    monkeypatch.setattr(drawing, "evaluator_hash", lambda path, task: f"hash of {path}")
    monkeypatch.setattr(drawing, "evaluator_folder", lambda path, task: Path(path))


def module_of(name: str) -> Any:
    small = {"image_tokenizer": {"image_size": 32, "width": 16, "groups": 2}} if "transfusion" in name else {}
    return zoo.build(name, scale="tiny", seed=0, decoder=DECODER, **small)


def passes_of(module: Any, **fields: Any) -> dict[str, float]:
    task = TextToImageConfig(evaluator="judge", batch=2, **fields).build()
    pictures, cost = task.draw(module.model, ICON, None)
    assert len(pictures) == len(ICON)
    return cost


def test_passes_are_counted_where_they_run() -> None:
    assert passes_of(module_of("show-o"), steps=3) == {"passes": 3}
    chameleon = module_of("chameleon")
    assert passes_of(chameleon) == {"passes": chameleon.model.places}
    assert passes_of(module_of("transfusion"), steps=4, guidance=1.0) == {"passes": 4}
    flow = module_of("transfusion-flow")
    assert passes_of(flow, steps=4) == {"passes": 8}  # the midpoint method asks twice a step
    calls: list[int] = []
    hook = flow.model.decoder.register_forward_pre_hook(lambda _, inputs: calls.append(inputs[0].embeds.shape[1]))
    assert passes_of(flow, steps=1) == {"passes": 2}
    hook.remove()
    assert len(calls) == 2 * (1 + 2)  # two batches, each with its prompts


def test_nothing_is_counted_that_nobody_asked_for() -> None:
    passed(7)
    with counted() as outer:
        passed(2)
        with counted() as inner:
            passed(3)
        passed(1)
    assert (outer.count, inner.count) == (3, 3)

    class Painter:
        def generate_images(self, texts: list[str], **_: Any) -> torch.Tensor:
            return torch.zeros(len(texts), 3, 8, 8)

    assert passes_of(SimpleNamespace(model=Painter())) == {}


def swept(monkeypatch: pytest.MonkeyPatch, name: str, out: Path, *more: str) -> int:
    module = module_of(name)
    monkeypatch.setattr("zoo.cli.checkpoint.load", lambda *_: module)
    task = "text-to-image,evaluator=judge,items=6,candidates=3"
    return main(["eval", "m", "--task", task, "--task", "naming", "--out", str(out), *more])


def test_each_value_has_its_folder(judged: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert swept(monkeypatch, "show-o", tmp_path, "--sweep", "steps=1,3") == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["steps=1", "steps=3"]
    stated = {}
    for folder in tmp_path.iterdir():
        metrics = json.loads((folder / "metrics.json").read_text())
        assert set(metrics) == {"text-to-image"}  # naming takes no steps
        stated[folder.name] = json.loads((folder / "sweep.json").read_text())
        assert metrics["text-to-image"]["passes"] == stated[folder.name]["value"] == int(folder.name[-1])
    assert stated["steps=1"]["field"] == "steps"
    assert stated["steps=1"]["conditions"] == stated["steps=3"]["conditions"]


def test_codes_one_after_the_other_are_evaluated_once(
    judged: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert swept(monkeypatch, "chameleon", tmp_path, "--sweep", "steps=8,16,32") == 0
    assert [p.name for p in tmp_path.iterdir()] == ["steps=all"]
    found = json.loads((tmp_path / "steps=all" / "metrics.json").read_text())["text-to-image"]
    assert found["passes"] == module_of("chameleon").model.places
    assert json.loads((tmp_path / "steps=all" / "sweep.json").read_text())["value"] is None


def test_mistakes_are_one_line(
    judged: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for sweep, message in (
        ("steps", "expected FIELD=VALUE"),
        ("steps=", "expected FIELD=VALUE"),
        ("steps=8,8", "each value once"),
        ("colour=1,2", "none of the tasks text-to-image, naming has this field"),
        ("steps=4,0", "steps = 0"),
        ("steps=4,many", "many"),
    ):
        assert swept(monkeypatch, "show-o", tmp_path, "--sweep", sweep) == 2, sweep
        error = capsys.readouterr().err
        assert message in error, error
        assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
