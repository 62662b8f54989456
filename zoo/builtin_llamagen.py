"""LlamaGen in the zoo's own manifest (``zoo.builtin``). Data only."""

from __future__ import annotations

from typing import Any

from zoo.registry import Component

_LM = "zoo.decoders.code_lm:CodeLMConfig"
_T5 = "zoo.encoders.t5:T5EncoderConfig"


def _lm(size: str, parameters: str, **preset: Any) -> Component:
    return Component(
        kind="decoder",
        name=f"llamagen-{size}",
        ref=_LM,
        preset=preset,
        summary=f"LlamaGen-{size.upper()}, {parameters}: Llama over image codes, positions on two axes",
    )


LLAMAGEN = (
    _lm("b", "111M"),  # table 2 of the paper, and gpt.py's GPT_1B to GPT_7B
    _lm("l", "343M", width=1024, depth=24, heads=16, ffn=2816),
    _lm("xl", "775M", width=1280, depth=36, heads=20, ffn=3584),
    _lm("xxl", "1.4B", width=1536, depth=48, heads=24, ffn=4096),
    _lm("xxxl", "3.9B", width=2560, depth=48, heads=40, ffn=6912),
    _lm("1b", "1.2B", width=2048, depth=22, heads=32, ffn=5632),
    _lm("3b", "3.1B", width=3200, depth=24, heads=32, ffn=8704),
    _lm("7b", "6.6B", width=4096, depth=32, heads=32, ffn=11008),
    *(
        Component(
            kind="image_tokenizer",
            name=f"llamagen-vq-16-{size}",
            ref="zoo.tokenizers.vqgan:VQGANConfig",
            preset={"attention": [True], "image_size": size},
            summary=f"llamagen-vq-16 for images of {size} pixels, {size // 16} x {size // 16} codes an image",
        )
        for size in (384, 512)
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
