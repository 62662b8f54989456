"""The multimodal language model of LISA against its released code: CLIP's last layer but one, logits, cached answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layout import Segment, lay_out
from zoo.nn import KVCache, PatchEmbedding, TokenEmbedding, Trunk
from zoo.weights.keymaps import clip_trunk, lisa, llama, load_into

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
LOGITS = {"atol": 1e-4, "rtol": 1e-5}


class Reader(nn.Module):
    """CLIP, one matrix, Llama."""

    def __init__(self, c: dict[str, Any], sam_width: int) -> None:
        super().__init__()
        clip = {"hidden_size": c["clip_width"], "num_hidden_layers": c["clip_layers"]}
        clip |= {"num_attention_heads": c["clip_heads"], "intermediate_size": c["clip_ffn"]}
        self.stem = PatchEmbedding(c["clip_width"], c["clip_img"], c["clip_patch"], bias=False, norm="layer")
        self.vit = Trunk(clip_trunk.trunk_config(clip))
        self.projector = nn.Linear(c["clip_width"], c["hidden"])
        self.embed = TokenEmbedding(c["vocab"], c["hidden"])
        text = {"hidden_size": c["hidden"], "num_hidden_layers": c["layers"], "num_attention_heads": c["heads"]}
        text |= {"intermediate_size": c["ffn"], "rms_norm_eps": c["rms_norm_eps"]}
        self.trunk = Trunk(llama.trunk_config(text))
        self.head = nn.Linear(c["hidden"], c["vocab"], bias=False)
        self.text_hidden = nn.Sequential(
            nn.Linear(c["hidden"], c["hidden"]), nn.ReLU(), nn.Linear(c["hidden"], sam_width)
        )
        self.placeholder = c["image_token_index"]

    def patches(self, pixels: Tensor) -> Tensor:
        _, taps = self.vit(self.stem(pixels), taps=True, final_norm=False)
        return self.projector(taps[-2][:, 1:])

    def spliced(self, ids: Tensor, patches: Tensor) -> Tensor:
        """Put the patches of every row where its placeholder stands: [R, L - 1 + patches, D]."""
        rows = []
        for row, seen in zip(ids, patches, strict=True):
            at = int((row == self.placeholder).nonzero()[0])
            words = self.embed(torch.cat([row[:at], row[at + 1 :]])[None])[0]
            rows.append(torch.cat([words[:at], seen, words[at:]]))
        return torch.stack(rows)


@pytest.fixture
def g(golden: Callable[[str], Any]) -> Any:
    return golden("lisa")


@pytest.fixture
def model(g: Any) -> Reader:
    built = Reader(g.config, g.config["sam_dim"]).eval()
    load_into(built, g.weights, lisa.keymap(), allow_ignored=lisa.SAM)
    return built


def owners(g: Any) -> Tensor:
    """The image of every row."""
    return torch.repeat_interleave(torch.arange(len(g.inputs["offset"]) - 1), g.inputs["offset"].diff())


def test_eps_and_activation(g: Any, model: Reader) -> None:
    assert model.vit.config.eps == model.stem.norm.eps == 1e-5
    assert model.vit.config.act == "quick_gelu"
    assert model.trunk.config.eps == g.config["rms_norm_eps"]


@torch.no_grad()
def test_logits_and_prompts(g: Any, model: Reader) -> None:
    c, ids = g.config, g.inputs["input_ids"]
    x = model.spliced(ids, model.patches(g.inputs["images_clip"])[owners(g)])
    count = x.shape[1] - ids.shape[1] + 1
    words = g.inputs["attention_mask"].bool()
    real = torch.cat([torch.ones(len(ids), count - 1, dtype=torch.bool), words], 1)
    layout = lay_out([Segment("row", x.shape[1])], real=real)
    assert layout.kind == "causal"
    hidden = model.trunk(x, layout)
    text = slice(x.shape[1] - g.outputs["logits_text"].shape[1], None)
    seen = real[:, text]
    torch.testing.assert_close(hidden[:, text][seen], g.outputs["last_hidden_text"][seen], **TOLERANCE)
    logits = model.head(hidden)
    torch.testing.assert_close(logits[:, text][seen], g.outputs["logits_text"][seen], **LOGITS)
    labels = torch.cat([torch.full((len(ids), count - 1), -100), g.inputs["labels"]], 1)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(loss, g.outputs["ce_loss"], **TOLERANCE)
    # the state that predicts a segmentation token prompts the mask decoder
    place = F.pad(ids[:, 1:] == c["seg_token_idx"], (count - 1, 1))
    prompts = model.text_hidden(hidden)
    for image in range(len(g.inputs["offset"]) - 1):
        rows = owners(g) == image
        found = prompts[rows][place[rows]][:, None]
        torch.testing.assert_close(found, g.outputs[f"text_embeds_{image}"], **TOLERANCE)


@torch.no_grad()
def test_cached_greedy_answer(g: Any, model: Reader) -> None:
    ids = g.inputs["prompt_ids"]
    x = model.spliced(ids, model.patches(g.inputs["images_clip"][:1]))
    layout, cache, tokens = lay_out([Segment("row", x.shape[1])]), KVCache(), []
    for _ in range(g.config["gen_new"]):
        new = model.head(model.trunk(x, layout, cache=cache)[:, -1]).argmax(-1, keepdim=True)
        tokens.append(int(new))
        x, layout = model.embed(new), layout.append("row")
    assert ids[0].tolist() + tokens == g.outputs["evaluate_output_ids"][0].tolist()


def test_saving_gives_the_official_names_back(g: Any, model: Reader) -> None:
    saved, unknown = lisa.keymap().save(model.state_dict())
    assert unknown == []
    assert all("visual_model" in name for name in set(g.weights) - set(saved))
    assert set(saved) <= set(g.weights)
    assert all(torch.equal(saved[name], g.weights[name]) for name in saved)
