"""Language models in 8 or 4 bits: refused in one line where they cannot run; their mechanism where bitsandbytes is."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch

import zoo
from zoo.decoders.causal_lm import CausalLMConfig
from zoo.errors import ConfigError, MissingExtra
from zoo.quantized import dequantized, exchange, is_quantized

TINY: dict[str, Any] = {"width": 64, "depth": 2, "heads": 4, "ffn": 128, "vocab_size": 100, "context_length": 64}
needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs mmzoo[quantized]")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="bitsandbytes is offered on CUDA devices only")


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_without_cuda_one_line_says_so(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=rf"quantize = '{kind}' needs a CUDA device") as error:
        zoo.build("llava-1.5", scale="tiny", decoder={"quantize": kind})
    assert "\n" not in str(error.value)


def test_unknown_kind_and_missing_package_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="did you mean nf4"):
        zoo.build("llava-1.5", scale="tiny", decoder={"quantize": "nf"})
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtra, match=r"pip install 'mmzoo\[quantized\]'"):
        exchange(CausalLMConfig(**TINY).build().lm, "nf4")


def test_shapes_and_flops_need_no_device() -> None:
    text = zoo.describe("llava-1.5", scale="tiny", decoder={"quantize": "nf4", "lora_rank": 4})
    assert "FLOPs a sample" in text


@needs_bitsandbytes
@pytest.mark.parametrize(("kind", "error"), [("int8", 0.02), ("nf4", 0.3)])
def test_checkpoints_of_a_quantized_model_are_ordinary(kind: str, error: float) -> None:
    torch.manual_seed(0)
    model = CausalLMConfig(**TINY).build().lm.eval()
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    exchange(model, kind)
    assert sum(map(is_quantized, model.parameters())) == 14
    assert {n: t.shape for n, t in model.state_dict().items()} == {n: t.shape for n, t in plain.items()}
    assert all(torch.equal(t, plain[n]) for n, t in model.state_dict().items())
    for layer in [m for m in model.modules() if hasattr(m, "weight") and is_quantized(m.weight)]:
        layer.to("cpu")  # bitsandbytes quantises on the way to a device; the CPU is one
        assert not layer.weight.is_floating_point()
    held = model.state_dict()
    assert {n: t.shape for n, t in held.items()} == {n: t.shape for n, t in plain.items()}
    worst = max(float((held[n] - plain[n]).abs().max() / plain[n].std()) for n in held)
    assert 0 < worst < 4 * error
    ids = torch.randint(0, 100, (2, 7))
    with torch.no_grad():
        before = model(ids).logits
        again = model.state_dict()  # after a forward pass as well
        assert all(torch.equal(again[n], held[n]) for n in held)
        other = CausalLMConfig(**TINY).build().lm.eval()
        other.load_state_dict(held)
        torch.testing.assert_close(other(ids).logits, before, atol=error, rtol=0)
        model.load_state_dict({n: 2 * t for n, t in plain.items()})
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    expected = 2 * plain["model.layers.0.mlp.up_proj.weight"]
    assert float((dequantized(layer) - expected).abs().max() / expected.std()) < 4 * error


@needs_bitsandbytes
@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_adapters_learn_beside_quantized_weights(kind: str) -> None:
    module = zoo.build("llava-1.5", scale="tiny", stages="joint", decoder={"quantize": kind, "lora_rank": 4}).cuda()
    batch = {name: tensor.cuda() for name, tensor in module.model.example_batch(2).items()}
    loss, _ = module.losses(batch)
    loss.backward()
    assert all(p.grad is not None for p in module.model.parameters() if p.requires_grad)
    with pytest.raises(ConfigError, match="fewer bits"):
        zoo.build("llava-1.5", scale="tiny", stages="joint", decoder={"quantize": kind})
