"""Answers as the VQA evaluation judges them, and the task on a model whose answers are known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from zoo.data.sample import BadSample, Sample
from zoo.errors import ConfigError, DataError
from zoo.evaluation.answers import answer_type, contractions, first_verdict, normalise_answer, vqa_accuracy
from zoo.evaluation.catalogue import METRICS
from zoo.evaluation.question_answering import QuestionAnsweringConfig, asked_of
from zoo.evaluation.run import evaluate


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes.", "yes"),
        ("The red Car", "red car"),
        ("an apple a day", "apple day"),
        ("two", "2"),
        ("none", "0"),
        ("ten", "10"),
        ("eleven", "eleven"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("oclock", "o'clock"),
        ("yalld've", "yalld've"),
        ("y'alld've", "y'all'd've"),
        ("somebody'd", "somebodyd"),
        ("well were", "well were"),  # not in the table: they are words
        ("3.5", "3.5"),
        ("end. of", "end of"),
        ("p.m.", "pm"),
        (".5", ".5"),
        ("t-shirt", "t shirt"),  # touches no blank: becomes one
        ("black- white", "black white"),
        ("yes, it is", "yes it is"),
        ("yes,it is", "yes it is"),
        ("1,000", "1000"),
        ("1,000 red/blue", "1000 redblue"),  # a number with a comma takes all punctuation away
        ("red/blue", "red blue"),
        ("what?!", "what"),
        ('"hot dog"', "hot dog"),
        ("line\none\ttwo", "line 1 2"),
        ("x_b (c)", "x b c"),
        ("the", ""),
        ("", ""),
    ],
)
def test_normalisation(text: str, expected: str) -> None:
    assert normalise_answer(text) == expected


def test_the_table_of_contractions() -> None:
    table = contractions()
    assert table["thats"] == "that's"
    assert table["twas"] == "'twas"
    assert table["ow's'at"] == table["'ows'at"] == table["'ow'sat"] == "'ow's'at"
    assert "well" not in table
    assert "were" not in table
    assert all(key.replace("'", "") == form.replace("'", "") for key, form in table.items())


def test_soft_accuracy_is_the_mean_over_leaving_one_out() -> None:
    ten = ["red"] * 3 + ["blue"] * 6 + ["Green."]
    assert vqa_accuracy("blue", ten) == 1.0
    assert vqa_accuracy("Red", ten) == pytest.approx((7 * 1 + 3 * 2 / 3) / 10)
    assert vqa_accuracy("green", ten) == pytest.approx((9 * 1 / 3 + 0) / 10)
    assert vqa_accuracy("pink", ten) == 0.0
    assert vqa_accuracy("no", ["no"] * 10) == 1.0
    assert vqa_accuracy("No.", ["no"] * 10) == 0.0  # as released: nothing is normalised where all agree to the letter
    assert vqa_accuracy("No.", ["no"] * 9 + ["no "]) == 0.0
    assert vqa_accuracy("No.", ["no"] * 9 + ["No"]) == 1.0
    assert vqa_accuracy("A garlic.", ["garlic"]) == 1.0
    assert vqa_accuracy("three", ["3"]) == 1.0
    with pytest.raises(ValueError, match="reference"):
        vqa_accuracy("x", [])


def test_types_and_verdicts() -> None:
    assert [answer_type([a]) for a in ("Yes", "no", "3", "two", "1,000", "red")] == [
        "yes_no", "yes_no", "number", "number", "number", "other",
    ]  # fmt: skip
    assert [first_verdict(a) for a in ("Yes, there is", "no", "There is no", "")] == ["yes", "no", "", ""]


class Quiz:
    """Grey squares; each has a count question, and an exist pair whose truth follows from its number."""

    name, version, licence, max_bad = "quiz", "1", "CC0-1.0", 1

    def __init__(self, count: int = 10) -> None:
        self.count = count

    def ids(self, split: str) -> list[str]:
        return [f"q-{n:02d}" for n in range(self.count)] if split == "test" else []

    def sample(self, id: str) -> Sample:
        n = int(id[2:])
        strategy = ("random", "popular", "adversarial")[n % 3]
        asked = [
            {"question": "<image>\nhow many?", "answer": str(n), "kind": "count"},
            {"question": "is it there?", "answer": "yes", "kind": "exist", "strategy": strategy},
            {"question": "is that there?", "answer": "no", "kind": "exist", "strategy": strategy},
        ]
        image = Image.new("RGB", (8, 6), (n, n, n))
        turns = [(a["question"], a["answer"]) for a in asked]
        return Sample(id, image, ("a square",), {"turns": turns, "questions": asked})


class Player:
    """Reads the number from the pixels; always says yes for even squares, and 255 of a blank."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.prompts: list[str] = []

    def generate_text(
        self, images: Sequence[Any], prompts: Sequence[str] | None = None, max_new_tokens: int = 32
    ) -> list[str]:
        assert prompts is not None
        self.batches.append(len(images))
        self.prompts += prompts
        out = []
        for image, prompt in zip(images, prompts, strict=True):
            n = image.getpixel((0, 0))[0]
            assert image.size == (8, 6)
            out.append(f" {n}. " if "many" in prompt else "Yes." if n % 2 == 0 or n == 255 else "no")
        return out


def test_accuracy_by_kind_and_verdicts_by_hand() -> None:
    model = Player()
    result = QuestionAnsweringConfig(batch_size=7).build().run(model, Quiz(), "test")
    values = result.metrics
    assert model.batches == [7, 7, 7, 7, 2]
    assert "how many?" in model.prompts
    assert values["questions"] == 30
    assert values["images"] == 10
    assert values["accuracy_count"] == values["accuracy_number"] == 1.0
    assert values["accuracy_exist"] == values["accuracy_yes_no"] == 0.5  # 5 squares say yes twice, 5 no twice
    assert values["accuracy"] == pytest.approx(20 / 30)
    assert values["exist_precision"] == 0.5
    assert values["exist_recall"] == 0.5
    assert values["exist_f1"] == 0.5
    assert values["exist_yes_ratio"] == 0.5
    assert values["accuracy_exist_popular"] == 0.5
    assert "accuracy_what" not in values
    assert "gain" not in values
    assert {row["cluster"] for row in result.items} == set(Quiz().ids("test"))
    assert len({row["item"] for row in result.items}) == 30
    for name, value in values.items():
        info = METRICS["question-answering"].get(name)
        if info is not None:
            below = sum(r[info.denominator] for r in result.items) if info.denominator else len(result.items)
            assert sum(r[info.numerator] for r in result.items) / below == pytest.approx(value)


def test_precision_and_recall_of_a_model_that_says_yes() -> None:
    class Agrees(Player):
        def generate_text(self, images: Any, prompts: Any = None, max_new_tokens: int = 32) -> list[str]:
            return [
                "yes" if "it" in p or i.getpixel((0, 0))[0] < 4 else "no" for i, p in zip(images, prompts, strict=True)
            ]

    values = QuestionAnsweringConfig().build().run(Agrees(), Quiz(), "test").metrics
    assert values["exist_recall"] == 1.0
    assert values["exist_precision"] == pytest.approx(10 / 14)
    assert values["exist_f1"] == pytest.approx(2 * 10 / (14 + 10))
    assert values["exist_yes_ratio"] == pytest.approx(14 / 20)


def test_blank_images_as_a_control() -> None:
    source = Quiz()
    blank = QuestionAnsweringConfig(images="blank").build().run(Player(), source, "test")
    assert blank.metrics["accuracy_count"] == 0.0
    assert blank.metrics["accuracy_exist"] == 0.5
    assert blank.metrics["exist_yes_ratio"] == 1.0
    both = QuestionAnsweringConfig(images="both").build().run(Player(), source, "test")
    assert both.metrics["accuracy"] == pytest.approx(20 / 30)
    assert both.metrics["blank_accuracy"] == blank.metrics["accuracy"] == pytest.approx(10 / 30)
    assert both.metrics["gain"] == pytest.approx(10 / 30)
    assert blank.spec_hash != both.spec_hash


def test_items_and_questions_are_chosen_by_hash_whatever_the_batch() -> None:
    def run(**fields: Any) -> list[str]:
        result = QuestionAnsweringConfig(**fields).build().run(Player(), Quiz(), "test")
        return [row["item"] for row in result.items]

    few = run(items=4, questions=2)
    assert len(few) == 8
    assert len({i.split("/")[0] for i in few}) == 4
    assert few == run(items=4, questions=2, batch_size=3)
    assert set(few) < set(run(questions=2))


def test_dialogues_ask_their_first_turn_and_text_alone_is_passed_over() -> None:
    turns = [("What?\n<image>", "a cup"), ("And it?", "red")]
    image = Image.new("RGB", (4, 4))
    assert [(a.question, a.answers) for a in asked_of(Sample("x", image, ("t",), {"turns": turns}))] == [
        ("What?", ("a cup",))
    ]
    several = {"questions": [{"question": "colour?", "answers": ["red", "blue", "red"]}]}
    assert asked_of(Sample("x", image, (), several))[0].answers == ("red", "blue", "red")

    class Mixed(Quiz):
        def sample(self, id: str) -> Sample:
            found = super().sample(id)
            if id == "q-09":
                raise BadSample(id, "damaged")
            if id < "q-05":
                return Sample(id, None, ("text",), found.meta)
            return Sample(id, found.image, (), {"turns": found.meta["turns"]})

    result = QuestionAnsweringConfig(batch_size=3).build().run(Player(), Mixed(), "test")
    assert [row["item"] for row in result.items] == ["q-05", "q-06", "q-07", "q-08"]
    assert result.metrics["accuracy"] == 1.0


def test_results_are_written_and_shown(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    report = evaluate(Player(), Quiz(), "test", [QuestionAnsweringConfig(images="both").build()], tmp_path)
    table = pq.read_table(tmp_path / "items" / "question-answering.parquet").to_pylist()
    assert len(table) == 30
    assert table[0]["gain"] == table[0]["correct"] - table[0]["correct_blank"]
    shown = report["samples"][0]
    assert shown["id"].startswith("q-")
    assert len(shown["output"]) == 3
    assert "how many?" in " ".join(shown["output"])
    skipped = evaluate(object(), Quiz(), "test", [QuestionAnsweringConfig().build()])
    assert skipped["skipped"] == {"question-answering": "the model does not offer generate_text"}


def test_what_cannot_be_asked() -> None:
    with pytest.raises(ConfigError, match="expected shown, blank, both"):
        QuestionAnsweringConfig(images="none")
    with pytest.raises(ConfigError, match="question"):
        QuestionAnsweringConfig(prompt="Answer:")
    with pytest.raises(ConfigError, match="at least 1"):
        QuestionAnsweringConfig(batch_size=0)

    class Silent(Quiz):
        def sample(self, id: str) -> Sample:
            return Sample(id, Image.new("RGB", (4, 4)), ("text",))

    with pytest.raises(DataError, match="no questions about images"):
        QuestionAnsweringConfig().build().run(Player(), Silent(), "test")
