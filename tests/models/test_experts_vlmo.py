"""VLMo through the real loader, wiring and objectives, against numbers of its released code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

import zoo
from zoo.models.experts import Experts
from zoo.objectives.masked_text import MaskedTextConfig
from zoo.part import Features
from zoo.recipe import resolve
from zoo.weights.keymaps import vlmo

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
GRADIENTS = {"atol": 5e-5, "rtol": 1e-4}
NAMES = {"vlmo": "vlmo", "vlmo_base_plus": "vlmo-base-plus"}


@pytest.fixture(params=list(NAMES))
def g(request: pytest.FixtureRequest, golden: Callable[[str], Any]) -> Any:
    return golden(request.param)


def released(g: Any, folder: Path) -> Any:
    """The golden's weights as a bare file, read by ``zoo.from_pretrained``; the module, in eval mode."""
    file = folder / "vlmo.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in g.weights.items()}, file)
    absolute = bool(g.config.get("abs_pos"))
    changes = {"trunk": {"heads": g.config["heads"]}} if absolute else {}  # no tensor tells it
    return zoo.from_pretrained(file, model=NAMES["vlmo_base_plus" if absolute else "vlmo"], **changes).eval()


@pytest.fixture
def module(g: Any, tmp_path: Path) -> Any:
    return released(g, tmp_path)


@pytest.fixture
def model(module: Any) -> Experts:
    network: Experts = module.model
    return network


def batch_of(g: Any) -> dict[str, Tensor]:
    return {
        "pixel_values": g.inputs["image"],
        "input_ids": g.inputs["text_ids"],
        "attention_mask": g.inputs["text_masks"].bool(),
        "negative_images": g.inputs["itm_image_neg_idx"],
        "negative_texts": g.inputs["itm_text_neg_idx"],
        "masked_ids": g.inputs["text_ids_mlm"],
        "masked_labels": g.inputs["text_labels_mlm"],
    }


def test_the_file_says_what_it_is(g: Any, module: Any, model: Experts) -> None:
    c, trunk = g.config, model.trunk_config
    assert (trunk.width, trunk.depth, trunk.heads) == (c["width"], c["layers"], c["heads"])
    assert trunk.pair_start == c["vlffn_start_layer_index"]
    assert (trunk.image_size, trunk.patch_size) == (c["image"], c["patch"])
    assert trunk.context_length == c["max_text_len"]
    assert trunk.relative is not bool(c.get("abs_pos"))
    assert not trunk.relative or trunk.text_rows == c["max_text_len_of_initckpt"]
    assert (trunk.layer_scale is None) is bool(c.get("abs_pos"))
    assert model.trunk.trunk.config.eps == 1e-6
    assert not any(name.endswith("attn.k.bias") for name in model.state_dict())
    experts = [len(layer.ffn) for layer in model.trunk.trunk.layers]
    assert experts == [2 if i < trunk.pair_start else 3 for i in range(c["layers"])]


def test_relative_index_tables(golden: Callable[[str], Any], tmp_path: Path) -> None:
    g = golden("vlmo")
    trunk = released(g, tmp_path).model.trunk
    text, image = g.config["max_text_len"], trunk.tokens
    assert torch.equal(trunk.relative_index(image, text), g.outputs["index/joint"])
    assert torch.equal(trunk.relative_index(0, text), g.outputs["index/text"])
    assert torch.equal(trunk.relative_index(image, 0), g.outputs["index/image"])
    shorter = trunk.relative_index(image, text - 2)
    kept = [*range(text - 2), *range(text, text + image)]
    assert torch.equal(shorter, g.outputs["index/joint"][kept][:, kept])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["image", "text"])
def test_one_modality_and_its_pair_experts(g: Any, model: Experts, kind: str) -> None:
    batch = batch_of(g)
    real = batch["attention_mask"]
    if kind == "image":
        rows, hidden = slice(None), model.read_image(batch["pixel_values"])
        feature = model.image_features(batch["pixel_values"])
        raw = model.trunk(image=model.trunk.embed_image(batch["pixel_values"]), final_norm=False).image
    else:
        rows, hidden = real, model.read_text(batch["input_ids"], real)
        feature = model.text_features(batch["input_ids"], real)
        raw = model.trunk(text=model.trunk.embed_text(batch["input_ids"]), mask=real, final_norm=False).text
    torch.testing.assert_close(hidden.tokens[rows], g.outputs[f"{kind}/hidden"][rows], **TOLERANCE)
    torch.testing.assert_close(raw[:, 0], g.outputs[f"{kind}/raw_cls_before_norm"], **TOLERANCE)
    torch.testing.assert_close(F.normalize(feature, dim=-1), g.outputs[f"{kind}/itc_feature"], **TOLERANCE)
    outputs = model(batch)
    torch.testing.assert_close(outputs[f"{kind}_embeds"], g.outputs[f"{kind}/itc_feature"], **TOLERANCE)
    torch.testing.assert_close(outputs[f"pair_{kind}_embeds"], g.outputs[f"{kind}/itc_vl_feature"], **TOLERANCE)


@torch.no_grad()
def test_joint(g: Any, model: Experts) -> None:
    batch = batch_of(g)
    real, outputs = batch["attention_mask"], model(batch)
    image, text = model.read_pair(outputs["image_tokens"], outputs["text_tokens"], real)
    torch.testing.assert_close(text.tokens[real], g.outputs["joint/text_hidden"][real], **TOLERANCE)
    torch.testing.assert_close(image.tokens, g.outputs["joint/image_hidden"], **TOLERANCE)
    assert model.pooler is not None
    torch.testing.assert_close(torch.tanh(model.pooler(text.pooled)), g.outputs["joint/pooled"], **TOLERANCE)
    fused = model.fuse(Features(outputs["image_tokens"]), batch["masked_ids"], real)
    words = model.word_logits(fused.tokens)
    torch.testing.assert_close(words[real], g.outputs["mlm/logits"][real], **TOLERANCE)
    alone = model.word_logits(model.read_text(batch["masked_ids"], real).tokens)
    torch.testing.assert_close(alone[real], g.outputs["textmlm/logits"][real], **TOLERANCE)
    matched = model.match_logits(batch["pixel_values"], batch["input_ids"], real)
    torch.testing.assert_close(matched, g.outputs["itm/logits"][: len(real)], **TOLERANCE)


def test_losses_and_gradients(g: Any, module: Any, model: Experts) -> None:
    """The recipe's own objectives and weights add up to the released total; so do the gradients, under their names."""
    batch = batch_of(g)
    total, report = module.losses(batch)
    itc = report["contrastive"] + report["pair-contrastive"]  # weighted already
    torch.testing.assert_close(itc, g.outputs["itc/loss"], **TOLERANCE)
    torch.testing.assert_close(report["matching"], g.outputs["itm/loss"], **TOLERANCE)
    torch.testing.assert_close(report["masked-lm"], g.outputs["mlm/loss"], **TOLERANCE)
    torch.testing.assert_close(total, g.outputs["loss_total"], **TOLERANCE)
    total.backward()
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    # gradients go back through the key map: every part of a fused matrix must have one
    mapping = vlmo.keymap(layers=g.config["layers"], relative=model.trunk_config.relative)
    gradients, unknown = mapping.save(ours)
    assert unknown == []
    wanted = {name: t for name, t in g.outputs.items() if name.startswith("grad_total/")}
    assert len(wanted) >= 10
    for name, expected in wanted.items():
        torch.testing.assert_close(gradients[name.removeprefix("grad_total/")], expected, **GRADIENTS)


def test_text_stage_loss(g: Any, model: Experts) -> None:
    batch = batch_of(g)
    loss, _ = MaskedTextConfig().build()(model, batch, model(batch))
    labels = g.inputs["text_labels_mlm"].flatten()
    torch.testing.assert_close(loss, F.cross_entropy(g.outputs["textmlm/logits"].flatten(0, 1), labels), **TOLERANCE)


def test_saving_gives_the_official_names_back(g: Any, model: Experts) -> None:
    mapping = vlmo.keymap(layers=g.config["layers"], relative=model.trunk_config.relative)
    saved, unknown = mapping.save(model.state_dict())
    assert unknown == []
    unread = set() if g.config.get("abs_pos") else {"text_embeddings.position_embeddings.weight"}
    assert set(g.weights) - set(saved) == unread
    assert all(torch.equal(saved[name], g.weights[name]) for name in saved)


@pytest.mark.parametrize("name", ["vlmo", "vlmo-large", "vlmo-base-plus", "vlmo-staged"])
def test_objectives_of_the_pair_stage(name: str) -> None:
    recipe = resolve(name)
    last = recipe.stages[-1]
    assert last.name == "pairs"
    weights = {key: recipe.objectives[key].weight for key in last.objectives or recipe.objectives}
    assert weights == {"contrastive": 0.5, "pair-contrastive": 0.5, "matching": 1.0, "masked-lm": 0.25}
    assert MaskedTextConfig().weight == 1.0
