"""The zoo's own components, stated in the same manifest a plugin uses. Data only: nothing heavy is imported here."""

from __future__ import annotations

from typing import Any

from zoo.plugin import Plugin
from zoo.registry import Component

_VIT_L: dict[str, Any] = {"patch_size": 14, "width": 1024, "depth": 24, "heads": 16, "ffn": 4096}


def _encoder(name: str, config: str, summary: str, **preset: Any) -> Component:
    return Component(kind="encoder", name=name, ref=f"zoo.encoders.{config}", preset=preset, summary=summary)


def _resnet(name: str, blocks: list[int], stem_width: int, embed_width: int, image_size: int) -> Component:
    sizes = {"blocks": blocks, "stem_width": stem_width, "embed_width": embed_width, "image_size": image_size}
    summary = f"CLIP's modified ResNet {name.removeprefix('clip-').upper()} with attention pool, {image_size} px"
    return _encoder(name, "open_clip:OpenCLIPResNetConfig", summary, **sizes)


def _clip_text(width: int) -> Component:
    return Component(
        kind="text_encoder",
        name=f"clip-text-{width}",
        ref="zoo.encoders.open_clip:OpenCLIPTextConfig",
        preset={"width": width, "heads": width // 64, "ffn": 4 * width},
        summary=f"CLIP's causal text transformer, 12 blocks of width {width}",
    )


ENCODERS = (
    _encoder("clip-vit-b-32", "open_clip:OpenCLIPViTConfig", "CLIP ViT-B/32, 224 px, 50 tokens"),
    _encoder("clip-vit-b-16", "open_clip:OpenCLIPViTConfig", "CLIP ViT-B/16, 224 px, 197 tokens", patch_size=16),
    _encoder("clip-vit-l-14", "open_clip:OpenCLIPViTConfig", "CLIP ViT-L/14, 224 px, 257 tokens", **_VIT_L),
    _encoder(
        "clip-vit-l-14-336", "open_clip:OpenCLIPViTConfig", "CLIP ViT-L/14, 336 px, 577 tokens",
        image_size=336, **_VIT_L,
    ),
    _resnet("clip-rn50", [3, 4, 6, 3], 64, 1024, 224),
    _resnet("clip-rn101", [3, 4, 23, 3], 64, 512, 224),
    _resnet("clip-rn50x4", [4, 6, 10, 6], 80, 640, 288),
    _resnet("clip-rn50x16", [6, 8, 18, 8], 96, 768, 384),
    _resnet("clip-rn50x64", [3, 15, 36, 10], 128, 1024, 448),
    _encoder("vit-tiny-16", "vit:ViTConfig", "ViT-Ti/16 on the zoo's trunk", width=192, heads=3, ffn=768),
    _encoder("vit-s-16", "vit:ViTConfig", "ViT-S/16 on the zoo's trunk", width=384, heads=6, ffn=1536),
    _encoder("vit-b-16", "vit:ViTConfig", "ViT-B/16 on the zoo's trunk"),
    _encoder(
        "vit-l-16", "vit:ViTConfig", "ViT-L/16 on the zoo's trunk", width=1024, depth=24, heads=16, ffn=4096
    ),
    _encoder(
        "eva-vit-g", "vit:ViTConfig", "EVA-CLIP ViT-g/14 as BLIP-2 reads it: 39 blocks, no final norm",
        patch_size=14, width=1408, depth=39, heads=16, ffn=6144, bias="qv", final_norm=False, pool=False,
    ),
    _encoder("timm-vit", "timm_vit:TimmConfig", "any timm model by name (arch=...), ViT-B/16 by default"),
)  # fmt: skip

TEXT_ENCODERS = tuple(_clip_text(width) for width in (512, 640, 768, 1024))

TOWERS = (
    Component(
        kind="wiring",
        name="towers",
        ref="zoo.models.towers:TowersConfig",
        summary="two encoders that meet in one dot product",
    ),
    Component(
        kind="objective",
        name="contrastive",
        ref="zoo.objectives.contrastive:ContrastiveConfig",
        summary="symmetric in-batch softmax over pairs, negatives from every rank",
    ),
)

DATA = (
    Component(
        kind="data",
        name="openmoji",
        ref="zoo.data.openmoji:OpenMojiConfig",
        summary="3,953 hand-drawn icons with their names (CC BY-SA 4.0), embedded; splits random and compositional",
    ),
    Component(
        kind="data",
        name="folder",
        ref="zoo.data.folder:FolderConfig",
        summary="your images with captions in a jsonl or csv file (root=PATH)",
    ),
)

TASKS = (
    Component(
        kind="task",
        name="retrieval",
        ref="zoo.evaluation.retrieval:RetrievalConfig",
        summary="image-text retrieval both ways: R@1, R@5, R@10, median rank",
    ),
    Component(
        kind="task",
        name="caption-likelihood",
        ref="zoo.evaluation.likelihood:CaptionLikelihoodConfig",
        summary="bits per byte of the reference captions",
    ),
    Component(
        kind="task",
        name="naming",
        ref="zoo.evaluation.naming:NamingConfig",
        summary="exact match of the generated name, and its rank among 100 names",
    ),
)

PLUGIN = Plugin(name="zoo", components=(*ENCODERS, *TEXT_ENCODERS, *TOWERS, *DATA, *TASKS))
