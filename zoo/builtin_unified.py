"""Components of Show-o and Chameleon in the zoo's own manifest (``zoo.builtin``). Data only."""

from __future__ import annotations

from typing import Any

from zoo.builtin_image_tokenizers import _MAGVITV2 as MAGVITV2
from zoo.registry import Component

_TRUNK = "zoo.decoders.trunk_lm:TrunkLMConfig"
_CHAMELEON: dict[str, Any] = {  # arXiv 2405.09818, section 2.3 and table 1; the released params.json
    "vocab_size": 65536,
    "context_length": 4096,
    "tokenizer": "hf:facebook/chameleon-7b",
    "qk_norm": "layer",
    "qk_norm_per_head": True,
    "tie": False,
}
_BASELINES: tuple[tuple[str, int, int, int, int], ...] = (  # arXiv 2408.11039, table 2; FFN 8/3 of the width, in 256s
    ("0.16b", 768, 16, 12, 2048),
    ("0.37b", 1024, 24, 16, 2816),
    ("0.76b", 1536, 24, 24, 4096),
    ("1.4b", 2048, 24, 16, 5632),
    ("7b", 4096, 32, 32, 11008),
)


def _decoder(name: str, summary: str, **preset: Any) -> Component:
    return Component(kind="decoder", name=name, ref=_TRUNK, preset=preset, summary=summary)


UNIFIED = (
    _decoder(
        "phi-1.5-qk", "Phi-1.5 with QK-norm, 1.3B: parallel attention and MLP, half of each head rotated (Show-o)",
        width=2048, depth=24, heads=32, kv_heads=0, ffn=8192, norm="layer", placement="parallel", act="gelu_tanh",
        gated=False, bias=True, rope_share=0.5, qk_norm="layer", tie=False, head_bias=True,
        vocab_size=50295, context_length=2048, tokenizer="hf:microsoft/phi-1_5",
    ),
    _decoder(
        "chameleon-7b", "Chameleon's 7B: Llama with QK-norm and dropout",
        width=4096, depth=32, heads=32, kv_heads=0, ffn=11008, dropout=0.1, **_CHAMELEON,
    ),
    _decoder(
        "chameleon-34b", "Chameleon's 34B: QK-norm, norms on the branches' outputs, 8 key/value heads",
        width=8192, depth=48, heads=64, kv_heads=8, ffn=22016, placement="branch", **_CHAMELEON,
    ),
    *(
        _decoder(
            f"chameleon-baseline-{name}",
            f"the Chameleon of Transfusion's comparison, {name}: {depth} layers of width {width}, QK-norm,"
            " norms on the branches' outputs",
            width=width, depth=depth, heads=heads, kv_heads=0, ffn=ffn, placement="branch", qk_norm="layer", tie=False,
            vocab_size=32000, context_length=4096, tokenizer="hf:meta-llama/Llama-2-7b-hf",
        )
        for name, width, depth, heads, ffn in _BASELINES
    ),
    Component(
        kind="image_tokenizer",
        name="magvitv2-512",
        ref="zoo.tokenizers.lfq:LFQConfig",
        preset=MAGVITV2 | {"image_size": 512},
        summary="Show-o's MAGVIT-v2 at 512 px: 13 bits, 32 x 32 codes",
    ),
    Component(
        kind="wiring",
        name="unified",
        ref="zoo.models.unified:UnifiedConfig",
        summary="one decoder over text and image codes: understands, writes and draws (Show-o, Chameleon)",
    ),
    Component(
        kind="wiring",
        name="unified-vision",
        ref="zoo.models.unified_vision:UnifiedVisionConfig",
        summary="unified, with an image encoder's features in place of codes where images are understood (Show-o)",
    ),
    Component(
        kind="objective",
        name="masked-image-token",
        ref="zoo.objectives.masked_image_tokens:MaskedImageTokensConfig",
        summary="hidden image codes in their own place, a cosine-drawn share of each image (MaskGIT, Show-o)",
    ),
)  # fmt: skip
