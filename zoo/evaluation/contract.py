"""What every model's capabilities must hold, as a function that tests of built-in parts and of plugins call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from zoo.capabilities import (
    EmbedImages,
    EmbedTexts,
    GenerateImages,
    GenerateText,
    Match,
    ScorePlainText,
    ScoreText,
    ScoreTexts,
    capabilities_of,
)


def check_capabilities(
    model: Any, images: Sequence[Any], texts: Sequence[str], tolerance: float = 1e-4, max_new_tokens: int = 8
) -> tuple[str, ...]:
    """Check that results depend on their own row only, have the stated shapes, and leave the training mode as it was.

    Every capability is called on all rows at once and on each row alone; results must agree. Give texts of different
    lengths, so that padding is part of the test.

    Args:
        images: N images; texts: N texts.
        tolerance: largest absolute difference allowed in fp32.

    Returns:
        The capabilities that were checked.

    Raises:
        AssertionError: naming the capability and what it broke.
    """
    images, texts = list(images), list(texts)
    assert len(images) == len(texts) > 1, "give at least two images and as many texts"
    was_training = getattr(model, "training", None)
    if isinstance(model, EmbedImages):
        _check_unit("embed_images", _alike("embed_images", model.embed_images, (images,), tolerance), len(images))
    if isinstance(model, EmbedTexts):
        _check_unit("embed_texts", _alike("embed_texts", model.embed_texts, (texts,), tolerance), len(texts))
    if isinstance(model, ScoreText):
        scores = _alike("score_text", model.score_text, (images, texts), tolerance)
        assert scores.shape == (len(texts),), f"score_text gives {tuple(scores.shape)}, expected ({len(texts)},)"
        assert bool((scores <= tolerance).all()), "score_text gives log-likelihoods above nought"
    if isinstance(model, ScorePlainText):
        plain = _alike("score_plain_text", model.score_plain_text, (texts,), tolerance)
        assert plain.shape == (len(texts),), f"score_plain_text gives {tuple(plain.shape)}, expected ({len(texts)},)"
        assert bool((plain <= tolerance).all()), "score_plain_text gives log-likelihoods above nought"
    if isinstance(model, Match):
        matches = _alike("match", model.match, (images, texts), tolerance)
        assert matches.shape == (len(texts),), f"match gives {tuple(matches.shape)}, expected ({len(texts)},)"
    if isinstance(model, ScoreTexts):
        table = _alike("score_candidates", model.score_candidates, (images, [texts] * len(images)), tolerance)
        assert table.shape == (len(images), len(texts)), f"score_candidates gives {tuple(table.shape)}"
        if isinstance(model, ScoreText):
            diagonal = model.score_text(images, texts)
            worst = float((table.diagonal() - diagonal).abs().max())
            assert worst <= tolerance, f"score_candidates differs from score_text by {worst:.2e}"
    if isinstance(model, GenerateText):
        together = model.generate_text(images, max_new_tokens=max_new_tokens)
        alone = [model.generate_text([image], max_new_tokens=max_new_tokens)[0] for image in images]
        assert together == alone, f"generate_text depends on the batch: {together} together, {alone} alone"
    if isinstance(model, GenerateImages):
        _check_drawn(model, texts, tolerance)
    assert getattr(model, "training", None) == was_training, "a capability changed the training mode"
    return capabilities_of(model)


def _alike(name: str, call: Callable[..., Tensor], columns: tuple[list[Any], ...], tolerance: float) -> Tensor:
    """Return the result of all rows at once, checked against each row alone."""
    together = call(*columns)
    assert not together.requires_grad, f"{name} keeps gradients: run it under torch.inference_mode"
    alone = torch.cat([call(*([value] for value in row)) for row in zip(*columns, strict=True)])
    assert together.shape == alone.shape, f"{name}: {tuple(together.shape)} together, {tuple(alone.shape)} alone"
    worst = float((together - alone).abs().max())
    assert worst <= tolerance, f"{name} depends on the batch: rows differ by {worst:.2e}, allowed {tolerance:.0e}"
    return together


def _check_drawn(model: GenerateImages, texts: list[str], tolerance: float) -> None:
    """Images in [0, 1] that follow from the text, the seed and the row: the first row alone is the first of all."""
    state = torch.get_rng_state()
    images = model.generate_images(texts, seed=1)
    assert torch.equal(state, torch.get_rng_state()), "generate_images moves the global random state"
    assert images.ndim == 4, f"generate_images gives {tuple(images.shape)}, expected (N, 3, H, W)"
    assert images.shape[:2] == (len(texts), 3), f"generate_images gives {tuple(images.shape)} for {len(texts)} texts"
    assert images.dtype == torch.float32, f"generate_images gives {images.dtype}, expected float32"
    assert not images.requires_grad, "generate_images keeps gradients: run it under torch.inference_mode"
    assert bool(((images >= 0) & (images <= 1)).all()), "generate_images gives values that are not within 0 and 1"
    assert torch.equal(images, model.generate_images(texts, seed=1)), "generate_images differs with the same seed"
    worst = float((images[:1] - model.generate_images(texts[:1], seed=1)).abs().max())
    assert worst <= tolerance, f"generate_images depends on the batch: row 0 differs by {worst:.2e}"


def _check_unit(name: str, vectors: Tensor, count: int) -> None:
    several = vectors.ndim == 3 and name == "embed_images"
    assert vectors.ndim == 2 or several, f"{name} gives {tuple(vectors.shape)}, expected ({count}, D)"
    assert len(vectors) == count, f"{name} gives {len(vectors)} rows for {count} inputs"
    worst = float((vectors.norm(dim=-1) - 1).abs().max())
    assert worst < 1e-4, f"{name} gives rows of other than unit length, off by {worst:.2e}"
