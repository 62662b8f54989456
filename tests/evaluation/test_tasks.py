"""The tasks on fakes whose right answers are known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from zoo.errors import ConfigError, DataError
from zoo.evaluation.catalogue import METRICS
from zoo.evaluation.likelihood import CaptionLikelihoodConfig
from zoo.evaluation.naming import NamingConfig, draw_candidates, normalise
from zoo.evaluation.retrieval import RetrievalConfig
from zoo.evaluation.task import TaskResult, by_hash, choose_ids, sample_ids


def from_items(result: TaskResult, metric: str) -> float:
    """Recompute a metric from the stored rows as its catalogue entry says: what the bootstrap does."""
    info = METRICS[result.name][metric]
    total = sum(row[info.numerator] for row in result.items)
    return total / (sum(row[info.denominator] for row in result.items) if info.denominator else len(result.items))


def test_retrieval_of_a_perfect_model(make_source: Any, towers: Any) -> None:
    result = RetrievalConfig().build().run(towers(), make_source(captions=3), "test")
    assert result.metrics["i2t_r1"] == 1.0
    assert result.metrics["t2i_r1"] == 1.0
    assert result.metrics["i2t_median_rank"] == 1.0
    assert result.metrics["images"] == 40
    assert result.metrics["captions"] == 120
    assert result.samples[0]["output"][0].startswith("the square ")


def test_retrieval_of_a_constant_model_is_nought(make_source: Any, towers: Any) -> None:
    result = RetrievalConfig().build().run(towers(constant=True), make_source(), "test")
    assert result.metrics["i2t_r10"] == 0.0
    assert result.metrics["t2i_median_rank"] == 40


def test_retrieval_against_a_slow_reference(make_source: Any, towers: Any) -> None:
    source, model = make_source(count=30, captions=2, clusters=6), towers(noise=1.2)
    result = RetrievalConfig(batch_size=7, chunk=4).build().run(model, source, "test")
    samples = [source.sample(i) for i in source.ids("test")]
    images = model.embed_images([s.image for s in samples])
    texts = [(n, t) for n, s in enumerate(samples) for t in s.texts]
    scores = (
        images @ model.embed_texts([t for _, t in texts]).T
    )  # [30, 60]; the two captions of one image are equal here
    hits = {1: 0, 5: 0}
    for n in range(30):
        better = sum(scores[n, m] > scores[n, 2 * n] + 1e-6 for m, (owner, _) in enumerate(texts) if owner != n)
        for k in hits:
            hits[k] += bool(better < k)
    assert 0 < hits[1] < 30
    for k, count in hits.items():
        assert result.metrics[f"i2t_r{k}"] == pytest.approx(count / 30)
    assert {row["cluster"] for row in result.items} == {f"c{n}" for n in range(6)}
    for metric in ("i2t_r1", "i2t_r5", "t2i_r1", "t2i_r10"):
        assert from_items(result, metric) == pytest.approx(result.metrics[metric])


def test_equal_captions_are_right_for_every_image_that_has_them(make_source: Any, towers: Any) -> None:
    source = make_source(count=10)
    original = source.sample

    def shared(id: str) -> Any:
        sample = original(id)
        if id in ("item-003", "item-004"):
            sample.texts = ("the square 3",)
        return sample

    source.sample = shared
    result = RetrievalConfig().build().run(towers(), source, "test")
    rows = {row["item"]: row for row in result.items}
    assert rows["item-003"]["i2t_rank"] == 1  # its twin's equal caption is no competitor
    assert rows["item-004"]["t2i_hits_1"] == 1.0  # "the square 3" finds image 3, which carries the same caption
    assert rows["item-004"]["i2t_rank"] > 1


def test_likelihood_by_hand(make_source: Any, writer: Any) -> None:
    result = CaptionLikelihoodConfig().build().run(writer(), make_source(captions=2), "test")
    lengths = [len(f"the square {n}" + " again" * c) for n in range(40) for c in range(2)]
    assert result.metrics["bits_per_byte"] == pytest.approx(0.3 / math.log(2))
    assert result.metrics["bytes"] == sum(lengths)
    assert from_items(result, "bits_per_byte") == pytest.approx(result.metrics["bits_per_byte"])
    assert result.items[0]["nll"] == pytest.approx(0.3 * (lengths[0] + lengths[1]), rel=1e-5)


def test_likelihood_counts_utf8_bytes(make_source: Any, writer: Any) -> None:
    source = make_source(count=3)
    original = source.sample

    def accented(id: str) -> Any:
        sample = original(id)
        sample.texts = (f"l\u2019\u00e9t\u00e9 {int(id[-3:])}",)
        return sample

    source.sample = accented
    result = CaptionLikelihoodConfig(captions="first").build().run(writer(), source, "test")
    assert [row["bytes"] for row in result.items] == [len(b"l") + 3 + 2 + 1 + 2 + 2] * 3


def test_naming_by_likelihood(make_source: Any, writer: Any) -> None:
    model = writer()
    result = NamingConfig(items=20, candidates=10).build().run(model, make_source(), "test")
    assert model.scored == 20 * 10
    for row in result.items:
        n = int(row["item"].split("-")[1])
        assert row["scorer"] == "likelihood"
        assert row["exact_match"] == float(n % 2 == 0), row
        # A two-digit name is one character, 0.3 nats, behind each one-digit name; a digit away costs 0.5.
        assert row["top1"] == 1.0
        assert row["reciprocal_rank"] == 1.0
    assert 0 < result.metrics["exact_match"] < 1
    assert result.metrics["items"] == 20
    assert result.metrics["candidates"] == 10
    for metric in ("top1", "mrr", "exact_match", "top1_per_byte"):
        assert from_items(result, metric) == pytest.approx(result.metrics[metric])


def test_naming_by_similarity(make_source: Any, towers: Any) -> None:
    result = NamingConfig(items=0, candidates=15).build().run(towers(noise=1.5), make_source(), "test")
    assert {row["scorer"] for row in result.items} == {"similarity"}
    assert 0.2 < result.metrics["top1"] < 1.0
    assert result.metrics["top1"] < result.metrics["mrr"] < 1.0
    assert "exact_match" not in result.metrics
    assert "top1_per_byte" not in result.metrics


def test_naming_takes_the_fast_door_with_equal_results(make_source: Any, writer: Any) -> None:
    class Fast(writer):  # type: ignore[misc]
        calls = 0

        def score_candidates(self, images: Any, candidates: Any, prompts: Any = None) -> torch.Tensor:
            self.calls += 1
            return torch.stack(
                [writer.score_text(self, [i] * len(c), c) for i, c in zip(images, candidates, strict=True)]
            )

        def score_text(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            raise AssertionError("the slow door was used")

    slow = NamingConfig(candidates=8).build().run(writer(), make_source(), "test")
    fast_model = Fast()
    fast = NamingConfig(candidates=8).build().run(fast_model, make_source(), "test")
    assert fast_model.calls == 1
    assert fast.metrics == slow.metrics
    assert fast.items == slow.items


def test_candidates_are_fixed_distinct_and_hold_the_name() -> None:
    pool = [f"name {n}" for n in range(300)]
    drawn = draw_candidates("item-7", "name 7", pool, 100)
    assert drawn == draw_candidates("item-7", "name 7", pool, 100)
    assert len(drawn) == len(set(drawn)) == 100
    assert "name 7" in drawn
    assert drawn != draw_candidates("item-8", "name 7", pool, 100)
    places = {draw_candidates(f"i{n}", "name 7", pool, 10).index("name 7") for n in range(60)}
    assert len(places) == 10  # the true name has no favourite place
    assert len(draw_candidates("x", "The name 3", pool[:5], 100)) == 5  # equal after normalisation: not its own rival


@pytest.mark.parametrize("method", ["retrieval", "likelihood", "naming"])
@pytest.mark.parametrize("size", [1, 3, 16])
def test_results_do_not_depend_on_the_batch_size(
    make_source: Any, towers: Any, writer: Any, method: str, size: int
) -> None:
    def run(batch: int) -> TaskResult:
        if method == "retrieval":
            return RetrievalConfig(batch_size=batch).build().run(towers(noise=1.0), make_source(captions=2), "test")
        if method == "likelihood":
            return CaptionLikelihoodConfig(batch_size=batch).build().run(writer(), make_source(captions=2), "test")
        return NamingConfig(batch_size=batch, candidates=12).build().run(writer(), make_source(), "test")

    small, large = run(size), run(64)
    assert small.metrics == pytest.approx(large.metrics)
    assert [row["item"] for row in small.items] == [row["item"] for row in large.items]
    for a, b in zip(small.items, large.items, strict=True):
        assert a == pytest.approx(b) if all(isinstance(v, (int, float)) for v in a.values()) else a.keys() == b.keys()
    assert small.samples == large.samples


def test_images_go_through_in_batches(make_source: Any, towers: Any) -> None:
    model, source = towers(), make_source(count=10)
    seen: list[tuple[str, int, int]] = []
    RetrievalConfig(batch_size=4).build().run(model, source, "test", lambda *step: seen.append(step))
    assert model.batches == [4, 4, 2]
    assert seen == [("retrieval", n, 10) for n in (0, 4, 8, 10)]


def test_normalisation() -> None:
    assert normalise("A  Man: Curly-Hair.\nIt is") == normalise("man curly hair") == "man curly hair"
    assert normalise("The") == "the"  # an article alone is a name
    assert normalise("\uff21 caf\u00c9") == "caf\u00e9"
    assert normalise("red heart") != normalise("heart red")


def test_items_are_chosen_by_hash_and_hold_the_shown_ones(make_source: Any) -> None:
    source = make_source(count=50)
    few, more = choose_ids(source, "test", 13), choose_ids(source, "test", 30)
    assert len(few) == 13
    assert set(few) < set(more)
    assert few == sorted(few)
    assert set(sample_ids(source.ids("test"))) <= set(few)
    assert by_hash(["a", "b", "c"]) == by_hash(["c", "a", "b"])


def test_bad_input_is_named(make_source: Any, towers: Any) -> None:
    with pytest.raises(DataError, match="train split of squares is empty"):
        RetrievalConfig().build().run(towers(), make_source(), "train")
    source = make_source(count=3)
    original = source.sample
    source.sample = lambda id: type(original(id))(id, None, ("x 1",))
    with pytest.raises(DataError, match="item-000 of squares has no image"):
        RetrievalConfig().build().run(towers(), source, "test")
    with pytest.raises(ConfigError, match="candidates = 1"):
        NamingConfig(candidates=1)
    with pytest.raises(ConfigError, match="all or first"):
        CaptionLikelihoodConfig(captions="some")


def test_an_unreadable_item_is_skipped_up_to_the_limit(make_source: Any, towers: Any) -> None:
    from zoo.data.sample import BadSample

    source = make_source(count=8)
    original = source.sample

    def broken(id: str) -> Any:
        if id == "item-005":
            raise BadSample(id, "truncated")
        return original(id)

    source.sample = broken
    with pytest.raises(DataError, match="item-005"):
        RetrievalConfig().build().run(towers(), source, "test")
    source.max_bad = 1
    result = RetrievalConfig(batch_size=3).build().run(towers(), source, "test")
    assert [row["item"] for row in result.items] == [f"item-{n:03d}" for n in range(8) if n != 5]
    assert result.metrics["i2t_r1"] == 1.0
