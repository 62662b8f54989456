"""The pictures between two frames of a story.

``latents`` interpolates the two frames' latents: no model of motion at all, the baseline of the paper. ``motion`` asks
a motion predictor for the embeddings in between and draws an image from the text and each of them (section 3.2 of arXiv
2405.01434, with a model of single images in place of the paper's model of videos).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from zoo.data.sheet import to_picture
from zoo.errors import ConfigError
from zoo.models.base import evaluating
from zoo_stories.drawing import decoded

TRANSITIONS = ("none", "latents", "motion")


def between(
    model: Any,
    images: Tensor,
    prompts: Sequence[str],
    how: str,
    count: int,
    *,
    predictor: Any = None,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    sampler: str | None = None,
) -> list[Tensor]:
    """For each two neighbours of ``images`` [N, 3, H, W] the ``count`` images between them, [count, 3, H, W].

    Args:
        how: ``latents`` or ``motion``.
        predictor: A motion predictor, for ``motion``.

    Raises:
        ConfigError: A model that draws from no embeddings, or a predictor that is none.
    """
    if how == "latents":
        latents = encoded(model, images)
        return [decoded_parts(model, interpolated(one, other, count + 2)[1:-1]) for one, other in pairwise(latents)]
    predictor = getattr(predictor, "model", predictor)
    if not hasattr(predictor, "predict_motion"):
        raise ConfigError("the motion predictor predicts no motion: take a run of model=motion-predictor")
    if not hasattr(model, "draw_embeddings"):
        raise ConfigError(
            "transitions='motion' needs a model that draws from embeddings of images: a run of frame-diffusion, or"
            " transitions='latents'"
        )
    pictures = [to_picture(image) for image in images]
    moves = predictor.predict_motion(pictures[:-1], pictures[1:], count + 2)  # [N - 1, count + 2, D]
    return [
        model.draw_embeddings(
            [prompts[n] if 2 * place < count else prompts[n + 1] for place in range(count)], move[1:-1],
            seed=seed, steps=steps, guidance=guidance, sampler=sampler,
        )
        for n, move in enumerate(moves)
    ]  # fmt: skip


def interpolated(one: Tensor, other: Tensor, count: int) -> Tensor:
    """``count`` points [count, ...] of the line from ``one`` to ``other``, both ends included."""
    share = torch.linspace(0, 1, count, device=one.device, dtype=one.dtype).view(-1, *(1,) * one.ndim)
    # of this form, so that both ends are met bit for bit
    return one * (1 - share) + other * share


def encoded(model: Any, images: Tensor) -> Tensor:
    """Latents [N, C, h, w] of images [N, 3, H, W] in [0, 1]."""
    like = next(model.image_tokenizer.parameters())
    with evaluating(model):
        pixels = model.processor.encode_images([to_picture(image) for image in images])
        latents: Tensor = model.image_tokenizer.encode(pixels.to(like.device, like.dtype)).float()
    return latents


def decoded_parts(model: Any, latents: Tensor, size: int = 8) -> Tensor:
    with evaluating(model):
        return torch.cat([decoded(model, part) for part in torch.split(latents, size)]).cpu()
