"""CoCa's components of the zoo's own manifest (``zoo.builtin``). Data only."""

from __future__ import annotations

from typing import Any

from zoo.registry import Component

_CLIP_VIT = "zoo.encoders.open_clip:OpenCLIPViTConfig"
_COCA: dict[str, str] = {
    "encoder": "zoo.encoders.vit:ViTConfig",
    "connector": "zoo.connectors.attentional_pooler:AttentionalPoolerConfig",
    "text_encoder": "zoo.encoders.causal_text:CausalTextConfig",
    "decoder": "zoo.decoders.multimodal:MultimodalDecoderConfig",
}
_COCA_VIT: dict[str, Any] = {"image_size": 288, "patch_size": 18, "class_token": False, "pool": False}
_COCA_TEXT: dict[str, Any] = {"tokenizer": "clip-bpe", "vocab_size": 64000, "context_length": 64}
_COCA_SIZES: dict[str, dict[str, Any]] = {  # table 1: the width, depth, heads and MLP of both text halves
    "base": {"width": 768, "depth": 12, "heads": 12, "ffn": 3072},
    "large": {"width": 1024, "depth": 12, "heads": 16, "ffn": 4096},
    "2b": {"width": 1408, "depth": 18, "heads": 16, "ffn": 5632},
}


def _coca(kind: str, name: str, summary: str, **preset: Any) -> Component:
    return Component(kind=kind, name=name, ref=_COCA[kind], preset=preset, summary=summary)


COCA = (
    Component(
        kind="encoder",
        name="coca-vit-b-32",
        ref=_CLIP_VIT,
        preset={"quick_gelu": False, "pool": False},
        summary="open_clip CoCa's ViT-B/32, 224 px, exact GELU, 50 tokens",
    ),
    Component(
        kind="encoder",
        name="coca-vit-l-14",
        ref=_CLIP_VIT,
        preset={
            "quick_gelu": False, "pool": False,
            "patch_size": 14, "width": 1024, "depth": 24, "heads": 16, "ffn": 4096,
        },
        summary="open_clip CoCa's ViT-L/14, 224 px, exact GELU, 257 tokens",
    ),
    _coca("encoder", "coca-vit-base", "CoCa's ViT-B/18, 288 px, 256 tokens", **_COCA_VIT),
    _coca(
        "encoder", "coca-vit-large", "CoCa's ViT-L/18, 288 px, 256 tokens",
        width=1024, depth=24, heads=16, ffn=4096, **_COCA_VIT,
    ),
    _coca(
        "encoder", "coca-vit-2b", "CoCa's ViT-g/18, 288 px, 256 tokens",
        width=1408, depth=40, heads=16, ffn=6144, **_COCA_VIT,
    ),
    _coca("connector", "attentional-pooler", "256 queries read the image once: a vector and 255 tokens (open_clip)"),
    _coca(
        "connector", "attentional-poolers", "256 queries read the image, and one more reads them (CoCa)",
        pooling="cascade",
    ),
    _coca("text_encoder", "coca-text-512", "causal text, 12 blocks of width 512, class token last (open_clip)"),
    _coca(
        "text_encoder", "coca-text-768", "causal text, 12 blocks of width 768, class token last (open_clip)",
        width=768, heads=12, ffn=3072,
    ),
    *(
        _coca(
            "text_encoder", f"coca-text-{name}",
            f"causal text, {size['depth']} blocks of width {size['width']}, class token last (CoCa)",
            **_COCA_TEXT, **size,
        )
        for name, size in _COCA_SIZES.items()
    ),
    _coca("decoder", "coca-decoder-512", "goes on from coca-text-512, reads the image, two MLPs a layer (open_clip)"),
    _coca(
        "decoder", "coca-decoder-768", "goes on from coca-text-768, reads the image, two MLPs a layer (open_clip)",
        width=768, heads=12, ffn=3072,
    ),
    *(
        _coca(
            "decoder", f"coca-decoder-{name}", f"goes on from coca-text-{name}, reads the image (CoCa)",
            two_ffn=False, **_COCA_TEXT, **size,
        )
        for name, size in _COCA_SIZES.items()
    ),
    Component(
        kind="wiring",
        name="captioner",
        ref="zoo.models.captioner:CaptionerConfig",
        summary="two encoders and a decoder that goes on from the text encoder's states: one pass, two losses",
    ),
)  # fmt: skip
