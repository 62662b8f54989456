"""Language models of the zoo's own manifest (``zoo.builtin``). Data only."""

from __future__ import annotations

from typing import Any

from zoo.registry import Component


def _lm(name: str, summary: str, **preset: Any) -> Component:
    ref = "zoo.decoders.causal_lm:CausalLMConfig"
    return Component(kind="decoder", name=name, ref=ref, preset=preset, summary=summary)


_OPT: dict[str, Any] = {"family": "opt", "vocab_size": 50272, "context_length": 2048, "dropout": 0.1}
_VICUNA: dict[str, Any] = {
    "family": "llama", "kv_heads": 0, "vocab_size": 32000, "context_length": 2048, "options": {"rms_norm_eps": 1e-5},
}  # fmt: skip
_LLAMA_2: dict[str, Any] = {**_VICUNA, "context_length": 4096}
_7B: dict[str, Any] = {"width": 4096, "depth": 32, "heads": 32, "ffn": 11008}
_13B: dict[str, Any] = {"width": 5120, "depth": 40, "heads": 40, "ffn": 13824}

LANGUAGE = (
    _lm(
        "opt-125m", "OPT-125M", width=768, depth=12, heads=12, ffn=3072, tokenizer="hf:facebook/opt-125m", **_OPT,
    ),
    _lm(
        "opt-2.7b", "OPT-2.7B", width=2560, depth=32, heads=32, ffn=10240, tokenizer="hf:facebook/opt-2.7b", **_OPT,
    ),
    _lm(
        "opt-6.7b", "OPT-6.7B", width=4096, depth=32, heads=32, ffn=16384, tokenizer="hf:facebook/opt-6.7b", **_OPT,
    ),
    _lm("llama-2-7b", "Llama 2 7B", tokenizer="hf:meta-llama/Llama-2-7b-hf", **_7B, **_LLAMA_2),
    _lm("llama-2-13b", "Llama 2 13B", tokenizer="hf:meta-llama/Llama-2-13b-hf", **_13B, **_LLAMA_2),
    _lm("vicuna-7b", "Vicuna-7B v1.5 (Llama 2)", tokenizer="hf:lmsys/vicuna-7b-v1.5", **_7B, **_VICUNA),
    _lm("vicuna-13b", "Vicuna-13B v1.5 (Llama 2)", tokenizer="hf:lmsys/vicuna-13b-v1.5", **_13B, **_VICUNA),
    _lm(
        "phi-2", "Phi-2, 2.7B", family="phi", width=2560, depth=32, heads=32, ffn=10240, dropout=0.1,
        vocab_size=51200, context_length=2048, tokenizer="hf:microsoft/phi-2",
        options={"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.4}},
    ),
    _lm(
        "gpt2", "GPT-2, 124M", family="gpt2", width=768, depth=12, heads=12, ffn=3072, dropout=0.1,
        vocab_size=50257, context_length=1024, tokenizer="hf:openai-community/gpt2",
    ),
    _lm(
        "smollm2-135m-new", "SmolLM2-135M's sizes with new weights, tied, 9 heads on 3",
        family="llama", width=576, depth=30, heads=9, kv_heads=3, ffn=1536,
        vocab_size=49152, context_length=8192, tokenizer="hf:HuggingFaceTB/SmolLM2-135M",
        options={
            "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        },
    ),
    _lm("causal-lm", "any transformers causal LM by family and size; a Llama of SmolLM2-135M's width by default"),
    Component(
        kind="decoder",
        name="smollm2-135m",
        ref="zoo.decoders.smollm2:SmolLM2Config",
        summary="SmolLM2-135M-Instruct with its trained weights, offline (extra smollm2); no scale shrinks it",
        extra="smollm2",
    ),
    Component(
        kind="tokenizer",
        name="smollm2",
        ref="zoo.decoders.smollm2:SmolLM2TokenizerConfig",
        summary="SmolLM2's byte-level BPE of 49,152 tokens, out of the same file as its weights (extra smollm2)",
        extra="smollm2",
    ),
)  # fmt: skip
