"""Chameleon against transformers (two norm placements) and against its released code (neighbouring rotary pairs)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import WeightsError
from zoo.layout import Segment, lay_out
from zoo.nn import KVCache, TokenEmbedding, Trunk
from zoo.weights.keymaps import KeyMap, chameleon, load_into
from zoo.weights.keymaps.llama import ffn_width

TOLERANCE = {"atol": 2e-5, "rtol": 1e-5}
TOKENIZER = ("model.vqmodel.{**}", "official_vqgan.{**}")
PLACEMENTS = [("prenorm", False), ("swin", True)]


def parts(vocab: int, width: int, **options: Any) -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "trunk": Trunk(chameleon.trunk_config(width=width, **options)),
            "embed": TokenEmbedding(vocab, width),
            "head": nn.Linear(width, vocab, bias=False),
        }
    ).eval()


@pytest.fixture
def g(golden: Callable[[str], Any]) -> Any:
    return golden("chameleon")


@pytest.fixture
def build(g: Any) -> Callable[[bool], nn.ModuleDict]:
    def built(swin: bool) -> nn.ModuleDict:
        c = g.config
        model = parts(
            c["vocab_size"],
            c["hidden_size"],
            depth=c["layers"],
            heads=c["heads"],
            kv_heads=c["kv_heads"],
            ffn=c["intermediate_size"],
            eps=c["rms_norm_eps"],
            qk_eps=c["qk_norm_eps"],
            rope_theta=c["rope_theta"],
            swin_norm=swin,
        )
        load_into(model, g.weights, chameleon.keymap(), allow_ignored=TOKENIZER)
        return model

    return built


@torch.no_grad()
@pytest.mark.parametrize(("name", "swin"), PLACEMENTS)
def test_hidden_states_and_logits(g: Any, build: Callable[[bool], nn.ModuleDict], name: str, swin: bool) -> None:
    model = build(swin)
    assert model["trunk"].config.eps == 1e-5
    assert model["trunk"].layers[0].attn.q_norm.eps == 1e-5
    ids, real = g.outputs["ids_with_image"], g.inputs["attention_mask"].bool()
    hidden = model["trunk"](model["embed"](ids), lay_out([Segment("tokens", ids.shape[1])], real=real))
    torch.testing.assert_close(hidden[real], g.outputs[f"{name}_hidden"][real], **TOLERANCE)
    logits = model["head"](hidden)
    torch.testing.assert_close(logits[real], g.outputs[f"{name}_logits"][real], **TOLERANCE)
    both = real[:, :-1] & real[:, 1:]
    ours, target = logits[:, :-1][both], ids[:, 1:][both]
    torch.testing.assert_close(F.cross_entropy(ours, target), g.outputs[f"{name}_ce"], **TOLERANCE)
    z = ours.logsumexp(-1).square().mean()
    torch.testing.assert_close(z, g.outputs[f"{name}_logz2"], **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize(("name", "swin"), PLACEMENTS)
@pytest.mark.parametrize("image", [False, True])
def test_cached_greedy_ids(g: Any, build: Callable[[bool], nn.ModuleDict], name: str, swin: bool, image: bool) -> None:
    """Text with the image columns masked, or image codes alone after BOI, over left-padded prompts."""
    model, names = build(swin), g.config["vocabulary_map"]
    codes = torch.zeros(g.config["vocab_size"], dtype=torch.bool)
    codes[[number for name, number in names.items() if name.startswith("IMGIMG")]] = True
    allowed = codes if image else ~codes
    ids, real = g.outputs["ids_with_image"], g.inputs["attention_mask"].bool()
    if image:
        ids, real = F.pad(ids, (0, 1), value=g.config["boi"]), F.pad(real, (0, 1), value=True)
    expected = g.outputs[f"{name}_image_generated" if image else f"{name}_generated"]
    layout, cache, new, steps = lay_out([Segment("tokens", ids.shape[1])], real=real), KVCache(), [], []
    for _ in range(expected.shape[1]):
        logits = model["head"](model["trunk"](model["embed"](ids), layout, cache=cache)[:, -1])
        steps.append(logits)
        ids = logits.masked_fill(~allowed, -torch.inf).argmax(-1, keepdim=True)
        new.append(ids)
        layout = layout.append("tokens")
    assert torch.equal(torch.cat(new, 1), expected)
    if not image:
        raw = torch.stack(steps, 1)[..., allowed]
        torch.testing.assert_close(raw, g.outputs[f"{name}_generate_logits"], **TOLERANCE)


def test_saving_gives_the_official_names_back(g: Any, build: Callable[[bool], nn.ModuleDict]) -> None:
    saved, unknown = chameleon.keymap().save(build(False).state_dict())
    assert unknown == []
    assert set(saved) == {n for n in g.weights if not n.startswith(("model.vqmodel.", "official_vqgan."))}
    assert all(torch.equal(saved[name], g.weights[name]) for name in saved)


@pytest.fixture
def official(golden: Callable[[str], Any]) -> Any:
    return golden("chameleon_official")


def build_official(official: Any, swin: bool, per_head: bool) -> tuple[nn.ModuleDict, KeyMap]:
    c = official.config
    heads, kv_heads = c["n_heads"], c["n_kv_heads"]
    model = parts(
        c["vocab_size"],
        c["dim"],
        depth=c["n_layers"],
        heads=heads,
        kv_heads=kv_heads,
        ffn=ffn_width(c["dim"], c["multiple_of"], c["ffn_dim_multiplier"]),
        eps=c["norm_eps"],
        rope_theta=c["rope_theta"],
        swin_norm=swin,
        per_head=per_head,
    )
    keymap = chameleon.official_keymap(heads=heads, kv_heads=kv_heads, head_dim=c["dim"] // heads, per_head=per_head)
    load_into(model, official.weights, keymap)
    return model, keymap


@torch.no_grad()
@pytest.mark.parametrize(("name", "swin"), PLACEMENTS)
@pytest.mark.parametrize("per_head", [False, True])
def test_released_layout(official: Any, name: str, swin: bool, per_head: bool) -> None:
    model, keymap = build_official(official, swin, per_head)
    ids: Tensor = official.inputs["ids"][None]
    logits = model["head"](model["trunk"](model["embed"](ids), lay_out([Segment("tokens", ids.shape[1])])))[0]
    torch.testing.assert_close(logits, official.outputs[f"{name}_logits"], **TOLERANCE)
    saved, unknown = keymap.save(model.state_dict())
    assert unknown == []
    assert set(saved) == set(official.weights)
    assert all(torch.equal(saved[name], official.weights[name]) for name in saved)


def test_norms_that_differ_between_heads_do_not_fit_the_released_layout(official: Any) -> None:
    model, keymap = build_official(official, swin=False, per_head=True)
    with torch.no_grad():
        model["trunk"].layers[1].attn.k_norm.weight[0] += 1.0
    with pytest.raises(WeightsError, match="k-norm differs between heads"):
        keymap.save(model.state_dict())
