"""Answers of texts and images: how many hold both, and what is measured of their images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.evaluation import drawing, text_to_image
from zoo.evaluation.catalogue import METRICS
from zoo.evaluation.illustrated import IllustratedConfig


class Writer:
    """Repeats the prompt and draws the square that it names; every ``silent``-th answer lacks its text, every
    ``blind``-th its image."""

    def __init__(self, silent: int = 0, blind: int = 0) -> None:
        self.silent, self.blind, self.count = silent, blind, 0
        self.calls: list[dict[str, Any]] = []

    def generate_interleaved(
        self, prompts: Sequence[Sequence[Any]], *, max_images: int = 4, max_new_tokens: int = 64, seed: int = 0
    ) -> list[list[str | Tensor]]:
        self.calls.append({"seed": seed, "max_images": max_images, "max_new_tokens": max_new_tokens})
        out: list[list[str | Tensor]] = []
        for (text,) in prompts:
            self.count += 1
            number = int(next(word for word in text.split() if word.isdigit()))
            colour = torch.tensor([number, min(255, 2 * number), 255 - number]) / 255
            pieces: list[str | Tensor] = []
            if not self.silent or self.count % self.silent:
                pieces.append(text.upper())
            if not self.blind or self.count % self.blind:
                pieces.append(colour[:, None, None].expand(-1, 8, 8).clone())
            out.append(pieces)
        return out


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch, towers: Any) -> Any:
    judge = towers(noise=0.2, width=8)
    monkeypatch.setattr(text_to_image, "load_evaluator", lambda path, task, model: judge)
    monkeypatch.setattr(drawing, "evaluator_hash", lambda path, task: f"hash of {path}")
    monkeypatch.setattr(drawing, "evaluator_folder", lambda path, task: Path(path))
    return judge


def measure(model: Any, source: Any, **fields: Any) -> Any:
    return IllustratedConfig(evaluator="judge", **fields).build().run(model, source, "test")


def test_images_are_measured_as_those_of_texts(judged: Any, make_source: Any) -> None:
    model = Writer()
    result = measure(model, make_source(), batch=7, seed=4)
    m = result.metrics
    assert m["score"] == pytest.approx(m["score_real"], abs=1e-6)
    assert m["score"] > m["score_other"] + 0.5  # the images of other prompts, shuffled
    assert m["both"] == m["with_image"] == m["with_text"] == m["repeats"] == 1
    assert [call["seed"] for call in model.calls] == [4 + 7 * n for n in range(len(model.calls))]
    assert {call["max_images"] for call in model.calls} == {1}
    assert set(METRICS["illustrated-answers"]) - set(m) == set()


def test_answers_that_lack_something(judged: Any, make_source: Any) -> None:
    whole = measure(Writer(), make_source()).metrics
    result = measure(Writer(silent=2, blind=4), make_source())
    m = result.metrics
    assert (m["with_text"], m["with_image"]) == (0.5, 0.75)
    assert m["both"] == 0.5
    assert m["score"] < whole["score"]  # an answer without an image is a blank one
    both = [item["both"] for item in result.items]
    assert sum(both) / len(both) == m["both"]
