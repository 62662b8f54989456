"""ALBEF against its released code: ViT, text and fusion layers of one BERT, ITM, masked words, momentum copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layout import Layout, Segment, lay_out
from zoo.nn import MLMHead, PatchEmbedding, TokenEmbedding, Trunk
from zoo.weights.keymaps import albef, load_into, vit

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


class ALBEF(nn.Module):
    """The pre-training model as its parts; a momentum copy has no ITM head and no temperature."""

    def __init__(self, c: dict[str, Any], bert_config: dict[str, Any], momentum: bool = False) -> None:
        super().__init__()
        width, vision = c["text_width"], c["vision_width"]
        self.stem = PatchEmbedding(vision, c["image"], c["patch"])
        self.vit = Trunk(vit.trunk_config(width=vision, depth=c["vision_layers"], heads=c["vision_heads"]))
        self.text = Trunk(albef.text_config(bert_config))
        rows, types = bert_config["max_position_embeddings"], bert_config["type_vocab_size"]
        self.embed = TokenEmbedding(c["vocab_size"], width, positions=rows, types=types, norm="layer")
        self.lm = MLMHead(width, c["vocab_size"])
        self.vision_proj, self.text_proj = nn.Linear(vision, c["embed_dim"]), nn.Linear(width, c["embed_dim"])
        if not momentum:
            self.itm_head, self.temp = nn.Linear(width, 2), nn.Parameter(torch.zeros(()))
        self.unimodal = slice(0, bert_config["fusion_layer"])
        self.fusion = slice(bert_config["fusion_layer"], None)

    def image(self, pixels: Tensor) -> Tensor:
        return self.vit(self.stem(pixels))

    def logits(self, hidden: Tensor) -> Tensor:
        return self.lm(hidden, self.embed.tokens.weight)


@pytest.fixture
def g(golden: Callable[[str], Any]) -> Any:
    return golden("albef")


@pytest.fixture
def model(g: Any) -> ALBEF:
    built = ALBEF(g.config, g.info["bert_config"]).eval()
    load_into(built, g.weights, albef.keymap(), allow_ignored=albef.MOMENTUM)
    return built


def words(real: Tensor) -> Layout:
    return lay_out([Segment("text", real.shape[1], attends="full")], real=real)


def test_eps_and_layers(g: Any, model: ALBEF) -> None:
    assert model.vit.config.eps == 1e-6
    assert {module.eps for module in model.text.modules() if isinstance(module, nn.LayerNorm)} == {1e-12}
    assert model.embed.norm.eps == model.lm.norm.eps == 1e-12
    text, depth = g.config["fusion_layer"], g.config["text_layers"]
    assert [layer.cross is not None for layer in model.text.layers] == [False] * text + [True] * (depth - text)


@torch.no_grad()
def test_one_modality_alone(g: Any, model: ALBEF) -> None:
    image, real = model.image(g.inputs["image"]), g.inputs["attention_mask"].bool()
    torch.testing.assert_close(image, g.outputs["image_embeds"], **TOLERANCE)
    torch.testing.assert_close(
        F.normalize(model.vision_proj(image[:, 0]), dim=-1), g.outputs["image_feat"], **TOLERANCE
    )
    text = model.text(model.embed(g.inputs["input_ids"]), words(real), layers=model.unimodal)
    torch.testing.assert_close(text[real], g.outputs["text_embeds"][real], **TOLERANCE)
    torch.testing.assert_close(F.normalize(model.text_proj(text[:, 0]), dim=-1), g.outputs["text_feat"], **TOLERANCE)


@torch.no_grad()
def test_fusion_and_itm(g: Any, model: ALBEF) -> None:
    image, real = model.image(g.inputs["image"]), g.inputs["attention_mask"].bool()
    text = model.text(model.embed(g.inputs["input_ids"]), words(real), layers=model.unimodal)
    other_image, other_text = g.inputs["itm_image_neg_idx"], g.inputs["itm_text_neg_idx"]
    text3, real3 = torch.cat([text, text, text[other_text]]), torch.cat([real, real, real[other_text]])
    image3 = torch.cat([image, image[other_image], image])
    fused = model.text(text3, words(real3), context=image3, layers=model.fusion)
    torch.testing.assert_close(fused[: len(real)][real], g.outputs["fusion_hidden_pos"][real], **TOLERANCE)
    torch.testing.assert_close(fused[:, 0], g.outputs["itm_cls_features"], **TOLERANCE)
    logits = model.itm_head(fused[:, 0])
    torch.testing.assert_close(logits, g.outputs["itm_logits"], **TOLERANCE)
    torch.testing.assert_close(F.cross_entropy(logits, g.outputs["itm_labels"]), g.outputs["loss_itm"], **TOLERANCE)


@torch.no_grad()
def test_masked_words(g: Any, model: ALBEF) -> None:
    image, real = model.image(g.inputs["image"]), g.inputs["attention_mask"].bool()
    hidden = model.text(model.embed(g.inputs["mlm_input_ids"]), words(real), context=image)
    logits = model.logits(hidden)
    torch.testing.assert_close(logits[real], g.outputs["mlm_logits"][real], **TOLERANCE)
    loss = F.cross_entropy(logits.flatten(0, 1), g.inputs["mlm_labels"].flatten())
    torch.testing.assert_close(loss, g.outputs["mlm_ce"], **TOLERANCE)


@torch.no_grad()
def test_momentum_copies(g: Any, model: ALBEF) -> None:
    """The copies load through the same map; the features come after one step of the moving average."""
    slow = ALBEF(g.config, g.info["bert_config"], momentum=True).eval()
    momentum = albef.keymap("_m").load(g.weights)[0]
    slow.load_state_dict(momentum)
    saved, unknown = albef.keymap("_m").save(slow.state_dict())
    assert unknown == []
    assert set(saved) == {name for name in g.weights if "_m." in name}
    assert all(torch.equal(saved[name], g.weights[name]) for name in saved)
    online = dict(model.named_parameters())
    for name, parameter in slow.named_parameters():
        parameter.lerp_(online[name], 1 - g.config["momentum"])
    image, real = slow.image(g.inputs["image"]), g.inputs["attention_mask"].bool()
    torch.testing.assert_close(image, g.outputs["image_embeds_m"], **TOLERANCE)
    text = slow.text(slow.embed(g.inputs["input_ids"]), words(real), layers=slow.unimodal)
    torch.testing.assert_close(F.normalize(slow.text_proj(text[:, 0]), dim=-1), g.outputs["text_feat_m"], **TOLERANCE)
    logits = slow.logits(slow.text(slow.embed(g.inputs["mlm_input_ids"]), words(real), context=image))
    torch.testing.assert_close(logits[real], g.outputs["mlm_logits_momentum"][real], **TOLERANCE)


def test_saving_gives_the_official_names_back(g: Any, model: ALBEF) -> None:
    saved, unknown = albef.keymap().save(model.state_dict())
    assert unknown == []
    left = {name for name in g.weights if name not in saved}
    assert {name for name in left if "_m." not in name} == {"image_queue", "text_queue", "queue_ptr"}
    assert all(torch.equal(saved[name], g.weights[name]) for name in saved)
