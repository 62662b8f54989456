"""What an image with one target costs at the published sizes, counted on the meta device: PixelLM beside LISA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from zoo.recipe import resolve


def flops(run: Any, *inputs: Any) -> float:
    """TFLOPs of a call, a multiply-add as two."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        run(*inputs)
    return counter.get_total_flops() / 1e12


@pytest.mark.slow
def test_half_of_lisas_forward_pass() -> None:
    whole, eye, read, draw = (dict[str, float]() for _ in range(4))
    for system in ("lisa", "pixellm"):
        recipe = resolve(f"{system}-7b")
        with torch.device("meta"):
            model: Any = recipe.wiring[1].build(recipe.parts, 0).eval()
        batch = model.example_batch(1)
        whole[system] = flops(model, batch)
        decoder, pixels, masks = model.mask_decoder, batch["pixel_values"], batch.get("mask_pixels")
        eye[system] = flops(model.encoder, pixels)
        with torch.no_grad():
            levels = model.encoder.levels(pixels, decoder.layers) if masks is None else []
            seen = decoder.encode(masks, levels)
        read[system] = flops(decoder.encode, masks, levels)
        prompts = torch.zeros(1, decoder.prompts, decoder.width, device="meta")
        draw[system] = flops(decoder.decode, seen, prompts, torch.zeros(1, dtype=torch.long, device="meta"))
    # docs/families/pixellm.md has these numbers
    assert whole == pytest.approx({"lisa": 9.69, "pixellm": 4.46}, abs=0.02)
    assert eye == pytest.approx({"lisa": 0.155, "pixellm": 0.693}, abs=0.002)
    assert read == pytest.approx({"lisa": 5.961, "pixellm": 0.179}, abs=0.002)
    assert draw == pytest.approx({"lisa": 0.0036, "pixellm": 0.0044}, abs=2e-4)
