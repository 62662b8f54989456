"""Where in an image a text is: gradients of the matching score through cross-attention (ALBEF, arXiv 2107.07651).

Grad-CAM on the attention map of one fusion layer, as section 5 and Grounding.py of the release have it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zoo.errors import ConfigError
from zoo.nn.attention import Attention
from zoo.nn.experts import run

if TYPE_CHECKING:
    from zoo.models.fusion import Fusion


@contextmanager
def watched(attention: Attention) -> Iterator[list[Tensor]]:
    """Let an attention compute its weights one by one, [B, heads, T, N], and note them: kernels that are fast do not
    keep them."""
    seen: list[Tensor] = []

    def read(q: Tensor, k: Tensor, v: Tensor, mask: object, causal: bool, route: int) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, heads, T, head]
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if isinstance(mask, Tensor):
            scores = scores + mask
        weights = scores.softmax(-1)
        if not weights.requires_grad:  # every part is frozen
            weights.requires_grad_()
        seen.append(weights)
        return run(attention.out, (weights @ v).transpose(1, 2).flatten(2), route)

    attention.__dict__["_read"] = read  # before the class's own, for this one layer
    try:
        yield seen
    finally:
        del attention.__dict__["_read"]


def grounding_maps(
    model: Fusion,
    pixel_values: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    layer: int | None = None,
) -> Tensor:
    """Maps [B, h, w] of how much each patch of image b makes text b match it, 0 or more.

    The weights A of the layer's cross-attention times their positive gradients of the logit of "match", averaged over
    heads and the text's real tokens.

    Args:
        layer: Index of a layer with cross-attention; two thirds of the way up by default, 8 of 12 as published.

    Raises:
        ConfigError: A layer without cross-attention, or an image encoder without a grid.
    """
    config = model.text_config
    first = config.depth - config.cross_depth
    index = max(first, config.depth * 2 // 3) if layer is None else layer
    if not first <= index < config.depth:
        raise ConfigError(
            f"layer {index} of the text encoder reads no image: choose one from {first} to {config.depth - 1}"
        )
    cross = model.text_encoder.trunk.layers[index].cross
    assert isinstance(cross, Attention)
    with torch.enable_grad(), watched(cross) as seen:
        image = model.encoder(pixel_values)
        if image.grid is None:
            raise ConfigError("the image encoder's tokens are no grid of patches, so that there is no map to draw")
        logits = model.matching_logits(model.fuse(image, input_ids, attention_mask))
        (gradient,) = torch.autograd.grad(logits[:, 1].sum(), seen[0])
    patches = image.grid[0] * image.grid[1]
    maps = (seen[0].detach() * gradient.clamp(min=0))[..., -patches:].mean(1)  # [B, T, patches]
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    weights = real.to(maps) / real.sum(1, keepdim=True)
    return torch.einsum("btp,bt->bp", maps, weights).view(-1, *image.grid)
