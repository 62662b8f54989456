"""VLMo against its released code: modality experts, pair experts, relative bias or positions, losses, gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layout import Layout, Segment, lay_out
from zoo.nn import PatchEmbedding, TokenEmbedding, Trunk
from zoo.nn.positions import pair_relative_index
from zoo.weights.keymaps import KeyMap, load_into, vlmo

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
GRADIENTS = {"atol": 5e-5, "rtol": 1e-4}


def mapping(g: Any) -> KeyMap:
    return vlmo.keymap(layers=g.config["layers"], relative=not g.config.get("abs_pos"))


class VLMo(nn.Module):
    """The parts under the names of the key map."""

    def __init__(self, g: Any) -> None:
        super().__init__()
        c = g.config
        width, absolute = c["width"], c.get("abs_pos", False)
        side = c["image"] // c["patch"]
        index = pair_relative_index((side, side), c["max_text_len"], c["max_text_len_of_initckpt"])
        self.index = None if absolute else index
        rows = (2 * side - 1) ** 2 + 3 + 2 + 2 * c["max_text_len_of_initckpt"]
        self.words, self.start = c["max_text_len"], c["vlffn_start_layer_index"]
        self.trunk = Trunk(
            vlmo.trunk_config(
                width=width,
                depth=c["layers"],
                heads=c["heads"],
                ffn=width * c["mlp_ratio"],
                vl_start=self.start,
                rel_rows=0 if absolute else rows,
                layer_scale=None if absolute else 0.1,
            )
        )
        self.stem = PatchEmbedding(width, c["image"], c["patch"], positions=absolute)
        positions = self.words if absolute else 0
        self.text = TokenEmbedding(c["vocab_size"], width, positions=positions, types=2, norm="layer")
        self.types = nn.Embedding(2, width)
        self.pooler, self.itm = nn.Linear(width, width), nn.Linear(width, 2)
        self.mlm = nn.ModuleDict(
            {
                "dense": nn.Linear(width, width),
                "norm": nn.LayerNorm(width, eps=1e-12),
                "decoder": nn.Linear(width, c["vocab_size"]),
            }
        )
        names = ("image", "text", "vl_image", "vl_text")
        self.itc = nn.ModuleDict({name: nn.Linear(width, width, bias=False) for name in names})
        self.logit_scale, self.logit_vl_scale = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))

    def embed_image(self, image: Tensor) -> Tensor:
        return self.stem(image) + self.types.weight[1]

    def embed_text(self, ids: Tensor) -> Tensor:
        return self.text(ids) + self.types.weight[0]

    def alone(self, x: Tensor, kind: str, real: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden rows of one modality, the first row before the final norm, and the rows of its pair experts."""
        single, pair = (vlmo.TEXT, vlmo.TEXT_IN_PAIR) if kind == "text" else (vlmo.IMAGE, vlmo.IMAGE_IN_PAIR)
        part = slice(self.words) if kind == "text" else slice(self.words, None)
        index = None if self.index is None else self.index[part, part]

        def layout(modality: int) -> Layout:
            return lay_out([Segment(kind, x.shape[1], modality, "full")], real=real)

        hidden, taps = self.trunk(x, layout(single), relative_index=index, taps=True)
        upper = self.trunk(taps[self.start - 1], layout(pair), relative_index=index, layers=slice(self.start, None))
        return hidden, taps[-1][:, 0], upper

    def joint(self, ids: Tensor, real: Tensor, image: Tensor) -> Tensor:
        x = torch.cat([self.embed_text(ids), self.embed_image(image)], 1)
        layout = lay_out(
            [
                Segment("text", self.words, vlmo.TEXT_IN_PAIR, "full"),
                Segment("image", x.shape[1] - self.words, vlmo.IMAGE_IN_PAIR, "full"),
            ],
            real=F.pad(real.bool(), (0, x.shape[1] - self.words), value=True),
            relation={("text", "image"): "all"},
        )
        return self.trunk(x, layout, relative_index=self.index)

    def pooled(self, hidden: Tensor) -> Tensor:
        return torch.tanh(self.pooler(hidden[:, 0]))

    def words_of(self, hidden: Tensor) -> Tensor:
        return self.mlm["decoder"](self.mlm["norm"](F.gelu(self.mlm["dense"](hidden))))


@pytest.fixture(params=["vlmo", "vlmo_base_plus"])
def g(request: pytest.FixtureRequest, golden: Callable[[str], Any]) -> Any:
    return golden(request.param)


@pytest.fixture
def model(g: Any) -> VLMo:
    built = VLMo(g).eval()
    load_into(built, g.weights, mapping(g))
    return built


def test_rules_that_hide(g: Any, model: VLMo) -> None:
    assert model.trunk.config.eps == 1e-6
    assert isinstance(model.text.norm, nn.LayerNorm)
    assert model.text.norm.eps == 1e-12
    assert not any(name.endswith("attn.k.bias") for name in model.state_dict())
    experts = [len(layer.ffn) for layer in model.trunk.layers]
    assert experts == [2 if i < model.start else 3 for i in range(g.config["layers"])]


def test_relative_index_tables(golden: Callable[[str], Any]) -> None:
    g = golden("vlmo")
    model = VLMo(g)
    assert model.index is not None
    text = model.words
    assert torch.equal(model.index, g.outputs["index/joint"])
    assert torch.equal(model.index[:text, :text], g.outputs["index/text"])
    assert torch.equal(model.index[text:, text:], g.outputs["index/image"])
    assert len(g.weights["relative_position_bias_table"]) == model.trunk.config.rel_rows


@torch.no_grad()
@pytest.mark.parametrize("kind", ["image", "text"])
def test_one_modality_and_its_pair_experts(g: Any, model: VLMo, kind: str) -> None:
    real = g.inputs["text_masks"].bool()
    if kind == "image":
        rows, (hidden, raw, pair) = slice(None), model.alone(model.embed_image(g.inputs["image"]), kind)
    else:
        rows, (hidden, raw, pair) = real, model.alone(model.embed_text(g.inputs["text_ids"]), kind, real)
    torch.testing.assert_close(hidden[rows], g.outputs[f"{kind}/hidden"][rows], **TOLERANCE)
    torch.testing.assert_close(raw, g.outputs[f"{kind}/raw_cls_before_norm"], **TOLERANCE)
    feature = F.normalize(model.itc[kind](hidden[:, 0]), dim=-1)
    torch.testing.assert_close(feature, g.outputs[f"{kind}/itc_feature"], **TOLERANCE)
    feature = F.normalize(model.itc[f"vl_{kind}"](pair[:, 0]), dim=-1)
    torch.testing.assert_close(feature, g.outputs[f"{kind}/itc_vl_feature"], **TOLERANCE)


@torch.no_grad()
def test_joint(g: Any, model: VLMo) -> None:
    real = g.inputs["text_masks"].bool()
    hidden = model.joint(g.inputs["text_ids"], real, g.inputs["image"])
    torch.testing.assert_close(hidden[:, : model.words][real], g.outputs["joint/text_hidden"][real], **TOLERANCE)
    torch.testing.assert_close(hidden[:, model.words :], g.outputs["joint/image_hidden"], **TOLERANCE)
    torch.testing.assert_close(model.pooled(hidden), g.outputs["joint/pooled"], **TOLERANCE)


def test_losses_and_gradients(g: Any, model: VLMo) -> None:
    image, ids, real = g.inputs["image"], g.inputs["text_ids"], g.inputs["text_masks"].bool()
    seen, _, seen_pair = model.alone(model.embed_image(image), "image")
    read, _, read_pair = model.alone(model.embed_text(ids), "text", real)

    def contrast(name: str, seen: Tensor, read: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        seen = F.normalize(model.itc[f"{name}image"](seen[:, 0]), dim=-1)
        logits = scale.exp() * seen @ F.normalize(model.itc[f"{name}text"](read[:, 0]), dim=-1).T
        target = torch.arange(len(logits))
        return logits, (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    main, loss_main = contrast("", seen, read, model.logit_scale)
    pair, loss_pair = contrast("vl_", seen_pair, read_pair, model.logit_vl_scale)
    torch.testing.assert_close(main, g.outputs["itc/i2t_logits"], **TOLERANCE)
    torch.testing.assert_close(pair, g.outputs["itc/vl_i2t_logits"], **TOLERANCE)
    itc = (loss_main + loss_pair) / 2
    torch.testing.assert_close(itc, g.outputs["itc/loss"], **TOLERANCE)

    image_of, text_of = g.inputs["itm_image_neg_idx"], g.inputs["itm_text_neg_idx"]
    fused = model.joint(
        torch.cat([ids, ids, ids[text_of]]),
        torch.cat([real, real, real[text_of]]),
        torch.cat([image, image[image_of], image]),
    )
    match = model.itm(model.pooled(fused))
    torch.testing.assert_close(match, g.outputs["itm/logits"], **TOLERANCE)
    itm = F.cross_entropy(match, g.outputs["itm/labels"].long())
    torch.testing.assert_close(itm, g.outputs["itm/loss"], **TOLERANCE)

    words = model.words_of(model.joint(g.inputs["text_ids_mlm"], real, image)[:, : model.words])
    torch.testing.assert_close(words[real], g.outputs["mlm/logits"][real], **TOLERANCE)
    mlm = 0.25 * F.cross_entropy(words.flatten(0, 1), g.inputs["text_labels_mlm"].flatten())
    torch.testing.assert_close(mlm, g.outputs["mlm/loss"], **TOLERANCE)

    total = itc + itm + mlm
    torch.testing.assert_close(total, g.outputs["loss_total"], **TOLERANCE)
    total.backward()
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    # gradients go back through the key map: every part of a fused matrix must have one
    gradients, unknown = mapping(g).save(ours)
    assert unknown == []
    wanted = {name: t for name, t in g.outputs.items() if name.startswith("grad_total/")}
    assert len(wanted) >= 10
    for name, expected in wanted.items():
        torch.testing.assert_close(gradients[name.removeprefix("grad_total/")], expected, **GRADIENTS)


@torch.no_grad()
def test_text_alone(g: Any, model: VLMo) -> None:
    real = g.inputs["text_masks"].bool()
    hidden, _, _ = model.alone(model.embed_text(g.inputs["text_ids_mlm"]), "text", real)
    torch.testing.assert_close(model.words_of(hidden)[real], g.outputs["textmlm/logits"][real], **TOLERANCE)


def test_saving_gives_the_official_names_back(g: Any, model: VLMo) -> None:
    saved, unknown = mapping(g).save(model.state_dict())
    assert unknown == []
    unread = set() if g.config.get("abs_pos") else {"text_embeddings.position_embeddings.weight"}
    assert set(g.weights) - set(saved) == unread
    assert all(torch.equal(saved[name], g.weights[name]) for name in saved)
