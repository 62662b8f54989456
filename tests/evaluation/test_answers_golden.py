"""The normalisation and the soft accuracy of answers beside the VQA evaluation's released code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from zoo.evaluation.answers import exact_match, normalise_answer, vqa_accuracy

GOLDEN = json.loads((Path(__file__).parents[1] / "goldens/evaluation/vqa_answers.json").read_text(encoding="utf-8"))


def test_strings_are_normalised_as_released() -> None:
    assert len(GOLDEN["normalised"]) == 40
    for text, expected in GOLDEN["normalised"]:
        assert normalise_answer(text) == expected, text


def test_ten_answers_are_judged_as_released() -> None:
    values = [percent for _, _, percent in GOLDEN["accuracy"]]
    assert set(values) == {0.0, 30.0, 60.0, 90.0, 100.0}
    for answer, references, percent in GOLDEN["accuracy"]:
        assert 100 * vqa_accuracy(answer, references) == pytest.approx(percent, abs=0.0051), (answer, references)


@pytest.mark.parametrize(
    ("answer", "references", "equal"),
    [
        (" Left. ", ["left"], True),
        ("the left", ["left"], False),
        ("2", ["two"], False),
        ("left..", ["left"], False),
        ("Red", ["blue", "red"], True),
        ("", ["red"], False),
    ],
)
def test_one_answer_as_gqa_compares_it(answer: str, references: list[str], equal: bool) -> None:
    assert exact_match(answer, references) is equal
