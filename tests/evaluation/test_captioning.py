"""CIDEr-D, BLEU-4 and ROUGE-L beside pycocoevalcap's values, and the task on a model whose captions are known."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from zoo.errors import ConfigError
from zoo.evaluation.caption_metrics import Bleu, CiderD, caption_words, rouge_l, smoothed_bleu
from zoo.evaluation.captioning import CaptioningConfig
from zoo.evaluation.catalogue import METRICS

GOLDEN = json.loads((Path(__file__).parents[1] / "goldens/evaluation/caption_scores.json").read_text())
CANDIDATES = [row[0].split() for row in GOLDEN["items"]]
REFERENCES = [[r.split() for r in row[1]] for row in GOLDEN["items"]]


def test_cider_d_is_that_of_coco_caption() -> None:
    metric = CiderD()
    metric.update(CANDIDATES, REFERENCES)
    found = metric.compute()
    assert found["scores"].tolist() == pytest.approx([row[2] for row in GOLDEN["items"]], abs=1e-12)
    assert float(found["score"]) == pytest.approx(GOLDEN["corpus"]["cider_d"], rel=1e-12)
    assert sum(row[2] > 0 for row in GOLDEN["items"]) > 20


def test_bleu_and_rouge_are_those_of_coco_caption() -> None:
    assert float(Bleu().add(CANDIDATES, REFERENCES).compute()) == pytest.approx(GOLDEN["corpus"]["bleu4"], abs=1e-6)
    found = [rouge_l(c, own) for c, own in zip(CANDIDATES, REFERENCES, strict=True)]
    assert found == pytest.approx([row[3] for row in GOLDEN["items"]], abs=1e-12)


def test_document_frequencies_are_those_of_all_processes() -> None:
    """Two ranks that gather each other's states give what one process gives for everything."""
    ranks = [CiderD(), CiderD()]
    parts = [slice(0, 13), slice(13, None)]
    for metric, part in zip(ranks, parts, strict=True):
        metric.update(CANDIDATES[part][:5], REFERENCES[part][:5])
        metric.update(CANDIDATES[part][5:], REFERENCES[part][5:])
    states = [torch.cat(list(metric.captions)) for metric in ranks]
    for metric in ranks:
        metric.distributed_available_fn = lambda: True
        metric.dist_sync_fn = lambda tensor, group=None: states
    for metric in ranks:
        found = metric.compute()
        assert found["scores"].tolist() == pytest.approx([row[2] for row in GOLDEN["items"]], abs=1e-12)
    alone = CiderD()
    alone.update(CANDIDATES[parts[0]], REFERENCES[parts[0]])
    assert alone.compute()["scores"].tolist() != pytest.approx([row[2] for row in GOLDEN["items"][:13]], abs=1e-3)


def test_corners_of_the_metrics() -> None:
    one = CiderD()
    one.update([["a", "cat"]], [[["a", "cat"]]])
    assert float(one.compute()["score"]) == 0.0  # every word is in every document
    with pytest.raises(ValueError, match="reference"):
        one.update([["a"]], [[]])
    with pytest.raises(ValueError, match="reference"):
        rouge_l(["a"], [])
    assert rouge_l([], [["a"]]) == 0.0
    beta = 1.2**2  # precision 2/3 from the first, recall 1 from the second
    expected = (1 + beta) * (2 / 3) * 1 / (1 + beta * 2 / 3)
    assert rouge_l(["a", "b", "c"], [["a", "x", "b", "y"], ["c"]]) == pytest.approx(expected)
    # two references as far away, 2 and 4 words: the shorter counts, so that no brevity is punished
    assert float(Bleu().add([["a", "b", "c"]], [[["a", "b", "c", "d"], ["a", "b"]]]).target_len) == 2.0


def test_smoothed_bleu_by_hand() -> None:
    reference = [["the", "cat", "sat", "on", "the", "mat"]]
    value = smoothed_bleu(["the", "cat", "sat", "there"], reference)
    precisions = [3 / 4, (2 + 1) / (3 + 1), (1 + 1) / (2 + 1), (0 + 1) / (1 + 1)]
    assert value == pytest.approx(math.prod(precisions) ** 0.25 * math.exp(1 - 6 / 4))
    assert smoothed_bleu(reference[0], reference) == pytest.approx(1.0)
    assert smoothed_bleu([], reference) == smoothed_bleu(["dog"], reference) == 0.0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A cat, a dog (and 3,000 birds).", "a cat a dog and 3,000 birds"),
        ("Don't touch the man's T-shirt!", "do n't touch the man 's t-shirt"),
        ("It\u2019s \u201cgo\u201d -- they're off...", "it 's go they 're off"),
        ("can't won't I'd", "ca n't wo n't i 'd"),
        ("the dogs' toy", "the dogs toy"),
        ("caf\u00e9 n\u00b0 5", "caf\u00e9 n \u00b0 5"),
        ("", ""),
    ],
)
def test_words(text: str, words: str) -> None:
    assert caption_words(text) == words.split()


def test_the_task_by_hand(make_source: Any, writer: Any) -> None:
    result = CaptioningConfig(items=20, batch_size=7).build().run(writer(), make_source(captions=2), "test")
    assert len(result.items) == 20
    words = [caption_words(row["output"]) for row in result.items]
    wanted = [[f"the square {int(r['item'][-3:])}{more}".split() for more in ("", " again")] for r in result.items]
    cider = CiderD()
    cider.update(words, wanted)
    assert [row["cider_d"] for row in result.items] == pytest.approx(cider.compute()["scores"].tolist())
    assert result.metrics["cider_d"] > 1
    assert [row["rouge_l"] for row in result.items] == pytest.approx(
        [rouge_l(c, own) for c, own in zip(words, wanted, strict=True)]
    )
    assert result.metrics["bleu4"] == 0.0  # captions of two words have no four in a row
    assert result.metrics["bits_per_byte"] == pytest.approx(0.3 / math.log(2))  # what FakeWriter's scores come to
    assert result.metrics["references"] == 40
    for name, info in METRICS["captioning"].items():
        if info.numerator:
            below = sum(r[info.denominator] for r in result.items) if info.denominator else len(result.items)
            assert sum(r[info.numerator] for r in result.items) / below == pytest.approx(result.metrics[name])
    again = CaptioningConfig(items=20, batch_size=20).build().run(writer(), make_source(captions=2), "test")
    assert again.metrics == pytest.approx(result.metrics)


def test_a_writer_that_does_not_score_has_no_bits(make_source: Any, writer: Any) -> None:
    class Writes:
        generate_text = writer.generate_text

    result = CaptioningConfig(references="first").build().run(Writes(), make_source(captions=3), "test")
    assert "bits_per_byte" not in result.metrics
    assert result.metrics["references"] == 40


def test_everything_that_changes_numbers_is_hashed(make_source: Any) -> None:
    changes: list[dict[str, Any]] = [
        {"items": 3}, {"batch_size": 2}, {"references": "first"}, {"prompt": "describe"}, {"max_new_tokens": 9}, {},
    ]  # fmt: skip
    hashes = {CaptioningConfig(**fields).build().spec_hash(make_source(), "test") for fields in changes}
    assert len(hashes) == len(changes)
    assert CaptioningConfig().build().spec(make_source(), "test")["words"] == "plain/1"


def test_what_cannot_be_asked() -> None:
    with pytest.raises(ConfigError, match="expected all or first"):
        CaptioningConfig(references="some")
    with pytest.raises(ConfigError, match="at least 1"):
        CaptioningConfig(max_new_tokens=0)
