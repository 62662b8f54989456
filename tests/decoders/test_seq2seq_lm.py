"""T5 behind the decoder interface, against transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoo.decoders.seq2seq_lm import FAMILIES, Seq2SeqLM, Seq2SeqLMConfig
from zoo.errors import ConfigError
from zoo.layout import Segment, TokenBatch, lay_out
from zoo.plugin import catalogue
from zoo.recipe import read_scale

SIZES: dict[str, Any] = {
    "width": 32, "depth": 2, "decoder_depth": 3, "heads": 4, "head_dim": 6, "ffn": 48, "vocab_size": 50,
}  # fmt: skip
KINDS: list[dict[str, Any]] = [
    {"family": "t5"},
    {"family": "t5", "activation": "gelu_new", "options": {"relative_attention_num_buckets": 6}},
    {"family": "t5", "activation": "relu", "gated": False, "tied": True, "scaled_output": True},
    {"family": "mt5", "activation": "gelu_new", "options": {"relative_attention_max_distance": 5}},
]


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    context = torch.randn(3, 9, 32, generator=generator)
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[1, 5:] = False
    ids = torch.randint(1, 50, (3, 7), generator=generator)
    ids[:, 0] = 0
    return context, mask, ids


@pytest.mark.parametrize("kind", KINDS, ids=["flan", "t5-1.1-few-buckets", "t5-1.0", "mt5"])
def test_equals_transformers_in_one_pass_and_step_by_step(
    kind: dict[str, Any], shake: Callable[[nn.Module], nn.Module]
) -> None:
    config = Seq2SeqLMConfig(**SIZES, **kind)
    model = config.build().eval()
    shake(model)
    lm: Any = model.lm
    if hasattr(lm.config, "scale_decoder_outputs"):
        lm.config.scale_decoder_outputs = config.scaled_output
    context, mask, ids = inputs()
    layout = lay_out([Segment("text", 7)], 3)
    with torch.no_grad():
        expected = lm(inputs_embeds=context, attention_mask=mask.long(), decoder_input_ids=ids).logits
        whole = model(TokenBatch(model.embed(ids), layout), context=context, context_mask=mask)
        torch.testing.assert_close(model.logits(whole), expected, atol=1e-5, rtol=0)
        memory = model.new_cache()
        rows = [
            model(TokenBatch(model.embed(ids[:, :2]), layout.truncate(2)), memory, context=context, context_mask=mask)
        ]
        for at in range(2, 7):
            if at == 4:  # beams: other rows, some twice
                memory = model.select_cache(memory, torch.tensor([2, 1, 1]))
                ids = torch.cat([ids[:, :4], ids[[2, 1, 1], 4:]], 1)
            rows.append(model(TokenBatch(model.embed(ids[:, at : at + 1]), layout.truncate(at + 1)), memory))
        steps = torch.cat(rows[:3], 1)
        torch.testing.assert_close(steps, whole[:, :4], atol=1e-4, rtol=0)
        torch.testing.assert_close(torch.cat(rows[3:], 1), whole[[2, 1, 1], 4:], atol=1e-4, rtol=0)
    assert expected.std() > 0.05


@pytest.mark.parametrize("kind", KINDS, ids=["flan", "t5-1.1-few-buckets", "t5-1.0", "mt5"])
def test_configuration_survives_a_config_json(kind: dict[str, Any]) -> None:
    config = Seq2SeqLMConfig(**SIZES, **kind)
    section = config.library().to_dict()
    assert section["dense_act_fn"] == config.activation
    assert section["is_gated_act"] is config.gated
    if config.family == "t5":  # where what is tied and scaled is written in
        section["scale_decoder_outputs"] = config.scaled_output
    assert Seq2SeqLMConfig.from_library(section, config.tokenizer, tied=config.tied) == config


def test_what_config_json_of_the_hub_means() -> None:
    flan = {
        "model_type": "t5", "d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": 24, "num_decoder_layers": 24,
        "num_heads": 32, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "vocab_size": 32128,
        "decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "n_positions": 512, "output_past": True,
    }  # fmt: skip
    read = Seq2SeqLMConfig.from_library(flan, "hf:google/flan-t5-xl")
    preset = catalogue()["decoder"].parse("flan-t5-xl")
    assert (read.activation, read.tied, read.scaled_output) == ("gelu_new", False, False)
    blip2 = Seq2SeqLMConfig.from_library({**flan, "dense_act_fn": "gelu"}, "hf:google/flan-t5-xl")
    assert blip2 == preset
    small = {"model_type": "t5", "d_model": 512, "num_layers": 6, "num_heads": 8}  # t5-small says no more
    old = Seq2SeqLMConfig.from_library(small, "hf:google-t5/t5-small")
    assert (old.activation, old.gated, old.tied, old.scaled_output) == ("relu", False, True, True)


def test_flans_two_tables_stay_two() -> None:
    """transformers 5 ties every T5 it builds; a state dict loaded into such a one leaves one table for both."""
    from transformers import AutoModelForSeq2SeqLM

    config = Seq2SeqLMConfig(**SIZES)
    theirs = AutoModelForSeq2SeqLM.from_config(config.library())
    assert theirs.lm_head.weight is theirs.shared.weight  # if this fails the work-around may go
    model = config.build()
    state = {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    shared = [name for name in state if "shared" in name or "embed_tokens" in name]
    for name in shared:
        state[name] = state[shared[0]]
    model.load_state_dict(state)
    assert torch.equal(model.state_dict()["lm.lm_head.weight"], state["lm.lm_head.weight"])
    assert not torch.equal(model.state_dict()["lm.lm_head.weight"], state["lm.shared.weight"])
    tied = Seq2SeqLMConfig(**SIZES, tied=True).build()
    assert tied.lm.lm_head.weight is tied.lm.shared.weight  # type: ignore[union-attr]


def test_scale_and_mistakes() -> None:
    sizes = read_scale("tiny").sizes
    small = Seq2SeqLMConfig(depth=24, decoder_depth=6).scaled(sizes)
    built = small.build()
    assert isinstance(built, Seq2SeqLM)
    stacks: Any = built.lm
    assert (len(stacks.encoder.block), len(stacks.decoder.block)) == (sizes["depth"], sizes["depth"])
    assert built.width == sizes["width"]
    with pytest.raises(ConfigError, match="expected t5, mt5"):
        Seq2SeqLMConfig(**SIZES, family="opt").build()
    with pytest.raises(ConfigError, match="activation = 'gelo' is unknown"):
        Seq2SeqLMConfig(**SIZES, activation="gelo").build()
    with pytest.raises(ConfigError, match="relative_attention_num_buckets"):
        Seq2SeqLMConfig(**SIZES, options={"relative_attention_num_bucket": 8}).build()
    with pytest.raises(ValueError, match="start_id"):
        Seq2SeqLMConfig(**SIZES, start_id=50)
    assert FAMILIES == ("t5", "mt5")
