"""LISA against its released code: the whole model through its official names, trained and evaluated."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from zoo_grounding.checkpoints import from_state, keymap
from zoo_grounding.masks import at_original_size

from zoo.api import build_module
from zoo.recipe import Recipe, resolve
from zoo.sampling.text import Decoding
from zoo.weights import load
from zoo.weights.keymaps import load_into

LOGITS = {"atol": 1e-4, "rtol": 1e-4}
LOSSES = {"atol": 1e-5, "rtol": 1e-5}


def recipe_of(c: dict[str, Any]) -> Recipe:
    """The golden's sizes as a recipe."""
    eye = {"image_size": c["clip_img"], "patch_size": c["clip_patch"], "width": c["clip_width"]}
    eye |= {"depth": c["clip_layers"], "heads": c["clip_heads"], "ffn": c["clip_ffn"]}
    text = {"family": "llama", "width": c["hidden"], "depth": c["layers"], "heads": c["heads"], "ffn": c["ffn"]}
    text |= {"vocab_size": c["vocab"] - 3, "context_length": 512, "options": {"rms_norm_eps": c["rms_norm_eps"]}}
    sam = {"image_size": c["sam_img"], "patch_size": c["sam_patch"], "width": c["sam_width"], "depth": c["sam_depth"]}
    sam |= {"heads": c["sam_heads"], "ffn": c["sam_mlp_ratio"] * c["sam_width"], "window": c["sam_window"]}
    sam |= {"global_blocks": c["sam_global"], "embed_width": c["sam_dim"], "decoder_heads": c["dec_heads"]}
    sam |= {"decoder_ffn": c["dec_mlp"], "scores_width": c["iou_hidden"]}
    return resolve("lisa", values={"encoder": eye, "decoder": text, "mask_decoder": sam})


@pytest.fixture(scope="module")
def g(golden: Callable[[str], Any]) -> Any:
    return golden("lisa")


@pytest.fixture
def module(g: Any) -> Any:
    recipe = recipe_of(g.config)
    built = build_module(recipe, 0)
    official = from_state(recipe, g.weights)
    assert official is not None
    assert official.new == ()
    report = load_into(built.model, g.weights, official.keymap)
    assert report.new == report.ignored == []
    return built.train()


def spliced(ids: Tensor, other: Tensor | None, token: int, fill: int, slots: int) -> tuple[Tensor, Tensor]:
    """Rows whose one placeholder is ``slots`` long; ``other`` has ``fill`` there."""
    rows, others = [], []
    for number, row in enumerate(ids):
        at = int((row == -200).nonzero()[0])
        middle = torch.full((slots,), token)
        rows.append(torch.cat([row[:at], middle, row[at + 1 :]]))
        own = row if other is None else other[number]
        others.append(torch.cat([own[:at], torch.full((slots,), fill, dtype=own.dtype), own[at + 1 :]]))
    return torch.stack(rows), torch.stack(others)


def batch_of(g: Any, model: Any) -> dict[str, Tensor]:
    """The golden's rows as the wiring reads them: every row with its image."""
    i, slots = g.inputs, g.config["n_patch"]
    owner = torch.repeat_interleave(torch.arange(2), i["offset"].diff())
    ids, labels = spliced(i["input_ids"], i["labels"], model.image_token_id, -100, slots)
    _, mask = spliced(i["input_ids"], i["attention_mask"].long(), model.image_token_id, 1, slots)
    row, place = (ids == g.config["seg_token_idx"]).nonzero(as_tuple=True)
    masks = [i[f"gt_masks_{n}"] for n in range(2)]
    height, width = (max(m.shape[axis] for m in masks) for axis in (1, 2))
    canvas = torch.zeros(len(row), height, width, dtype=torch.uint8)
    at = 0
    for part in masks:
        canvas[at : at + len(part), : part.shape[1], : part.shape[2]] = part.to(torch.uint8)
        at += len(part)
    return {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": mask.bool(),
        "pixel_values": i["images_clip"][owner],
        "mask_pixels": i["images"][owner],
        "resized": i["resize"][owner].long(),
        "image_sizes": i["original_size"][owner].long(),
        "masks": canvas,
        "mask_row": row,
        "mask_question": row,
        "prompt_places": place[:, None],
    }


@torch.no_grad()
def test_sam_sees_what_the_release_sees(g: Any, module: Any) -> None:
    sam = module.model.mask_decoder.eval()
    (seen,) = sam.encode(g.inputs["images"])
    torch.testing.assert_close(seen, g.outputs["image_embeddings"], **LOGITS)
    torch.testing.assert_close(sam.grid_positions(), g.outputs["dense_pe"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sam.no_mask.weight, g.outputs["dense_prompt_0"].reshape(1, -1))
    for image in (0, 1):
        prompts = g.outputs[f"text_embeds_{image}"]
        row = torch.full((len(prompts),), image)
        masks, scores = sam.masks((g.outputs["image_embeddings"],), prompts, row)
        torch.testing.assert_close(masks, g.outputs[f"low_res_masks_{image}"], **LOGITS)
        torch.testing.assert_close(scores, g.outputs[f"iou_{image}"], **LOSSES)
        assert torch.equal(sam.decode((g.outputs["image_embeddings"],), prompts, row), masks[:, 0])
    masks, scores = sam.masks((g.outputs["image_embeddings"],), g.outputs["text_embeds_0"], torch.zeros(3).long(), True)
    torch.testing.assert_close(masks, g.outputs["multimask_low_res_0"], **LOGITS)
    torch.testing.assert_close(scores, g.outputs["multimask_iou_0"], **LOSSES)


def test_training_step(g: Any, module: Any) -> None:
    """Masks at the images' sizes, each loss with its weight, and gradients in every part that learns."""
    batch = batch_of(g, module.model)
    loss, report = module.losses(batch)
    outputs = module.model(batch)
    owner = torch.repeat_interleave(torch.arange(2), g.inputs["offset"].diff())[batch["mask_row"]]
    for image in (0, 1):
        wanted = g.outputs[f"pred_masks_{image}"]
        found = outputs["mask_logits"][owner == image]
        torch.testing.assert_close(found[:, : wanted.shape[1], : wanted.shape[2]], wanted, **LOGITS)
        shown = outputs["mask_shown"][owner == image]
        assert shown.sum((1, 2)).tolist() == [wanted[0].numel()] * len(wanted)
    torch.testing.assert_close(report["next-token"], g.outputs["ce_loss"], **LOSSES)
    torch.testing.assert_close(2.0 * report["mask-bce/bce"], g.outputs["mask_bce_loss"], **LOSSES)
    torch.testing.assert_close(0.5 * report["mask-dice/dice"], g.outputs["mask_dice_loss"], **LOSSES)
    torch.testing.assert_close(loss, g.outputs["loss"], **LOSSES)
    loss.backward()
    grads = {name: p.grad for name, p in module.model.named_parameters()}
    names = [name.removeprefix("grad/") for name in g.outputs if name.startswith("grad/")]
    assert len(names) == 5
    ours, unknown = keymap(module.recipe).load({name: g.outputs[f"grad/{name}"] for name in names})
    assert not unknown
    for name, wanted in ours.items():
        assert float(wanted.abs().max()) > 0
        torch.testing.assert_close(grads[name], wanted, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_evaluate(g: Any, module: Any) -> None:
    """Greedy answer over a cache, and a mask of every target's token in it, as the release gets without a cache."""
    model, c = module.model.eval(), g.config
    ids, real = spliced(g.inputs["prompt_ids"], None, model.image_token_id, 1, c["n_patch"])
    real = torch.ones_like(real, dtype=torch.bool)
    # the golden has no text tokenizer, and its token another id than a recipe's
    model._processor = SimpleNamespace(target_ids=(c["seg_token_idx"],), stop_ids=frozenset(), stop_sequences=())
    eye, levels = model._look(g.inputs["images_clip"][:1])
    new = model._continue(eye, ids, real, Decoding(max_new_tokens=c["gen_new"]), stop_ids=(), pad_id=0)
    assert torch.cat([g.inputs["prompt_ids"], new], 1).tolist() == g.outputs["evaluate_output_ids"].tolist()
    drawn, row = model._drawn_of(ids, real, new, new.tolist(), eye, levels, g.inputs["images"][:1])
    sizes = g.inputs["resize"][:1].long(), g.inputs["original_size"][:1].long()
    wanted = g.outputs["evaluate_pred_masks"]
    masks, _ = at_original_size(drawn, sizes[0][row], sizes[1][row], c["sam_img"], tuple(wanted.shape[1:]))
    torch.testing.assert_close(masks, wanted, **LOGITS)
    assert len(row) == 2


@torch.no_grad()
def test_inference_branch_is_the_training_branch(g: Any, module: Any) -> None:
    masks = module.model.eval()(batch_of(g, module.model))["mask_logits"][:3]
    wanted = g.outputs["inference_pred_masks_0"]
    torch.testing.assert_close(masks[:, : wanted.shape[1], : wanted.shape[2]], wanted, **LOGITS)


def test_official_names_come_back(g: Any, module: Any) -> None:
    saved, unknown = keymap(module.recipe).save(module.model.state_dict())
    assert unknown == []
    left = set(g.weights) - set(saved)
    prompt = ("point_embeddings", "not_a_point_embed", "mask_downscaling")
    unread = ("post_layernorm", "encoder.layers.2.", "position_ids", "pixel_")
    assert all(any(word in name for word in (*prompt, *unread)) for name in left)
    assert set(saved) <= set(g.weights)
    assert all(torch.equal(saved[name], g.weights[name]) for name in saved)


def test_checkpoints_without_the_eye_leave_it_new(g: Any) -> None:
    recipe = recipe_of(g.config)
    state = {name: tensor for name, tensor in g.weights.items() if "vision_tower" not in name}
    official = from_state(recipe, state)
    assert official is not None
    assert official.new == ("encoder.{**}",)
    report = load_into(build_module(recipe, 1).model, state, official.keymap, allow_new=official.new)
    assert report.new
    assert all(name.startswith("encoder.") for name in report.new)
    assert from_state(recipe, build_module(recipe, 1).model.state_dict()) is None


def test_a_released_folder_is_read_by_the_recipes_name(g: Any, tmp_path: Path) -> None:
    """Its config.json calls itself LLaVA, and its tensors come in pickled shards."""
    names = sorted(g.weights)
    shards = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
    for shard, own in shards.items():
        torch.save({name: g.weights[name].clone() for name in own}, tmp_path / shard)
    places = {name: shard for shard, own in shards.items() for name in own}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava", "architectures": ["LISAForCausalLM"]}))
    recipe, state, report = load(tmp_path, model="lisa-7b")
    assert recipe.model == "lisa-7b"
    assert report.form == "LISA"
    assert report.ignored == []
    wanted = g.weights["model.visual_model.mask_decoder.mask_tokens.weight"]
    assert torch.equal(state["mask_decoder.decoder.mask_tokens.weight"], wanted)
    assert torch.equal(state["decoder.lm.lm_head.weight"], g.weights["lm_head.weight"])
