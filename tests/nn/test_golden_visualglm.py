"""The language half of VisualGLM against its released code: prefix mask, position ids, scaled residuals, logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layout import ALL, PAST, Layout
from zoo.nn import KVCache, TokenEmbedding, Trunk
from zoo.nn.positions import rotary
from zoo.weights.keymaps import load_into, visualglm

HIDDEN = {"atol": 2e-5, "rtol": 2e-5}
LOGITS = {"atol": 1e-4, "rtol": 1e-5}


@pytest.fixture
def g(golden: Callable[[str], Any]) -> Any:
    return golden("visualglm")


@pytest.fixture
def model(g: Any) -> nn.ModuleDict:
    c = g.config
    config = visualglm.trunk_config(
        width=c["hidden"], depth=c["layers"], heads=c["heads"], ffn=c["inner_hidden"], eps=c["layernorm_eps"]
    )
    built = nn.ModuleDict(
        {
            "trunk": Trunk(config),
            "embed": TokenEmbedding(c["vocab"], c["hidden"]),
            "head": nn.Linear(c["hidden"], c["vocab"], bias=False),
            "projector": nn.Linear(c["qf_hidden"], c["hidden"]),
        }
    ).eval()
    load_into(built, g.weights, visualglm.keymap(c["heads"]))
    return built


def prefix(ids: Tensor, c: dict[str, Any], pads: int) -> Layout:
    """Everything before sop is one full segment (it ends elsewhere in every row); the answer is causal.

    Position: the place, then the place of gMASK for all of the answer; the block position counts the answer from 1.
    """
    place = torch.arange(ids.shape[1]).expand_as(ids)
    start = (ids == c["bos"]).long().argmax(1, keepdim=True)
    gmask = (ids == c["gmask"]).long().argmax(1, keepdim=True)
    answer = place >= start
    position = torch.stack([torch.where(answer, gmask, place), (place - start + 1).clamp(min=0)], 1)
    segment = answer.long()
    segment[answer & (ids == c["pad"])] = pads
    return Layout.from_ids(segment, [[ALL, PAST], [PAST, PAST]], position=position, names=["prefix", "answer"])


def embedded(g: Any, model: nn.ModuleDict) -> Tensor:
    x, first = model["embed"](g.inputs["input_ids"]), int(g.inputs["pre_image_length"])
    image = model["projector"](g.inputs["qformer_output"])
    torch.testing.assert_close(image, g.outputs["image_vectors"], **HIDDEN)
    return torch.cat([x[:, :first], image, x[:, first + image.shape[1] :]], 1)


def test_mask_and_position_ids(g: Any) -> None:
    layout = prefix(g.inputs["input_ids"], g.config, 1)  # the released mask knows no pads
    assert torch.equal(layout.mask(), g.outputs["attention_hidden"] == 0)
    assert torch.equal(layout.position, g.outputs["position_ids"])


def test_values_an_output_would_not_show(g: Any, model: nn.ModuleDict) -> None:
    config = model["trunk"].config
    assert config.eps == 1e-5
    assert config.residual_scale == 56**0.5
    stored = g.weights["transformer.layers.0.attention.rotary_emb.inv_freq"]
    assert config.rope_half
    angle = rotary(torch.ones(1, 1, dtype=torch.long), config.rope, config.rope_theta, 2, torch.float64, half=True)
    assert torch.equal(angle[1].flatten(), stored.sin().double().repeat(2))


@torch.no_grad()
def test_logits(g: Any, model: nn.ModuleDict) -> None:
    layout = prefix(g.inputs["input_ids"], g.config, -1)
    hidden, taps = model["trunk"](embedded(g, model), layout, taps=True)
    real = layout.real
    for seen, wanted in zip((*taps[:-1], hidden), g.outputs["hidden_states"][1:], strict=True):
        torch.testing.assert_close(seen[real], wanted[real], **HIDDEN)
    torch.testing.assert_close(model["head"](hidden)[real], g.outputs["logits"][real], **LOGITS)
    text_only = model["head"](model["trunk"](model["embed"](g.inputs["input_ids"]), layout))
    torch.testing.assert_close(text_only[real], g.outputs["text_only_logits"][real], **LOGITS)


def test_loss_and_gradients(g: Any, model: nn.ModuleDict) -> None:
    layout = prefix(g.inputs["input_ids"], g.config, -1)
    logits = model["head"](model["trunk"](embedded(g, model), layout))
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), g.inputs["labels"][:, 1:].flatten())
    torch.testing.assert_close(loss, g.outputs["loss"], **LOGITS)
    attn = model["trunk"].layers[0].attn
    wanted = [model["projector"].weight, attn.q.weight, attn.k.weight, attn.v.weight]
    projector, *parts = torch.autograd.grad(loss, wanted)
    torch.testing.assert_close(projector, g.outputs["grad/image_encoder.glm_proj.weight"], **LOGITS)
    mine = {f"trunk.layers.0.attn.{letter}.weight": part for letter, part in zip("qkv", parts, strict=True)}
    name = "transformer.layers.0.attention.query_key_value.weight"
    fused = visualglm.keymap(g.config["heads"]).save(mine)[0][name]
    assert g.outputs[f"grad/{name}"].abs().max() > 1e-3
    torch.testing.assert_close(fused, g.outputs[f"grad/{name}"], atol=1e-6, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("row", [0, 1])
def test_cached_greedy_answers(g: Any, model: nn.ModuleDict, row: int) -> None:
    """gMASK's place is repeated, the block position counts on."""
    c, ids = g.config, g.inputs["input_ids"][row : row + 1]
    end = int((ids[0] == c["bos"]).nonzero()[0]) + 1
    layout, x = prefix(ids[:, :end], c, 1), embedded(g, model)[row : row + 1, :end]
    cache, tokens = KVCache(), []
    while len(tokens) < c["gen_new"] and c["eos"] not in tokens:
        new = model["head"](model["trunk"](x, layout, cache=cache)[:, -1]).argmax(-1, keepdim=True)
        tokens.append(int(new))
        x, last = model["embed"](new), layout.position[..., -1:]
        layout = layout.append("answer", position=last + torch.tensor([[0], [1]]))
    assert tokens == g.outputs[f"gen{row}_ids"][0].tolist()


def test_saving_gives_the_official_names_back(g: Any, model: nn.ModuleDict) -> None:
    saved, unknown = visualglm.keymap(g.config["heads"]).save(model.state_dict())
    assert unknown == []
    assert {name.split(".")[-1] for name in set(g.weights) - set(saved)} == {"inv_freq"}
    assert all(torch.equal(saved[name], g.weights[name]) for name in saved)
