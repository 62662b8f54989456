"""LLaVA and BLIP-2 checkpoints that hold less than a whole model, and those the zoo does not read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from zoo.errors import WeightsError
from zoo.recipe import resolve
from zoo.weights import load_model
from zoo.weights.formats import file_format
from zoo.weights.formats.llava import from_transformers


def state_of(name: str) -> dict[str, torch.Tensor]:
    model: Any = resolve(name, scale="tiny")
    built = model.wiring[1].build(model.parts, 0)
    return dict(built.state_dict())


def test_projector_alone_leaves_the_rest_new() -> None:
    recipe = resolve("llava-1.5", scale="tiny")
    state = {f"model.mm_projector.{i}.{p}": torch.randn(128) for i in (0, 2) for p in ("weight", "bias")}
    official = file_format(recipe, state)
    assert official is not None
    mapped, unknown = official.keymap.load(state)
    assert sorted(mapped) == [f"connector.proj.{i}.{p}" for i in (0, 2) for p in ("bias", "weight")]
    assert unknown == []
    assert official.new == ("encoder.{**}", "decoder.{**}")


def test_lavis_stage_2_file_holds_what_was_trained() -> None:
    recipe = resolve("blip2-opt", scale="tiny")
    own = {k: v for k, v in state_of("blip2-opt").items() if k.startswith("connector.")}
    official = file_format(recipe, {"Qformer.bert.embeddings.LayerNorm.weight": torch.ones(1)})
    assert official is not None
    theirs, left = official.keymap.save(own)
    assert left == []
    assert {name.split(".")[0] for name in theirs} == {"Qformer", "query_tokens", "ln_vision", "opt_proj"}
    official = file_format(recipe, theirs)
    assert official is not None
    assert official.new == ("encoder.{**}", "decoder.{**}")
    mapped, unknown = official.keymap.load(theirs)
    assert (sorted(mapped), unknown) == (sorted(own), [])
    stage1 = {k: v for k, v in theirs.items() if not k.startswith("opt_proj")}
    again = file_format(recipe, {**stage1, "itm_head.weight": torch.ones(2, 2)})
    assert again is not None
    assert "connector.proj.{p}" in again.new


def test_own_names_are_not_taken_for_official_ones() -> None:
    for name in ("llava", "blip2-opt"):
        assert file_format(resolve(name, scale="tiny"), state_of(name)) is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "blip-2", "qformer_config": {"use_qformer_text_input": True}}, "text branch"),
        ({"model_type": "blip-2", "vision_config": {"hidden_act": "relu"}}, "expected gelu"),
        ({"model_type": "llava", "vision_config": {"model_type": "siglip_vision_model"}}, "siglip_vision_model"),
        ({"model_type": "llava", "vision_feature_layer": [-2, -5]}, "reads one layer"),
        ({"model_type": "llava", "projector_hidden_act": "relu"}, "exact GELU"),
        ({"model_type": "llava", "mm_projector_type": "mlp2x_gelu", "mm_vision_tower": "who/knows"}, "who/knows"),
        ({"model_type": "llava", "mm_projector_type": "resampler"}, "resampler"),
        ({"model_type": "llava", "mm_projector_type": "linear", "mm_use_im_start_end": True}, "im_start_end"),
    ],
)
def test_what_is_not_read_is_said_in_one_line(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=message) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_published_folders_become_the_published_recipes(tmp_path: Path) -> None:
    hub = {  # what llava-hf/llava-1.5-7b-hf states; the rest are LLaVA's defaults
        "model_type": "llava", "image_token_index": 32000, "vision_feature_layer": -2,
        "text_config": {
            "model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        },
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096,
            "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
        },
    }  # fmt: skip
    recipe = from_transformers(hub, tmp_path).recipe
    published = resolve("llava-1.5")
    assert recipe.model == "llava-1.5"
    ours, theirs = recipe.parts, published.parts
    encoder: Any = ours["encoder"][1]
    assert (encoder.layer, encoder.cls, encoder.image_size, encoder.depth) == (-2, False, 336, 24)
    assert ours["connector"] == theirs["connector"]
    decoder: Any = ours["decoder"][1]
    assert (decoder.width, decoder.depth, decoder.vocab_size, decoder.heads) == (4096, 32, 32064, 32)
    assert decoder.options["rms_norm_eps"] == 1e-5
    official = {
        "model_type": "llava", "hidden_size": 4096, "vocab_size": 32000, "mm_projector_type": "linear",
        "mm_vision_tower": "openai/clip-vit-large-patch14", "mm_vision_select_layer": -2,
    }  # fmt: skip
    first = from_transformers(official, tmp_path).recipe
    assert first.model == "llava"
    assert first.parts["connector"] == resolve("llava").parts["connector"]
    assert getattr(first.parts["encoder"][1], "image_size") == 224  # noqa: B009
