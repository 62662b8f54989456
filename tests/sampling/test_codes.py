"""Autoregressive codes: LlamaGen's own ids, with and without a cache, and what guidance costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.decoders.base import Decoder
from zoo.errors import ConfigError
from zoo.layout import Layout, Segment, TokenBatch, lay_out
from zoo.nn import KVCache, TokenEmbedding, Trunk
from zoo.sampling.block import Prefix
from zoo.sampling.codes import CodeDecoding, CodeStreams, RecordedCodes, decode_codes
from zoo.sampling.guidance import probabilities
from zoo.sampling.text import streams
from zoo.weights.keymaps import llamagen, load_into
from zoo.weights.keymaps.llama import ffn_width


class Peer(Decoder):
    """The golden's transformer behind the decoder interface; counts the rows it is given."""

    def __init__(self, g: Any, kind: str) -> None:
        super().__init__()
        c = g.config
        self.width, self.vocab_size, self.context_length = c["dim"], c["vocab_size"], 0
        self.trunk = Trunk(
            llamagen.trunk_config(
                width=c["dim"],
                depth=c["n_layer"],
                heads=c["n_head"],
                ffn=ffn_width(c["dim"], c["multiple_of"]),
                eps=c["norm_eps"],
                rope_theta=c["rope_base"],
            )
        )
        self.embedding = TokenEmbedding(c["vocab_size"], c["dim"])
        self.head = nn.Linear(c["dim"], c["vocab_size"], bias=False)
        holder = nn.ModuleDict({"trunk": self.trunk, "embed": self.embedding, "head": self.head})
        own = {name.removeprefix(f"{kind}/"): t for name, t in g.weights.items() if name.startswith(f"{kind}/")}
        condition = {name: own.pop(name) for name in list(own) if name.startswith("cls_embedding")}
        load_into(holder, own, llamagen.keymap(heads=c["n_head"], head_dim=c["dim"] // c["n_head"]))
        self.condition = condition
        self.forwarded: list[int] = []
        self.eval()

    def embed(self, ids: Tensor) -> Tensor:
        return self.embedding(ids)

    def forward(self, batch: TokenBatch, cache: Any = None) -> Tensor:
        self.forwarded.append(len(batch.embeds))
        return self.trunk(batch.embeds, batch.layout, cache=cache)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden)

    def new_cache(self) -> KVCache:
        return KVCache()

    def select_cache(self, cache: Any, index: Tensor) -> Any:
        cache.reorder(index)
        return cache

    def cut_cache(self, cache: Any, length: int) -> Any:
        cache.truncate(length)
        return cache


def given(g: Any, peer: Peer, kind: str, guided: bool) -> tuple[Tensor, Layout, Tensor]:
    """Condition embeddings of both branches, their layout, and the positions of the image."""
    c, condition = g.config, peer.condition
    if kind == "c2i":
        table, rows = condition["cls_embedding.embedding_table.weight"], g.inputs["c2i_cond"]
        x = table[torch.cat([rows, torch.full_like(rows, c["num_classes"])]) if guided else rows][:, None]
        real = None
    else:
        first, second = (condition[f"cls_embedding.cap_proj.{name}.weight"] for name in ("fc1", "fc2"))
        features = g.inputs["t2i_cond"]
        none = condition["cls_embedding.uncond_embedding"].expand_as(features)
        x = F.gelu((torch.cat([features, none]) if guided else features) @ first.T, approximate="tanh") @ second.T
        real = g.inputs["t2i_emb_mask"].bool().repeat(2 if guided else 1, 1)
    prefix, place = x.shape[1], torch.arange(c["grid"] ** 2)
    layout = lay_out(
        [Segment("condition", prefix), Segment("image", 0, "image")],
        real=real,
        position=torch.full((1, 2, prefix), -1),
    )
    return x, layout, torch.stack([place // c["grid"], place % c["grid"]])[None]


@pytest.fixture
def g(golden: Callable[[str], Any]) -> Any:
    return golden("llamagen")


def run(g: Any, peer: Peer, kind: str, decoding: CodeDecoding, draws: Any = None, tell: Any = None) -> Tensor:
    x, layout, position = given(g, peer, kind, len(decoding.weights) > 1)
    with torch.inference_mode():
        prefix = Prefix(peer, x, layout)
    return decode_codes(
        prefix, g.config["grid"] ** 2, peer.embed, peer.logits, decoding, draws, "image",
        position=position, modality=1, tell=tell,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["c2i_cfg", "c2i_interval", "c2i_nocfg", "t2i_cfg", "t2i_nocfg"])
def test_greedy_ids(g: Any, name: str) -> None:
    kind, mode = name.split("_")
    peer, guided = Peer(g, kind), []
    decoding = CodeDecoding(
        temperature=0.0,
        guidance=1.0 if mode == "nocfg" else g.config["cfg_scale"],
        interval=g.config["cfg_interval"] if mode == "interval" else -1,
    )
    ids = run(g, peer, kind, decoding, tell=lambda number, logits, code: guided.append(logits))
    assert torch.equal(ids, g.outputs[f"{name}_ids"])
    torch.testing.assert_close(torch.stack(guided, 1), g.outputs[f"{name}_logits"], atol=2e-5, rtol=1e-5)
    rows, interval = len(ids), g.config["cfg_interval"]
    if mode == "interval":  # the prefix and the codes 0 .. interval go in twice, the others once
        assert peer.forwarded == [2 * rows] * (1 + interval + 1) + [rows] * (16 - 2 - interval)
    else:
        assert set(peer.forwarded) == {rows if mode == "nocfg" else 2 * rows}


@pytest.mark.parametrize("kind", ["c2i", "t2i"])
def test_sampled_ids_with_recorded_noise(g: Any, kind: str) -> None:
    decoding = CodeDecoding(temperature=0.9, top_k=20, top_p=0.9, guidance=g.config["cfg_scale"])
    ids = run(g, Peer(g, kind), kind, decoding, RecordedCodes(g.inputs[f"{kind}_sample_exp_noise"]))
    assert torch.equal(ids, g.outputs[f"{kind}_sample_ids"])


@torch.no_grad()
@pytest.mark.parametrize("interval", [-1, 4])
@pytest.mark.parametrize("kind", ["c2i", "t2i"])
def test_cached_equals_uncached(g: Any, kind: str, interval: int) -> None:
    """The reference runs the whole sequence again for every code, both branches, and never drops one."""
    peer, decoding = Peer(g, kind), CodeDecoding(temperature=1.2, top_k=15, guidance=2.0, interval=interval)
    cached = run(g, peer, kind, decoding, CodeStreams(streams(3, 0, 3)))
    x, layout, position = given(g, peer, kind, True)
    draws, ids = CodeStreams(streams(3, 0, 3)), torch.empty(3, 0, dtype=torch.long)
    for number in range(16):
        whole = layout
        if number:
            place = position[..., :number].expand(layout.batch, -1, -1)
            whole = layout.append("image", number, modality=1, position=place)
        rows = torch.cat([x, peer.embed(ids).repeat(2, 1, 1)], 1)
        c, u = peer.logits(peer(TokenBatch(rows, whole))[:, -1]).chunk(2)
        logits = u + 2.0 * (c - u) if interval < 0 or number <= interval + 1 else c
        ids = torch.cat([ids, draws.code(number, probabilities(logits, decoding))[:, None]], 1)
    assert torch.equal(cached, ids)
    assert len({tuple(row.tolist()) for row in ids}) == 3


def test_rows_do_not_depend_on_their_batch(g: Any) -> None:
    peer, decoding = Peer(g, "t2i"), CodeDecoding(guidance=1.5)
    together = run(g, peer, "t2i", decoding, CodeStreams(streams(0, 0, 3)))
    x, layout, position = given(g, peer, "t2i", True)
    for row in range(3):
        own = torch.tensor([row, row + 3])
        with torch.inference_mode():
            prefix = Prefix(peer, x[own], layout.select(own))
        draws = CodeStreams(streams(0, row, 1))
        alone = decode_codes(
            prefix, 16, peer.embed, peer.logits, decoding, draws, "image", position=position, modality=1
        )
        assert torch.equal(alone, together[row : row + 1])


def test_filters(golden: Callable[[str], Any]) -> None:
    g = golden("discrete_diffusion")
    logits = g.inputs["filter_logits"]
    for fields, name in (({"top_k": 4}, "top_k_filtered"), ({"top_p": 0.7}, "top_p_filtered")):
        p, stored = probabilities(logits, CodeDecoding(**fields)), g.outputs[name]
        assert torch.equal(p > 0, stored > -1e8)
        torch.testing.assert_close(p, stored.masked_fill(stored < -1e8, -torch.inf).softmax(-1))


def test_temperature_then_top_k_then_top_p() -> None:
    p = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    # top-p is of what top-k left: 0.4 / 0.7 < 0.6, so the second code is in; of all four, 0.4 + 0.3 > 0.6 as well
    kept = probabilities(p.log(), CodeDecoding(top_k=2, top_p=0.57))
    torch.testing.assert_close(kept, torch.tensor([[1.0, 0.0, 0.0, 0.0]]))  # 0.4 of all four alone would keep two
    sharp = probabilities(p.log(), CodeDecoding(temperature=0.5, top_p=0.5))  # p^2: 16, 9, 4, 1 of 30
    torch.testing.assert_close(sharp, torch.tensor([[1.0, 0.0, 0.0, 0.0]]))


def test_bad_input(g: Any) -> None:
    peer = Peer(g, "c2i")
    x, layout, _ = given(g, peer, "c2i", False)
    with torch.inference_mode():
        prefix = Prefix(peer, x, layout)
    with pytest.raises(ConfigError, match="3 rows; expected 2 branches"):
        decode_codes(prefix, 16, peer.embed, peer.logits, CodeDecoding(guidance=2.0), None, "image")
    with pytest.raises(ConfigError, match="needs random numbers"):
        run(g, peer, "c2i", CodeDecoding())
    for fields in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"interval": -2}, {"guidance": -0.5}):
        with pytest.raises(ConfigError):
            CodeDecoding(**fields)
