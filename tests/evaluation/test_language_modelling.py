"""Bits per byte of text alone: by hand, and what real models score beside their own logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import zoo
from zoo.capabilities import ScorePlainText
from zoo.data.sample import Sample
from zoo.errors import ConfigError, DataError
from zoo.evaluation.language_modelling import LanguageModellingConfig

TEXTS = ["a red cat", "the", "two dogs and a small boat, near a tree: yes"]


class Lines:
    name, version, licence, max_bad = "lines", "1", "CC0-1.0", 0

    def ids(self, split: str) -> list[str]:
        return ["one", "two", "three"] if split == "test" else []

    def sample(self, id: str) -> Sample:
        texts = {"one": ("ab", "abcd", "ab"), "two": ("\u00e9",), "three": ("abc", "")}[id]
        return Sample(id, None, texts, {"cluster": "c"} if id != "two" else {})


class Counts:
    """Half a nat a character and one for the end."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def score_plain_text(self, texts: Sequence[str]) -> Tensor:
        self.batches.append(len(texts))
        return torch.tensor([-0.5 * len(text) - 1.0 for text in texts])


def test_by_hand() -> None:
    model = Counts()
    result = LanguageModellingConfig(batch_size=3).build().run(model, Lines(), "test")
    assert model.batches == [3, 1]
    nats = (1 + 1) + (2 + 1) + (0.5 + 1) + (1.5 + 1)
    assert result.metrics == pytest.approx(
        {"bits_per_byte": nats / math.log(2) / (2 + 4 + 2 + 3), "texts": 4, "bytes": 11}
    )
    rows = {row["item"]: row for row in result.items}
    assert rows["one"]["nll"] == pytest.approx(5.0)
    assert rows["one"]["texts"] == 2
    assert rows["one"]["cluster"] == rows["three"]["cluster"] == "c"
    assert sum(r["bits"] for r in result.items) / sum(r["bytes"] for r in result.items) == pytest.approx(
        result.metrics["bits_per_byte"]
    )
    first = LanguageModellingConfig(texts="first").build().run(Counts(), Lines(), "test")
    assert first.metrics["texts"] == 3


def test_what_cannot_be_asked() -> None:
    with pytest.raises(ConfigError, match="expected all or first"):
        LanguageModellingConfig(texts="none")

    class Mute(Lines):
        def sample(self, id: str) -> Sample:
            return Sample(id, None, ())

    with pytest.raises(DataError, match="has no text"):
        LanguageModellingConfig().build().run(Counts(), Mute(), "test")
    model = LanguageModellingConfig().build()
    assert model.missing(object()) == ("score_plain_text",)


@pytest.mark.parametrize("name", ["llava", "show-o", "transfusion"])
def test_real_models_score_what_their_logits_say(name: str) -> None:
    model: Any = zoo.build(name, scale="tiny", seed=3).model
    with torch.no_grad():
        for parameter in model.decoder.parameters():  # far from uniform, so that places and ends matter
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    assert isinstance(model, ScorePlainText)
    scores = model.score_plain_text(TEXTS)
    words = model.tokenizer
    for text, score in zip(TEXTS, scores.tolist(), strict=True):
        ids = torch.tensor([[words.bos_id, *words.encode([text])[0], words.eos_id]])
        with torch.inference_mode():
            logits = model.eval().text_logits(None, ids)  # [1, T, V]
        model.train()
        logs = logits[0, :-1].float().log_softmax(-1)
        assert score == pytest.approx(float(logs.gather(1, ids[0, 1:, None]).sum()), abs=2e-3)
    assert model.training
    torch.testing.assert_close(scores, torch.cat([model.score_plain_text([t]) for t in TEXTS]), atol=1e-3, rtol=0)
    assert len({round(s / len(t), 2) for s, t in zip(scores.tolist(), TEXTS, strict=True)}) == 3
    with pytest.raises(DataError, match=r"the decoder reads \d+: shorten it"):
        model.score_plain_text(["a", "boat " * 700])
    with pytest.raises(ConfigError, match="wrap it in a list"):
        model.score_plain_text("a cat")


def test_rows_of_text_alone_are_those_of_training() -> None:
    """What is scored is the row that a unified model learns of a text without an image."""
    model: Any = zoo.build("show-o", scale="tiny").model
    words = model.tokenizer
    rows = model.processor([Sample("x", None, (TEXTS[0],))])
    ids = rows["input_ids"][0][rows["attention_mask"][0].bool()].tolist()
    assert ids == [words.bos_id, *words.encode([TEXTS[0]])[0], words.eos_id]


def test_models_that_need_an_image_do_not_offer_it() -> None:
    assert not isinstance(zoo.build("blip2-flan-t5", scale="tiny").model, ScorePlainText)
    assert not isinstance(zoo.build("coca", scale="tiny").model, ScorePlainText)


def test_the_contract_of_plugins_covers_it() -> None:
    from PIL import Image

    from zoo.evaluation.contract import check_capabilities

    images = [Image.new("RGB", (4, 4))] * len(TEXTS)
    assert check_capabilities(Counts(), images, TEXTS) == ("score_plain_text",)

    class ByBatch(Counts):
        def score_plain_text(self, texts: Sequence[str]) -> Tensor:
            return super().score_plain_text(texts) / len(texts)

    class Likely(Counts):
        def score_plain_text(self, texts: Sequence[str]) -> Tensor:
            return -super().score_plain_text(texts)

    with pytest.raises(AssertionError, match="score_plain_text depends on the batch"):
        check_capabilities(ByBatch(), images, TEXTS)
    with pytest.raises(AssertionError, match="above nought"):
        check_capabilities(Likely(), images, TEXTS)
