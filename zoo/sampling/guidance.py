"""Classifier-free guidance: how the branches of one prediction are mixed, and how one of its ids is drawn, of text and
of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from zoo.errors import ConfigError, near

FORMS = ("muse", "scale")


def weights(guidance: float, form: str = "muse") -> tuple[float, ...]:
    """The weights of the conditional and the unconditional prediction; one weight where the second is not needed.

    Args:
        guidance: w of ``muse``, (1 + w)c - wu (arXiv 2301.00704 and Show-o, arXiv 2408.12528, eq. 12), or s of
            ``scale``, u + s(c - u) (arXiv 2207.12598 as LlamaGen and aMUSEd write it); s = 1 + w.
        form: One of the two.

    Raises:
        ConfigError: Another form, or a negative guidance.
    """
    if form not in FORMS:
        raise ConfigError(f"guidance_form = {form!r}: expected one of {', '.join(FORMS)}{near(form, FORMS)}")
    if guidance < 0:
        raise ConfigError(f"guidance = {guidance} must be 0 or more")
    scale = 1 + guidance if form == "muse" else guidance
    return (1.0,) if scale == 1 else (scale, 1 - scale)


def image_text_weights(text: float, image: float) -> tuple[float, float, float]:
    """The weights of the full prompt, the prompt with its images alone, and no prompt: u + image·(i - u) +
    text·(f - i) (InstructPix2Pix, arXiv 2211.09800, eq. 3; Chameleon takes text 3.0 and image 1.2)."""
    return text, image - text, 1 - image


def mixed(predictions: Tensor, weights: Sequence[float]) -> Tensor:
    """The weighted sum of branches.

    Args:
        predictions: ``[branches * B, ...]``, all rows of the first branch first.
        weights: One a branch.

    Returns:
        ``[B, ...]``.
    """
    if len(weights) == 1:
        return predictions
    parts = predictions.chunk(len(weights))
    total = weights[0] * parts[0]
    for weight, part in zip(weights[1:], parts[1:], strict=True):
        total = total + weight * part
    return total


def rescaled(guided: Tensor, conditional: Tensor, share: float) -> Tensor:
    """A guided prediction brought towards the deviation of the conditional one, whose images guidance else overexposes
    (arXiv 2305.08891, section 3.4, equations 15 and 16).

    Args:
        guided: ``[B, ...]``.
        conditional: ``[B, ...]``, its branch with the condition.
        share: phi, 0 (as it is) to 1 (the same standard deviation, item by item).
    """
    over = list(range(1, guided.ndim))
    matched = guided * (conditional.std(over, keepdim=True) / guided.std(over, keepdim=True))
    return share * matched + (1 - share) * guided


class Cut(Protocol):
    """What narrows a distribution (``zoo.sampling.text.Decoding``, ``zoo.sampling.codes.CodeDecoding``)."""

    @property
    def temperature(self) -> float: ...
    @property
    def top_k(self) -> int: ...
    @property
    def top_p(self) -> float: ...


def probabilities(logits: Tensor, cut: Cut) -> Tensor:
    """What temperature, then top-k, then top-p leave of a distribution (LlamaGen's ``sample``; transformers'
    ``generate``).

    Args:
        logits: ``[B, K]``.
        cut: Ids level with the k-th likeliest stay, and the id that crosses top_p of what top-k left; a temperature of
            0 counts as 1.

    Returns:
        ``[B, K]`` float32, 0 where an id is left out.
    """
    logits = logits.float() / (cut.temperature or 1.0)
    if cut.top_k and cut.top_k < logits.shape[-1]:
        least = logits.topk(cut.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if cut.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        dropped = ordered.softmax(-1).cumsum(-1) > cut.top_p
        dropped = torch.cat([torch.zeros_like(dropped[:, :1]), dropped[:, :-1]], -1)
        logits = logits.masked_fill(torch.zeros_like(dropped).scatter(1, order, dropped), -torch.inf)
    return logits.softmax(-1)


def drawn(p: Tensor, uniform: Tensor) -> Tensor:
    """One id a row, by the inverse of its cumulative distribution.

    Args:
        p: ``[M, K]`` probabilities, or weights in their proportion.
        uniform: ``[M]`` numbers in [0, 1). A row's id is a function of its own probabilities and number.

    Returns:
        ``[M]`` int64.
    """
    if not len(p):
        return torch.empty(0, dtype=torch.long, device=p.device)
    cdf = p.double().cumsum(-1)  # [M, K]
    place = torch.searchsorted(cdf, uniform.to(cdf)[:, None] * cdf[:, -1:], right=True)[:, 0]
    # rounding must not step behind the last id that has any weight
    last = p.shape[-1] - 1 - (p > 0).flip(-1).long().argmax(-1)
    return place.minimum(last)


def raced(p: Tensor, exponential: Tensor) -> Tensor:
    """One id a row, argmax of p / E with E ~ Exp(1): how ``torch.multinomial`` draws one, for recorded noise.

    Args:
        p: ``[M, K]`` probabilities.
        exponential: ``[M, K]``.

    Returns:
        ``[M]`` int64.
    """
    return (p / exponential).argmax(-1)
