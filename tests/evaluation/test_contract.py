"""The capability contract passes what holds it and names what does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from zoo.evaluation.contract import check_capabilities


@pytest.fixture
def inputs(make_source: Any) -> tuple[list[Any], list[str]]:
    source = make_source(captions=3)
    samples = [source.sample(i) for i in source.ids("test")[:5]]
    return [s.image for s in samples], [s.texts[n % 3] for n, s in enumerate(samples)]


def test_it_passes_what_holds_it(inputs: Any, towers: Any, writer: Any) -> None:
    assert check_capabilities(towers(noise=0.5), *inputs) == ("embed_images", "embed_texts")
    assert check_capabilities(writer(), *inputs) == ("score_text", "generate_text")


def test_a_batch_dependent_score_is_named(inputs: Any, writer: Any) -> None:
    class Padded(writer):  # type: ignore[misc]
        def score_text(self, images: Any, texts: Any, prompts: Any = None) -> torch.Tensor:
            return super().score_text(images, texts) - 0.01 * max(map(len, texts))  # as unmasked padding would

    with pytest.raises(AssertionError, match="score_text depends on the batch"):
        check_capabilities(Padded(), *inputs)


def test_a_batch_dependent_text_is_named(inputs: Any, writer: Any) -> None:
    class Shy(writer):  # type: ignore[misc]
        def generate_text(self, images: Any, prompts: Any = None, max_new_tokens: int = 32) -> list[str]:
            return ["alone" if len(images) == 1 else "together"] * len(images)

    with pytest.raises(AssertionError, match="generate_text depends on the batch"):
        check_capabilities(Shy(), *inputs)


def test_length_and_mode_are_checked(inputs: Any, towers: Any) -> None:
    class Long(towers):  # type: ignore[misc]
        def embed_images(self, images: Any) -> torch.Tensor:
            return 2 * super().embed_images(images)

    class Forgetful(towers):  # type: ignore[misc]
        training = True

        def embed_texts(self, texts: Any) -> torch.Tensor:
            self.training = False
            return super().embed_texts(texts)

    with pytest.raises(AssertionError, match="other than unit length"):
        check_capabilities(Long(), *inputs)
    with pytest.raises(AssertionError, match="training mode"):
        check_capabilities(Forgetful(), *inputs)


def test_a_fast_door_must_agree_with_the_slow_one(inputs: Any, writer: Any) -> None:
    class Fast(writer):  # type: ignore[misc]
        offset = 0.0

        def score_candidates(self, images: Any, candidates: Any, prompts: Any = None) -> torch.Tensor:
            rows = [self.score_text([i] * len(c), c) for i, c in zip(images, candidates, strict=True)]
            return torch.stack(rows) + self.offset

    good = Fast()
    assert "score_candidates" in check_capabilities(good, *inputs)
    good.offset = 0.1
    with pytest.raises(AssertionError, match=r"differs from score_text by 1\.00e-01"):
        check_capabilities(good, *inputs)
