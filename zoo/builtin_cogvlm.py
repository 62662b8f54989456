"""CogVLM's components of the zoo's own manifest (``zoo.builtin``). Data only."""

from __future__ import annotations

from typing import Any

from zoo.registry import Component

_EVA2: dict[str, Any] = {  # its norms stand on the branches' outputs
    "patch_size": 14, "width": 1792, "depth": 63, "heads": 16, "ffn": 15360, "placement": "branch",
    "final_norm": False, "pool": False, "cls": False, "resize": "squash",
}  # fmt: skip


def _encoder(name: str, summary: str, **preset: Any) -> Component:
    ref = "zoo.encoders.vit:ViTConfig"
    return Component(kind="encoder", name=name, ref=ref, preset={**_EVA2, **preset}, summary=summary)


COGVLM = (
    _encoder("eva2-clip-e", "EVA2-CLIP-E/14 as CogVLM reads it: 63 blocks, no class token, 224 px, 256 tokens"),
    _encoder("eva2-clip-e-490", "EVA2-CLIP-E/14 as CogVLM reads it, 490 px, 1,225 tokens", image_size=490),
    Component(
        kind="connector",
        name="glu-adapter",
        ref="zoo.connectors.glu_adapter:GLUAdapterConfig",
        summary="a linear map, then a SwiGLU of the decoder's size, between learned boi and eoi (CogVLM)",
    ),
    Component(
        kind="decoder",
        name="cogvlm-lm",
        ref="zoo.decoders.cogvlm_lm:CogVLMConfig",
        preset={"tokenizer": "hf:lmsys/vicuna-7b-v1.5", "vocab_size": 32000, "context_length": 2048},
        summary="Vicuna-7B with a visual expert of attention and FFN in every layer (CogVLM)",
    ),
)
