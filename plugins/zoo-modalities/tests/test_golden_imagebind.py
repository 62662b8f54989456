"""ImageBind against its released code: six stems, trunks, heads and scales, through the wiring and the key map."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from zoo_modalities.imagebind.bind import Bind
from zoo_modalities.imagebind.weights import from_state

import zoo
from zoo.errors import WeightsError
from zoo.recipe import Recipe, resolve
from zoo.weights.keymaps import load_into

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
EMBEDDING = {"atol": 2e-5, "rtol": 1e-5}
MODALITIES = ("vision", "text", "audio", "depth", "thermal", "imu")


def recipe_of(c: dict[str, Any]) -> Recipe:
    """The recipe of the golden's sizes."""
    k = c["kwargs"]

    def sizes(name: str, prefix: str = "") -> dict[str, Any]:
        width = k[f"{name}_embed_dim"]
        own = {"width": width, "depth": k[f"{name}_num_blocks"], "heads": k[f"{name}_num_heads"], "ffn": 4 * width}
        return {f"{prefix}{key}": value for key, value in own.items()}

    maps = {
        name: {**sizes(name), "image_size": c["image"], "patch_size": k[f"{name}_kernel_size"]}
        for name in ("depth", "thermal")
    }
    audio = {
        "patch_size": k["audio_kernel_size"],
        "stride": k["audio_stride"],
        "mel_bins": k["audio_num_mel_bins"],
        "frames": k["audio_target_len"],
    }
    imu = {"steps": c["imu_steps"], "window": k["imu_kernel_size"]}
    values = {
        "encoder": {
            **sizes("vision"),
            "image_size": c["image"],
            "patch_size": k["kernel_size"][1],
            "frames": k["kernel_size"][0],
        },
        "text_encoder": {**sizes("text"), "vocab_size": c["vocab_size"], "context_length": c["context_length"]},
        "wiring": {
            "embed_width": k["out_embed_dim"],
            "fields": {"audio": {**sizes("audio"), **audio}, "imu": {**sizes("imu"), **imu}, **maps},
        },
    }
    return resolve("imagebind", values=values)


@pytest.fixture(scope="module")
def g(golden: Callable[[str], Any]) -> Any:
    return golden("imagebind")


@pytest.fixture(scope="module")
def recipe(g: Any) -> Recipe:
    return recipe_of(g.config)


@pytest.fixture(scope="module")
def model(g: Any, recipe: Recipe) -> Bind:
    built: Bind = recipe.wiring[1].build(recipe.parts, 0)
    official = from_state(recipe, g.weights)
    assert official.form == "ImageBind"
    load_into(built, g.weights, official.keymap)
    return built.eval()


@torch.no_grad()
@pytest.mark.parametrize("name", MODALITIES)
def test_modality(g: Any, model: Bind, name: str) -> None:
    encoder: Any = {"vision": model.encoder, "text": model.text_encoder}.get(name) or model.encoders[name]
    x = g.inputs[name]
    # a still image is two equal frames; what the release calls tokens stands before vision's norm
    tokens = encoder.embed.placed(x[:, :, None].expand(-1, -1, 2, -1, -1)) if name == "vision" else encoder.embed(x)
    torch.testing.assert_close(tokens, g.outputs[f"{name}/tokens"], **TOLERANCE)
    features = encoder(x)
    torch.testing.assert_close(features.tokens, g.outputs[f"{name}/trunk"], **TOLERANCE)
    if name == "vision":
        head = model.image_features(x)
    elif name == "text":
        head = model.text_features(x)
    else:
        head = model.modality_features(name, x)
    torch.testing.assert_close(head, g.outputs[f"{name}/head"], **TOLERANCE)
    torch.testing.assert_close(model.features(name, x), g.outputs[f"{name}/embedding"], **EMBEDDING)
    assert ("trunk.layers.0.attn.bias_k" in encoder.state_dict()) == (name not in ("vision", "text"))


@torch.no_grad()
def test_another_resolution(g: Any, model: Bind) -> None:
    large = g.inputs["vision_large"]
    torch.testing.assert_close(model.image_features(large), g.outputs["vision_large/head"], **TOLERANCE)
    torch.testing.assert_close(model.features("vision", large), g.outputs["vision_large/embedding"], **EMBEDDING)


@torch.no_grad()
@pytest.mark.parametrize("name", ["audio", "vision"])
def test_clips_are_averaged_after_the_scale(g: Any, model: Bind, name: str) -> None:
    clips = g.inputs[f"{name}_clips"]
    out = model.features(name, clips)
    torch.testing.assert_close(out, g.outputs[f"{name}_clips/embedding"], **EMBEDDING)
    each = model.features(name, clips.flatten(0, 1)) if name == "audio" else None
    if each is not None:
        torch.testing.assert_close(each, g.outputs["audio_clips/per_clip"], **EMBEDDING)
        assert (out.norm(dim=-1) < each.norm(dim=-1).max() - 1e-3).all()  # the mean is not brought to length again


@torch.no_grad()
@pytest.mark.parametrize("name", MODALITIES[1:])
def test_scores(g: Any, model: Bind, name: str) -> None:
    image, other = model.features("vision", g.inputs["vision"]), model.features(name, g.inputs[name])
    torch.testing.assert_close((image @ other.T).softmax(-1), g.outputs[f"scores/vision_{name}"], **TOLERANCE)


@torch.no_grad()
def test_the_learned_key_and_value_matter(g: Any, model: Bind) -> None:
    encoder: Any = model.encoders["depth"]
    before = encoder.hidden(g.outputs["depth/tokens"])
    kept = [layer.attn.bias_v.clone() for layer in encoder.trunk.layers]
    for layer in encoder.trunk.layers:
        layer.attn.bias_v.zero_()
    assert (encoder.hidden(g.outputs["depth/tokens"]) - before).abs().max() > 1e-2
    for layer, value in zip(encoder.trunk.layers, kept, strict=True):
        layer.attn.bias_v.copy_(value)


def test_saving_gives_the_official_names_back(g: Any, model: Bind, recipe: Recipe) -> None:
    saved, unknown = from_state(recipe, g.weights).keymap.save(model.state_dict())
    assert unknown == []
    assert set(g.weights) - set(saved) == {"modality_preprocessors.text.mask"}
    assert all(torch.equal(saved[name], g.weights[name]) for name in saved)


def test_fewer_modalities_leave_the_others_of_the_file(g: Any, recipe: Recipe) -> None:
    wiring = {"modalities": ["depth"], "fields": {"depth": recipe.wiring[1].fields["depth"]}}  # type: ignore[attr-defined]
    less = resolve(
        "imagebind",
        values={
            **{slot: {k: v for k, v in recipe.to_plain()[slot].items() if k != "name"} for slot in recipe.parts},
            "wiring": {"embed_width": recipe.wiring[1].embed_width, **wiring},  # type: ignore[attr-defined]
        },
    )
    official = from_state(less, g.weights)
    ours, unknown = official.keymap.load(g.weights)
    assert unknown
    assert all(n.split(".")[1] in ("audio", "thermal", "imu") for n in unknown)
    assert {template.split(".")[1] for template in official.ignored} == {"audio", "thermal", "imu"}
    built = less.wiring[1].build(less.parts, 0)
    assert set(ours) == set(built.state_dict())


def test_a_file_of_another_size_is_refused_in_a_line(g: Any) -> None:
    with pytest.raises(WeightsError, match=r"width 32, that of imagebind width 1024: .*imagebind-huge") as caught:
        from_state(resolve("imagebind"), g.weights)
    assert "\n" not in str(caught.value)


def test_the_releases_file_loads(g: Any, model: Bind, recipe: Recipe, tmp_path: Path, monkeypatch: Any) -> None:
    """A state dict saved as the release saves its own (a .pth), read by name with weights_only."""
    path = tmp_path / "imagebind_small.pth"
    torch.save(g.weights, path)
    # the golden's sizes are no preset
    monkeypatch.setattr(sys.modules["zoo.weights.load"], "resolve", lambda name: recipe)
    loaded = zoo.from_pretrained(path, model="imagebind")
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value), name
    x = g.inputs["depth"]
    torch.testing.assert_close(loaded.model.features("depth", x), g.outputs["depth/embedding"], **EMBEDDING)
