"""The language half of VisualGLM against its released code: prefix, two position streams, scaled residuals, decoding.

The golden has the Q-Former's output for an input; the vision half is proved in ``test_visualglm.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoo
from zoo.decoders.glm_lm import GLMLM
from zoo.layout import TokenBatch, lay_out
from zoo.layout_facts import Segment
from zoo.nn.positions import rotary
from zoo.objectives.next_token import NextTokenConfig
from zoo.part import Features
from zoo.sampling.text import Decoding
from zoo.weights.keymaps import visualglm

HIDDEN = {"atol": 2e-5, "rtol": 2e-5}
LOGITS = {"atol": 1e-4, "rtol": 1e-5}


@pytest.fixture
def g(golden: Callable[[str], Any]) -> Any:
    return golden("visualglm")


@pytest.fixture
def model(g: Any) -> Any:
    """VisualGLM around the golden's language model; pixels stand for the Q-Former's rows (see ``Given``)."""
    c = g.config
    decoder = {
        "width": c["hidden"], "depth": c["layers"], "heads": c["heads"], "ffn": c["inner_hidden"],
        "eps": c["layernorm_eps"], "vocab_size": c["vocab"], "sop_id": c["bos"],
    }  # fmt: skip
    connector = {"queries": c["n_img"], "width": c["qf_hidden"], "heads": 2, "depth": 2}
    built: Any = zoo.build("visualglm-6b", scale="tiny", decoder=decoder, connector=connector).model
    mapped, unknown = visualglm.keymap(c["heads"]).load(g.weights)
    assert unknown == []
    lost = built.load_state_dict(mapped, strict=False)
    assert lost.unexpected_keys == []
    assert not [name for name in lost.missing_keys if name.startswith(("decoder.", "connector.proj."))]
    built.connector.hidden = lambda image, text: image.tokens
    built.encode_images = lambda pixel_values, image_tokens=None: Features(g.inputs["qformer_output"])
    for parameter in built.parameters():
        parameter.requires_grad_(True)
    return built.eval()


class Given:
    """One image of a golden's batch, whose Q-Former output is looked up."""

    def __init__(self, g: Any, model: Any, rows: slice) -> None:
        model.encode_images = lambda pixel_values, image_tokens=None: Features(g.inputs["qformer_output"][rows])
        self.pixels = torch.zeros(len(g.inputs["qformer_output"][rows]), 3, 1, 1)


def placed(g: Any, model: Any, ids: Tensor) -> Tensor:
    """The golden's rows with the zoo's placeholder in place of the pads that the image overwrites."""
    first, out = int(g.inputs["pre_image_length"]), ids.clone()
    out[:, first : first + g.config["n_img"]] = model.image_token_id
    return out


def batch_of(g: Any, model: Any) -> dict[str, Tensor]:
    ids = g.inputs["input_ids"]
    place = torch.arange(ids.shape[1])
    start = (ids == g.config["bos"]).long().argmax(1, keepdim=True)
    real = (place < start) | (ids != g.config["pad"])
    return {"input_ids": placed(g, model, ids), "attention_mask": real, "labels": g.inputs["labels"]}


def test_rows_keep_their_length_and_image_vectors_overwrite_pads(g: Any, model: Any) -> None:
    batch, first, n = batch_of(g, model), int(g.inputs["pre_image_length"]), g.config["n_img"]
    with torch.no_grad():
        embeds = model._splice(batch["input_ids"], Given(g, model, slice(None)).pixels)
        words = model.decoder.embed(g.inputs["input_ids"])
    assert embeds.shape[:2] == g.inputs["input_ids"].shape
    torch.testing.assert_close(embeds[:, first : first + n], g.outputs["image_vectors"], **HIDDEN)
    assert torch.equal(embeds[:, :first], words[:, :first])
    assert torch.equal(embeds[:, first + n :], words[:, first + n :])


def test_mask_and_position_ids(g: Any, model: Any) -> None:
    ids = placed(g, model, g.inputs["input_ids"])
    layout = model._layout(ids, None)  # the released mask knows no pads
    assert torch.equal(layout.mask(), g.outputs["attention_hidden"] == 0)
    assert torch.equal(layout.position, g.outputs["position_ids"])


def test_values_an_output_would_not_show(g: Any, model: Any) -> None:
    config = model.decoder.trunk.config
    assert config.eps == 1e-5
    assert config.residual_scale == 56**0.5
    stored = g.weights["transformer.layers.0.attention.rotary_emb.inv_freq"]
    assert config.rope_half
    angle = rotary(torch.ones(1, 1, dtype=torch.long), config.rope, config.rope_theta, 2, torch.float64, half=True)
    assert torch.equal(angle[1].flatten(), stored.sin().double().repeat(2))


@torch.no_grad()
def test_hidden_states_and_logits(g: Any, model: Any) -> None:
    batch = batch_of(g, model)
    ids, real = batch["input_ids"], batch["attention_mask"]
    layout = model._layout(ids, real, "right")
    embeds = model._splice(ids, Given(g, model, slice(None)).pixels)
    hidden, taps = model.decoder.trunk(embeds, layout, taps=True)
    for seen, wanted in zip((*taps[:-1], hidden), g.outputs["hidden_states"][1:], strict=True):
        torch.testing.assert_close(seen[real], wanted[real], **HIDDEN)
    logits = model.text_logits(Given(g, model, slice(None)).pixels, ids, real)
    torch.testing.assert_close(logits[real], g.outputs["logits"][real], **LOGITS)
    text_only = model.text_logits(None, g.inputs["input_ids"], real)
    torch.testing.assert_close(text_only[real], g.outputs["text_only_logits"][real], **LOGITS)


def test_loss_and_gradients(g: Any, model: Any) -> None:
    batch = {**batch_of(g, model), "pixel_values": Given(g, model, slice(None)).pixels}
    loss = NextTokenConfig().build()(model, batch, model(batch))[0]
    torch.testing.assert_close(loss.detach(), g.outputs["loss"], **LOGITS)
    loss.backward()
    learned = {n: p.grad for n, p in model.named_parameters() if p.grad is not None and not n.startswith("encoder.")}
    language = {n: t for n, t in learned.items() if n.startswith(("decoder.", "connector.proj."))}
    gradients, unknown = visualglm.keymap(g.config["heads"]).save(language)
    assert unknown == []
    wanted = {name.removeprefix("grad/"): t for name, t in g.outputs.items() if name.startswith("grad/")}
    assert len(wanted) == 2
    for name, expected in wanted.items():
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(gradients[name], expected, atol=1e-6, rtol=1e-4)


def prompt(g: Any, model: Any, row: int) -> Tensor:
    ids = g.inputs["input_ids"][row : row + 1]
    return placed(g, model, ids)[:, : int((ids[0] == g.config["bos"]).nonzero()[0]) + 1]


def test_greedy_answers_alone_and_in_one_batch(g: Any, model: Any) -> None:
    """gMASK's place is repeated, the block position counts on; pads in front change nothing."""
    c = g.config
    decoding = Decoding(max_new_tokens=c["gen_new"])
    rows = [prompt(g, model, i) for i in range(2)]
    found = []
    for i, row in enumerate(rows):
        pixels = Given(g, model, slice(i, i + 1)).pixels
        new = model.generate_ids(pixels, row, None, decoding, stop_ids=[c["eos"]], pad_id=c["pad"])
        assert new.tolist() == g.outputs[f"gen{i}_ids"].tolist()
        found.append(new[0])
    width = max(row.shape[1] for row in rows)
    ids = torch.cat([nn.functional.pad(row, (width - row.shape[1], 0), value=c["pad"]) for row in rows])
    mask = torch.stack([torch.arange(width) >= width - row.shape[1] for row in rows])
    pixels = Given(g, model, slice(None)).pixels
    together = model.generate_ids(pixels, ids, mask, decoding, stop_ids=[c["eos"]], pad_id=c["pad"])
    for i, alone in enumerate(found):
        assert torch.equal(together[i, : len(alone)], alone)


@torch.no_grad()
def test_every_cached_row_equals_the_full_forward(g: Any, model: Any) -> None:
    batch = batch_of(g, model)
    for i in range(2):
        ids = batch["input_ids"][i : i + 1, : int(batch["attention_mask"][i].sum())]
        full = model._layout(ids, None)
        x = model._splice(ids, Given(g, model, slice(i, i + 1)).pixels)
        whole = model.decoder(TokenBatch(x, full))
        start = prompt(g, model, i).shape[1]
        layout, cache = model._layout(ids[:, :start], None), model.decoder.new_cache()
        rows = [model.decoder(TokenBatch(x[:, :start], layout), cache)]
        for at in range(start, ids.shape[1]):
            layout = model.decoder.grow(layout)
            rows.append(model.decoder(TokenBatch(x[:, at : at + 1], layout), cache))
        assert ids.shape[1] - start >= 3
        assert torch.equal(layout.position, full.position)
        torch.testing.assert_close(torch.cat(rows, 1), whole, **HIDDEN)


@torch.no_grad()
def test_qkv_of_another_layout_gives_other_logits(g: Any, model: Any) -> None:
    """The fused rows are [head, (q, k, v)]; read as [(q, k, v), head] they are another model."""
    batch, heads = batch_of(g, model), g.config["heads"]
    name = "transformer.layers.{}.attention.query_key_value.{}"
    wrong = dict(g.weights)
    for i in range(g.config["layers"]):
        for p in ("weight", "bias"):
            fused = g.weights[name.format(i, p)]
            head = fused.shape[0] // (3 * heads)
            by_three = fused.reshape(3, heads, head, *fused.shape[1:]).transpose(0, 1)
            wrong[name.format(i, p)] = by_three.reshape(fused.shape)
    mapped, _ = visualglm.keymap(heads).load(wrong)
    model.load_state_dict(mapped, strict=False)
    real = batch["attention_mask"]
    logits = model.text_logits(None, g.inputs["input_ids"], real)
    assert float((logits - g.outputs["text_only_logits"])[real].abs().max()) > 0.1


def test_saving_gives_the_official_names_back(g: Any, model: Any) -> None:
    own = {k: v for k, v in model.state_dict().items() if k.startswith(("decoder.", "connector.proj."))}
    saved, unknown = visualglm.keymap(g.config["heads"]).save(own)
    assert unknown == []
    assert {name.split(".")[-1] for name in set(g.weights) - set(saved)} == {"inv_freq"}
    assert all(torch.equal(saved[name], g.weights[name]) for name in saved)


@torch.no_grad()
def test_a_row_without_an_answer_is_all_prefix(g: Any, model: Any) -> None:
    assert isinstance(model.decoder, GLMLM)
    ids = torch.tensor([[5, 6, 7, 8]])
    plain = replace(lay_out([Segment("sequence", 4)]), spans=None)
    layout = model.decoder.arrange(plain, ids, torch.zeros_like(ids, dtype=torch.bool))
    assert bool(layout.mask().all())
    assert layout.position.tolist() == [[[0, 1, 2, 3], [0, 0, 0, 0]]]
    grown = model.decoder.grow(layout)  # as if sop had been written
    assert grown.position[0, :, -1].tolist() == [3, 1]
