"""CLIP against transformers and open_clip through saved folders (clip.md section 8)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from zoo.errors import WeightsError
from zoo.objectives.contrastive import ContrastiveConfig
from zoo.weights import load_model

EOS, VOCAB, LENGTH = 98, 99, 20
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def loss_of(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Our loss, and our logits per image."""
    outputs = model(inputs)
    logits = outputs["logit_scale"].exp() * outputs["image_embeds"] @ outputs["text_embeds"].T
    return ContrastiveConfig().build()(model, inputs, outputs)[0], logits


@pytest.mark.parametrize("eos", [EOS, 2])
@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_transformers_folder_gives_equal_features_logits_loss_and_gradient(
    batch: Any, clip_folder: Any, eos: int, act: str
) -> None:
    folder, reference = clip_folder(eos, act)
    model, recipe, report = load_model(folder)
    model.eval()
    inputs = batch()
    theirs = reference(**inputs, return_loss=True)
    assert_close(
        model.image_features(inputs["pixel_values"]),
        reference.get_image_features(inputs["pixel_values"]).pooler_output,
        **TOLERANCE,
    )
    assert_close(
        model.text_features(inputs["input_ids"], inputs["attention_mask"]),
        reference.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output,
        **TOLERANCE,
    )
    loss, logits = loss_of(model, inputs)
    assert (theirs.logits_per_image.std(0) > 0.01).all()  # the drawn weights tell pictures apart
    assert_close(logits, theirs.logits_per_image, atol=1e-4, rtol=1e-4)
    assert_close(loss, theirs.loss, **TOLERANCE)
    loss.backward()
    theirs.loss.backward()
    ours = model.encoder.tower.transformer.resblocks[0].attn.in_proj_weight.grad
    layer = reference.vision_model.encoder.layers[0].self_attn
    assert_close(ours, torch.cat([getattr(layer, f"{p}_proj").weight.grad for p in "qkv"]), atol=1e-5, rtol=1e-4)
    assert_close(
        model.text_encoder.tower.token_embedding.weight.grad,
        reference.text_model.embeddings.token_embedding.weight.grad,
        atol=1e-5, rtol=1e-4,
    )  # fmt: skip
    assert_close(model.logit_scale.grad, reference.logit_scale.grad, atol=1e-5, rtol=1e-4)
    assert report.form == "transformers clip"
    assert not report.new
    assert not report.ignored
    assert recipe.parts["encoder"][1].quick_gelu == (act == "quick_gelu")
    assert recipe.parts["encoder"][1].eps == 2e-5
    assert recipe.parts["text_encoder"][1].eps == 1e-4


def test_pooling_follows_the_configuration_where_the_two_rules_differ(batch: Any, clip_folder: Any) -> None:
    inputs = batch()
    ids = inputs["input_ids"].clone()
    ids[1, 12] = EOS  # a second end: the first one counts; by the largest id alone the same
    ids[0, 3] = EOS - 1  # the start's id again
    for eos in (EOS, 2, 40):
        if eos == 40:
            ids[:, 2] = 40  # an end that is not the largest id
        folder, reference = clip_folder(eos)
        model, _, _ = load_model(folder)
        ones = torch.ones_like(ids)
        theirs = reference.get_text_features(ids, ones).pooler_output
        assert_close(model.eval().text_features(ids, ones), theirs, **TOLERANCE)


def test_sharded_folder_equals_the_whole(batch: Any, clip_folder: Any) -> None:
    folder, reference = clip_folder(max_shard_size="80KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    model, _, report = load_model(folder)
    pixels = batch()["pixel_values"]
    assert_close(model.eval().image_features(pixels), reference.get_image_features(pixels).pooler_output, **TOLERANCE)
    next(iter(sorted(folder.glob("model-*.safetensors")))).unlink()
    with pytest.raises(WeightsError, match="lacks the shard"):
        load_model(folder)
    assert len(report.loaded) > 50


OPEN_CLIP: dict[str, dict[str, Any]] = {
    "vit": {"layers": 3, "width": 64, "head_width": 16, "patch_size": 8, "image_size": 32, "mlp_ratio": 2.0},
    "resnet": {"layers": [1, 2, 1, 1], "width": 16, "patch_size": None, "image_size": 32},
}


@pytest.mark.parametrize("quick_gelu", [True, False])
@pytest.mark.parametrize("tower", ["vit", "resnet"])
def test_open_clip_folder_gives_equal_features_and_loss(
    draw: Any, batch: Any, tmp_path: Path, tower: str, quick_gelu: bool
) -> None:
    import open_clip
    from open_clip.loss import ClipLoss

    text = {"context_length": LENGTH, "vocab_size": VOCAB, "width": 48, "heads": 4, "layers": 3}
    config = {"embed_dim": 40, "quick_gelu": quick_gelu, "vision_cfg": OPEN_CLIP[tower], "text_cfg": text}
    reference: Any = draw(open_clip.CLIP(**config))
    save_file({k: v.contiguous() for k, v in reference.state_dict().items()}, tmp_path / "open_clip_model.safetensors")
    mean = [0.1, 0.2, 0.3]
    about = {"model_cfg": config, "preprocess_cfg": {"mean": mean, "std": [0.5, 0.5, 0.5]}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(about))
    model, recipe, report = load_model(tmp_path)
    model.eval()
    inputs = batch()
    images, texts = reference.encode_image(inputs["pixel_values"]), reference.encode_text(inputs["input_ids"])
    assert (images.std(0) > 1e-3).all()
    assert_close(model.image_features(inputs["pixel_values"]), images, **TOLERANCE)
    assert_close(model.text_features(inputs["input_ids"]), texts, **TOLERANCE)
    features, words = reference(inputs["pixel_values"], inputs["input_ids"])[:2]
    theirs = ClipLoss()(features, words, reference.logit_scale.exp())
    loss, _ = loss_of(model, inputs)
    assert_close(loss, theirs, **TOLERANCE)
    loss.backward()
    theirs.backward()
    assert_close(model.logit_scale.grad, reference.logit_scale.grad, atol=1e-5, rtol=1e-4)
    assert_close(model.encoder.tower.conv1.weight.grad, reference.visual.conv1.weight.grad, atol=1e-5, rtol=1e-4)
    assert recipe.parts["encoder"][1].mean == mean
    assert report.form == "open_clip"


def test_an_option_the_towers_do_not_have_is_refused(tmp_path: Path) -> None:
    config = {"embed_dim": 40, "vision_cfg": {"timm_model_name": "resnet50"}, "text_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    with pytest.raises(WeightsError, match="timm_model_name"):
        load_model(tmp_path)
