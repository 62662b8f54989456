"""Decoders: the transformers adapter and the trunk language model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoo.decoders.base import Decoder
from zoo.decoders.causal_lm import CausalLMConfig
from zoo.decoders.trunk_lm import TrunkLMConfig
from zoo.errors import ConfigError
from zoo.layout import Segment, TokenBatch, lay_out
from zoo.plugin import catalogue
from zoo.weights.keymaps import KeyMap, llama, load_into, rename

Shake = Callable[[nn.Module], nn.Module]
TINY: dict[str, Any] = {"width": 64, "depth": 2, "heads": 4, "ffn": 96, "vocab_size": 100, "context_length": 64}
FAMILIES = ["llama", "opt", "phi", "gpt2", "gpt_neox", "qwen2", "mistral", "gemma2", "granite"]


def decoder(family: str) -> Decoder:
    if family == "trunk-lm":
        return TrunkLMConfig(**TINY, kv_heads=2).build()
    return CausalLMConfig(family=family, **TINY).build()


def text(batch: int, length: int, real: Tensor | None = None) -> Any:
    return lay_out([Segment("text", length)], batch, real=real, position=None if real is None else "real")


def logits_of(model: Decoder, ids: Tensor) -> Tensor:
    return model.logits(model(TokenBatch(model.embed(ids), text(*ids.shape))))


@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_equals_the_library(family: str, shake: Shake) -> None:
    model = decoder(family).eval()
    shake(model)
    ids = torch.randint(0, 100, (3, 10))
    with torch.no_grad():
        expected = model.lm(input_ids=ids).logits  # type: ignore[operator]
        got = logits_of(model, ids)
    assert expected.std() > 0.05
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
    assert (model.width, model.vocab_size) == (64, 100)


@pytest.mark.parametrize("family", ["trunk-lm", *FAMILIES])
def test_pads_and_cache_change_nothing(family: str, shake: Shake) -> None:
    model = decoder(family).eval()
    shake(model)
    ids = torch.randint(0, 100, (3, 10))
    pads = torch.tensor([0, 4, 2])
    with torch.no_grad():
        expected = logits_of(model, ids)
        for side in ("left", "right"):
            embeds = torch.randn(3, 14, 64)
            real = torch.zeros(3, 14, dtype=torch.bool)
            for row, pad in enumerate(pads.tolist()):
                start = pad if side == "left" else 0
                embeds[row, start : start + 10] = model.embed(ids[row])
                real[row, start : start + 10] = True
            out = model.logits(model(TokenBatch(embeds, text(3, 14, real))))
            torch.testing.assert_close(out[real].view(3, 10, -1), expected, atol=2e-5, rtol=1e-4)
        # the same rows in three pieces over a cache, with pads in front
        real = torch.ones(3, 13, dtype=torch.bool)
        real[1, :3] = False
        ids = torch.randint(0, 100, (3, 13))
        layout = text(3, 13, real)
        whole = model(TokenBatch(model.embed(ids), layout))
        cache = model.new_cache()
        pieces = []
        for start, stop in ((0, 7), (7, 8), (8, 13)):
            pieces.append(model(TokenBatch(model.embed(ids[:, start:stop]), layout.truncate(stop)), cache))
    torch.testing.assert_close(torch.cat(pieces, 1)[real], whole[real], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["trunk-lm", "llama", "opt"])
def test_cache_rows_can_be_repeated(family: str, shake: Shake) -> None:
    model: Any = decoder(family).eval()
    shake(model)
    ids = torch.randint(0, 100, (4, 9))
    ids[:, :6] = ids[:1, :6]
    with torch.no_grad():
        expected = logits_of(model, ids)[:, 6:]
        cache = model.new_cache()
        model(TokenBatch(model.embed(ids[:1, :6]), text(1, 6)), cache)
        cache = model.select_cache(cache, torch.zeros(4, dtype=torch.long))
        got = model.logits(model(TokenBatch(model.embed(ids[:, 6:]), text(4, 9)), cache))
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["trunk-lm", "llama", "opt", "gemma2"])
def test_reads_by_the_layout(family: str, shake: Shake) -> None:
    """A full segment in front reads itself whole; text stays causal."""
    model = decoder(family).eval()
    shake(model)
    ids = torch.randint(0, 99, (2, 8))
    layout = lay_out([Segment("image", 4, attends="full"), Segment("text", 4)], 2)
    other = {place: ids.clone() for place in (3, 6)}
    for place, changed in other.items():
        changed[:, place] += 1
    with torch.no_grad():
        base = model(TokenBatch(model.embed(ids), layout))
        moved = {place: (model(TokenBatch(model.embed(i), layout)) - base).abs().amax(-1) for place, i in other.items()}
    assert bool((moved[3] > 1e-3).all())  # the image token 3 is read by all
    assert bool((moved[6][:, :6] == 0).all())  # the text token 6 by nobody before it
    assert bool((moved[6][:, 6:] > 1e-3).all())


def test_trunk_lm_equals_llama(shake: Shake) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-5, max_position_embeddings=64,
    )  # fmt: skip
    theirs = LlamaForCausalLM(config).eval()
    shake(theirs)
    ours = TrunkLMConfig(**TINY, kv_heads=2, tie=False).build().eval()
    keymap = llama.keymap(embed="embedding.tokens.") + KeyMap(rename("head.{p}", "lm_head.{p}"))
    state, unknown = keymap.load(theirs.state_dict())
    assert unknown == []
    state = {name.replace("head.weight", "lm_head.weight"): t for name, t in state.items()}
    load_into(ours, state, KeyMap(rename("{**}", "{**}")))
    ids = torch.randint(0, 100, (3, 10))
    with torch.no_grad():
        torch.testing.assert_close(logits_of(ours, ids), theirs(input_ids=ids).logits, atol=1e-5, rtol=1e-4)


def test_tied_head_is_the_table() -> None:
    tied = TrunkLMConfig(**TINY, kv_heads=4).build()
    hidden = torch.randn(2, 64)
    torch.testing.assert_close(tied.logits(hidden), hidden @ tied.embedding.tokens.weight.T)
    assert "lm_head.weight" not in tied.state_dict()


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("opt-125m", 125.2),
        ("opt-2.7b", 2651.6),
        ("opt-6.7b", 6658.5),
        ("llama-2-7b", 6738.4),
        ("llama-2-13b", 13015.9),
        ("vicuna-7b", 6738.4),
        ("vicuna-13b", 13015.9),
        ("phi-2", 2779.7),
        ("smollm2-135m", 134.5),
        ("smollm2-135m-new", 134.5),
        ("gpt2", 124.4),
    ],
)
def test_published_sizes(name: str, millions: float) -> None:
    config = catalogue()["decoder"].parse(name)
    with torch.device("meta"):
        model = config.build()
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert count == pytest.approx(millions, abs=0.06)


def test_config_survives_the_librarys_form() -> None:
    config = catalogue()["decoder"].parse("smollm2-135m")
    again = CausalLMConfig.from_library(config.library().to_dict(), config.tokenizer)
    assert again.library().to_dict() == config.library().to_dict()
    phi = catalogue()["decoder"].parse("phi-2").library()
    assert phi.rope_parameters["partial_rotary_factor"] == 0.4


def test_bad_names_are_one_line() -> None:
    with pytest.raises(ConfigError, match=r"did you mean .*llama"):
        CausalLMConfig(family="lama", **TINY).build()
    with pytest.raises(ConfigError, match=r"'rms_norm_ep'.*did you mean rms_norm_eps"):
        CausalLMConfig(**TINY, options={"rms_norm_ep": 1e-5}).build()
    with pytest.raises(ValueError, match="multiple of heads"):
        CausalLMConfig(**{**TINY, "heads": 5})
