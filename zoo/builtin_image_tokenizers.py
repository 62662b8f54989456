"""Discrete image tokenizers and what trains them, in the zoo's own manifest (``zoo.builtin``). Data only."""

from __future__ import annotations

from typing import Any

from zoo.registry import Component

_LFQ, _VQGAN = "zoo.tokenizers.lfq:LFQConfig", "zoo.tokenizers.vqgan:VQGANConfig"

_MAGVITV2: dict[str, Any] = {
    "encoder_mult": [1, 2, 2, 4, 4], "encoder_blocks": [4, 3, 4, 3, 4],
    "decoder_mult": [1, 1, 2, 2, 4], "decoder_blocks": [4, 4, 3, 4, 3],
    "middle_attention": True, "fold": 1, "code_convs": True,
}  # fmt: skip
_OPEN: dict[str, Any] = {
    "vocab_size": 262144,
    "encoder_mult": [1, 1, 2, 2, 4], "encoder_blocks": [4, 4, 4, 4, 4],
    "decoder_mult": [1, 1, 2, 2, 4], "decoder_blocks": [4, 4, 4, 4, 4],
    "middle": 4, "bias": False, "even": True, "depth_to_space": True, "fold": 1,
    "bit_order": "lsb", "kernel": 1, "adaptive": True,
}  # fmt: skip
_LLAMAGEN: dict[str, Any] = {"attention": [True]}
_CHAMELEON: dict[str, Any] = {"image_size": 512, "vocab_size": 8192, "code_width": 256, "unit": False}


def _tokenizer(name: str, ref: str, summary: str, **preset: Any) -> Component:
    return Component(kind="image_tokenizer", name=name, ref=ref, preset=preset, summary=summary)


DISCRETE_TOKENIZERS = (
    _tokenizer("lfq", _LFQ, "lookup-free codes, 2^K signs of K channels, no codebook; learns from any images"),
    _tokenizer("magvitv2", _LFQ, "Show-o's MAGVIT-v2: 13 bits, 256 px, 16 x 16 codes", **_MAGVITV2),
    _tokenizer("open-magvit2", _LFQ, "Open-MAGVIT2: 18 bits, 256 px, 16 x 16 codes", **_OPEN),
    _tokenizer(
        "open-magvit2-8", _LFQ, "Open-MAGVIT2 of the 128-pixel models: 18 bits, 16 x 16 codes, f8",
        **_OPEN | {"image_size": 128, "patch_size": 8},
    ),
    _tokenizer(
        "open-magvit2-14", _LFQ, "Open-MAGVIT2, pre-trained on more images: 14 bits, 256 px, 16 x 16 codes",
        **_OPEN | {"vocab_size": 16384},
    ),
    _tokenizer("llamagen-vq-16", _VQGAN, "LlamaGen's VQ: 16,384 codes of unit length, 16 x 16 at 256 px", **_LLAMAGEN),
    _tokenizer(
        "llamagen-vq-8", _VQGAN, "LlamaGen's VQ: 16,384 codes of unit length, 32 x 32 at 256 px",
        **_LLAMAGEN | {"patch_size": 8},
    ),
    _tokenizer("chameleon-vq", _VQGAN, "Chameleon's VQGAN: 8,192 codes of width 256, 32 x 32 at 512 px", **_CHAMELEON),
    Component(
        kind="objective",
        name="lfq-reconstruction",
        ref="zoo.objectives.vq_reconstruction:VQReconstructionConfig",
        preset={"absolute": 1.0, "beta": 0.25, "entropy": 0.1},
        summary="draw the image again from lookup-free codes: pixels, commitment, entropy (Open-MAGVIT2's factors)",
    ),
)  # fmt: skip
