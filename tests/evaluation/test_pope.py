"""POPE: which objects are asked for, how answers are read, and the measures beside sums over the stored rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from PIL import Image

from zoo.data.sample import Sample
from zoo.errors import ConfigError, DataError
from zoo.evaluation.catalogue import METRICS, STRATEGIES
from zoo.evaluation.hallucination import (
    ObjectCounts,
    PopeConfig,
    objects_of,
    poll,
    read_first,
    read_released,
    says_either,
)

IMAGES = [
    ["cat", "dog", "cup"], ["cat", "dog"], ["cat", "dog", "tree"], ["cat", "tree"], ["cat", "car"],
    ["cup", "tree"], ["weary cat", "boat"], ["boat", "car"],
]  # fmt: skip
NAMES = ("cat", "dog", "cup", "tree", "car", "weary cat", "boat")


class Shelf:
    """Images of so many grey levels, whose objects are known; the first named twice, as two of a kind are."""

    name, version, licence, max_bad = "shelf", "1", "CC0-1.0", 0

    def ids(self, split: str) -> list[str]:
        return [f"s-{n}" for n in range(len(IMAGES))] if split == "test" else []

    def text_sample(self, id: str) -> Sample:
        names = IMAGES[int(id[2:])]
        return Sample(id, None, ("a shelf",), {"objects": [{"name": n} for n in [names[0], *names]]})

    def sample(self, id: str) -> Sample:
        found = self.text_sample(id)
        n = int(id[2:])
        return Sample(id, Image.new("RGB", (4, 4), (n, n, n)), found.texts, found.meta)


class Sees:
    """Answers rightly; ``wrong`` says of which objects it sees one that is not there, ``blind`` of which none."""

    def __init__(self, wrong: Sequence[str] = (), blind: Sequence[str] = ()) -> None:
        self.wrong, self.blind, self.batches = wrong, blind, list[int]()

    def generate_text(self, images: Sequence[Any], prompts: Any = None, max_new_tokens: int = 32) -> list[str]:
        self.batches.append(len(images))
        out = []
        for image, prompt in zip(images, prompts, strict=True):
            asked = prompt.removeprefix("a ").removesuffix("?")
            there = asked in IMAGES[image.getpixel((0, 0))[0]]
            out.append(" Yes" if (there or asked in self.wrong) and asked not in self.blind else "no.")
        return out


def run(model: Any, **fields: Any) -> Any:
    return PopeConfig(question="a {object}?", **fields).build().run(model, Shelf(), "test")


def test_counts() -> None:
    counts = ObjectCounts.of(objects_of(Shelf().text_sample(i)) for i in Shelf().ids("test"))
    assert counts.shown == {"cat": 5, "dog": 3, "tree": 3, "cup": 2, "car": 2, "weary cat": 1, "boat": 2}
    assert counts.ranked(counts.shown)[:3] == ["cat", "dog", "tree"]
    assert counts.ranked(counts.together["cat"])[0] == "dog"


def test_what_is_missing_by_strategy() -> None:
    counts = ObjectCounts.of(IMAGES)
    asked = poll("x", ["tree"], counts, pairs=3)
    there, *missing = asked
    assert there.object == "tree"
    assert there.strategies == STRATEGIES
    chosen = {s: [p.object for p in missing if s in p.strategies] for s in STRATEGIES}
    assert chosen["popular"] == ["cat"]  # most frequent
    assert chosen["adversarial"] == ["cat"]  # most often beside a tree
    assert len(chosen["random"]) == 1
    assert next(p for p in missing if p.object == "cat").strategies[-2:] == ("popular", "adversarial")

    asked = poll("y", ["cat", "tree"], counts, pairs=2)
    chosen = {s: [p.object for p in asked if not p.there and s in p.strategies] for s in STRATEGIES}
    assert set(chosen["popular"]) == {"dog", "boat"}  # three times; of those shown twice the first in the alphabet
    assert set(chosen["adversarial"]) == {"dog", "cup"}  # beside a cat, beside a tree
    everything = {name for names in chosen.values() for name in names}
    assert "weary cat" not in everything  # nobody can say that there is none beside a cat
    assert not everything & {"cat", "tree"}
    assert all(len(set(names)) == 2 for names in chosen.values())
    assert poll("y", ["cat", "tree"], counts, pairs=2) == asked
    assert len({tuple(p.object for p in poll(str(n), ["cat", "tree"], counts, 1)) for n in range(20)}) > 2


def test_random_fills_up_where_nothing_was_shown_together() -> None:
    counts = ObjectCounts.of([["a"], ["b"], ["c"]])
    adversarial = [p for p in poll("x", ["a"], counts, 1) if "adversarial" in p.strategies and not p.there]
    assert len(adversarial) == 1
    assert adversarial[0].object in ("b", "c")
    assert poll("x", ["a", "b", "c"], counts, 3) == []  # nothing is missing: no question at all


@pytest.mark.parametrize(
    ("answer", "released", "first", "either"),
    [
        ("Yes, there is a cat.", "yes", "yes", True),
        ("No, there is not.", "no", "no", True),
        ("no", "no", "no", True),
        ("There is not a cat", "no", "no", True),
        ("There is a cat. No dog.", "yes", "no", True),
        ("NO", "yes", "no", True),  # as released: the word is No, no or not
        ("nothing", "yes", "no", False),
        ("", "yes", "no", False),
        ("a cat", "yes", "no", False),
    ],
)
def test_how_answers_are_read(answer: str, released: str, first: str, either: bool) -> None:
    assert (read_released(answer), read_first(answer), says_either(answer)) == (released, first, either)


def test_measures_of_perfect_and_of_agreeing_models() -> None:
    model = Sees()
    perfect = run(model, batch_size=5)
    assert set(model.batches[:-1]) == {5}
    for name in ("accuracy", "precision", "recall", "f1"):
        assert all(perfect.metrics[f"{name}{s}"] == 1.0 for s in ("", *(f"_{x}" for x in STRATEGIES)))
    assert perfect.metrics["yes_ratio"] == 0.5
    assert perfect.metrics["unread"] == 0.0
    agrees = run(Sees(wrong=NAMES))
    assert agrees.metrics["accuracy"] == agrees.metrics["precision"] == 0.5
    assert agrees.metrics["recall"] == agrees.metrics["yes_ratio"] == 1.0
    denies = run(Sees(blind=NAMES))
    assert denies.metrics["accuracy"] == 0.5
    assert denies.metrics["precision"] == denies.metrics["recall"] == denies.metrics["f1"] == 0.0


def test_measures_follow_from_the_rows() -> None:
    result = run(Sees(wrong=["dog", "boat"], blind=["tree"]), batch_size=4)
    assert 0 < result.metrics["f1_adversarial"] < result.metrics["recall_random"] < 1
    for name, info in METRICS["pope"].items():
        below = sum(r[info.denominator] for r in result.items) if info.denominator else len(result.items)
        assert sum(r[info.numerator] for r in result.items) / below == pytest.approx(result.metrics[name]), name
    for strategy in STRATEGIES:
        rows = [r for r in result.items if r[f"asked_{strategy}"]]
        assert sum(r[f"is_yes_{strategy}"] for r in rows) == len(rows) / 2
        for row in rows:
            there = IMAGES[int(row["sample"][2:])]
            assert (row["object"] in there) == (row["reference"] == "yes")
    assert len({row["item"] for row in result.items}) == len(result.items)
    assert run(Sees(wrong=["dog", "boat"], blind=["tree"])).items == result.items  # whatever the batch


def test_what_cannot_be_asked() -> None:
    with pytest.raises(ConfigError, match="released or first"):
        PopeConfig(parse="any")
    with pytest.raises(ConfigError, match="object"):
        PopeConfig(question="is it there?")
    with pytest.raises(ConfigError, match="question"):
        PopeConfig(prompt="Q:")
    with pytest.raises(ConfigError, match="at least 1"):
        PopeConfig(pairs=0)

    class Bare(Shelf):
        def text_sample(self, id: str) -> Sample:
            return Sample(id, None, ("a shelf",), {})

    with pytest.raises(DataError, match="names 0 objects"):
        PopeConfig().build().run(Sees(), Bare(), "test")
    hashes = {PopeConfig(parse=p).build().spec_hash(Shelf(), "test") for p in ("released", "first")}
    assert len(hashes) == 2


def test_articles() -> None:
    config = PopeConfig(question="is there {an_object} here?")
    assert config.build()._question("apple") == "is there an apple here?"
    assert config.build()._question("cat") == "is there a cat here?"
