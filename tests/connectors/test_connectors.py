"""The connectors beside the Q-Former."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import zoo
from zoo.connectors.perceiver_resampler import PerceiverResamplerConfig
from zoo.connectors.pixel_shuffle import PixelShuffleConfig, fold
from zoo.connectors.simple import IdentityConfig, LinearConfig, MLPConfig
from zoo.errors import ConfigError
from zoo.part import Features

Shake = Callable[[nn.Module], nn.Module]


def test_identity() -> None:
    features = Features(torch.randn(2, 5, 8), mask=torch.ones(2, 5, dtype=torch.bool), grid=(2, 2))
    out = IdentityConfig().build(in_width=8, in_tokens=5, out_width=8)(features)
    assert out.tokens is features.tokens
    assert (out.mask is features.mask, out.grid) == (True, (2, 2))
    with pytest.raises(ConfigError, match=r"width 8 to a decoder of width 12"):
        IdentityConfig().build(in_width=8, in_tokens=5, out_width=12)


def test_linear_is_one_matrix_with_bias(shake: Shake) -> None:
    model = LinearConfig().build(in_width=8, in_tokens=5, out_width=12)
    shake(model)
    x = torch.randn(2, 5, 8)
    p = dict(model.named_parameters())
    assert sorted(p) == ["proj.bias", "proj.weight"]
    torch.testing.assert_close(model(Features(x)).tokens, x @ p["proj.weight"].T + p["proj.bias"])


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_mlp_is_linears_with_exact_gelu_between(depth: int, shake: Shake) -> None:
    model = MLPConfig(depth=depth).build(in_width=8, in_tokens=5, out_width=12)
    shake(model)
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert [tuple(m.weight.shape) for m in linears] == [(12, 8)] + [(12, 12)] * (depth - 1)
    x = torch.randn(2, 5, 8)
    expected = x
    for i, linear in enumerate(linears):
        if i:
            expected = 0.5 * expected * (1 + torch.erf(expected / math.sqrt(2)))
        expected = expected @ linear.weight.T + linear.bias
    torch.testing.assert_close(model(Features(x)).tokens, expected, atol=1e-5, rtol=1e-5)


def test_scale_leaves_the_mlps_depth_alone() -> None:
    assert MLPConfig().scaled({"depth": 4, "width": 128}).depth == 2
    with pytest.raises(ValueError, match="depth = 0"):
        MLPConfig(depth=0)


def literal_fold(tokens: Tensor, height: int, width: int, factor: int) -> Tensor:
    rows = []
    for y in range(0, height, factor):
        for x in range(0, width, factor):
            patches = [tokens[:, (y + dy) * width + x + dx] for dy in range(factor) for dx in range(factor)]
            rows.append(torch.cat(patches, -1))
    return torch.stack(rows, 1)


def test_pixel_shuffle_folds_neighbours_and_drops_the_class_token(shake: Shake) -> None:
    tokens = torch.randn(2, 24, 5)
    assert torch.equal(fold(tokens, (4, 6), 2), literal_fold(tokens, 4, 6, 2))
    model = PixelShuffleConfig().build(in_width=5, in_tokens=17, out_width=12)
    shake(model)
    assert model.tokens == 4
    grid = torch.randn(2, 16, 5)
    out = [model(Features(torch.cat([torch.randn(2, 1, 5), grid], 1), grid=(4, 4))) for _ in range(2)]
    assert torch.equal(out[0].tokens, out[1].tokens)
    assert out[0].tokens.shape == (2, 4, 12)
    assert out[0].grid == (2, 2)
    expected = model.proj(model.norm(literal_fold(grid, 4, 4, 2)))
    torch.testing.assert_close(out[0].tokens, expected)


def test_pixel_shuffle_refuses_what_it_cannot_fold() -> None:
    with pytest.raises(ConfigError, match="cannot fold 9 tokens by 2"):
        PixelShuffleConfig().build(in_width=5, in_tokens=9, out_width=12)
    model = PixelShuffleConfig().build(in_width=5, in_tokens=16, out_width=12)
    with pytest.raises(ConfigError, match="gives none"):
        model(Features(torch.randn(1, 16, 5)))


def literal_resampler(p: dict[str, Tensor], media: Tensor, heads: int, depth: int) -> Tensor:
    """One image [N, D], loops over heads; Flamingo's appendix A.1.1."""

    def norm(x: Tensor, name: str) -> Tensor:
        return torch.nn.functional.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"])

    media = media @ p["proj_in.weight"].T + p["proj_in.bias"]
    x = p["latents"]
    for i in range(depth):
        at = f"layers.{i}."
        latents = norm(x, at + "norm_latents")
        keys = torch.cat([norm(media, at + "norm_media"), latents])
        q, kv = latents @ p[at + "q.weight"].T, keys @ p[at + "kv.weight"].T
        k, v = kv.chunk(2, -1)
        size = q.shape[-1] // heads
        read = []
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            read.append((q[:, part] @ k[:, part].T / size**0.5).softmax(-1) @ v[:, part])
        x = x + torch.cat(read, -1) @ p[at + "out.weight"].T
        hidden = norm(x, at + "ffn.0") @ p[at + "ffn.1.weight"].T
        x = x + torch.nn.functional.gelu(hidden) @ p[at + "ffn.3.weight"].T
    return norm(x, "norm") @ p["proj_out.weight"].T + p["proj_out.bias"]


def test_resampler_equals_a_literal_one(shake: Shake) -> None:
    config = PerceiverResamplerConfig(latents=3, width=16, depth=2, heads=2, head_dim=4, ffn=20)
    model = config.build(in_width=10, in_tokens=7, out_width=12)
    shake(model)
    p = dict(model.named_parameters())
    tokens = torch.randn(2, 7, 10)
    out = model(Features(tokens)).tokens
    assert out.shape == (2, 3, 12)
    for row, image in zip(out, tokens, strict=True):
        torch.testing.assert_close(row, literal_resampler(p, image, 2, 2), atol=1e-5, rtol=1e-5)
    # masked tokens are as if they were not there
    mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    short = model(Features(tokens, mask=mask)).tokens
    torch.testing.assert_close(short[0], out[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(short[1], literal_resampler(p, tokens[1, :4], 2, 2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cls", [0, 1])
def test_pooling_averages_squares_of_patches(cls: int, shake: Shake) -> None:
    tokens = torch.randn(2, cls + 24, 8)
    features = Features(tokens, grid=(4, 6))
    model = MLPConfig(pool=2).build(in_width=8, in_tokens=cls + 16, out_width=12)
    shake(model)
    out = model(features)
    patches = tokens[:, cls:].view(2, 4, 6, 8)
    for row in range(2):
        for column in range(3):
            mean = patches[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten(1, 2).mean(1)
            torch.testing.assert_close(out.tokens[:, 3 * row + column], model.proj(mean))
    assert (out.grid, model.tokens) == ((2, 3), 4)


def test_pooling_needs_a_grid_it_divides() -> None:
    with pytest.raises(ConfigError, match=r"pool = 3 cannot average 17 tokens"):
        LinearConfig(pool=3).build(in_width=8, in_tokens=17, out_width=12)
    model = LinearConfig(pool=2).build(in_width=8, in_tokens=16, out_width=12)
    with pytest.raises(ConfigError, match=r"gives none"):
        model(Features(torch.randn(1, 16, 8)))
    with pytest.raises(ConfigError, match=r"does not divide the 3 x 5 grid"):
        model(Features(torch.randn(1, 15, 8), grid=(3, 5)))


@pytest.mark.parametrize(
    ("name", "tokens"), [("linear", 4), ("mlp", 4), ("qformer", 5), ("perceiver-resampler", 5), ("pixel-shuffle", 4)]
)
@pytest.mark.parametrize("cls", [False, True])
def test_every_bridge_gives_as_many_visual_tokens_as_asked_for(name: str, tokens: int, cls: bool) -> None:
    module = zoo.build("llava", connector=name, scale="tiny", encoder={"cls": cls}, wiring={"visual_tokens": tokens})
    features = module.model.image_features(torch.randn(2, 3, 64, 64))
    assert features.shape[1] == module.model.connector.tokens == tokens


def test_numbers_of_tokens_that_patches_cannot_give() -> None:
    with pytest.raises(ConfigError, match=r"16 tokens of the encoder cannot become 5 .* expected one of 16, 4, 1"):
        zoo.build("llava", scale="tiny", wiring={"visual_tokens": 5})
    with pytest.raises(ConfigError, match="IdentityConfig cannot be told"):
        zoo.build("llava", connector="identity", scale="tiny", wiring={"visual_tokens": 4})
