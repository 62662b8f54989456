"""Answers with masks: LISA and PixelLM, their data, metrics and command. Nothing heavy is imported here."""

from __future__ import annotations

from typing import Any

from zoo.plugin import Plugin
from zoo.registry import Component
from zoo_grounding.pixellm_manifest import PIXELLM

_SAM = "zoo_grounding.sam:SamConfig"
_HUGE: dict[str, Any] = {"width": 1280, "depth": 32, "heads": 16, "ffn": 5120, "global_blocks": [7, 15, 23, 31]}
_LARGE: dict[str, Any] = {"width": 1024, "depth": 24, "heads": 16, "ffn": 4096, "global_blocks": [5, 11, 17, 23]}
_LLAMA_2_13B: dict[str, Any] = {
    "family": "llama", "width": 5120, "depth": 40, "heads": 40, "kv_heads": 0, "ffn": 13824, "vocab_size": 32000,
    "context_length": 4096, "options": {"rms_norm_eps": 1e-5}, "tokenizer": "hf:xinlai/LISA-13B-llama2-v1",
}  # fmt: skip

LISA = (
    Component(
        kind="decoder",
        name="lisa-llama2-13b",
        ref="zoo.decoders.causal_lm:CausalLMConfig",
        preset=_LLAMA_2_13B,
        summary="the language model of LISA-13B-llama2: Llama 2 13B, tuned for chat",
    ),
    Component(
        kind="wiring",
        name="segmenter",
        ref="zoo_grounding.segmenter:SegmenterConfig",
        summary="an image encoder, a connector, a language model that names targets, a mask decoder that draws them",
    ),
    Component(
        kind="mask_decoder",
        name="sam-vit-h",
        ref=_SAM,
        preset=_HUGE,
        summary="SAM with ViT-H at 1024 px: an image encoder of its own, a decoder that one state prompts",
    ),
    Component(kind="mask_decoder", name="sam-vit-l", ref=_SAM, preset=_LARGE, summary="SAM with ViT-L at 1024 px"),
    Component(kind="mask_decoder", name="sam-vit-b", ref=_SAM, summary="SAM with ViT-B at 1024 px"),
    Component(
        kind="objective",
        name="mask-bce",
        ref="zoo_grounding.objectives:MaskBCEConfig",
        summary="binary cross-entropy of masks at the size of the image, a mean a mask (LISA, weight 2)",
    ),
    Component(
        kind="objective",
        name="mask-dice",
        ref="zoo_grounding.objectives:MaskDiceConfig",
        summary="dice loss of masks at the size of the image (LISA, weight 0.5)",
    ),
    Component(
        kind="data",
        name="openmoji-grounding",
        ref="zoo_grounding.data.scenes:GroundingScenesConfig",
        summary="scenes of icons, questions that name, describe or reason, answers with exact masks, parts too",
    ),
    Component(
        kind="data",
        name="reason-seg",
        ref="zoo_grounding.data.reason_seg:ReasonSegConfig",
        summary="images with LISA's JSON files: a question or a name, polygons, areas to ignore",
    ),
    Component(
        kind="task",
        name="grounding",
        ref="zoo_grounding.task:GroundingConfig",
        summary="the source's own questions, answered with masks: gIoU and cIoU a target, several targets an answer",
    ),
    *(
        Component(
            kind="checkpoint",
            name=name,
            ref="zoo_grounding.checkpoints:from_state",
            summary="the released LISA: LLaVA, the projection of states and SAM in the names of dvlab-research/LISA",
        )
        for name in ("lisa", "lisa-7b", "lisa-13b")
    ),
    Component(
        kind="command",
        name="segment",
        ref="zoo_grounding.command:main",
        summary="answer a question about an image with masks: zoo segment MODEL --image FILE --prompt TEXT",
    ),
)

PLUGIN = Plugin(name="zoo-grounding", components=(*LISA, *PIXELLM), conf="pkg://zoo_grounding/conf")
