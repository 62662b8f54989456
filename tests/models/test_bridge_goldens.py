"""LLaVA and BLIP-2 (OPT) against what the released code and transformers computed, loaded as their own checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from zoo.errors import ConfigError
from zoo.layout import TokenBatch
from zoo.models.bridge import Bridge
from zoo.objectives.next_token import NextTokenConfig
from zoo.sampling.text import Decoding
from zoo.weights import load_model
from zoo.weights.keymaps import blip2, load_into

LOGITS = {"atol": 1e-4, "rtol": 0.0}
SLOTS = 16


def checkpoint(folder: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({k: v.clone() for k, v in weights.items()}, folder / "model.safetensors")
    return folder


def released_llava(folder: Path, golden: Any) -> Bridge:
    """The golden's weights as haotian-liu/LLaVA stores them: one Llama configuration, the tower named beside it."""
    c = golden.config
    tower = {
        "hidden_size": c["clip_width"], "intermediate_size": c["clip_ffn"], "num_hidden_layers": c["clip_layers"],
        "num_attention_heads": c["clip_heads"], "image_size": c["img_size"], "patch_size": c["patch_size"],
        "hidden_act": c["hidden_act_clip"],
    }  # fmt: skip
    (folder / "clip").mkdir(parents=True)
    (folder / "clip" / "config.json").write_text(json.dumps({"model_type": "clip_vision_model", **tower}))
    config = {
        "model_type": "llava_llama", "hidden_size": c["llm_hidden"], "intermediate_size": c["llm_ffn"],
        "num_hidden_layers": c["llm_layers"], "num_attention_heads": c["llm_heads"], "vocab_size": c["vocab"],
        "rms_norm_eps": c["rms_norm_eps"], "max_position_embeddings": 512, "mm_vision_tower": str(folder / "clip"),
        "mm_projector_type": c["mm_projector_type"], "mm_vision_select_layer": c["select_layer"],
        "mm_vision_select_feature": c["select_feature"], "image_aspect_ratio": "pad", "mm_use_im_start_end": False,
    }  # fmt: skip
    model, _, _ = load_model(checkpoint(folder / "llava", config, golden.weights))
    assert isinstance(model, Bridge)
    return model.eval()


def spliced(ids: Tensor, labels: Tensor, mask: Tensor, image_id: int, side: str = "right") -> tuple[Tensor, ...]:
    """Expand each -200 to its slots and pad again, as the released code rebuilds rows."""
    rows = []
    for row, label, real in zip(ids, labels, mask.bool(), strict=True):
        out: list[tuple[int, int]] = []
        for token, target in zip(row[real].tolist(), label[real].tolist(), strict=True):
            out += [(image_id, -100)] * SLOTS if token == -200 else [(token, target)]
        rows.append(out)
    longest = max(map(len, rows))
    new = torch.zeros(len(rows), longest, 2, dtype=torch.long)
    new[..., 1] = -100
    real = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, out in enumerate(rows):
        here = slice(0, len(out)) if side == "right" else slice(longest - len(out), longest)
        new[i, here] = torch.tensor(out)
        real[i, here] = True
    return new[..., 0], new[..., 1], real


def loss_of(model: Bridge, batch: dict[str, Tensor]) -> Tensor:
    return NextTokenConfig().build()(model, batch, model(batch))[0]


@pytest.mark.parametrize("name", ["llava_v1", "llava_v15"])
def test_released_llava(name: str, golden: Callable[[str], Any], tmp_path: Path) -> None:
    g = golden(name)
    model = released_llava(tmp_path, g)
    images = g.inputs["images"][[0, 2, 3]]  # the released code feeds a blank image for the row that shows none
    ids, labels, real = spliced(
        g.inputs["input_ids"], g.inputs["labels"], g.inputs["attention_mask"], model.image_token_id
    )
    assert torch.equal(labels, g.outputs["spliced_labels"])
    assert torch.equal(real, g.outputs["spliced_attention_mask"].bool())
    with torch.no_grad():
        torch.testing.assert_close(
            model.image_features(g.inputs["images"]), g.outputs["image_features"], atol=1e-5, rtol=1e-5
        )
        logits = model.text_logits(images, ids, real)
    torch.testing.assert_close(logits[real], g.outputs["logits"][real], **LOGITS)
    batch = {"pixel_values": images, "input_ids": ids, "attention_mask": real, "labels": labels}
    loss = loss_of(model, batch)
    torch.testing.assert_close(loss.detach(), g.outputs["loss"], atol=1e-5, rtol=0)
    # rows cut after the images are expanded; the cut goes through an image, which the processor would refuse
    end = g.config["trunc_len"]
    assert torch.equal(labels[:, :end], g.outputs["trunc_labels"])
    with pytest.raises(ConfigError, match="placeholders"):
        model.text_logits(images, ids[:, :end], real[:, :end])
    with torch.no_grad():
        embeds = model._splice(ids, images)[:, :end]
        hidden = model.decoder(TokenBatch(embeds, model._layout(ids[:, :end], real[:, :end])))
        outputs = {"hidden": hidden[:, :-1], "targets": labels[:, 1:end]}
        cut = NextTokenConfig().build()(model, {}, outputs)[0]
    torch.testing.assert_close(cut, g.outputs["trunc_loss"], atol=1e-5, rtol=0)
    # gradients
    loss.backward()
    ours = {
        "model.mm_projector.weight": "proj.weight",
        "model.mm_projector.0.weight": "proj.0.weight",
        "model.mm_projector.2.weight": "proj.2.weight",
    }
    parameters = dict(model.connector.named_parameters())
    for key, value in g.outputs.items():
        if key.startswith("grad/model.mm_projector"):
            torch.testing.assert_close(parameters[ours[key.removeprefix("grad/")]].grad, value, **LOGITS)


@pytest.mark.parametrize("name", ["llava_v1", "llava_v15"])
def test_released_llava_left_padding_and_greedy(name: str, golden: Callable[[str], Any], tmp_path: Path) -> None:
    g = golden(name)
    model = released_llava(tmp_path, g)
    images = g.inputs["images"]
    args = g.inputs["input_ids"], g.inputs["labels"], g.inputs["attention_mask"]
    ids, labels, real = spliced(*args, model.image_token_id, side="left")
    assert torch.equal(labels, g.outputs["left_labels"])
    layout = model._layout(ids, real)
    assert torch.equal(layout.position[real], g.outputs["left_position_ids"][real])  # every row counts from 0
    with torch.no_grad():
        logits = model.text_logits(images[[0, 2, 3]], ids, real)
    torch.testing.assert_close(logits[:, -1], g.outputs["left_logits_last"], **LOGITS)
    prompts = {"gen0": images[:1], "gen2": images[2:]}
    rows = [g.inputs[f"{key}_prompt_ids"] for key in prompts]
    for (key, pixels), prompt in zip(prompts.items(), rows, strict=True):
        one, _, _ = spliced(prompt, torch.full_like(prompt, -100), torch.ones_like(prompt), model.image_token_id)
        new = model.generate_ids(pixels, one, None, Decoding(max_new_tokens=8), stop_ids=[2], pad_id=0)
        assert torch.equal(new, g.outputs[f"{key}_ids"][:, : new.shape[1]])
    # both prompts in one batch write the same
    width = max(r.shape[1] for r in rows)
    ids = torch.stack([torch.nn.functional.pad(r[0], (0, width - r.shape[1])) for r in rows])
    mask = torch.stack([torch.arange(width) < r.shape[1] for r in rows])
    ids, _, real = spliced(ids, torch.full_like(ids, -100), mask, model.image_token_id)
    new = model.generate_ids(images[[0, 2, 3]], ids, real, Decoding(max_new_tokens=8), stop_ids=[2], pad_id=0)
    assert torch.equal(new, torch.cat([g.outputs["gen0_ids"], g.outputs["gen2_ids"]]))


def test_transformers_llava(golden: Callable[[str], Any], tmp_path: Path) -> None:
    g = golden("llava")
    config = {"model_type": "llava", **{k: v for k, v in g.config.items() if k != "n_image_tokens"}}
    model, recipe, report = load_model(checkpoint(tmp_path, config, g.weights))
    model.eval()
    assert isinstance(model, Bridge)
    assert model.image_token_id == 460
    assert recipe.model == "llava-1.5"
    assert (report.new, report.ignored) == ([], [])
    real = g.inputs["attention_mask"].bool()
    batch = {k: g.inputs[k] for k in ("pixel_values", "input_ids", "attention_mask", "labels")}
    with torch.no_grad():
        features = model.image_features(g.inputs["pixel_values"])
        logits = model.text_logits(*(g.inputs[k] for k in ("pixel_values", "input_ids", "attention_mask")))
        loss = loss_of(model, batch)
    torch.testing.assert_close(features, g.outputs["image_features"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits[real], g.outputs["logits"][real], **LOGITS)
    torch.testing.assert_close(loss, g.outputs["loss"], atol=1e-5, rtol=0)
    for key in ("gen0", "gen2"):
        pixels, ids = g.inputs[f"{key}_pixel_values"], g.inputs[f"{key}_input_ids"]
        new = model.generate_ids(pixels, ids, None, Decoding(max_new_tokens=8), stop_ids=[2], pad_id=0)
        assert torch.equal(new, g.outputs[f"{key}_ids"][:, : new.shape[1]])


def test_transformers_blip2(golden: Callable[[str], Any], tmp_path: Path) -> None:
    g = golden("hf_blip2_opt")
    known = ("vision_config", "qformer_config", "text_config", "num_query_tokens", "image_token_index")
    config = {"model_type": "blip-2", **{k: g.config[k] for k in known}}
    model, recipe, report = load_model(checkpoint(tmp_path, config, g.weights))
    model.eval()
    assert isinstance(model, Bridge)
    assert recipe.model == "blip2-opt"
    assert (report.new, report.ignored) == ([], [])
    real = g.inputs["attention_mask"].bool()
    batch = {k: g.inputs[k] for k in ("pixel_values", "input_ids", "attention_mask", "labels")}
    with torch.no_grad():
        image = model.encoder(g.inputs["pixel_values"])
        hidden = model.connector.hidden(image)  # type: ignore[operator]
        logits = model.text_logits(*(g.inputs[k] for k in ("pixel_values", "input_ids", "attention_mask")))
        loss = loss_of(model, batch)
    normed = model.connector.ln_vision(image.tokens)  # type: ignore[operator]
    torch.testing.assert_close(normed, g.outputs["vision_last_hidden_state"], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(hidden, g.outputs["qformer_last_hidden_state"], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(logits[real], g.outputs["logits"][real], **LOGITS)
    torch.testing.assert_close(loss, g.outputs["loss"], atol=2e-5, rtol=0)
    new = model.generate_ids(
        g.inputs["pixel_values"],
        g.inputs["gen_input_ids"],
        g.inputs["gen_attention_mask"],
        Decoding(max_new_tokens=g.config["gen_max_new_tokens"]),
        stop_ids=[g.config["text_config"]["eos_token_id"]],
        pad_id=1,
    )
    assert torch.equal(new, g.outputs["generate_ids"])


def lavis_blip2(g: Any, tmp_path: Path, golden: Callable[[str], Any]) -> Bridge:
    hf = golden("hf_blip2_opt")
    known = ("vision_config", "qformer_config", "text_config", "num_query_tokens", "image_token_index")
    folder = checkpoint(tmp_path, {"model_type": "blip-2", **{k: hf.config[k] for k in known}}, hf.weights)
    model, _, _ = load_model(folder, changes={"connector.input_eps": 1e-5})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    dropped = {k.removeprefix("dropped_block/"): v for k, v in g.inputs.items() if k.startswith("dropped_block/")}
    assert dropped
    load_into(model, {**g.weights, **dropped}, blip2.lavis(2, 3), allow_ignored=blip2.STAGE1)
    assert isinstance(model, Bridge)
    return model.eval()


def test_lavis_blip2(golden: Callable[[str], Any], tmp_path: Path) -> None:
    g = golden("blip2_opt")
    model = lavis_blip2(g, tmp_path, golden)
    c = g.config
    for parameter in (*model.encoder.parameters(), *model.decoder.parameters()):
        parameter.requires_grad_(False)
    text, mask = g.inputs["text_ids"], g.inputs["text_attention_mask"]
    slots = torch.full((c["batch"], c["num_query"]), model.image_token_id)
    ids = torch.cat([slots, text], 1)
    mask = torch.cat([torch.ones_like(slots), mask], 1)
    labels = g.outputs["labels"]
    assert torch.equal(mask, g.outputs["attention_mask"])
    image = g.inputs["image"]
    features = model.encoder(image)
    torch.testing.assert_close(features.tokens, g.outputs["vit_tokens"], atol=2e-5, rtol=1e-5)
    hidden = model.connector.hidden(features)  # type: ignore[operator]
    torch.testing.assert_close(hidden, g.outputs["query_output"], atol=2e-5, rtol=1e-5)
    embeds = model._splice(ids, image)
    torch.testing.assert_close(embeds[mask.bool()], g.outputs["inputs_embeds"][mask.bool()], atol=2e-5, rtol=1e-5)
    logits = model.text_logits(image, ids, mask)
    torch.testing.assert_close(logits[mask.bool()], g.outputs["logits"][mask.bool()], **LOGITS)
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
        (connector.proj.weight, "opt_proj.weight"),
        (connector.trunk.layers[0].cross.v.weight, "Qformer.bert.encoder.layer.0.crossattention.self.value.weight"),
    ):
        torch.testing.assert_close(ours.grad, g.outputs[f"grad/{theirs}"], **LOGITS)


def test_lavis_blip2_greedy(golden: Callable[[str], Any], tmp_path: Path) -> None:
    g = golden("blip2_opt")
    model = lavis_blip2(g, tmp_path, golden)
    c = g.config
    slots = torch.full((c["batch"], c["num_query"]), model.image_token_id)
    prompt = torch.cat([slots, g.inputs["prompt_ids"]], 1)
    decoding = Decoding(max_new_tokens=c["gen_max_length"])
    new = model.generate_ids(g.inputs["image"], prompt, None, decoding, stop_ids=[c["newline_id"]], pad_id=1)
    assert torch.equal(new, g.outputs["generate_ids_greedy"][:, : new.shape[1]])
    # questions of different lengths, padded in front of the text, behind the slots
    ids = torch.cat([slots, g.inputs["vqa_ids"]], 1)
    mask = torch.cat([torch.ones_like(slots), g.inputs["vqa_attention_mask"]], 1)
    decoding = Decoding(max_new_tokens=c["vqa_max_len"])
    new = model.generate_ids(g.inputs["image"], ids, mask, decoding, stop_ids=[c["newline_id"]], pad_id=1)
    assert torch.equal(new, g.outputs["vqa_ids_greedy"][:, : new.shape[1]])
