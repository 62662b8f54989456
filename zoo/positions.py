"""Positions of the sequences a model reads: text and images apart, what budgets and costs call tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

IMAGES = ("pixel_values", "other_pixel_values", "image_tokens", "image_codes", "image_latents")
"""What a batch may hold of images, one row an image; all but the second stand for the same images."""

IGNORE = -100


def positions(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Positions of a batch that are no pads, as the part reads them that joins image and text.

    Where images stand among the words (a bridge, one transformer of both) an image counts as many positions as it has
    in that sequence; where they are read apart, as many as its encoder, trunk or tokenizer makes of it. A question and
    its answer both count, and so does what an encoder-decoder language model writes. A model of other modalities counts
    by itself (``positions_of(batch)``), all but text as images.

    Returns:
        [2] int64 on the batch's device: of text, of images.
    """
    own = getattr(model, "positions_of", None)
    if callable(own):
        counted: Tensor = own(batch)
        return counted
    mask = batch.get("attention_mask")
    ids = batch.get("input_ids")
    device = next(iter(batch.values())).device
    if mask is None:
        mask = torch.zeros(0, dtype=torch.bool, device=device) if ids is None else torch.ones_like(ids).bool()
    mask = mask.bool()
    if (slots := batch.get("image_slots")) is not None:
        image = (slots & mask).sum()
        text = mask.sum() - image
    elif ids is not None and (placeholder := getattr(model, "image_token_id", None)) is not None:
        image = (ids == placeholder).sum()
        text = mask.sum() - image
    else:
        count = next((len(batch[key]) for key in IMAGES if key in batch), 0) + len(batch.get("other_pixel_values", ()))
        image = torch.tensor(count * tokens_of_image(model), device=device)
        text = mask.sum()
    if (question := batch.get("question_mask")) is not None:
        text = text + question.bool().sum()
    if getattr(model, "gives_context", False) and "labels" in batch:
        text = text + (batch["labels"] != IGNORE).sum()
    return torch.stack([text, image]).long()


def tokens_of_image(model: Any) -> int:
    """Tokens that the encoder, trunk or image tokenizer of a model makes of one image."""
    for slot in ("encoder", "trunk"):
        found = getattr(getattr(model, slot, None), "tokens", None)
        if isinstance(found, int):
            return found
    return math.prod(getattr(getattr(model, "image_tokenizer", None), "grid", (0,)))
