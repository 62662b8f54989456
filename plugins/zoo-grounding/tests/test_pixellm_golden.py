"""PixelLM against its released code: the official file loads into the recipe, and the whole model agrees: text, masks,
losses, gradients, at 448 px with a padded image and answers of several targets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from zoo_grounding.clip_levels import CLIPLevelsConfig
from zoo_grounding.objectives import MaskBCEConfig, MaskDiceConfig
from zoo_grounding.pixellm_weights import TOWER, fill_tower, keymap, resized_positions
from zoo_grounding.refinement_loss import MaskRefinementConfig

import zoo
from zoo.errors import WeightsError
from zoo.objectives.next_token import NextTokenConfig

EMBEDS = {"atol": 2e-5, "rtol": 1e-5}
LOGITS = {"atol": 1e-4, "rtol": 1e-5}


@pytest.fixture(scope="module")
def g(golden: Callable[[str], Any]) -> Any:
    return golden("pixellm")


def changes(g: Any) -> dict[str, Any]:
    """What tensors do not tell, and no adapters, as the release computed without dropout."""
    c = g.config
    return {
        "encoder": {"heads": c["clip_heads"]},
        "decoder": {"heads": c["heads"], "lora_rank": 0},
        "mask_decoder": {"heads": c["dec_heads"]},
    }


@pytest.fixture(scope="module")
def file(g: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pixellm") / "model.safetensors"
    save_file(g.weights, path)
    return path


@pytest.fixture(scope="module")
def module(g: Any, file: Path) -> Any:
    return zoo.from_pretrained(file, model="pixellm-7b", **changes(g))


@pytest.fixture(scope="module")
def batch(g: Any, module: Any) -> dict[str, Tensor]:
    """The released inputs as the wiring reads them: 256 slots in place of one placeholder, the image in every row."""
    c, slot = g.config, module.model.image_token_id
    count = c["llm_visual_tokens"]
    ids, labels, real = [], [], []
    for row, label, mask in zip(*(g.inputs[k] for k in ("input_ids", "labels", "attention_mask")), strict=True):
        at = int((row == c["image_token_index"]).nonzero()[0])
        ids.append(torch.cat([row[:at], torch.full((count,), slot), row[at + 1 :]]))
        labels.append(torch.cat([label[:at], torch.full((count,), -100), label[at + 1 :]]))
        real.append(torch.cat([mask[:at], torch.ones(count, dtype=mask.dtype), mask[at + 1 :]]))
    rows = len(ids)
    low, size = g.inputs["image_low"], c["clip_image"]
    image = low.repeat_interleave(size // low.shape[-1], -1).repeat_interleave(size // low.shape[-1], -2)
    height, width = g.inputs["clip_resize"][0].tolist()
    image[:, :, height:], image[:, :, :, width:] = 0, 0
    whole = torch.stack(ids)
    places = torch.isin(whole, torch.tensor(c["seg_token_idx"])).nonzero()
    targets = g.inputs["targets_per_row"]
    owner = torch.repeat_interleave(torch.arange(rows), targets)
    return {
        "input_ids": whole,
        "labels": torch.stack(labels),
        "attention_mask": torch.stack(real).bool(),
        "pixel_values": image.expand(rows, -1, -1, -1),
        "resized": g.inputs["clip_resize"].expand(rows, -1),
        "image_sizes": g.inputs["original_size"].expand(rows, -1),
        "masks": g.inputs["gt_masks_0"],
        "mask_row": owner,
        "mask_question": owner,
        "prompt_places": places[:, 1].view(len(owner), -1),
    }


@pytest.fixture(scope="module")
def outputs(module: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return module.model(batch)  # type: ignore[no-any-return]


def test_sizes_come_from_the_tensors(g: Any, module: Any) -> None:
    c, parts = g.config, module.recipe.parts
    encoder, decoder, mask = (parts[slot][1] for slot in ("encoder", "decoder", "mask_decoder"))
    assert (encoder.width, encoder.depth, encoder.ffn) == (c["clip_width"], c["clip_layers"], c["clip_ffn"])
    assert (encoder.image_size, encoder.patch_size, encoder.eps) == (c["clip_image"], c["patch"], 1e-5)
    assert (decoder.width, decoder.depth, decoder.ffn) == (c["hidden"], c["layers"], c["ffn"])
    assert decoder.vocab_size + 8 == c["vocab"]
    assert decoder.options["rms_norm_eps"] == c["rms_norm_eps"]
    assert (mask.width, mask.ffn, mask.depth) == (c["dec_dim"], c["dec_mlp"], 2)
    marks = module.model.marks
    assert [marks[f"[SEG{i}]"] for i in range(6)] == c["seg_token_idx"]
    assert (marks["<im_start>"], marks["<im_end>"]) == (c["im_start"], c["im_end"])
    assert not module.load_report.new
    assert module.model.connector.tokens == c["llm_visual_tokens"]


def test_widths_that_nobody_published_need_their_heads(file: Path) -> None:
    with pytest.raises(WeightsError, match=r"tensors do not tell decoder\.heads"):
        zoo.from_pretrained(file, model="pixellm-7b", encoder={"heads": 2}, mask_decoder={"heads": 4})


@torch.no_grad()
def test_features_of_both_layers(g: Any, module: Any, batch: dict[str, Tensor]) -> None:
    model = module.model
    _, levels = model._look(batch["pixel_values"][:1])
    shown = levels[0].mask
    assert shown is not None
    assert int(shown.sum()) == 23 * 32  # of 320 rows of pixels the last patch is not whole
    wanted = g.outputs["image_features_subset"]
    every = -(-shown.shape[1] // wanted.shape[2])
    assert not shown[:, ::every].all()
    for level, features in zip(levels, wanted, strict=True):
        got = model.mask_decoder.image_proj(level.tokens)[:, ::every]
        torch.testing.assert_close(got, features, **EMBEDS)


def test_text(g: Any, module: Any, batch: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
    text = slice(-g.outputs["logits_text"].shape[1], None)
    seen = batch["attention_mask"][:, text]
    hidden = outputs["hidden"][:, text]
    torch.testing.assert_close(hidden[seen], g.outputs["last_hidden_text"][seen], **EMBEDS)
    logits = module.model.decoder.logits(hidden)
    torch.testing.assert_close(logits[seen], g.outputs["logits_text"][seen], **LOGITS)


@torch.no_grad()
def test_fusion_and_masks(g: Any, module: Any, batch: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
    model, row = module.model, batch["mask_row"]
    prompts = model.text_hidden(outputs["hidden"][row[:, None], batch["prompt_places"] - 1])
    torch.testing.assert_close(model.mask_decoder.fusion(prompts), g.outputs["fused_embeds_0"], **EMBEDS)
    weights = model.mask_decoder.fusion
    assert torch.equal(weights.token_weights, g.outputs["multiseg_scalar"][:3])
    assert torch.equal(weights.scale_weights, g.outputs["multiscale_scalar"])
    seen = model.mask_decoder.encode(None, model._look(batch["pixel_values"])[1])
    coarse, fine = model.mask_decoder.scale_masks(seen, prompts, row)
    torch.testing.assert_close(coarse, g.outputs["level0_masks_0"][:, 0], **LOGITS)
    torch.testing.assert_close(F.avg_pool2d(fine, 2), g.outputs["level1_masks_0"][:, 0], **LOGITS)
    low = model.mask_decoder.decode(seen, prompts, row)
    torch.testing.assert_close(low[:, ::4], g.outputs["low_res_row0_0"], **LOGITS)
    torch.testing.assert_close(outputs["mask_logits"], g.outputs["pred_masks_0"], **LOGITS)
    grid = model.mask_decoder.grid(32, 32).sum(0)[::4]
    torch.testing.assert_close(grid, g.outputs["dense_pe_sum"], **EMBEDS)
    found = outputs["mask_logits"] > 0
    scores = (outputs["mask_logits"].sigmoid() * found).flatten(1).sum(1) / (found.flatten(1).sum(1) + 1e-6)
    torch.testing.assert_close(scores, g.outputs["inference_mask_scores_0"], **EMBEDS)


def test_losses_and_gradients(g: Any, module: Any, batch: dict[str, Tensor]) -> None:
    model = module.model
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    outputs = model(batch)
    released = {
        "ce_loss": NextTokenConfig().build()(model, batch, outputs)[0],
        "mask_bce_loss": 2.0 * MaskBCEConfig().build()(model, batch, outputs)[0],
        "mask_dice_loss": 0.5 * MaskDiceConfig().build()(model, batch, outputs)[0],
    }
    for name, value in released.items():
        torch.testing.assert_close(value, g.outputs[name], **EMBEDS)
    loss = sum(released.values())
    torch.testing.assert_close(loss, g.outputs["loss"], **EMBEDS)
    for form, alpha, name in (("paper", 2.0, "refine_paper_0"), ("released", 1.0, "overlap_loss_0")):
        refined = MaskRefinementConfig(form=form, alpha=alpha).build()(model, batch, outputs)[0]
        torch.testing.assert_close(refined, g.outputs[name], **EMBEDS)
    model.zero_grad()
    loss.backward()
    for ours, theirs in (
        (model.text_hidden[0].weight, "model.text_hidden_fcs.0.0.weight"),
        (model.mask_decoder.mask_tokens, "model.mask_decoder.mask_tokens.weight"),
        (model.mask_decoder.level_embed, "model.mask_decoder.level_embed.weight"),
        (model.mask_decoder.image_proj[0].weight, "model.out_mm_projector.0.weight"),
        (model.connector.proj[0].weight, "model.mm_projector.0.weight"),
    ):
        torch.testing.assert_close(ours.grad, g.outputs[f"grad/{theirs}"], atol=1e-4, rtol=1e-4)
    model.zero_grad()


def test_saving_gives_the_official_names_back(g: Any, module: Any) -> None:
    saved, unknown = keymap(10, 11).save(module.model.state_dict())
    assert unknown == []
    left = {name for name in g.weights if name not in saved}
    unread = ("prompt_encoder.mask_down", "prompt_encoder.point", "prompt_encoder.not_a", "iou_prediction_head")
    slots = tuple(f"output_hypernetworks_mlps.{i}" for i in (1, 2, 3))
    tower = ("encoder.layers.10.", "post_layernorm", "position_ids")
    assert all(any(part in name for part in (*unread, *slots, *tower)) for name in left)
    assert set(saved) <= set(g.weights)
    assert all(torch.equal(saved[name], g.weights[name]) for name in saved)


def test_files_without_the_tower_leave_it_new_and_it_is_filled_as_the_release_does(g: Any, tmp_path: Path) -> None:
    c = g.config
    path = tmp_path / "without.safetensors"
    save_file({name: t for name, t in g.weights.items() if not name.startswith(TOWER)}, path)
    sizes = {"width": 16, "depth": 11, "heads": 2, "ffn": 24}
    given = {**changes(g), "encoder": sizes}
    module = zoo.from_pretrained(path, model="pixellm-7b", **given)
    assert module.load_report.new
    assert all(name.startswith("encoder.") for name in module.load_report.new)
    prefix = TOWER.removesuffix("vision_model.")
    tower = {name.removeprefix(prefix): t for name, t in g.weights.items() if name.startswith(prefix)}
    tower["vision_model.embeddings.position_embedding.weight"] = g.inputs["clip_position_table_336"]
    fill_tower(module.model.encoder, tower)
    table = module.model.encoder.embed.positions[0]
    torch.testing.assert_close(table, g.outputs["resized_position_table"], **EMBEDS)
    assert torch.equal(
        module.model.encoder.trunk.layers[3].ffn.up.weight, g.weights[f"{TOWER}encoder.layers.3.mlp.fc1.weight"]
    )
    ours = resized_positions(g.inputs["clip_position_table_336"], c["clip_image"] // c["patch"])
    torch.testing.assert_close(ours, g.outputs["resized_position_table"], **EMBEDS)
    with pytest.raises(WeightsError, match="expected CLIP's tower"):
        fill_tower(CLIPLevelsConfig(image_size=28, patch_size=14, width=16, depth=2, heads=2, ffn=24).build(), {})
