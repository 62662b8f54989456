"""CoCa against open_clip's class through saved folders, with drawn weights: features, logits, losses, gradients."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.testing import assert_close

from zoo import torchvision_ops
from zoo.api import build_module
from zoo.errors import WeightsError
from zoo.models.captioner import Captioner
from zoo.recipe import Recipe
from zoo.weights import load_model
from zoo.weights.formats.coca import from_state
from zoo.weights.keymaps import load_into

torchvision_ops.ensure()

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
PAD, LENGTH, VOCAB, EMBED = 0, 9, 50, 24
LENGTHS = (LENGTH, 6, 3, LENGTH - 1)


def config(corrected: bool, fused: bool) -> dict[str, Any]:
    text = {"width": EMBED, "heads": 4, "layers": 3, "context_length": LENGTH, "vocab_size": VOCAB}
    return {
        "embed_dim": EMBED,
        "multimodal_cfg": {"width": EMBED, "heads": 3, "layers": 2, "context_length": LENGTH, "vocab_size": VOCAB},
        "text_cfg": {**text, "embed_cls": True, "output_tokens": True, "correct_cls_mask": corrected},
        "vision_cfg": {
            "image_size": 16,
            "patch_size": 8,
            "width": EMBED if fused else 32,
            "layers": 2,
            "head_width": 8,
            "attentional_pool": True,
            "attn_pooler_heads": 4,
            "attn_pooler_queries": 6,
            "output_tokens": True,
        },
    }


@pytest.fixture
def peer(shake: Callable[..., nn.Module], tmp_path: Path) -> Callable[..., tuple[Any, Path]]:
    """Make a folder of an open_clip CoCa: (model, folder)."""
    from open_clip.coca_model import CoCa

    def make(corrected: bool, fused: bool = False) -> tuple[Any, Path]:
        about = config(corrected, fused)
        text = {k: v for k, v in about["text_cfg"].items() if k != "correct_cls_mask"}  # no option of 3.3.0's builder
        built: Any = CoCa(**{**about, "text_cfg": text})
        built.text.correct_cls_mask = corrected
        shake(built)
        with torch.no_grad():
            for module in built.modules():
                if isinstance(module, nn.LayerNorm):
                    module.weight += 1
            built.text.token_embedding.weight[PAD] *= 3  # what the class token must or must not see
            built.logit_scale.fill_(1.7)
        folder = tmp_path / f"{corrected}-{fused}"
        folder.mkdir()
        state = {k: v.contiguous() for k, v in built.state_dict().items()}
        save_file(state, folder / "open_clip_model.safetensors")
        preprocess = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5]}
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": about, "preprocess_cfg": preprocess}))
        return built.eval(), folder

    return make


def inputs(lengths: tuple[int, ...] = LENGTHS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, VOCAB, (len(lengths), LENGTH), generator=generator)
    for row, length in zip(ids, lengths, strict=True):
        row[length:] = PAD
    pixels = torch.randn(len(lengths), 3, 16, 16, generator=generator)
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": ids != PAD}


def losses(model: Captioner, recipe: Recipe, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    module = build_module(recipe, 0)
    module.model = model
    total, report = module.losses(batch)
    return total, report


@pytest.mark.parametrize("lengths", [LENGTHS, (4, 2, 5, 5)])
@pytest.mark.parametrize("corrected", [False, True])
def test_folder_gives_equal_features_logits_and_losses(peer: Any, corrected: bool, lengths: tuple[int, ...]) -> None:
    from open_clip.loss import CoCaLoss

    theirs, folder = peer(corrected)
    model, recipe, report = load_model(folder)
    assert isinstance(model, Captioner)
    model.eval()
    assert report.form == "open_clip coca"
    assert not report.new
    assert not report.ignored
    assert recipe.parts["text_encoder"][1].cls_mask == ("corrected" if corrected else "legacy")  # type: ignore[attr-defined]
    assert model.image_config.mean == [0.1, 0.2, 0.3]
    batch = inputs(lengths)
    ids, real = batch["input_ids"], batch["attention_mask"]
    expected = theirs(batch["pixel_values"], ids)
    out = model(batch)
    for ours, name in (("image_embeds", "image_features"), ("text_embeds", "text_features")):
        assert expected[name].std(0).min() > 1e-3  # the drawn weights tell the rows apart
        assert_close(out[ours], expected[name], **TOLERANCE)
    logits = model.text_logits(batch["pixel_values"], ids)[:, :-1]
    assert expected["logits"].std() > 0.1
    assert_close(logits[real[:, 1:]], expected["logits"][real[:, 1:]], atol=1e-4, rtol=1e-4)
    in_pass = model.decoder.logits(out["hidden"])
    kept = out["targets"] != -100
    assert kept.sum() == sum(lengths) - len(lengths)
    assert_close(in_pass[kept], expected["logits"][:, : in_pass.shape[1]][kept], atol=1e-4, rtol=1e-4)

    contrastive, caption = CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0, pad_id=PAD)(
        *(expected[k] for k in ("image_features", "text_features", "logits", "labels", "logit_scale"))
    )
    total, parts = losses(model, recipe, batch)
    assert_close(parts["contrastive"], contrastive.detach(), **TOLERANCE)
    assert_close(parts["next-token"], caption.detach(), **TOLERANCE)  # weighted on both sides
    assert_close(total, contrastive + caption, **TOLERANCE)

    total.backward()
    (contrastive + caption).backward()
    found = {n: p.grad for n, p in model.named_parameters()}
    wanted, unknown = keymap_of(recipe).load({n: p.grad for n, p in theirs.named_parameters()})
    assert not unknown
    assert set(found) == set(wanted)
    for name, gradient in wanted.items():
        largest = float(gradient.abs().max())
        assert_close(found[name], gradient, atol=1e-4 * max(largest, 1.0), rtol=1e-3, msg=name)


def keymap_of(recipe: Recipe) -> Any:
    return from_state(recipe, {"visual.": torch.empty(0)}).keymap


@torch.no_grad()
def test_tower_as_wide_as_the_queries_keeps_one_matrix(peer: Any) -> None:
    theirs, folder = peer(True, fused=True)
    assert "visual.attn_pool.attn.in_proj_weight" in theirs.state_dict()
    model, recipe, _ = load_model(folder)
    batch = inputs()
    assert_close(model.eval()(batch)["image_embeds"], theirs(batch["pixel_values"])["image_features"], **TOLERANCE)
    saved, unknown = keymap_of(recipe).save(model.state_dict())
    assert not unknown
    assert set(saved) == set(theirs.state_dict())


def test_bare_state_dict_is_taken_to_be_trained_with_the_legacy_mask_and_saves_back(peer: Any) -> None:
    theirs, folder = peer(False)
    _, recipe, _ = load_model(folder)
    state = theirs.state_dict()
    official = from_state(recipe.with_(text_encoder={"cls_mask": "corrected"}), state)
    assert official.recipe.parts["text_encoder"][1].cls_mask == "legacy"  # type: ignore[attr-defined]
    model = official.recipe.wiring[1].build(official.recipe.parts, 0)
    report = load_into(model, state, official.keymap)
    assert not report.new
    saved, unknown = official.keymap.save(model.state_dict())
    assert unknown == []
    assert set(saved) == set(state)
    assert all(torch.equal(saved[name], state[name]) for name in saved)
    own = from_state(recipe, model.state_dict())
    assert own.recipe.parts["text_encoder"][1].cls_mask == "legacy"  # type: ignore[attr-defined]
    assert not own.keymap.rules


@torch.no_grad()
def test_only_the_legacy_mask_shows_pads_to_the_class_token(peer: Any) -> None:
    batch = inputs()
    ids, real = batch["input_ids"], batch["attention_mask"]
    padded = (~real).any(1)
    for corrected in (False, True):
        model = load_model(peer(corrected)[1])[0].eval()
        before = model.text_features(ids, real)
        pad = model.text_encoder.embed_tokens.tokens.weight[PAD]
        pad.copy_(pad.flip(0))  # not a shift, which a norm would take out
        moved = (model.text_features(ids, real) - before).abs().amax(1)
        assert (moved > 1e-3).equal(padded & (not corrected))
        assert not corrected or (moved == 0).all()


@torch.no_grad()
def test_greedy_captions_equal_their_forward_in_a_loop(peer: Any) -> None:
    """open_clip 3.3.0 cannot generate with transformers 5, so that its plain forward pass is run prefix by prefix."""
    theirs, folder = peer(False)
    model: Any = load_model(folder)[0].eval()
    pixels = inputs()["pixel_values"]
    prompts = torch.tensor([[7, 12], [7, 31], [7, 7], [7, 2]])
    written = model.generate_ids(pixels, prompts, stop_ids=[VOCAB - 1], pad_id=PAD)
    whole = prompts
    for _ in range(written.shape[1]):
        logits = theirs(pixels, whole, output_labels=False)["logits"][:, -1]
        whole = torch.cat([whole, logits.argmax(-1, keepdim=True)], 1)
    stopped = (written == VOCAB - 1).cumsum(1) - (written == VOCAB - 1).long() > 0
    assert torch.equal(written, whole[:, 2:].masked_fill(stopped, PAD))
    assert written.unique().numel() > 3


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("vision_cfg", "attentional_pool", "cascade", "attentional_pool = 'cascade'"),
        ("vision_cfg", "timm_model_name", "resnet50", "vision_cfg.timm_model_name"),
        ("text_cfg", "hf_model_name", "roberta-base", "text_cfg.hf_model_name"),
        ("text_cfg", "embed_cls", False, "embed_cls"),
        ("multimodal_cfg", "width", 32, "multimodal_cfg.width = 32"),
    ],
)
def test_options_the_zoo_does_not_have_are_refused(
    tmp_path: Path, section: str, key: str, value: Any, message: str
) -> None:
    about = config(True, False)
    about[section][key] = value
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": about}))
    with pytest.raises(WeightsError, match=message) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_another_size_is_refused_in_one_line(peer: Any) -> None:
    _, folder = peer(True)
    about = json.loads((folder / "open_clip_config.json").read_text())
    about["model_cfg"]["vision_cfg"]["image_size"] = 24
    (folder / "open_clip_config.json").write_text(json.dumps(about))
    with pytest.raises(WeightsError, match=r"positional_embedding is \(5, 32\).*\(10, 32\)") as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
