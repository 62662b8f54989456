"""Patches and the two codecs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.patch_codecs.base import PATCHES, patchify, unpatchify
from zoo.patch_codecs.linear import LinearCodecConfig
from zoo.patch_codecs.unet import UNetCodecConfig
from zoo.plugin import catalogue
from zoo.testing.config import shake


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_patches_are_the_golden(golden: Callable[[str], Any]) -> None:
    g = golden("transfusion")
    assert torch.equal(patchify(g.outputs["x_t"], 2), g.outputs["patches"])


@pytest.mark.parametrize("patch", PATCHES)
def test_patches_come_back_together(patch: int) -> None:
    latents = draws(2, 3, 16, 8)
    patches = patchify(latents, patch)
    assert patches.shape == (2, (16 // patch) * (8 // patch), 3 * patch * patch)
    assert torch.equal(unpatchify(patches, patch, (16, 8)), latents)
    # row-major: the second patch lies to the right of the first, inside it channels run fastest
    if patch < 8:
        assert torch.equal(patches[0, 1, :3], latents[0, :, 0, patch])
    assert torch.equal(patches[0, 8 // patch, :3], latents[0, :, patch, 0])


def test_linear_codec_is_the_golden(golden: Callable[[str], Any]) -> None:
    g = golden("transfusion")
    codec = LinearCodecConfig(patch=2).build(channels=4, width=32)
    codec.load_state_dict({k: v for k, v in g.weights.items() if k.startswith("patch_")})
    tokens, skips = codec.encode(g.outputs["x_t"], g.inputs["t"])
    rows = g.inputs["image_rows"].tolist()
    expected = torch.stack([g.outputs["inputs_embeds"][row, at : at + 4] for row, at in rows])
    torch.testing.assert_close(tokens, expected, atol=1e-6, rtol=1e-5)
    hidden = torch.stack([g.outputs["hidden"][row, at : at + 4] for row, at in rows])
    found = codec.decode(hidden, skips, g.inputs["t"], (4, 4))
    torch.testing.assert_close(patchify(found, 2), g.outputs["eps_pred"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("patch", PATCHES)
@pytest.mark.parametrize("kind", [LinearCodecConfig(), UNetCodecConfig(stem_width=8, blocks=2, level_width=6)])
def test_both_codecs_exist_for_every_patch(kind: Any, patch: int) -> None:
    codec: Any = shake(dataclasses.replace(kind, patch=patch).build(channels=3, width=20))
    x, level = draws(2, 3, 8, 16), torch.tensor([0.0, 700.0])
    tokens, skips = codec.encode(x, level)
    assert tokens.shape == (2, codec.cells((8, 16)), 20) == (2, 128 // patch**2, 20)
    out = codec.decode(draws(2, tokens.shape[1], 20, seed=1), skips, level, (8, 16))
    assert out.shape == x.shape
    if patch > 1:
        with pytest.raises(ConfigError, match="do not divide into patches"):
            codec.cells((8, 9))


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_skips_lead_around_the_trunk(patch: int) -> None:
    torch.manual_seed(0)
    config = UNetCodecConfig(patch=patch, stem_width=8, blocks=2, level_width=6)
    codec: Any = shake(config.build(channels=3, width=20))  # library weights, gains not 1, biases not 0
    x, level = draws(2, 3, 8, 8), torch.tensor([100.0, 700.0])
    _, skips = codec.encode(x, level)
    grids = [1, 2, 3][PATCHES.index(patch)]
    assert len(skips) == 2 * grids  # one a residual block
    assert [s.shape[-1] for s in skips] == sorted((8 // 2**i for i in range(grids) for _ in range(2)), reverse=True)
    states = draws(2, codec.cells((8, 8)), 20, seed=1)
    out = codec.decode(states, skips, level, (8, 8))
    for place in range(len(skips)):
        other = tuple(s + (i == place) for i, s in enumerate(skips))
        assert (codec.decode(states, other, level, (8, 8)) - out).abs().max() > 1e-3
    assert (codec.decode(states + 1, skips, level, (8, 8)) - out).abs().max() > 1e-3
    assert (codec.decode(states, skips, level + 100, (8, 8)) - out).abs().max() > 1e-3
    assert not any(isinstance(m, nn.GroupNorm | nn.BatchNorm2d) for m in codec.modules())


@pytest.mark.parametrize("width", [768, 1024, 1536, 2048, 4096])
def test_published_codecs_have_the_papers_size(width: int) -> None:
    """Section 4.1 and footnotes: under half a percent, and 0.27B parameters whatever the trunk."""
    with torch.device("meta"):
        unet = catalogue()["patch_codec"].parse("unet").build(channels=8, width=width)
        linear = catalogue()["patch_codec"].parse("linear").build(channels=8, width=width)
    assert round(sum(p.numel() for p in unet.parameters()) / 1e9, 2) == 0.27
    assert sum(p.numel() for p in linear.parameters()) < 0.005 * 162e6


def test_wrong_patch_is_one_line() -> None:
    with pytest.raises(ConfigError, match="patch = 3 must be one of 1, 2, 4, 8"):
        catalogue()["patch_codec"].parse("linear", {"patch": 3})
