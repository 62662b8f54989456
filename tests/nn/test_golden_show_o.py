"""Show-o against its released code: every mask exactly, logits, cached decoding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layout import ALL, NEVER, PAST, Layout, Segment, lay_out
from zoo.nn import KVCache, TokenEmbedding, Trunk
from zoo.weights.keymaps import KeyMap, load_into, phi, rename

TOLERANCE = {"atol": 2e-5, "rtol": 1e-5}
KEYMAP = phi.keymap().under("showo.") + KeyMap(rename("mm_projector.{i}.{p}", "projector.{i}.{p}"))
PAD, SOI, EOI, TASKS, EOT = 40, 41, 42, range(43, 50), 39


@pytest.fixture
def g(golden: Callable[[str], Any]) -> Any:
    return golden("show_o")


@pytest.fixture
def model(g: Any) -> nn.ModuleDict:
    trunk = Trunk(phi.trunk_config(g.config["phi"]))
    width, vocab = trunk.config.width, g.config["vocab_size"]
    clip = g.config["clip_width"]
    built = nn.ModuleDict(
        {
            "trunk": trunk,
            "embed": TokenEmbedding(vocab, width),
            "head": nn.Linear(width, vocab),
            "projector": nn.Sequential(nn.Linear(clip, width), nn.GELU(), nn.Linear(width, width)),
        }
    ).eval()
    load_into(built, g.weights, KEYMAP)
    return built


def blocks(ids: Tensor) -> Tensor:
    """Number the pieces of every row: 0 text, 1 first [soi .. eoi], 2 text behind it, 3 the second image, ..."""
    starts, ends = ids == SOI, F.pad(ids == EOI, (1, 0))[:, :-1]
    return (starts.long() + ends.long()).cumsum(1)


def mixed(ids: Tensor, c: dict[str, Any], pads: int) -> Layout:
    """The mixed batch: t2i rows, lm rows, mmu rows (the task token to eoi is one full segment).

    Args:
        ids: [B, T].
        c: the golden's config.
        pads: -1 for pads, or 3: left pads are a segment (the released masks let them read each other), right pads text.
    """
    t2i, lm = c["batch"]["t2i"], c["batch"]["lm"]
    segment = (blocks(ids) == 1).long()  # 0 text, 1 image
    understanding = torch.arange(len(ids))[:, None] >= t2i + lm
    segment[understanding.expand_as(ids) & (blocks(ids) <= 1)] = 2
    if pads < 0:
        segment[ids == PAD] = -1
    else:
        segment[:t2i][ids[:t2i] == PAD] = pads
    relation = [[PAST, PAST, PAST, NEVER], [PAST, ALL, PAST, NEVER], [PAST, PAST, ALL, NEVER], [PAST, PAST, PAST, PAST]]
    return Layout.from_ids(segment, relation, names=["text", "image", "prompt", "pad"])


def test_mixed_batch_masks(g: Any) -> None:
    ids = g.outputs["ids"]
    assert torch.equal(mixed(ids, g.config, 3).mask()[:, 0], g.outputs["mask"])
    ours = mixed(ids, g.config, -1)
    assert torch.equal(ours.mask()[:, 0][ours.real], (g.outputs["mask"] & ours.real[:, None])[ours.real])


@pytest.mark.parametrize("name", ["gen", "gen_nocfg", "inpaint"])
def test_prompt_masks(g: Any, name: str) -> None:
    rows = [g.inputs[f"{name}_cond_ids"]] + ([g.inputs[f"{name}_uncond_ids"]] if name != "gen_nocfg" else [])
    ids = torch.cat(rows)
    config = {**g.config, "batch": {"t2i": len(ids), "lm": 0}}
    assert torch.equal(mixed(ids, config, 3).mask()[:, 0], g.outputs[f"{name}_prompt_mask"])


def test_interleaved_masks(g: Any) -> None:
    ids = g.inputs["lvg_ids"]
    piece = blocks(ids)  # 0 text, 1 image, 2 text, 3 image
    names = ["text", "image", "text2", "image2", "pad"]
    table = torch.full((5, 5), PAST)
    table[1, 1] = table[3, 3] = ALL

    lvg = table.clone()
    lvg[1:4, 4] = NEVER  # pads are hidden from the first image on, text before it reads them
    segment = torch.where(ids == PAD, 4, piece)
    assert torch.equal(Layout.from_ids(segment, lvg, names=names).mask()[:, 0], g.outputs["lvg_mask"])

    all_images = table.clone()
    all_images[1] = all_images[3] = ALL  # rm_pad_in_image=False: image rows read everything
    assert torch.equal(
        Layout.from_ids(segment, all_images, names=names).mask()[:, 0], g.outputs["predict_next_no_rmpad_mask"]
    )

    # the second variant: text reads no earlier image; task tokens and pads are read by nobody, but column 0 by all
    second = torch.full((6, 6), PAST)
    second[:4, :4] = table[:4, :4]
    second[2, 1] = NEVER
    second[:, 4] = NEVER
    second[4, :4] = NEVER
    segment = torch.where((ids == PAD) | torch.isin(ids, torch.tensor(list(TASKS))), 4, piece)
    segment[:, 0] = 5
    ours = Layout.from_ids(segment, second, names=[*names, "first"])
    assert torch.equal(ours.mask()[:, 0], g.outputs["lvg_v2_mask"])


@torch.no_grad()
def test_logits_and_losses_of_the_mixed_batch(g: Any, model: nn.ModuleDict) -> None:
    assert model["trunk"].config.rope == 8  # half of the head
    ids, labels = g.outputs["ids"], g.outputs["labels"]
    layout = mixed(ids, g.config, -1)
    logits = model["head"](model["trunk"](model["embed"](ids), layout))
    torch.testing.assert_close(logits[layout.real], g.outputs["logits"][layout.real], **TOLERANCE)
    t2i, lm, first = g.config["batch"]["t2i"], g.config["batch"]["lm"], g.config["max_seq_length"] + 1

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    torch.testing.assert_close(loss(logits[:t2i, first:], labels[:t2i, first:]), g.outputs["loss_t2i"], **TOLERANCE)
    text = slice(t2i, t2i + lm)
    torch.testing.assert_close(loss(logits[text, :-1], labels[text, 1:]), g.outputs["loss_lm"], **TOLERANCE)
    torch.testing.assert_close(
        loss(logits[t2i + lm :, :-1], labels[t2i + lm :, 1:]), g.outputs["loss_mmu"], **TOLERANCE
    )


@torch.no_grad()
def test_clip_features_read_by_earlier_text(g: Any, model: nn.ModuleDict) -> None:
    prefix, suffix = g.inputs["clip_prefix_ids"], g.inputs["clip_suffix_ids"]
    features = model["projector"](g.inputs["clip_feats"])
    layout = lay_out(
        [
            Segment("prefix", prefix.shape[1]),
            Segment("features", features.shape[1], "image", "full"),
            Segment("suffix", suffix.shape[1]),
        ],
        relation={("prefix", "features"): "all"},
    )
    packed = np.unpackbits(g.outputs["clip_mask_packed"].numpy(), axis=-1)[:, : layout.length]
    assert torch.equal(layout.mask()[0, 0], torch.from_numpy(packed).bool())
    x = torch.cat([model["embed"](prefix), features, model["embed"](suffix)], 1)
    logits = model["head"](model["trunk"](x, layout)[:, g.inputs["clip_rows"]])
    torch.testing.assert_close(logits, g.outputs["clip_logits"], **TOLERANCE)


@torch.no_grad()
def test_image_rows_over_a_cached_text_prefix(g: Any, model: nn.ModuleDict) -> None:
    """The text never reads the image, so it is computed once for all denoising steps."""
    c, scale = g.config, g.config["guidance_scale"]
    steps, uncond = g.outputs["gen_step_input_ids"], g.inputs["gen_uncond_ids"]
    first = c["max_seq_length"] + 1
    ids = torch.cat([steps[0], uncond])
    layout = mixed(ids, {**c, "batch": {"t2i": len(ids), "lm": 0}}, -1)
    cache = KVCache()
    model["trunk"](model["embed"](ids[:, :first]), layout.truncate(first), cache=cache)
    for step, expected in ((0, "gen_first_logits"), (len(steps) - 1, "gen_last_logits")):
        image = steps[step][:, first:]
        hidden = model["trunk"](model["embed"](torch.cat([image, image])), layout, cache=cache)
        cache.truncate(first)
        codes = slice(c["image_token_offset"], c["image_token_offset"] + c["codebook_size"])
        with_text, without = model["head"](hidden[:, 1:-1])[..., codes].chunk(2)
        torch.testing.assert_close((1 + scale) * with_text - scale * without, g.outputs[expected], **TOLERANCE)
    assert not torch.equal(g.outputs["gen_first_logits"], g.outputs["gen_last_logits"])


@torch.no_grad()
def test_cached_greedy_answers(g: Any, model: nn.ModuleDict) -> None:
    ids = g.inputs["mmu_gen_ids"]
    end = int((ids[0] == EOI).nonzero()[0]) + 1
    layout = lay_out([Segment("prompt", end, attends="full"), Segment("text", ids.shape[1] - end)])
    cache, new, tokens, last = KVCache(), ids, [], []
    for _ in g.outputs["mmu_gen_tokens"]:
        logits = model["head"](model["trunk"](model["embed"](new), layout, cache=cache)[:, -1])
        new = logits.argmax(-1, keepdim=True)
        tokens.append(int(new))
        last.append(logits[0])
        layout = layout.append("text")
    assert tokens == g.outputs["mmu_gen_tokens"].tolist()
    torch.testing.assert_close(torch.stack(last), g.outputs["mmu_gen_last_logits"], **TOLERANCE)


def test_saving_gives_the_official_names_back(g: Any, model: nn.ModuleDict) -> None:
    saved, unknown = KEYMAP.save(model.state_dict())
    assert unknown == []
    assert set(saved) == set(g.weights)
    assert all(torch.equal(saved[name], g.weights[name]) for name in saved)
