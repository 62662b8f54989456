"""InstructBLIP's and MiniGPT-4's components of the zoo's own manifest (``zoo.builtin``). Data only."""

from __future__ import annotations

from typing import Any

from zoo.registry import Component


def _llama(name: str, summary: str, **preset: Any) -> Component:
    fields: dict[str, Any] = {"family": "llama", "kv_heads": 0, "vocab_size": 32000, "context_length": 2048}
    fields |= {"options": {"rms_norm_eps": 1e-6}}  # Llama 1; Llama 2 has 1e-5
    ref = "zoo.decoders.causal_lm:CausalLMConfig"
    return Component(kind="decoder", name=name, ref=ref, preset={**fields, **preset}, summary=summary)


_7B: dict[str, Any] = {"width": 4096, "depth": 32, "heads": 32, "ffn": 11008}
_13B: dict[str, Any] = {"width": 5120, "depth": 40, "heads": 40, "ffn": 13824}

DIALOGUE = (
    Component(
        kind="connector",
        name="instruct-qformer",
        ref="zoo.connectors.instruct_qformer:InstructQFormerConfig",
        summary="a Q-Former whose queries also read the instruction (InstructBLIP)",
    ),
    Component(
        kind="connector",
        name="frozen-qformer",
        ref="zoo.connectors.qformer:QFormerConfig",
        preset={"dropout": 0.0},
        summary="BLIP-2's Q-Former without dropout, of which only the last linear map is to learn (MiniGPT-4)",
    ),
    Component(
        kind="connector",
        name="token-merge",
        ref="zoo.connectors.token_merge:TokenMergeConfig",
        summary="every 4 patches side by side, one linear map (MiniGPT-4 with LLaMA-2)",
    ),
    _llama("vicuna-7b-v0", "Vicuna-7B v0 (Llama 1)", tokenizer="hf:Vision-CAIR/vicuna-7b", **_7B),
    _llama("vicuna-13b-v0", "Vicuna-13B v0 (Llama 1)", tokenizer="hf:Vision-CAIR/vicuna", **_13B),
    _llama(
        "vicuna-7b-v1.1", "Vicuna-7B v1.1 (Llama 1) and one id for pads",
        tokenizer="hf:lmsys/vicuna-7b-v1.1", **{**_7B, "vocab_size": 32001},
    ),
    _llama(
        "vicuna-13b-v1.1", "Vicuna-13B v1.1 (Llama 1) and one id for pads",
        tokenizer="hf:lmsys/vicuna-13b-v1.1", **{**_13B, "vocab_size": 32001},
    ),
    _llama(
        "llama-2-7b-chat", "Llama 2 7B, tuned for chat", tokenizer="hf:meta-llama/Llama-2-7b-chat-hf",
        **{**_7B, "context_length": 4096, "options": {"rms_norm_eps": 1e-5}},
    ),
)  # fmt: skip
