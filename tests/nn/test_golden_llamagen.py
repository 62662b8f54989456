"""LlamaGen against its released code: two-axis rotary, zero rows for the condition, guided cached decoding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layout import Layout, Segment, lay_out
from zoo.nn import KVCache, TokenEmbedding, Trunk
from zoo.nn.positions import rotary
from zoo.weights.keymaps import KeyMap, llamagen, load_into
from zoo.weights.keymaps.llama import ffn_width

TOLERANCE = {"atol": 2e-5, "rtol": 1e-5}
KINDS = ["c2i", "t2i"]


class Caption(nn.Module):
    """Caption features to tokens, and the learned features of no caption."""

    def __init__(self, features: int, width: int, tokens: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(features, width, bias=False), nn.Linear(width, width, bias=False)
        self.register_buffer("unconditional", torch.zeros(tokens, features))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class LlamaGen(nn.Module):
    """The parts under the names of the key map."""

    def __init__(self, c: dict[str, Any], kind: str) -> None:
        super().__init__()
        width = c["dim"]
        self.kind, self.grid, self.none = kind, c["grid"], c["num_classes"]
        self.trunk = Trunk(
            llamagen.trunk_config(
                width=width,
                depth=c["n_layer"],
                heads=c["n_head"],
                ffn=ffn_width(width, c["multiple_of"]),
                eps=c["norm_eps"],
                rope_theta=c["rope_base"],
            )
        )
        self.embed = TokenEmbedding(c["vocab_size"], width)
        self.head = nn.Linear(width, c["vocab_size"], bias=False)
        self.prefix = c["t2i_tokens"] if kind == "t2i" else 1
        if kind == "t2i":
            self.caption = Caption(c["caption_dim"], width, self.prefix)
        else:
            self.classes = nn.Embedding(c["num_classes"] + 1, width)

    def condition(self, given: Tensor, dropped: Tensor) -> Tensor:
        """Embed class ids ``[B]`` or caption features ``[B, T, C]``, without the dropped rows ``[B]``."""
        if self.kind == "c2i":
            return self.classes(torch.where(dropped, self.none, given))[:, None]
        return self.caption(torch.where(dropped[:, None, None], self.caption.unconditional, given))

    def layout(self, real: Tensor | None) -> Layout:
        """Lay out the condition and the whole image; ``real`` ``[B, prefix]`` says which caption tokens are there."""
        place = torch.arange(self.grid**2)
        image = torch.stack([place // self.grid, place % self.grid])
        if real is not None:
            real = F.pad(real.bool(), (0, len(place)), value=True)
        return lay_out(
            [Segment("condition", self.prefix), Segment("image", len(place), "image")],
            real=real,
            position=F.pad(image, (self.prefix, 0), value=-1)[None],  # [1, 2, T]
        )

    def train_logits(self, condition: Tensor, ids: Tensor, layout: Layout) -> Tensor:
        x = torch.cat([condition, self.embed(ids[:, :-1])], 1)
        return self.head(self.trunk(x, layout.truncate(x.shape[1]))[:, self.prefix - 1 :])


def mapping(g: Any) -> KeyMap:
    c = g.config
    return llamagen.keymap(heads=c["n_head"], head_dim=c["dim"] // c["n_head"])


def weights(g: Any, kind: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{kind}/"): t for name, t in g.weights.items() if name.startswith(f"{kind}/")}


@pytest.fixture
def g(golden: Callable[[str], Any]) -> Any:
    return golden("llamagen")


@pytest.fixture
def build(g: Any) -> Callable[[str], LlamaGen]:
    def built(kind: str) -> LlamaGen:
        model = LlamaGen(g.config, kind).eval()
        load_into(model, weights(g, kind), mapping(g))
        return model

    return built


def captions(g: Any, kind: str) -> Tensor | None:
    return g.inputs["t2i_emb_mask"] if kind == "t2i" else None


def test_mask_and_rotation_rows(g: Any, build: Callable[[str], LlamaGen]) -> None:
    model = build("t2i")
    layout = model.layout(captions(g, "t2i"))
    expected = g.outputs["t2i_mask"]
    assert torch.equal(layout.truncate(expected.shape[-1]).mask()[:, 0], expected)  # pads too: they read themselves
    c = model.trunk.config
    cos, sin = rotary(layout.position[:1], c.rope, c.rope_theta, c.rope_axes, torch.float32)
    rows = torch.stack([cos, sin], -1)[0, :, 0]
    torch.testing.assert_close(rows, g.outputs["freqs_cis_t2i"], atol=1e-6, rtol=0.0)
    assert torch.count_nonzero(rows[: model.prefix]) == 0
    assert build("c2i").layout(None).kind == "causal"


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["", "_dropped"])
def test_training_logits_and_losses(g: Any, build: Callable[[str], LlamaGen], kind: str, name: str) -> None:
    model, ids = build(kind), g.inputs[f"{kind}_ids"]
    assert model.trunk.config.eps == 1e-5
    dropped = g.inputs[f"{kind}_drop_uniform"] < (g.config["class_dropout_prob"] if name else 0.0)
    assert bool(dropped.any()) == bool(name)
    layout = model.layout(captions(g, kind))
    logits = model.train_logits(model.condition(g.inputs[f"{kind}_cond"], dropped), ids, layout)
    torch.testing.assert_close(logits, g.outputs[f"{kind}_logits{name}"], **TOLERANCE)
    each = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view_as(ids)
    valid = g.inputs["t2i_valid"] if kind == "t2i" else torch.ones(len(ids))
    loss = (each * valid[:, None]).sum() / (valid.sum() * ids.shape[1]).clamp(min=1)
    torch.testing.assert_close(loss, g.outputs[f"{kind}_loss{name}"], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("run", ["c2i_cfg", "c2i_interval", "c2i_nocfg", "t2i_cfg", "t2i_nocfg"])
def test_cached_greedy_ids_under_guidance(g: Any, build: Callable[[str], LlamaGen], run: str) -> None:
    """Both branches share one cache; the pads of the caption hide the same keys of the unconditional branch."""
    kind, mode = run.split("_")
    model, given = build(kind), g.inputs[f"{kind}_cond"]
    real, batch = captions(g, kind), len(given)
    scale = 1.0 if mode == "nocfg" else g.config["cfg_scale"]
    last_guided = g.config["cfg_interval"] + 1 if mode == "interval" else model.grid**2
    dropped = torch.arange(2 * batch) >= batch
    layout = model.layout(None if real is None else real.repeat(2, 1))
    x, cache, ids = model.condition(torch.cat([given, given]), dropped), KVCache(), []
    for number in range(model.grid**2):
        hidden = model.trunk(x, layout.truncate(model.prefix + number), cache=cache)
        with_condition, without = model.head(hidden[:, -1]).chunk(2)
        logits = without + scale * (with_condition - without) if number <= last_guided else with_condition
        torch.testing.assert_close(logits, g.outputs[f"{run}_logits"][:, number], **TOLERANCE)
        ids.append(logits.argmax(-1))
        x = model.embed(ids[-1][:, None]).repeat(2, 1, 1)
    assert torch.equal(torch.stack(ids, 1), g.outputs[f"{run}_ids"])


@pytest.mark.parametrize("kind", KINDS)
def test_saving_gives_the_official_names_back(g: Any, build: Callable[[str], LlamaGen], kind: str) -> None:
    saved, unknown = mapping(g).save(build(kind).state_dict())
    official = weights(g, kind)
    assert unknown == []
    assert set(saved) == set(official)
    assert all(torch.equal(saved[name], official[name]) for name in saved)
