"""The wirings ``image-lm`` and ``image-lm-class`` as a whole against LlamaGen's released code."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.connectors.caption_mlp import CaptionMLPConfig
from zoo.decoders.code_lm import CodeLMConfig
from zoo.encoders.t5 import T5EncoderConfig
from zoo.models.conditioned import CaptionedConfig, CaptionedImageLM, ClassedConfig, ClassedImageLM
from zoo.objectives.next_token import NextTokenConfig
from zoo.sampling.codes import CodeDecoding, RecordedCodes
from zoo.tokenizers.vq import VQConfig
from zoo.weights.formats.llamagen import keymap
from zoo.weights.keymaps.llama import ffn_width

TOLERANCE = {"atol": 2e-5, "rtol": 1e-5}
KINDS = ["c2i", "t2i"]


@pytest.fixture
def g(golden: Callable[[str], Any]) -> Any:
    return golden("llamagen")


def decoder_config(c: dict[str, Any], **changes: Any) -> CodeLMConfig:
    fields: dict[str, Any] = {
        "width": c["dim"],
        "depth": c["n_layer"],
        "heads": c["n_head"],
        "ffn": ffn_width(c["dim"], c["multiple_of"]),
        "rope_theta": float(c["rope_base"]),
        "eps": c["norm_eps"],
        "dropout": 0.0,
    }
    return CodeLMConfig(**(fields | changes))


@pytest.fixture
def build(g: Any) -> Callable[[str], Any]:
    def built(kind: str, seed: int = 0) -> Any:
        c, drop = g.config, g.config["class_dropout_prob"]
        images = VQConfig(image_size=16 * c["grid"], vocab_size=c["vocab_size"], width=32, blocks=1, code_width=8)
        decoder = decoder_config(c)
        model: Any
        if kind == "t2i":
            text = T5EncoderConfig(
                vocab_size=64, context_length=c["t2i_tokens"], width=c["caption_dim"], depth=1, heads=2, head_dim=6,
                ffn=16, dropout=0.0,
            )  # fmt: skip
            config = CaptionedConfig(prefix_tokens=c["t2i_tokens"], drop=drop)
            model = CaptionedImageLM(config, text, CaptionMLPConfig(), decoder, images, seed)
        else:
            model = ClassedImageLM(ClassedConfig(classes=c["num_classes"], drop=drop), decoder, images, seed)
        state = {name.removeprefix(f"{kind}/"): t for name, t in g.weights.items() if name.startswith(f"{kind}/")}
        own = {name: t for name, t in model.state_dict().items() if name.startswith(("image_tokenizer", "text_enc"))}
        mapped, unknown = keymap(SimpleNamespace(parts={"decoder": ("", decoder)})).load(state)  # type: ignore[arg-type]
        assert unknown == []
        model.load_state_dict(own | mapped)
        return model.eval()

    return built


def rows(g: Any, kind: str) -> dict[str, Tensor]:
    if kind == "c2i":
        return {"classes": g.inputs["c2i_cond"]}
    return {"caption_features": g.inputs["t2i_cond"], "caption_mask": g.inputs["t2i_emb_mask"]}


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["", "_dropped"])
def test_training_logits_and_losses(g: Any, build: Callable[[str], Any], kind: str, name: str) -> None:
    model = build(kind)
    batch = {**rows(g, kind), "image_codes": g.inputs[f"{kind}_ids"]}
    if kind == "t2i":
        batch["valid"] = g.inputs["t2i_valid"]
        assert 0 < int(batch["valid"].sum()) < len(batch["valid"])
    if name:
        batch["drop_draw"] = g.inputs[f"{kind}_drop_uniform"]
    out = model(batch)
    logits = model.decoder.logits(out["hidden"])
    torch.testing.assert_close(logits, g.outputs[f"{kind}_logits{name}"], **TOLERANCE)
    loss, _ = NextTokenConfig().build()(model, batch, out)
    torch.testing.assert_close(loss, g.outputs[f"{kind}_loss{name}"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("run", ["c2i_cfg", "c2i_interval", "c2i_nocfg", "t2i_cfg", "t2i_nocfg"])
def test_cached_greedy_codes(g: Any, build: Callable[[str], Any], run: str) -> None:
    kind, mode = run.split("_")
    model, seen = build(kind), list[Tensor]()
    decoding = CodeDecoding(
        temperature=0.0,
        guidance=1.0 if mode == "nocfg" else g.config["cfg_scale"],
        interval=g.config["cfg_interval"] if mode == "interval" else -1,
    )
    codes = model.generate_codes(rows(g, kind), decoding, tell=lambda number, logits, _: seen.append(logits))
    assert torch.equal(codes, g.outputs[f"{run}_ids"])
    torch.testing.assert_close(torch.stack(seen, 1), g.outputs[f"{run}_logits"], **TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_drawn_with_recorded_noise(g: Any, build: Callable[[str], Any], kind: str) -> None:
    decoding = CodeDecoding(temperature=0.9, top_k=20, top_p=0.9, guidance=g.config["cfg_scale"])
    draws = RecordedCodes(g.inputs[f"{kind}_sample_exp_noise"])
    codes = build(kind).generate_codes(rows(g, kind), decoding, draws)
    assert torch.equal(codes, g.outputs[f"{kind}_sample_ids"])
