"""CogVLM against the port of its released code, loaded as the hub's folder: experts, positions, gradients, decoding."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from zoo.connectors.glu_adapter import GLUAdapter
from zoo.decoders.cogvlm_lm import TEXT, CogVLMLM
from zoo.layout import TokenBatch
from zoo.models.bridge import Bridge
from zoo.objectives.next_token import NextTokenConfig
from zoo.sampling.text import Decoding
from zoo.weights import load_model
from zoo.weights.formats import file_format
from zoo.weights.keymaps import cogvlm

TOLERANCE = {"atol": 2e-5, "rtol": 1e-5}
LOGITS = {"atol": 1e-4, "rtol": 1e-5}


def folder_of(g: Any, folder: Path, **more: Any) -> Path:
    """The golden's weights as the hub stores them; its ``config.json`` has no model_type."""
    c = g.config
    config = {
        "architectures": ["CogVLMForCausalLM"], "hidden_size": c["hidden"], "intermediate_size": c["ffn"],
        "num_hidden_layers": c["layers"], "num_attention_heads": c["heads"], "vocab_size": c["vocab"],
        "rms_norm_eps": c["rms_norm_eps"], "max_position_embeddings": 64, "hidden_act": "silu",
        "template_version": "base", "vision_config": c["vision_config"], **more,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: t.clone() for name, t in g.weights.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture
def g(golden: Callable[[str], Any]) -> Any:
    return golden("cogvlm")


@pytest.fixture
def model(g: Any, tmp_path: Path) -> Any:
    built, recipe, report = load_model(folder_of(g, tmp_path / "cogvlm"))
    assert recipe.model == "cogvlm-base-224"
    assert set(report.ignored) | set(report.new) == set()
    assert isinstance(built, Bridge)
    assert isinstance(built.decoder, CogVLMLM)
    assert isinstance(built.connector, GLUAdapter)
    return built.eval()


def placed(model: Any, ids: Tensor, types: Tensor) -> Tensor:
    """The golden's rows with the zoo's placeholder where boi, patches and eoi overwrite them."""
    return ids.masked_fill(types.bool(), model.image_token_id)


def batch_of(g: Any, model: Any) -> dict[str, Tensor]:
    return {
        "pixel_values": g.inputs["pixel_values"],
        "input_ids": placed(model, g.inputs["input_ids"], g.inputs["token_type_ids"]),
        "attention_mask": g.inputs["attention_mask"].bool(),
        "labels": g.inputs["labels"],
    }


@torch.no_grad()
def test_image_tokens_are_boi_patches_eoi(g: Any, model: Any) -> None:
    assert model.encoder.trunk.config.eps == 1e-6
    assert model.decoder.trunk.config.eps == model.connector.norm.eps == 1e-5
    features = model.image_features(g.inputs["pixel_values"])
    assert features.shape[1] == model.connector.tokens == g.config["n_patches"] + 2
    torch.testing.assert_close(features, g.outputs["image_features"], **TOLERANCE)
    assert torch.equal(features[:, :1], model.connector.boi.expand(2, -1, -1))
    assert torch.equal(features[:, -1:], model.connector.eoi.expand(2, -1, -1))


def test_routes_and_positions(g: Any, model: Any) -> None:
    batch = batch_of(g, model)
    real = batch["attention_mask"]
    layout = model._layout(batch["input_ids"], real, "right")
    assert torch.equal(layout.modality[real], g.outputs["expert_mask_vision"][real])
    assert torch.equal(layout.position[real], g.outputs["position_ids"][real])
    assert layout.kind == "causal"  # patches too: no mask is needed
    assert layout.spans is not None
    assert len(layout.spans) == 3


@torch.no_grad()
def test_hidden_states_and_logits(g: Any, model: Any) -> None:
    batch = batch_of(g, model)
    real = batch["attention_mask"]
    x = model._splice(batch["input_ids"], batch["pixel_values"])
    layout = model._layout(batch["input_ids"], real, "right")
    hidden, taps = model.decoder.trunk(x, layout, taps=True)
    states = [x, *taps[:-1], hidden]
    assert len(states) == len(g.outputs["hidden_states"])
    for ours, expected in zip(states, g.outputs["hidden_states"], strict=True):
        torch.testing.assert_close(ours[real], expected[real], **TOLERANCE)
    logits = model.text_logits(batch["pixel_values"], batch["input_ids"], real)
    torch.testing.assert_close(logits[real], g.outputs["logits"][real], **LOGITS)


@torch.no_grad()
def test_text_alone_and_experts_copied_from_text(g: Any, model: Any) -> None:
    batch = batch_of(g, model)
    ids, real = g.inputs["text_only_input_ids"], batch["attention_mask"]
    torch.testing.assert_close(model.text_logits(None, ids), g.outputs["text_only_logits"], **LOGITS)
    model.decoder.start_experts()
    logits = model.text_logits(batch["pixel_values"], batch["input_ids"], real)
    torch.testing.assert_close(logits[real], g.outputs["reduced_logits"][real], **LOGITS)


def test_loss_and_gradients(g: Any, model: Any) -> None:
    batch = batch_of(g, model)
    loss = NextTokenConfig().build()(model, batch, model(batch))[0]
    torch.testing.assert_close(loss.detach(), g.outputs["loss"], **LOGITS)
    loss.backward()
    learned = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    gradients, unknown = cogvlm.keymap().save(learned)
    assert unknown == []
    wanted = {name.removeprefix("grad/"): t for name, t in g.outputs.items() if name.startswith("grad/")}
    assert len(wanted) == 6
    for name, expected in wanted.items():
        assert expected.abs().max() > 1e-2
        torch.testing.assert_close(gradients[name], expected, **LOGITS)


@pytest.mark.parametrize("beams", [1, 3])
def test_greedy_ids_and_cached_equal_full(g: Any, model: Any, beams: int) -> None:
    """The next token takes the last position + 1, which is not the length of the sequence."""
    prompts = [placed(model, g.inputs[f"gen{i}_input_ids"], g.inputs[f"gen{i}_token_type_ids"]) for i in range(2)]
    wanted = [g.outputs[f"gen{i}_ids"] for i in range(2)]
    decoding = Decoding(max_new_tokens=wanted[0].shape[1], beams=beams)
    pixels = g.inputs["pixel_values"]
    found = [model.generate_ids(pixels[i : i + 1], prompts[i], None, decoding, stop_ids=[], pad_id=0) for i in range(2)]
    if beams == 1:
        assert [ids.tolist() for ids in found] == [ids.tolist() for ids in wanted]
    else:  # a hypothesis' log p over the cache is that of one pass over the whole row
        for i, ids in enumerate(found):
            assert torch.equal(ids, rescored(model, pixels[i : i + 1], prompts[i], ids.shape[1], beams))
    # both prompts in one batch, pads in front, write the same
    width = max(p.shape[1] for p in prompts)
    rows = torch.cat([torch.nn.functional.pad(p, (width - p.shape[1], 0)) for p in prompts])
    mask = torch.stack([torch.arange(width) >= width - p.shape[1] for p in prompts])
    together = model.generate_ids(pixels, rows, mask, decoding, stop_ids=[], pad_id=0)
    assert torch.equal(together, torch.cat(found))


@torch.no_grad()
def rescored(model: Any, pixels: Tensor, prompt: Tensor, steps: int, beams: int) -> Tensor:
    """Beam search without a cache and without stops: every step is a full forward pass."""
    rows, scores = prompt, torch.zeros(1)
    for _ in range(steps):
        logits = model.text_logits(pixels.repeat(len(rows), 1, 1, 1), rows)[:, -1].log_softmax(-1)  # [beams, V]
        best, places = (scores[:, None] + logits).flatten().topk(beams)
        rows = torch.cat([rows[places // logits.shape[1]], (places % logits.shape[1])[:, None]], 1)
        scores = best
    return rows[:1, prompt.shape[1] :]


@torch.no_grad()
def test_every_cached_row_equals_the_full_forward(g: Any, model: Any) -> None:
    batch = batch_of(g, model)
    ids, pixels = batch["input_ids"][:1], batch["pixel_values"][:1]
    real = int(batch["attention_mask"][0].sum())
    ids = ids[:, :real]
    x, full = model._splice(ids, pixels), model._layout(ids, None)
    whole = model.decoder(TokenBatch(x, full))
    start = model.connector.tokens + 2
    cache = model.decoder.new_cache()
    layout = model._layout(ids[:, :start], None)
    rows = [model.decoder(TokenBatch(x[:, :start], layout), cache)]
    for at in range(start, real):
        layout = model.decoder.grow(layout)
        rows.append(model.decoder(TokenBatch(x[:, at : at + 1], layout), cache))
    assert real - start >= 5
    assert torch.equal(layout.position, full.position)
    assert int(layout.modality[0, -1]) == TEXT
    torch.testing.assert_close(torch.cat(rows, 1), whole, **TOLERANCE)


def test_saving_gives_the_official_names_back(g: Any, model: Any) -> None:
    saved, unknown = cogvlm.keymap().save(model.state_dict())
    assert unknown == []
    assert {name for name in g.weights if "inv_freq" not in name} == set(saved)
    assert all(torch.equal(saved[name], g.weights[name]) for name in saved)


def test_bare_file_of_the_hub(g: Any, model: Any, tmp_path: Path) -> None:
    _, recipe, _ = load_model(folder_of(g, tmp_path / "cogvlm"))
    official = file_format(recipe, g.weights)
    assert official is not None
    mapped, unknown = official.keymap.load(g.weights)
    assert unknown == []
    assert set(mapped) == set(model.state_dict())
    assert file_format(recipe, model.state_dict()) is None


def test_larger_images_interpolate_the_positions(g: Any, model: Any, tmp_path: Path) -> None:
    """As base-490 goes on from base-224: the same weights, the table of positions resized, more patches."""
    source = folder_of(g, tmp_path / "cogvlm", max_position_embeddings=128)
    larger, recipe, report = load_model(source, changes={"encoder": {"image_size": 32}})
    assert "+encoder.image_size=32" in recipe.name
    assert report.resized == ["encoder.embed.positions"]
    assert (report.new, report.ignored) == ([], [])
    assert larger.connector.tokens == larger.decoder.image_tokens == 64 + 2
    own, theirs = larger.state_dict(), model.state_dict()
    assert all(torch.equal(own[name], t) for name, t in theirs.items() if name != "encoder.embed.positions")
    assert own["encoder.embed.positions"].shape == (1, 65, g.config["vit_width"])
