"""CogVLM against the port of its released code: visual experts, shared patch positions, gradients, decoding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layout import Layout, Segment, lay_out
from zoo.nn import KVCache, PatchEmbedding, TokenEmbedding, Trunk, copy_expert_
from zoo.nn.block import FFN
from zoo.weights.keymaps import cogvlm, load_into

TOLERANCE = {"atol": 2e-5, "rtol": 1e-5}
LOGITS = {"atol": 1e-4, "rtol": 1e-5}
KEYMAP = cogvlm.keymap()


class Adapter(nn.Module):
    def __init__(self, inputs: int, llm: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, llm.width, bias=False)
        self.norm = nn.LayerNorm(llm.width, eps=1e-5)
        self.ffn = FFN(llm)

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(F.gelu(self.norm(self.linear(x))))


class CogVLM(nn.Module):
    """The parts under the names of the key map."""

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        self.trunk = Trunk(
            cogvlm.trunk_config(
                width=c["hidden"],
                depth=c["layers"],
                heads=c["heads"],
                ffn=c["ffn"],
                eps=c["rms_norm_eps"],
                rope_theta=c["rope_theta"],
            )
        )
        self.vit = Trunk(cogvlm.vit_config(c["vision_config"]))
        self.stem = PatchEmbedding(self.vit.config.width, c["img_size"], c["patch_size"])
        self.adapter = Adapter(self.vit.config.width, self.trunk.config)
        self.boi, self.eoi = (nn.Parameter(torch.zeros(1, 1, c["hidden"])) for _ in range(2))
        self.embed = TokenEmbedding(c["vocab"], c["hidden"])
        self.head = nn.Linear(c["hidden"], c["vocab"], bias=False)
        self.patches = self.stem.grid[0] * self.stem.grid[1]

    def image(self, pixels: Tensor) -> Tensor:
        features = self.adapter(self.vit(self.stem(pixels))[:, 1:])
        ends = (end.expand(len(pixels), -1, -1) for end in (self.boi, self.eoi))
        return torch.cat([next(ends), features, next(ends)], 1)  # [B, P + 2, D]

    def rows(self, ids: Tensor, pixels: Tensor) -> Tensor:
        words, image = self.embed(ids), self.image(pixels)
        return torch.cat([words[:, :1], image, words[:, 1 + image.shape[1] :]], 1)

    def layout(self, length: int, real: Tensor | None = None) -> Layout:
        """Lay out [bos][boi, patches][eoi, text], causal throughout; patches share a position."""
        advances = torch.ones(length, dtype=torch.long)
        advances[0], advances[3 : 2 + self.patches] = 0, 0
        return lay_out(
            [
                Segment("bos", 1, "text"),
                Segment("image", self.patches + 1, "image"),
                Segment("text", length - self.patches - 2, "text"),
            ],
            real=real,
            position=advances.cumsum(0)[None],
        )


@pytest.fixture
def g(golden: Callable[[str], Any]) -> Any:
    return golden("cogvlm")


@pytest.fixture
def model(g: Any) -> CogVLM:
    built = CogVLM(g.config).eval()
    load_into(built, g.weights, KEYMAP)
    return built


@torch.no_grad()
def test_vision_and_adapter(g: Any, model: CogVLM) -> None:
    assert model.vit.config.eps == 1e-6
    assert model.trunk.config.eps == 1e-5
    features = model.image(g.inputs["pixel_values"])
    torch.testing.assert_close(features, g.outputs["image_features"], **TOLERANCE)


def test_routes_and_positions(g: Any, model: CogVLM) -> None:
    types, real = g.inputs["token_type_ids"], g.inputs["attention_mask"].bool()
    layout = model.layout(types.shape[1], real)
    assert torch.equal(layout.modality[real], g.outputs["expert_mask_vision"][real])
    assert torch.equal(layout.position.expand_as(types)[real], g.outputs["position_ids"][real])
    assert layout.kind == "causal"  # patches too: no mask is needed
    assert layout.spans is not None
    assert len(layout.spans) == 3


@torch.no_grad()
def test_hidden_states_and_logits(g: Any, model: CogVLM) -> None:
    real = g.inputs["attention_mask"].bool()
    x = model.rows(g.inputs["input_ids"], g.inputs["pixel_values"])
    hidden, taps = model.trunk(x, model.layout(x.shape[1], real), taps=True)
    states = [x, *taps[:-1], hidden]
    assert len(states) == len(g.outputs["hidden_states"])
    for ours, expected in zip(states, g.outputs["hidden_states"], strict=True):
        torch.testing.assert_close(ours[real], expected[real], **TOLERANCE)
    torch.testing.assert_close(model.head(hidden)[real], g.outputs["logits"][real], **LOGITS)


@torch.no_grad()
def test_text_alone_and_experts_copied_from_text(g: Any, model: CogVLM) -> None:
    ids, real = g.inputs["text_only_input_ids"], g.inputs["attention_mask"].bool()
    logits = model.head(model.trunk(model.embed(ids), lay_out([Segment("text", ids.shape[1], "text")])))
    torch.testing.assert_close(logits, g.outputs["text_only_logits"], **LOGITS)

    x = model.rows(g.inputs["input_ids"], g.inputs["pixel_values"])
    copy_expert_(model.trunk, source=0, target=1)
    logits = model.head(model.trunk(x, model.layout(x.shape[1], real)))
    torch.testing.assert_close(logits[real], g.outputs["reduced_logits"][real], **LOGITS)


def test_gradients(g: Any, model: CogVLM) -> None:
    real = g.inputs["attention_mask"].bool()
    x = model.rows(g.inputs["input_ids"], g.inputs["pixel_values"])
    logits = model.head(model.trunk(x, model.layout(x.shape[1], real)))
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), g.inputs["labels"][:, 1:].flatten())
    torch.testing.assert_close(loss, g.outputs["loss"], **LOGITS)
    loss.backward()
    gradients, _ = KEYMAP.save({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    wanted = {name.removeprefix("grad/"): t for name, t in g.outputs.items() if name.startswith("grad/")}
    assert len(wanted) == 6
    for name, expected in wanted.items():
        assert expected.abs().max() > 1e-2
        torch.testing.assert_close(gradients[name], expected, **LOGITS)
    last = model.trunk.layers[-1]  # of its visual expert, text reads keys and values only
    for unread in (last.attn.q[1], last.attn.out[1], last.ffn[1].down):
        assert torch.count_nonzero(unread.weight.grad) == 0
    assert torch.count_nonzero(last.attn.k[1].weight.grad) > 0


@torch.no_grad()
@pytest.mark.parametrize("row", [0, 1])
def test_cached_greedy_ids(g: Any, model: CogVLM, row: int) -> None:
    """The next token takes the last position + 1, which is not the length of the sequence."""
    ids, expected = g.inputs[f"gen{row}_input_ids"], g.outputs[f"gen{row}_ids"][0].tolist()
    x, cache, new = model.rows(ids, g.inputs["pixel_values"][row : row + 1]), KVCache(), []
    layout = model.layout(ids.shape[1])
    for _ in expected:
        new.append(int(model.head(model.trunk(x, layout, cache=cache)[:, -1]).argmax()))
        layout, x = layout.append("text"), model.embed(torch.tensor([new[-1:]]))
    assert int(layout.position[0, -1]) == layout.length - model.patches
    assert new == expected


def test_saving_gives_the_official_names_back(g: Any, model: CogVLM) -> None:
    saved, unknown = KEYMAP.save(model.state_dict())
    assert unknown == []
    assert {name for name in g.weights if "inv_freq" not in name} == set(saved)
    assert all(torch.equal(saved[name], g.weights[name]) for name in saved)
