"""Output connectors against the released code of NExT-GPT and SEED-X, and their own contracts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from zoo import testing
from zoo.connectors.perceiver_resampler import PerceiverResamplerConfig
from zoo.errors import ConfigError
from zoo.output_connectors.mapper import MapperConfig
from zoo.output_connectors.projection import Projection, ProjectionConfig
from zoo.output_connectors.query_resampler import (
    FeatureAdapter,
    QueryResampler,
    QueryResamplerConfig,
    sincos_2d,
)
from zoo.output_connectors.simple import TokenWiseConfig
from zoo.part import Features
from zoo.weights.keymaps import load_into, next_gpt, seed_x

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
NAMES = ("mapper", "projection", "projection-audio", "query-resampler", "linear", "mlp")


def below(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}


@pytest.mark.parametrize("name", NAMES)
def test_contract(name: str) -> None:
    from zoo.plugin import catalogue

    assert name in catalogue()["output_connector"]
    testing.check_output_connector(name)


def projection(g: Any, modality: str) -> Projection:
    c, own = g.config, g.config["modalities"][modality]
    config = ProjectionConfig(
        width=c["hidden_dim"], heads=c["nhead"], ffn=c["ffn"], depth=c["layers"][0], queries=own["num_query_token"]
    )
    model = config.build(in_width=c["in_features"], in_tokens=7, out_width=own["out_features"]).eval()
    load_into(model, below(g.weights, f"{modality}."), next_gpt.keymap())
    return model


@torch.no_grad()
@pytest.mark.parametrize("modality", ["image", "video", "audio"])
def test_next_gpt(golden: Callable[[str], Any], modality: str) -> None:
    """One interface serves 77, 24 and 1 tokens; the embeddings are added before."""
    from zoo.objectives.alignment import distances

    g = golden("next_gpt")
    model = projection(g, modality)
    assert model.adds_embeddings
    states = g.inputs[f"{modality}_hidden"] + g.inputs[f"{modality}_input_emb"]
    out = model(states).tokens
    torch.testing.assert_close(out, g.outputs[f"{modality}_out"], **TOLERANCE)
    assert out.shape[1] == model.outputs == g.config["modalities"][modality]["num_query_token"]
    loss = distances(out, g.inputs[f"{modality}_target"], "euclidean")
    torch.testing.assert_close(loss, g.outputs[f"{modality}_l2"].mean(1), **TOLERANCE)
    torch.testing.assert_close(loss.mean(), g.outputs[f"{modality}_loss"], **TOLERANCE)


def test_next_gpt_saves_the_official_names(golden: Callable[[str], Any]) -> None:
    g = golden("next_gpt")
    model = projection(g, "image")
    own = below(g.weights, "image.")
    saved, unknown = next_gpt.keymap().save(model.state_dict())
    assert unknown == []
    assert set(saved) == set(own)
    assert all(torch.equal(saved[name], own[name]) for name in saved)
    old, _ = next_gpt.keymap(legacy=True).save(model.state_dict())
    assert {"fc.weight", "model.bias"} <= set(old)


@torch.no_grad()
def test_seed_x_resamplers(golden: Callable[[str], Any]) -> None:
    g = golden("seed_x")
    c = g.config
    into, out = c["input_resampler"], c["output_resampler"]
    first = QueryResampler(into["grid"] ** 2, into["embed_dim"], into["heads"], into["kv_dim"]).eval()
    load_into(first, below(g.weights, "input_resampler."), seed_x.RESAMPLER)
    read = first(g.inputs["vit"])  # 16 keys on a grid of 4, 4 queries on one of 2
    torch.testing.assert_close(read, g.outputs["input_resampler"], **TOLERANCE)
    second = QueryResampler(out["grid"] ** 2, out["embed_dim"], out["heads"], out["kv_dim"]).eval()
    load_into(second, below(g.weights, "output_resampler."), seed_x.RESAMPLER)
    torch.testing.assert_close(second(read), g.outputs["output_resampler"], **TOLERANCE)
    torch.testing.assert_close(second(g.outputs["gen_hidden"]), g.outputs["recon"], **TOLERANCE)
    torch.testing.assert_close(sincos_2d(out["embed_dim"], out["grid"]), g.weights["output_resampler.pos_embed"])


@torch.no_grad()
def test_seed_x_adapter(golden: Callable[[str], Any]) -> None:
    g = golden("seed_x")
    a = g.config["adapter"]
    config = PerceiverResamplerConfig(
        latents=a["num_queries"], width=a["dim"], depth=a["depth"], heads=a["heads"], head_dim=a["dim_head"],
        ffn=a["dim"] * a["ff_mult"],
    )  # fmt: skip
    widths = (a["output1_dim"], a["output2_dim"])
    model = FeatureAdapter(config, a["embedding_dim"], sum(widths), a["output2_dim"]).eval()
    weights = below(g.weights, "adapter.")
    load_into(model, weights, seed_x.adapter(widths))
    for inputs, suffix in ((g.inputs["vit"], ""), (torch.zeros_like(g.inputs["vit"][:1]), "_zero")):
        got = model(Features(inputs))
        torch.testing.assert_close(got.tokens, g.outputs[f"prompt_embeds{suffix}"], **TOLERANCE)
        torch.testing.assert_close(got.pooled, g.outputs[f"pooled{suffix or '_embeds'}"], **TOLERANCE)
    saved, unknown = seed_x.adapter(widths).save(model.state_dict())
    assert unknown == []
    assert all(torch.equal(saved[name], weights[name]) for name in weights)


@torch.no_grad()
def test_seed_x_regression(golden: Callable[[str], Any]) -> None:
    """The part as a whole, and its two losses against the released forward pass."""
    from zoo.objectives.alignment import distances

    g = golden("seed_x")
    c = g.config["output_resampler"]
    config = QueryResamplerConfig(queries=c["grid"] ** 2, feature_heads=c["heads"], width=16, heads=2, depth=1, ffn=32)
    model = config.build(in_width=c["kv_dim"], in_tokens=4, out_width=20, image_width=c["embed_dim"], image_tokens=16)
    load_into(model.resampler, below(g.weights, "output_resampler."), seed_x.RESAMPLER)
    aligned = model.eval().align(g.outputs["gen_hidden"])
    target = model.target(g.inputs["vit"][g.inputs["embeds_gen_mask"]])
    rec = distances(aligned, target, "mse").mean()
    torch.testing.assert_close(rec, g.outputs["rec_loss"], **TOLERANCE)
    torch.testing.assert_close(distances(aligned, target, "cosine").mean(), g.outputs["rec_loss_cosine"], **TOLERANCE)
    total = g.config["lm_loss_scale"] * g.outputs["lm_loss"] + g.config["rec_loss_scale"] * rec
    torch.testing.assert_close(total, g.outputs["total_loss"], **TOLERANCE)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_published_sizes() -> None:
    """Counted on the released code (cards of MiniGPT-5, section 2, and of the three systems, section 3)."""
    with torch.device("meta"):
        minigpt5 = MapperConfig().build(in_width=4096, in_tokens=8, out_width=1024)
        next_gpt_sd2 = ProjectionConfig().build(in_width=4096, in_tokens=4, out_width=1024)
        adapter = FeatureAdapter(
            PerceiverResamplerConfig(width=1024, depth=4, heads=16, head_dim=64, latents=64), 4096, 2048, 1280
        )
    transformer = nn.ModuleList([minigpt5.encoder, minigpt5.decoder])
    assert round(count(transformer) / 1e6, 1) == 117.6
    assert round(count(minigpt5) / 1e6, 1) == 122.9
    assert round(count(next_gpt_sd2) / 1e6, 1) == 32.1
    assert round(count(adapter) / 1e6, 1) == 61.2
    assert (minigpt5.outputs, next_gpt_sd2.outputs) == (77, 77)


def test_the_number_of_states_does_not_change_the_condition() -> None:
    model = MapperConfig(width=16, heads=2, ffn=32, depth=1).build(in_width=8, in_tokens=8, out_width=16)
    for states in (1, 4, 8):
        assert model(torch.zeros(2, states, 8)).tokens.shape == (2, 77, 16)


def test_bad_input() -> None:
    config = QueryResamplerConfig(queries=4, feature_heads=2)
    sizes = {"in_width": 8, "out_width": 16, "image_width": 8}
    with pytest.raises(ConfigError, match="square grid"):
        config.build(in_tokens=8, image_tokens=16, **sizes)
    with pytest.raises(ConfigError, match="17 patches to 4"):
        config.build(in_tokens=4, image_tokens=17, **sizes)
    with pytest.raises(ConfigError, match="feature_heads = 3"):
        QueryResamplerConfig(queries=4, feature_heads=3).build(in_tokens=4, image_tokens=16, **sizes)
    with pytest.raises(ValueError, match="multiple of heads"):
        MapperConfig(width=10, heads=4)
    with pytest.raises(ValueError, match="depth = 0"):
        TokenWiseConfig(depth=0)
