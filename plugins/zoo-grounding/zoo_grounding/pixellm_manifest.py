"""What PixelLM adds to the plugin."""

from __future__ import annotations

from typing import Any

from zoo.registry import Component

_CLIP: dict[str, Any] = {
    "act": "quick_gelu", "eps": 1e-5, "patch_bias": False, "pre_norm": True, "layer": -2, "cls": False, "pool": False,
    "init": "clip", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
}  # fmt: skip
"""CLIP's tower up to the block before the last. Pixels are normalised as ImageNet's, not as CLIP's: the release does
so."""

_VIT_L: dict[str, Any] = {"image_size": 448, "patch_size": 14, "width": 1024, "depth": 24, "heads": 16, "ffn": 4096}
_VIT_B: dict[str, Any] = {"image_size": 224, "patch_size": 16, "width": 768, "depth": 12, "heads": 12, "ffn": 3072}

_LIGHTNING: dict[str, Any] = {
    "family": "llama", "width": 4096, "depth": 32, "heads": 32, "kv_heads": 0, "ffn": 11008, "vocab_size": 32000,
    "context_length": 2048, "options": {"rms_norm_eps": 1e-6}, "tokenizer": "hf:huggyllama/llama-7b",
}  # fmt: skip
_SEVERAL: dict[str, Any] = {
    "icons": "train", "kinds": 12, "objects": "2..4", "questions": "name+every+several", "wording": "plain",
    "people": False, "turns": 1,
}  # fmt: skip

PIXELLM = (
    Component(
        kind="encoder",
        name="clip-vit-l-14-448",
        ref="zoo_grounding.clip_levels:CLIPLevelsConfig",
        preset={**_CLIP, **_VIT_L},
        summary="CLIP ViT-L/14 at 448 px that gives several layers and hides padded patches (PixelLM)",
    ),
    Component(
        kind="encoder",
        name="clip-vit-b-16-levels",
        ref="zoo_grounding.clip_levels:CLIPLevelsConfig",
        preset={**_CLIP, **_VIT_B},
        summary="the same with ViT-B/16 at 224 px",
    ),
    Component(
        kind="decoder",
        name="llava-lightning-7b",
        ref="zoo.decoders.causal_lm:CausalLMConfig",
        preset=_LIGHTNING,
        summary="LLaVA-Lightning-7B-v1-1 (Llama 1), the language model of PixelLM-7B",
    ),
    Component(
        kind="connector",
        name="shrunk-mlp",
        ref="zoo_grounding.shrunk_mlp:ShrunkMLPConfig",
        summary="a grid of patches half as wide and high, two linears with GELU (PixelLM)",
    ),
    Component(
        kind="mask_decoder",
        name="pixel-decoder",
        ref="zoo_grounding.pixel_decoder:PixelDecoderConfig",
        summary="PixelLM's light decoder: several tokens a scale and target, several layers of the encoder, no SAM",
    ),
    Component(
        kind="objective",
        name="mask-refinement",
        ref="zoo_grounding.refinement_loss:MaskRefinementConfig",
        summary="cross-entropy of masks in which pixels that several targets claim weigh more (PixelLM, weight 2)",
    ),
    Component(
        kind="data",
        name="muse",
        ref="zoo_grounding.muse:MuseConfig",
        summary="MUSE's JSON: questions answered with masks of several instances (root=PATH, train=, test=FILE)",
    ),
    Component(
        kind="data",
        name="muse-coco",
        ref="zoo_grounding.muse_generated:MuseCocoConfig",
        summary="MUSE-style questions written from templates about COCO's instances (root=PATH, train=, test=FILE)",
    ),
    Component(
        kind="data",
        name="muse-scenes",
        ref="zoo_grounding.muse_generated:MuseScenesConfig",
        summary="the same about scenes of icons: one question a scene, a mask of each instance it asks for",
    ),
    Component(
        kind="data",
        name="several-targets",
        ref="zoo_grounding.data.scenes:GroundingScenesConfig",
        preset=_SEVERAL,
        summary="scenes of two to four icons of 12 kinds, one question with one to four targets (claims)",
    ),
    Component(
        kind="task",
        name="muse",
        ref="zoo_grounding.muse_task:MuseTaskConfig",
        summary="questions answered with several masks, paired at best: gIoU and cIoU of whole answers (MUSE)",
    ),
    Component(
        kind="command",
        name="muse",
        ref="zoo_grounding.muse_command:main",
        summary="write MUSE's JSON from COCO's annotations: zoo muse --root COCO --instances FILE --out FILE",
    ),
    *(
        Component(
            kind="checkpoint",
            name=name,
            ref="zoo_grounding.pixellm_weights:from_state",
            summary="the released PixelLM: LLaVA, codebook, pixel decoder in the names of MaverickRen/PixelLM",
        )
        for name in ("pixellm-7b", "pixellm-13b")
    ),
)
