"""Drawn images are judged against their texts, against others' and against real ones, each with its reference."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from zoo.errors import ConfigError, DataError
from zoo.evaluation import drawing, text_to_image
from zoo.evaluation.catalogue import METRICS
from zoo.evaluation.evaluator import embed_images, evaluator_hash, load_evaluator, to_pictures
from zoo.evaluation.run import evaluate
from zoo.evaluation.text_to_image import TextToImageConfig


class Painter:
    """Draws the square that the text names, or what ``change`` makes of its number; keeps what it was asked."""

    def __init__(self, change: Callable[[int], int] = lambda n: n) -> None:
        self.change = change
        self.calls: list[dict[str, Any]] = []

    def generate_images(
        self, texts: Sequence[str], *, seed: int = 0, steps: int | None = None, guidance: float | None = None
    ) -> Tensor:
        self.calls.append({"texts": list(texts), "seed": seed, "steps": steps, "guidance": guidance})
        numbers = [self.change(int(next(w for w in t.split() if w.isdigit()))) for t in texts]
        colours = torch.tensor([[n, min(255, 2 * n), 255 - n] for n in numbers]) / 255  # [N, 3]
        return colours[..., None, None].expand(-1, -1, 8, 8).clone()


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch, towers: Any) -> Any:
    """Stands in for the evaluator's checkpoint."""
    judge = towers(noise=0.2, width=8)
    monkeypatch.setattr(text_to_image, "load_evaluator", lambda path, task, model: judge)
    monkeypatch.setattr(drawing, "evaluator_hash", lambda path, task: f"hash of {path}")
    monkeypatch.setattr(drawing, "evaluator_folder", lambda path, task: Path(path))
    return judge


def measure(model: Any, source: Any, **fields: Any) -> Any:
    return TextToImageConfig(evaluator="judge", **fields).build().run(model, source, "test")


def test_right_images_score_as_real_ones(judged: Any, make_source: Any) -> None:
    m = measure(Painter(), make_source()).metrics
    for key in ("score", "score_other", "gain", "r_precision", "mrr", "frechet", "kernel", "cmmd"):
        assert m[key] == pytest.approx(m[f"{key}_real"], abs=1e-6), key
    assert m["score"] > 0.9
    assert abs(m["score_other"]) < 0.2
    assert m["gain"] == pytest.approx(m["score"] - m["score_other"])
    assert m["r_precision"] > 0.9
    assert m["images"] == m["candidates"] == 40


def test_images_of_other_names_fit_no_text_though_the_sets_are_alike(judged: Any, make_source: Any) -> None:
    m = measure(Painter(lambda n: (n + 7) % 40), make_source()).metrics
    right = measure(Painter(), make_source()).metrics
    assert m["score"] < 0.3
    assert m["r_precision"] <= 0.1
    assert m["mrr"] < 0.2
    assert m["score_real"] == right["score_real"]
    assert m["frechet"] < 2 * m["frechet_real"]  # the distances ask for no text


def test_blank_images_gain_nothing_and_lie_far_off(judged: Any, make_source: Any) -> None:
    m = measure(Painter(lambda n: 200), make_source()).metrics
    assert m["gain"] == pytest.approx(0, abs=1e-6)
    assert m["r_precision"] <= 0.05
    for key in ("frechet", "kernel", "cmmd"):
        assert m[key] > 1.5 * abs(m[f"{key}_real"]), key
    assert m["kernel"] > 0.5


def test_metrics_follow_from_the_items(judged: Any, make_source: Any) -> None:
    result = measure(Painter(lambda n: n if n % 3 else 0), make_source(clusters=5))
    listed = METRICS["text-to-image"]
    for name, info in listed.items():
        if info.numerator:
            total = sum(row[info.numerator] for row in result.items)
            assert result.metrics[name] == pytest.approx(total / len(result.items)), name
    assert set(result.metrics) == {*listed, "images", "candidates"}
    assert {row["cluster"] for row in result.items} == {f"c{n}" for n in range(5)}
    assert 0.5 < result.metrics["score"] / result.metrics["score_real"] < 0.9
    assert sum(info.primary for info in listed.values()) == 1


def test_every_text_or_the_first(judged: Any, make_source: Any) -> None:
    painter = Painter()
    result = measure(painter, make_source(captions=3), texts="all", batch=50, candidates=10)
    assert [len(call["texts"]) for call in painter.calls] == [50, 50, 20]
    assert [row["item"] for row in result.items][:4] == [*(f"item-000/{k}" for k in range(3)), "item-001/0"]
    assert result.metrics["images"] == 120
    one = measure(Painter(), make_source(captions=3), candidates=10)
    assert [row["item"] for row in one.items][:2] == ["item-000", "item-001"]
    # distances compare one image a sample either way
    assert result.metrics["frechet"] == pytest.approx(one.metrics["frechet"])


def test_what_the_model_is_asked(judged: Any, make_source: Any) -> None:
    painter = Painter()
    done: list[tuple[str, int, int]] = []
    task = TextToImageConfig(evaluator="judge", items=20, batch=8, steps=5, guidance=3.0, seed=100).build()
    result = task.run(painter, make_source(), "test", lambda *p: done.append(p))
    assert [call["seed"] for call in painter.calls] == [100, 108, 116]
    assert {(call["steps"], call["guidance"]) for call in painter.calls} == {(5, 3.0)}
    assert done[-1] == ("text-to-image", 20, 20)
    assert result.metrics["candidates"] == 40  # the whole split's texts, however many are drawn
    again = task.run(Painter(), make_source(), "test")
    assert again.metrics == result.metrics


def test_pictures_are_kept_to_look_at(judged: Any, make_source: Any, tmp_path: Path) -> None:
    tasks = [TextToImageConfig(evaluator="judge").build()]
    report = evaluate(Painter(lambda n: n + 1), make_source(), "test", tasks, tmp_path)
    assert len(report["samples"]) == 12
    for sample in report["samples"]:
        entry = sample["outputs"]["text-to-image"]
        n = int(sample["id"].split("-")[1])
        picture = Image.open(io.BytesIO(base64.b64decode(entry["picture"], validate=True)))
        assert picture.getpixel((0, 0)) == (n + 1, 2 * n + 2, 254 - n)
        assert entry["text"] == f"the square {n}"
        assert sample["output"].startswith("rank ")
    skipped = evaluate(object(), make_source(), "test", tasks)
    assert skipped["skipped"] == {"text-to-image": "the model does not offer generate_images"}


def test_bad_input(judged: Any, make_source: Any) -> None:
    with pytest.raises(DataError, match="too few to compare sets"):
        measure(Painter(), make_source(3))
    with pytest.raises(ConfigError, match="first or all"):
        TextToImageConfig(texts="some")
    with pytest.raises(ConfigError, match="at least 2 texts"):
        TextToImageConfig(candidates=1)
    with pytest.raises(ConfigError, match="steps = 0"):
        TextToImageConfig(steps=0)
    with pytest.raises(ConfigError, match="batch and batch_size"):
        TextToImageConfig(batch=0)
    with pytest.raises(ConfigError, match="expected \\[N, 3, H, W\\]"):
        to_pictures(torch.zeros(2, 3, 8, 8), 3, "t")
    with pytest.raises(ConfigError, match="not finite"):
        to_pictures(torch.full((1, 3, 8, 8), torch.nan), 1, "t")

    class Several:
        def embed_images(self, images: Sequence[Any]) -> Tensor:
            return torch.ones(len(images), 4, 2)

    with pytest.raises(ConfigError, match="4 vectors an image"):
        embed_images(Several(), [Image.new("RGB", (8, 8))], 2, "t")  # type: ignore[arg-type]


def test_an_evaluator_is_a_checkpoint(make_source: Any, tmp_path: Path) -> None:
    import zoo
    from zoo.weights.save import save

    first, second = (zoo.build("clip", scale="tiny", seed=seed) for seed in (0, 1))
    save(first, first.recipe, tmp_path / "run" / "weights")
    save(first, first.recipe, tmp_path / "copy")
    save(second, second.recipe, tmp_path / "other")
    hashes = [evaluator_hash(str(tmp_path / name), "t") for name in ("run", "copy", "other")]
    assert hashes[0] == hashes[1] != hashes[2]
    source = make_source()
    specs = [TextToImageConfig(evaluator=str(tmp_path / n)).build().spec_hash(source, "test") for n in ("run", "copy")]
    assert specs[0] == specs[1]
    assert specs[0] != TextToImageConfig(evaluator=str(tmp_path / "other")).build().spec_hash(source, "test")

    judge = load_evaluator(str(tmp_path / "run"), "t", first)
    images = [source.sample(i).image for i in source.ids("test")[:4]]
    torch.testing.assert_close(judge.embed_images(images), first.embed_images(images))
    assert not any(p.requires_grad for p in judge.parameters())  # type: ignore[attr-defined]

    image = measure_with(Painter(), source, str(tmp_path / "run"))
    assert image.metrics["score"] == pytest.approx(image.metrics["score_real"], abs=1e-5)


def measure_with(model: Any, source: Any, evaluator: str) -> Any:
    return TextToImageConfig(evaluator=evaluator).build().run(model, source, "test")


def test_a_missing_or_unfit_evaluator_is_told_before_the_work(make_source: Any, tmp_path: Path) -> None:
    import zoo
    from zoo.weights.save import save

    painter = Painter()
    for path, why in (("", "none is given"), (str(tmp_path / "no"), "does not exist"), (str(tmp_path), "no finished")):
        with pytest.raises(ConfigError, match=why):
            evaluate(painter, make_source(), "test", [TextToImageConfig(evaluator=path).build()])
    eyeless = zoo.build("vq-tokenizer", scale="tiny")
    save(eyeless, eyeless.recipe, tmp_path / "vq")
    with pytest.raises(ConfigError, match="lacks embed_images and embed_texts"):
        evaluate(painter, make_source(), "test", [TextToImageConfig(evaluator=str(tmp_path / "vq")).build()])
    assert painter.calls == []


def test_training_asks_for_the_evaluator_before_it_begins(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from zoo.cli import main

    tasks = f"evaluation.tasks={{text-to-image:{{evaluator:{tmp_path / 'nowhere'}}}}}"
    argv = ["train", "model=clip", "scale=tiny", "trainer.accelerator=cpu", f"out={tmp_path / 'runs'}", tasks]
    assert main(argv) == 2
    assert "does not exist; train one with" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "runs").exists()
