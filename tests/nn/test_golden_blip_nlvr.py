"""BLIP's two-image classifier against its released code: a pair of cross-attentions in place of the layer's one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layout import Segment, lay_out
from zoo.nn import PatchEmbedding, TokenEmbedding, Trunk, TrunkConfig
from zoo.nn.attention import Attention, Reading
from zoo.weights.keymaps import bert, blip, load_into, vit

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
MERGE_FROM = 6  # a literal of the release


class Twins(nn.Module):
    """Two cross-attentions, one for each half of the context; averaged, or merged by a matrix."""

    def __init__(self, config: TrunkConfig, layer: int, merge: bool) -> None:
        super().__init__()
        self.layer = layer
        self.first, self.second = (Attention(config, layer, cross=True) for _ in range(2))
        self.merge = nn.Linear(2 * config.width, config.width) if merge else None

    def read_context(self, x: Tensor, reading: Reading) -> Tensor:
        halves = reading.context.chunk(2, 1)
        both = [
            one.read_context(x, replace(reading, context=half))
            for one, half in zip((self.first, self.second), halves, strict=True)
        ]
        return sum(both) / 2 if self.merge is None else self.merge(torch.cat(both, -1))


class NLVR(nn.Module):
    def __init__(self, c: dict[str, Any], bert_config: dict[str, Any]) -> None:
        super().__init__()
        width, vision = c["text_width"], c["vision_width"]
        self.stem = PatchEmbedding(vision, c["image"], c["patch"])
        self.vit = Trunk(vit.trunk_config(width=vision, depth=c["vision_layers"], heads=c["vision_heads"]))
        self.embed = TokenEmbedding(c["vocab_size"], width, positions=c["max_positions"], norm="layer")
        config = bert.trunk_config(bert_config, context_width=bert_config["encoder_width"])
        self.encoder = Trunk(config)
        for i, layer in enumerate(self.encoder.layers):
            layer.cross = Twins(config, i, merge=i >= MERGE_FROM)
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))


@pytest.fixture
def g(golden: Callable[[str], Any]) -> Any:
    return golden("blip_nlvr")


@pytest.fixture
def model(g: Any) -> NLVR:
    built = NLVR(g.config, g.info["bert_config"]).eval()
    load_into(built, g.weights, blip.nlvr_keymap())
    return built


@torch.no_grad()
def test_two_images(g: Any, model: NLVR) -> None:
    assert {m.eps for m in model.encoder.modules() if isinstance(m, nn.LayerNorm)} == {1e-12}
    images = model.vit(model.stem(g.inputs["image"]))
    torch.testing.assert_close(images, g.outputs["image_embeds"], **TOLERANCE)
    real = g.inputs["attention_mask"].bool()
    ids = torch.cat([torch.full((len(real), 1), g.config["enc_id"]), g.inputs["input_ids"][:, 1:]], 1)
    layout = lay_out([Segment("text", ids.shape[1], attends="full")], real=real)
    first, second = images.chunk(2)  # along the batch
    hidden, taps = model.encoder(model.embed(ids), layout, context=torch.cat([first, second], 1), taps=True)
    wanted = {name: t for name, t in g.outputs.items() if name.startswith("text/after_layer_")}
    assert {int(name.rsplit("_", 1)[1]) < MERGE_FROM for name in wanted} == {True, False}
    for name, tensor in wanted.items():
        torch.testing.assert_close(taps[int(name.rsplit("_", 1)[1])][real], tensor[real], **TOLERANCE)
    torch.testing.assert_close(hidden[:, 0], g.outputs["cls_hidden"], **TOLERANCE)
    logits = model.head(hidden[:, 0])
    torch.testing.assert_close(logits, g.outputs["logits"], **TOLERANCE)
    torch.testing.assert_close(F.cross_entropy(logits, g.inputs["targets"]), g.outputs["loss"], **TOLERANCE)


def test_saving_gives_the_official_names_back(g: Any, model: NLVR) -> None:
    saved, unknown = blip.nlvr_keymap().save(model.state_dict())
    assert unknown == []
    assert set(saved) == set(g.weights)
    assert all(torch.equal(saved[name], g.weights[name]) for name in saved)
