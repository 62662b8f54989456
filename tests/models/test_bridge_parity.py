"""Whole bridges against transformers, through folders that save_pretrained wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoo.models.bridge import Bridge
from zoo.objectives.next_token import NextTokenConfig
from zoo.sampling.text import Decoding
from zoo.torchvision_ops import ensure
from zoo.weights import load_model

IMAGE = 110


def llava(**changes: Any) -> Any:
    ensure()
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=4, num_attention_heads=3, image_size=16, patch_size=4
    )
    text = LlamaConfig(
        vocab_size=120, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, **changes)
    return LlavaForConditionalGeneration(config)


def llava_last_layer() -> Any:
    return llava(vision_feature_layer=-1, vision_feature_select_strategy="full")


def blip2() -> Any:
    ensure()
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2QFormerConfig,
        Blip2VisionConfig,
        OPTConfig,
    )

    vision = Blip2VisionConfig(
        hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=7
    )
    qformer = Blip2QFormerConfig(
        vocab_size=99, hidden_size=24, num_hidden_layers=4, num_attention_heads=3, intermediate_size=40,
        encoder_hidden_size=32,
    )  # fmt: skip
    text = OPTConfig(
        vocab_size=120, hidden_size=40, num_hidden_layers=2, ffn_dim=64, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=40, pad_token_id=1,
    )  # fmt: skip
    config = Blip2Config(
        vision_config=vision, qformer_config=qformer, text_config=text, num_query_tokens=6, image_token_index=IMAGE
    )
    return Blip2ForConditionalGeneration(config)


def batch(slots: int, size: int, start: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    length = start + slots + 9
    ids = torch.randint(3, 100, (4, length), generator=generator)
    ids[:, start : start + slots] = IMAGE
    mask = torch.ones(4, length, dtype=torch.long)
    mask[1, -3:] = 0
    mask[3, -5:] = 0
    labels = ids.masked_fill((ids == IMAGE) | (mask == 0), -100)
    labels[2, : start + slots + 3] = -100  # a prompt
    pixels = torch.randn(4, 3, size, size, generator=generator)
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize(
    ("make", "slots", "size", "start"),
    [(llava, 16, 16, 2), (llava_last_layer, 17, 16, 1), (blip2, 6, 28, 0)],
    ids=["llava-1.5", "llava-last-layer-with-class-token", "blip2-opt"],
)  # fmt: skip
def test_equals_transformers(
    make: Callable[[], Any], slots: int, size: int, start: int, shake: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    theirs = make().eval()
    shake(theirs)
    theirs.save_pretrained(tmp_path)
    ours, _, report = load_model(tmp_path)
    assert isinstance(ours, Bridge)
    ours.eval()
    assert report.new == []
    given = batch(slots, size, start)
    real = given["attention_mask"].bool()
    with torch.no_grad():
        expected = theirs(**given)
        logits = ours.text_logits(given["pixel_values"], given["input_ids"], given["attention_mask"])
        loss, about = NextTokenConfig().build()(ours, given, ours(given))
    assert expected.logits[real].std() > 0.3  # large enough that a difference would show
    torch.testing.assert_close(logits[real], expected.logits[real], atol=1e-4, rtol=0)
    torch.testing.assert_close(loss, expected.loss, atol=1e-5, rtol=0)
    assert int(about["tokens"]) == int((given["labels"][:, 1:] != -100).sum())
    # greedy text; transformers wants the pads of prompts in front
    prompt, mask = given["input_ids"][:, : start + slots + 4], given["attention_mask"][:, : start + slots + 4].clone()
    arguments = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 1, "eos_token_id": 2}
    new = theirs.generate(pixel_values=given["pixel_values"], input_ids=prompt, attention_mask=mask, **arguments)
    got = ours.generate_ids(given["pixel_values"], prompt, mask, Decoding(max_new_tokens=7), stop_ids=[2], pad_id=1)
    assert torch.equal(new[:, -got.shape[1] :], got)
    assert len(set(got.flatten().tolist())) > 2  # rows differ; longer varied texts are in the goldens


def test_dropped_block_has_no_say(shake: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    """LLaVA reads the block before the last, without the tower's output norm."""
    theirs = llava().eval()
    shake(theirs)
    theirs.save_pretrained(tmp_path / "a")
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "encoder.layers.3" in name or "post_layernorm" in name:
                parameter.add_(1.0)
    theirs.save_pretrained(tmp_path / "b")
    models = [load_model(tmp_path / name)[0].eval() for name in "ab"]
    pixels = batch(16, 16, 2)["pixel_values"]
    with torch.no_grad():
        tokens = [m.image_features(pixels) for m in models]  # type: ignore[operator]
    assert torch.equal(*tokens)
    assert tokens[0].shape == (4, 16, 32)


def test_official_and_hub_names_give_equal_logits(shake: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    """The hub's names, transformers 5's own and the released code's all load to the same model."""
    from safetensors.torch import load_file, save_file

    theirs = llava().eval()
    shake(theirs)
    theirs.save_pretrained(tmp_path / "hub")
    own = {k: v.clone() for k, v in theirs.state_dict().items()}
    swaps = {
        "five": {},
        "released": {
            "model.language_model.": "model.",
            "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
            "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
            "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
        },
    }
    assert any(k.startswith("language_model.model.") for k in load_file(tmp_path / "hub" / "model.safetensors"))
    given = batch(16, 16, 2)
    logits = []
    for name in ("hub", *swaps):
        folder = tmp_path / name
        if name != "hub":
            folder.mkdir()
            (folder / "config.json").write_text((tmp_path / "hub" / "config.json").read_text())
            renamed = {}
            for key, value in own.items():
                prefix = next((p for p in swaps[name] if key.startswith(p)), "")
                renamed[swaps[name].get(prefix, "") + key.removeprefix(prefix)] = value
            save_file(renamed, folder / "model.safetensors")
        model = load_model(folder)[0].eval()
        with torch.no_grad():
            logits.append(model.text_logits(given["pixel_values"], given["input_ids"], given["attention_mask"]))  # type: ignore[operator]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
