"""Encoder-decoder language models in the zoo's own manifest (``zoo.builtin``). Data only."""

from __future__ import annotations

from typing import Any

from zoo.registry import Component


def _t5(name: str, summary: str, **preset: Any) -> Component:
    ref = "zoo.decoders.seq2seq_lm:Seq2SeqLMConfig"
    return Component(kind="decoder", name=name, ref=ref, preset=preset, summary=summary)


T5 = (
    _t5("flan-t5-base", "FlanT5-base, 250M, encoder-decoder, exact GELU as BLIP-2 runs it"),
    _t5(
        "flan-t5-xl", "FlanT5-XL, 2.8B, encoder-decoder, exact GELU as BLIP-2 runs it",
        width=2048, depth=24, heads=32, ffn=5120, tokenizer="hf:google/flan-t5-xl",
    ),
    _t5(
        "flan-t5-xxl", "FlanT5-XXL, 11B, encoder-decoder, exact GELU as BLIP-2 runs it",
        width=4096, depth=24, heads=64, ffn=10240, tokenizer="hf:google/flan-t5-xxl",
    ),
    _t5("seq2seq-lm", "any T5 of transformers (t5, mt5) by family and size; FlanT5-base's size by default"),
    Component(
        kind="wiring",
        name="bridge-seq2seq",
        ref="zoo.models.seq2seq_bridge:Seq2SeqBridgeConfig",
        summary="image encoder, connector, encoder-decoder LM: its encoder reads image and prefix, its decoder writes",
    ),
)  # fmt: skip
