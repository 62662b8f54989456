"""The unified-latent wiring against the goldens: masks, trunk, both losses, with the recorded times and noise."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import zoo
from zoo.data.sequences import segments_of, style
from zoo.decoders.trunk_lm import TrunkLMConfig
from zoo.diffusion.noising import DDPM
from zoo.models.unified_latent import UnifiedLatent, UnifiedLatentConfig
from zoo.objectives.denoising import DiffusionConfig, image_errors
from zoo.objectives.next_token import NextTokenConfig
from zoo.patch_codecs.base import patchify
from zoo.patch_codecs.linear import LinearCodecConfig
from zoo.plugin import catalogue
from zoo.tokenizers.kl import KLConfig
from zoo.weights.keymaps import KeyMap, rename

LOSSES = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture
def g(golden: Callable[[str], Any]) -> Any:
    return golden("transfusion")


@pytest.fixture
def model(g: Any) -> UnifiedLatent:
    from zoo.weights.keymaps import llama

    c = g.config["llama"]
    decoder = TrunkLMConfig(
        width=c["hidden_size"], depth=c["layers"], heads=c["heads"], kv_heads=c["kv_heads"], ffn=c["intermediate_size"],
        eps=c["rms_norm_eps"], rope_theta=c["rope_theta"], tie=False,
        vocab_size=c["vocab_size"] - 2, context_length=64,
    )  # fmt: skip
    image = KLConfig(image_size=8, patch_size=2, channels=4, width=8, mult=[1, 1], groups=4, blocks=1, scaling=1.0)
    built = UnifiedLatent(UnifiedLatentConfig(), decoder, LinearCodecConfig(patch=2), image, seed=0)
    names = llama.keymap() + KeyMap(rename("patch_in.{p}", "patch_in.{p}"), rename("patch_out.{p}", "patch_out.{p}"))
    renamed, unknown = names.load(g.weights)[:2]
    assert not unknown
    places = {"embed.tokens": "decoder.embedding.tokens", "trunk.": "decoder.trunk.", "head.": "decoder.lm_head."}
    state = {}
    for name, value in renamed.items():
        old = next((old for old in places if name.startswith(old)), None)
        state["patch_codec." + name if old is None else places[old] + name.removeprefix(old)] = value
    missing, unexpected = built.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.startswith("image_tokenizer.") for name in missing)
    return built.eval()


@pytest.fixture
def batch(g: Any, model: UnifiedLatent) -> dict[str, Tensor]:
    ids, slots = g.inputs["ids"], g.inputs["ids"] < 0
    assert g.config["boi"] == model.vocabulary.id("boi")
    assert g.config["eoi"] == model.vocabulary.id("eoi")
    ids = ids.masked_fill(slots, model.vocabulary.slot_id)
    labels = ids.masked_fill(slots | (ids == g.config["eoi"]), -100)  # the rule; the recorded targets check it below
    images = len(g.inputs["x0"])
    return {
        "input_ids": ids,
        "segment": segments_of(ids, None, model.style, model.vocabulary),
        "labels": labels,
        "image_slots": slots,
        "image_given": torch.zeros(images, dtype=torch.bool),
        "image_first": torch.zeros(images, dtype=torch.bool),
        "image_latents": g.inputs["x0"],
        "image_time": g.inputs["t"],
        "image_noise": g.inputs["noise"],
    }


@torch.no_grad()
def test_both_losses_through_the_wiring(g: Any, model: UnifiedLatent, batch: dict[str, Tensor]) -> None:
    assert model.process == DDPM()
    outputs = model(batch)
    torch.testing.assert_close(outputs["hidden"], g.outputs["hidden"], atol=2e-5, rtol=1e-5)
    assert torch.equal(outputs["targets"], g.outputs["lm_targets"])
    torch.testing.assert_close(patchify(outputs["prediction"], 2), g.outputs["eps_pred"], **LOSSES)
    assert torch.equal(outputs["denoising_target"], g.inputs["noise"])
    each = image_errors(outputs["prediction"], outputs["denoising_target"])
    torch.testing.assert_close(each, g.outputs["ddpm_loss_per_image"], **LOSSES)
    lm, _ = NextTokenConfig().build()(model, batch, outputs)
    config = DiffusionConfig()
    ddpm, report = config.build()(model, batch, outputs)
    torch.testing.assert_close(lm, g.outputs["lm_loss"], **LOSSES)
    torch.testing.assert_close(ddpm, g.outputs["ddpm_loss"], **LOSSES)
    assert config.weight == g.config["lambda_ddpm"]
    torch.testing.assert_close(lm + config.weight * ddpm, g.outputs["total_loss"], **LOSSES)
    assert int(report["noised"]) == 3


@torch.no_grad()
def test_masks_come_from_the_layout(g: Any, model: UnifiedLatent, batch: dict[str, Tensor]) -> None:
    seen: list[Tensor] = []
    inside = model.decoder.forward

    def look(tokens: Any, cache: Any = None) -> Tensor:
        seen.append(tokens.layout.mask()[:, 0])
        return inside(tokens, cache)

    model.decoder.forward = look  # type: ignore[method-assign]
    model(batch)
    assert torch.equal(seen[0], g.outputs["mask"])


def test_rows_written_by_the_style_have_the_recorded_targets(g: Any, model: UnifiedLatent) -> None:
    """BOI is a target, EOI and what follows BOI are none."""
    from zoo.data.sequences import Image, Text, Words, collate, write_row

    ids, width = g.inputs["ids"], g.inputs["ids"].shape[1]
    rows = []
    for row in ids.tolist():
        parts: list[Any] = []
        at = 1
        while at < width:
            if row[at] == g.config["boi"]:
                parts.append(Image(4))
                at += 6
            else:
                stop = next((n for n in range(at, width) if row[n] == g.config["boi"]), width)
                parts.append(Text(tuple(row[at:stop])))
                at = stop
        words = Words(row[0], 0, 0)
        rows.append(
            write_row(style("transfusion"), model.vocabulary, words, "interleaved", parts, length=64, closed=False)
        )
    made = collate(rows, style("transfusion"), model.vocabulary, 0)
    assert torch.equal(made["input_ids"].masked_fill(made["image_slots"], -1), ids)
    assert torch.equal(F.pad(made["labels"][:, 1:], (0, 1), value=-100), g.outputs["lm_targets"])


def test_images_of_other_sizes_weigh_alike(g: Any) -> None:
    """A mean of images, not of elements: each image's error alone, then their mean."""
    pairs = [(g.inputs[f"uneq_pred_{n}"], g.inputs[f"uneq_noise_{n}"]) for n in "ab"]
    each = torch.cat([image_errors(pred[None], noise[None]) for pred, noise in pairs])
    torch.testing.assert_close(each.mean(), g.outputs["uneq_loss"], **LOSSES)
    assert (each.mean() - g.outputs["uneq_loss_token_level"]).abs() > 1e-3


@torch.no_grad()
def test_the_time_reaches_the_wiring_as_an_index(g: Any, model: UnifiedLatent, batch: dict[str, Tensor]) -> None:
    """diffusers counts levels 0 to 999; off by one shows."""
    right = model(batch)["prediction"]
    off = model(batch | {"image_time": g.inputs["t"] + 1})["prediction"]
    assert (right - off).abs().max() > 1e-4
    assert dataclasses.asdict(DiffusionConfig())["noise_limit"] == 0.5


@pytest.mark.parametrize(
    ("name", "width", "depth", "heads", "head", "millions"),
    [
        ("0.16b", 768, 16, 12, 64, 162), ("0.37b", 1024, 24, 16, 64, 374), ("0.76b", 1536, 24, 24, 64, 778),
        ("1.4b", 2048, 24, 16, 128, 1364), ("7b", 4096, 32, 32, 128, 6738),
    ],
)  # fmt: skip
def test_the_five_sizes_of_table_2(name: str, width: int, depth: int, heads: int, head: int, millions: int) -> None:
    config = catalogue()["decoder"].parse(f"transfusion-{name}")
    with torch.device("meta"):
        model: Any = zoo.build("transfusion", decoder=f"transfusion-{name}").model
    assert round((sum(p.numel() for p in model.decoder.parameters()) - 2 * 2 * width) / 1e6) == millions
    trunk = config.trunk()
    assert (trunk.width, trunk.depth, trunk.heads, trunk.keys) == (width, depth, heads, heads)
    assert trunk.width // trunk.heads == head == trunk.rope
    assert (trunk.norm, trunk.placement, trunk.gated, trunk.act, trunk.bias) == ("rms", "pre", True, "silu", "")
    assert trunk.ffn % 256 == 0 <= trunk.ffn - 8 * width / 3 < 256
    assert model.vocabulary.size == 32002
    assert model.places == 256  # patches of 2 of 32 x 32 latents
    assert model.patch_codec.patch_in.weight.shape == (width, 32)
    assert model.decoder.lm_head.weight.shape == (32002, width)
