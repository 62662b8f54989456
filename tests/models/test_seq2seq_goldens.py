"""BLIP-2 with T5 against what LAVIS and transformers computed, loaded as their own checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import zoo
from zoo.models.seq2seq_bridge import Seq2SeqBridge
from zoo.objectives.next_token import NextTokenConfig
from zoo.sampling.text import Decoding
from zoo.weights import load_model
from zoo.weights.files import read_file
from zoo.weights.formats import file_format
from zoo.weights.keymaps import load_into

FEATURES = {"atol": 2e-5, "rtol": 1e-5}
LOGITS = {"atol": 1e-4, "rtol": 0.0}
KNOWN = ("vision_config", "qformer_config", "text_config", "num_query_tokens", "image_token_index")


def transformers_folder(folder: Path, golden: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "blip-2", **{k: golden.config[k] for k in KNOWN}}))
    save_file({k: v.clone() for k, v in golden.weights.items()}, folder / "model.safetensors")
    return folder


def loss_of(model: Seq2SeqBridge, batch: dict[str, Tensor]) -> Tensor:
    return NextTokenConfig().build()(model, batch, model(batch))[0]


def lavis(g: Any, tmp_path: Path, golden: Callable[[str], Any]) -> Seq2SeqBridge:
    """The golden's file as LAVIS stores it, with the ViT's last block, read by the recipe at the golden's sizes."""
    _, recipe, _ = load_model(transformers_folder(tmp_path, golden("hf_blip2_t5")))
    dropped = {k.removeprefix("dropped_block/"): v for k, v in g.inputs.items() if k.startswith("dropped_block/")}
    assert dropped
    file = tmp_path / "blip2.pth"
    torch.save({"model": {**g.weights, **dropped}}, file)
    recipe = recipe.with_(**{"connector.input_eps": 1e-5})
    built = recipe.wiring[1].build(recipe.parts, 3)
    state = read_file(file)
    official = file_format(recipe, state)
    assert official is not None
    assert official.new == ()
    load_into(built, state, official.keymap, allow_ignored=official.ignored)
    assert isinstance(built, Seq2SeqBridge)
    return built.eval()


def test_transformers_folder(golden: Callable[[str], Any], tmp_path: Path) -> None:
    g = golden("hf_blip2_t5")
    model, recipe, report = load_model(transformers_folder(tmp_path, g))
    model.eval()
    assert isinstance(model, Seq2SeqBridge)
    assert recipe.model == "blip2-flan-t5"
    assert (report.new, report.ignored) == ([], [])
    assert model.image_token_id == 49
    assert model.decoder.config.activation == "gelu"
    given = {k: g.inputs[k] for k in ("pixel_values", "input_ids", "attention_mask", "labels")}
    with torch.no_grad():
        image = model.encoder(given["pixel_values"])
        normed = model.connector.ln_vision(image.tokens)  # type: ignore[operator]
        hidden = model.connector.hidden(image)  # type: ignore[operator]
        logits = model.text_logits(
            given["pixel_values"], given["input_ids"], given["attention_mask"], model.shift_right(given["labels"])
        )
        loss = loss_of(model, given)
    torch.testing.assert_close(normed, g.outputs["vision_last_hidden_state"], **FEATURES)
    torch.testing.assert_close(hidden, g.outputs["qformer_last_hidden_state"], **FEATURES)
    real = given["labels"] != -100
    torch.testing.assert_close(logits[real], g.outputs["logits"][real], **LOGITS)
    torch.testing.assert_close(loss, g.outputs["loss"], atol=2e-5, rtol=0)
    new = model.generate_ids(
        given["pixel_values"],
        g.inputs["gen_input_ids"],
        g.inputs["gen_attention_mask"],
        Decoding(max_new_tokens=g.config["gen_max_new_tokens"]),
        stop_ids=[1],
        pad_id=0,
    )
    assert torch.equal(new, g.outputs["generate_ids"][:, 1 : 1 + new.shape[1]])
    assert not g.outputs["generate_ids"][:, 1 + new.shape[1] :].any()


def test_lavis_file(golden: Callable[[str], Any], tmp_path: Path) -> None:
    g = golden("blip2_t5")
    model = lavis(g, tmp_path, golden)
    for parameter in (*model.encoder.parameters(), *model.decoder.parameters()):
        parameter.requires_grad_(False)
    image, labels = g.inputs["image"], g.outputs["labels"]
    slots = torch.full((g.config["batch"], g.config["num_query"]), model.image_token_id)
    ids = torch.cat([slots, g.inputs["text_input_ids"]], 1)
    mask = torch.cat([torch.ones_like(slots), g.inputs["text_input_attention_mask"]], 1)
    assert torch.equal(mask, g.outputs["attention_mask"])
    features = model.encoder(image)
    torch.testing.assert_close(features.tokens, g.outputs["vit_tokens"], **FEATURES)
    torch.testing.assert_close(model.connector.hidden(features), g.outputs["query_output"], **FEATURES)  # type: ignore[operator]
    embeds = model._splice(ids, image)
    torch.testing.assert_close(embeds[mask.bool()], g.outputs["inputs_embeds"][mask.bool()], **FEATURES)
    logits = model.text_logits(image, ids, mask, model.shift_right(labels))
    torch.testing.assert_close(logits[labels != -100], g.outputs["logits"][labels != -100], **LOGITS)
    batch = {"pixel_values": image, "input_ids": ids, "attention_mask": mask, "labels": labels}
    loss = loss_of(model, batch)
    torch.testing.assert_close(loss.detach(), g.outputs["loss"], atol=2e-5, rtol=0)
    other = torch.where(mask.bool(), ids, 7)  # the ids of pads do not matter
    torch.testing.assert_close(loss_of(model, {**batch, "input_ids": other}), loss, atol=0, rtol=0)
    loss.backward()
    assert all(p.grad is None for p in (*model.encoder.parameters(), *model.decoder.parameters()))
    connector: Any = model.connector
    for ours, theirs in (
        (connector.query_tokens, "query_tokens"),
        (connector.ln_vision.weight, "ln_vision.weight"),
        (connector.proj.weight, "t5_proj.weight"),
        (connector.trunk.layers[0].cross.v.weight, "Qformer.bert.encoder.layer.0.crossattention.self.value.weight"),
    ):
        torch.testing.assert_close(ours.grad, g.outputs[f"grad/{theirs}"], **LOGITS)


def test_lavis_greedy(golden: Callable[[str], Any], tmp_path: Path) -> None:
    g = golden("blip2_t5")
    model = lavis(g, tmp_path, golden)
    slots = torch.full((g.config["batch"], g.config["num_query"]), model.image_token_id)
    decoding = Decoding(max_new_tokens=g.config["gen_max_length"])
    one = torch.cat([slots, g.inputs["prompt_ids"]], 1)
    new = model.generate_ids(g.inputs["image"], one, None, decoding, stop_ids=[1], pad_id=0)
    assert torch.equal(new, g.outputs["generate_ids_greedy"][:, 1 : 1 + new.shape[1]])
    ids = torch.cat([slots, g.inputs["text_input_ids"]], 1)
    mask = torch.cat([torch.ones_like(slots), g.inputs["text_input_attention_mask"]], 1)
    new = model.generate_ids(g.inputs["image"], ids, mask, decoding, stop_ids=[1], pad_id=0)
    assert torch.equal(new, g.outputs["generate_ids_greedy_prompted"][:, 1 : 1 + new.shape[1]])
    # the same with the pads in front, and between image and text
    width = mask.shape[1]
    for cut in (0, slots.shape[1]):
        order = torch.stack([_pads_at(row, cut, width) for row in mask])
        moved = model.generate_ids(
            g.inputs["image"], ids.gather(1, order), mask.gather(1, order), decoding, stop_ids=[1], pad_id=0
        )
        assert torch.equal(moved, new)


def _pads_at(mask: Tensor, cut: int, width: int) -> Tensor:
    """Places of a row whose pads, which stand behind, are to stand at ``cut``."""
    real = int(mask.sum())
    return torch.tensor([*range(cut), *range(real, width), *range(cut, real)])


def test_exact_gelu_is_what_makes_the_difference(golden: Callable[[str], Any], tmp_path: Path) -> None:
    """LAVIS overrides FlanT5's tanh GELU; with the other the logits leave the golden's by 7e-4."""
    g = golden("hf_blip2_t5")
    folder = transformers_folder(tmp_path, g)
    model, _, _ = load_model(folder, changes={"decoder.activation": "gelu_new"})
    assert isinstance(model, Seq2SeqBridge)
    model.eval()
    given = {k: g.inputs[k] for k in ("pixel_values", "input_ids", "attention_mask")}
    labels = g.inputs["labels"]
    with torch.no_grad():
        logits = model.text_logits(**given, decoder_input_ids=model.shift_right(labels))
    away = (logits - g.outputs["logits"])[labels != -100].abs().max()
    assert 1e-4 < float(away) < 5e-3


def test_public_door(golden: Callable[[str], Any], tmp_path: Path) -> None:
    module = zoo.from_pretrained(transformers_folder(tmp_path, golden("hf_blip2_t5")))
    assert isinstance(module.model, Seq2SeqBridge)
    head, table = module.model.decoder.lm.lm_head.weight, module.model.decoder.lm.shared.weight  # type: ignore[union-attr]
    assert (head - table).abs().max() > 0.5  # type: ignore[operator]  # Flan's two tables stay two
