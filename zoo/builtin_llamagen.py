"""LlamaGen in the zoo's own manifest (``zoo.builtin``). Data only."""

from __future__ import annotations

from typing import Any

from zoo.registry import Component

_LM = "zoo.decoders.code_lm:CodeLMConfig"
_T5 = "zoo.encoders.t5:T5EncoderConfig"
_SIZES: dict[str, tuple[str, dict[str, Any]]] = {  # table 2 of the paper, and gpt.py's GPT_1B to GPT_7B
    "b": ("111M", {}),
    "l": ("343M", {"width": 1024, "depth": 24, "heads": 16, "ffn": 2816}),
    "xl": ("775M", {"width": 1280, "depth": 36, "heads": 20, "ffn": 3584}),
    "xxl": ("1.4B", {"width": 1536, "depth": 48, "heads": 24, "ffn": 4096}),
    "xxxl": ("3.9B", {"width": 2560, "depth": 48, "heads": 40, "ffn": 6912}),
    "1b": ("1.2B", {"width": 2048, "depth": 22, "heads": 32, "ffn": 5632}),
    "3b": ("3.1B", {"width": 3200, "depth": 24, "heads": 32, "ffn": 8704}),
    "7b": ("6.6B", {"width": 4096, "depth": 32, "heads": 32, "ffn": 11008}),
}

LLAMAGEN = (
    *(
        Component(
            kind="decoder",
            name=f"llamagen-{name}",
            ref=_LM,
            preset=preset,
            summary=f"LlamaGen-{name.upper()}, {count}: Llama over image codes, positions on two axes",
        )
        for name, (count, preset) in _SIZES.items()
    ),
    Component(
        kind="connector",
        name="caption-mlp",
        ref="zoo.connectors.caption_mlp:CaptionMLPConfig",
        summary="two matrices without biases, tanh GELU between (LlamaGen's captions)",
    ),
    Component(
        kind="text_encoder",
        name="flan-t5-base-encoder",
        ref=_T5,
        summary="the encoder of FlanT5-base: 12 layers of width 768",
    ),
    Component(
        kind="text_encoder",
        name="flan-t5-xl-encoder",
        ref=_T5,
        preset={"width": 2048, "depth": 24, "heads": 32, "ffn": 5120, "tokenizer": "hf:google/flan-t5-xl"},
        summary="the encoder of FlanT5-XL: 24 layers of width 2048 (LlamaGen)",
    ),
    Component(
        kind="wiring",
        name="image-lm",
        ref="zoo.models.conditioned:CaptionedConfig",
        summary="text encoder, connector, language model of image codes: a caption's features, then the image's codes",
    ),
    Component(
        kind="wiring",
        name="image-lm-class",
        ref="zoo.models.conditioned:ClassedConfig",
        summary="a table of classes and a language model of image codes: one class token, then the image's codes",
    ),
)
