"""OPT behind BLIP-2 against the released code: positions from the padding mask, logits, cached greedy answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layout import Segment, lay_out
from zoo.nn import KVCache, TokenEmbedding, Trunk
from zoo.weights.keymaps import load_into, opt

FEATURES = {"atol": 2e-5, "rtol": 1e-5}
LOGITS = {"atol": 1e-4, "rtol": 1e-5}
KEYMAP = opt.keymap().under("opt_model.")
BRIDGE = ("Qformer.{**}", "visual_encoder.{**}", "ln_vision.{p}", "query_tokens", "opt_proj.{p}")


class OPT(nn.Module):
    def __init__(self, hf: dict[str, Any]) -> None:
        super().__init__()
        self.trunk = Trunk(opt.trunk_config(hf))
        rows = hf["max_position_embeddings"] + opt.FIRST_POSITION
        self.embed = TokenEmbedding(hf["vocab_size"], hf["hidden_size"], positions=rows, first=opt.FIRST_POSITION)

    def words(self, ids: Tensor) -> Tensor:
        return self.embed.tokens(ids)

    def logits(self, x: Tensor, real: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits of the rows ``x`` ``[B, T, D]`` (the last ones of ``real`` ``[B, K]`` with a cache)."""
        place = (real.long().cumsum(1) * real - 1)[:, -x.shape[1] :]  # pads read row 1 and are read by nobody
        x = x + self.embed.positions(place + self.embed.first)
        layout = lay_out([Segment("row", real.shape[1])], real=real)
        return self.trunk(x, layout, cache=cache) @ self.embed.tokens.weight.T

    def greedy(self, x: Tensor, real: Tensor, most: int, end: int, pad: int) -> Tensor:
        cache, out = KVCache(), torch.empty(len(x), 0, dtype=torch.long)
        done = torch.zeros(len(x), dtype=torch.bool)
        while out.shape[1] < most and not done.all():
            new = self.logits(x, real, cache)[:, -1].argmax(-1).masked_fill(done, pad)
            out, done = torch.cat([out, new[:, None]], 1), done | (new == end)
            x, real = self.words(new[:, None]), F.pad(real, (0, 1), value=True)
        return out


@pytest.fixture
def g(golden: Callable[[str], Any]) -> Any:
    return golden("blip2_opt")


@pytest.fixture
def model(g: Any) -> OPT:
    built = OPT(g.info["llm_config"]).eval()
    load_into(built, g.weights, KEYMAP, allow_ignored=BRIDGE)
    return built


def queries(g: Any) -> Tensor:
    projected = F.linear(g.outputs["query_output"], g.weights["opt_proj.weight"], g.weights["opt_proj.bias"])
    torch.testing.assert_close(projected, g.outputs["inputs_embeds"][:, : projected.shape[1]], **FEATURES)
    return projected


@torch.no_grad()
def test_logits_and_loss(g: Any, model: OPT) -> None:
    assert model.trunk.config.eps == 1e-5
    assert model.trunk.config.act == "relu"
    x = torch.cat([queries(g), model.words(g.inputs["text_ids"])], 1)
    torch.testing.assert_close(x, g.outputs["inputs_embeds"], **FEATURES)
    real = g.outputs["attention_mask"].bool()
    logits = model.logits(x, real)
    torch.testing.assert_close(logits[real], g.outputs["logits"][real], **LOGITS)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), g.outputs["labels"][:, 1:].flatten())
    torch.testing.assert_close(loss, g.outputs["loss"], **FEATURES)


@torch.no_grad()
@pytest.mark.parametrize("task", ["generate", "vqa"])
def test_cached_greedy_text(g: Any, model: OPT, task: str) -> None:
    """Left-padded questions leave a hole between the queries and the words."""
    c, pad = g.config, g.info["llm_config"]["pad"]
    ids = g.inputs["prompt_ids" if task == "generate" else "vqa_ids"]
    words = g.inputs["vqa_attention_mask"].bool() if task == "vqa" else torch.ones_like(ids, dtype=torch.bool)
    assert bool(words.all()) == (task == "generate")
    seen = queries(g)
    real = torch.cat([torch.ones(seen.shape[:2], dtype=torch.bool), words], 1)
    most = c["gen_max_length"] if task == "generate" else c["vqa_max_len"]
    ours = model.greedy(torch.cat([seen, model.words(ids)], 1), real, most, c["newline_id"], pad)
    expected = g.outputs[f"{task}_ids_greedy"]
    assert torch.equal(F.pad(ours, (0, expected.shape[1] - ours.shape[1]), value=pad), expected)


def test_saving_gives_the_official_names_back(g: Any, model: OPT) -> None:
    saved, unknown = KEYMAP.save(model.state_dict())
    assert unknown == []
    assert set(saved) == {name for name in g.weights if name.startswith("opt_model.")}
    assert all(torch.equal(saved[name], g.weights[name]) for name in saved)
