"""The trunk against transformers, same random weights, through the key maps and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoo import torchvision_ops
from zoo.errors import WeightsError
from zoo.layout import Segment, lay_out
from zoo.nn import KVCache, TokenEmbedding, Trunk
from zoo.weights.keymaps import KeyMap, bert, llama, load_into, phi

torchvision_ops.ensure()  # before transformers, which imports torchvision

import transformers  # noqa: E402

Shake = Callable[..., nn.Module]
CLOSE = {"atol": 5e-6, "rtol": 1e-5}


def parts(trunk: Trunk, vocab: int, bias: bool) -> nn.ModuleDict:
    width = trunk.config.width
    embed = TokenEmbedding(vocab, width)
    return nn.ModuleDict({"trunk": trunk, "embed": embed, "head": nn.Linear(width, vocab, bias=bias)}).eval()


def there_and_back(keymap: KeyMap, ours: nn.Module, official: dict[str, Tensor]) -> None:
    """Saving gives back every official tensor that is not a buffer or a tied copy."""
    saved, unknown = keymap.save(ours.state_dict())
    assert not unknown
    for name, tensor in saved.items():
        assert torch.equal(tensor, official[name]), name
    assert {n for n in official if n not in saved and "position_ids" not in n and "token_type_ids" not in n} == set()


def llama_pair(shake: Shake, kv_heads: int) -> tuple[Any, nn.ModuleDict]:
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=kv_heads,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
    )
    theirs = shake(transformers.LlamaForCausalLM(config)).eval()
    ours = parts(Trunk(llama.trunk_config(config.to_dict())), 61, bias=False)
    load_into(ours, theirs.state_dict(), llama.keymap())
    return theirs, ours


@pytest.mark.parametrize("kv_heads", [6, 2, 1])
def test_llama(shake: Shake, kv_heads: int) -> None:
    theirs, ours = llama_pair(shake, kv_heads)
    there_and_back(llama.keymap(), ours, theirs.state_dict())
    ids = torch.randint(0, 61, (2, 11), generator=torch.Generator().manual_seed(1))
    layout = lay_out([Segment("text", 11)], 2)
    assert layout.kind == "causal"
    with torch.no_grad():
        expected = theirs(ids).logits
        got = ours["head"](ours["trunk"](ours["embed"](ids), layout))
        assert expected.std() > 0.3
        torch.testing.assert_close(got, expected, **CLOSE)

        real = torch.ones(2, 11, dtype=torch.long)
        real[1, :4] = 0
        expected = theirs(ids, attention_mask=real).logits
        left = lay_out([Segment("text", 11)], real=real)
        got = ours["head"](ours["trunk"](ours["embed"](ids), left))
        torch.testing.assert_close(got[real.bool()], expected[real.bool()], **CLOSE)


def test_llama_decodes_with_a_cache_as_without(shake: Shake) -> None:
    theirs, ours = llama_pair(shake, 2)
    prompt = torch.randint(0, 61, (2, 5), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = theirs.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
        cache, layout, ids, new = KVCache(), lay_out([Segment("text", 5)], 2), prompt, prompt
        for _ in range(12):
            hidden = ours["trunk"](ours["embed"](new), layout, cache=cache)
            new = ours["head"](hidden[:, -1:]).argmax(-1)
            ids, layout = torch.cat([ids, new], 1), layout.append("text")
    assert torch.equal(ids, expected)


@pytest.mark.parametrize("qk_norm", [True, False])
def test_phi(shake: Shake, qk_norm: bool) -> None:
    config = transformers.PhiConfig(
        vocab_size=61,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=3,
        qk_layernorm=qk_norm,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    )
    theirs = shake(transformers.PhiForCausalLM(config)).eval()
    trunk = Trunk(phi.trunk_config(config.to_dict()))
    assert trunk.config.rope == 8
    ours = parts(trunk, 61, bias=True)
    load_into(ours, theirs.state_dict(), phi.keymap())
    there_and_back(phi.keymap(), ours, theirs.state_dict())
    ids = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids).logits
        got = ours["head"](ours["trunk"](ours["embed"](ids), lay_out([Segment("text", 9)], 2)))
    assert expected.std() > 0.3
    torch.testing.assert_close(got, expected, **CLOSE)


def bert_config(**more: Any) -> Any:
    return transformers.BertConfig(
        vocab_size=61,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=20,
        type_vocab_size=2,
        **more,
    )


def bert_embedding() -> TokenEmbedding:
    return TokenEmbedding(61, 48, positions=20, types=2, norm="layer", eps=1e-12)


def test_bert_encoder(shake: Shake) -> None:
    config = bert_config()
    theirs = shake(transformers.BertModel(config, add_pooling_layer=False)).eval()
    ours = nn.ModuleDict({"trunk": Trunk(bert.trunk_config(config.to_dict())), "embed": bert_embedding()}).eval()
    load_into(ours, theirs.state_dict(), bert.keymap())
    there_and_back(bert.keymap(), ours, theirs.state_dict())
    ids = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(1))
    types = torch.randint(0, 2, (2, 9), generator=torch.Generator().manual_seed(2))
    real = torch.ones(2, 9, dtype=torch.long)
    real[1, 6:] = 0
    layout = lay_out([Segment("text", 9, attends="full")], real=real)
    with torch.no_grad():
        expected = theirs(ids, attention_mask=real, token_type_ids=types).last_hidden_state
        got = ours["trunk"](ours["embed"](ids, type_ids=types), layout)
    torch.testing.assert_close(got[real.bool()], expected[real.bool()], **CLOSE)


def test_bert_decoder_with_cross_attention(shake: Shake) -> None:
    config = bert_config(is_decoder=True, add_cross_attention=True)
    theirs = shake(transformers.BertModel(config, add_pooling_layer=False)).eval()
    ours = nn.ModuleDict({"trunk": Trunk(bert.trunk_config(config.to_dict())), "embed": bert_embedding()}).eval()
    load_into(ours, theirs.state_dict(), bert.keymap())
    there_and_back(bert.keymap(), ours, theirs.state_dict())
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 61, (2, 9), generator=generator)
    context = torch.randn(2, 7, 48, generator=generator)
    there = torch.ones(2, 7, dtype=torch.long)
    there[0, 5:] = 0
    layout = lay_out([Segment("text", 9)], 2)
    with torch.no_grad():
        expected = theirs(ids, encoder_hidden_states=context, encoder_attention_mask=there).last_hidden_state
        x = ours["embed"](ids)
        got = ours["trunk"](x, layout, context=context, context_mask=there)
        torch.testing.assert_close(got, expected, **CLOSE)

        cache = KVCache()
        first = ours["trunk"](x[:, :6], layout.truncate(6), context=context, context_mask=there, cache=cache)
        rest = ours["trunk"](x[:, 6:], layout, cache=cache)  # context and its mask are remembered
        torch.testing.assert_close(torch.cat([first, rest], 1), expected, **CLOSE)


def test_incomplete_and_foreign_checkpoints_are_refused(shake: Shake) -> None:
    theirs, ours = llama_pair(shake, 2)
    state = dict(theirs.state_dict())
    del state["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(WeightsError, match=r"does not fill trunk\.layers\.1\.ffn\.up\.weight"):
        load_into(ours, state, llama.keymap())
    report = load_into(ours, state, llama.keymap(), allow_new=["trunk.layers.{i}.ffn.up.weight"])
    assert report.new == ["trunk.layers.1.ffn.up.weight"]
    state = {**theirs.state_dict(), "vision.weight": torch.zeros(2)}
    with pytest.raises(WeightsError, match=r"has vision\.weight that this model does not know"):
        load_into(ours, state, llama.keymap())
    assert load_into(ours, state, llama.keymap(), allow_ignored=["vision.{**}"]).ignored == ["vision.weight"]
    state = {**theirs.state_dict(), "model.norm.weight": torch.ones(7)}
    with pytest.raises(WeightsError, match=r"final_norm\.weight is \(7,\) in the checkpoint and \(48,\)"):
        load_into(ours, state, llama.keymap())
    state = {**theirs.state_dict(), "model.layers.7.input_layernorm.weight": torch.ones(48)}
    with pytest.raises(WeightsError, match=r"fills trunk\.layers\.7\.attn_norm\.weight"):
        load_into(ours, state, llama.keymap())
