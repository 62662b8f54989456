"""What ImageBind adds: its encoders, its wiring and objective, data of its modalities, its tasks."""

from __future__ import annotations

from zoo.registry import Component

_ENCODERS = "zoo_modalities.imagebind.encoders"

IMAGEBIND: tuple[Component, ...] = (
    Component(
        kind="encoder",
        name="imagebind-vision",
        ref=f"{_ENCODERS}:VisionConfig",
        summary="ImageBind's image and video encoder, ViT-L/14 on two frames",
    ),
    Component(
        kind="encoder",
        name="imagebind-vision-huge",
        ref=f"{_ENCODERS}:VisionConfig",
        preset={"width": 1280, "depth": 32, "heads": 16, "ffn": 5120},
        summary="ImageBind's image and video encoder, ViT-H/14 on two frames (the checkpoint's)",
    ),
    Component(
        kind="text_encoder",
        name="imagebind-text",
        ref=f"{_ENCODERS}:TextConfig",
        summary="ImageBind's causal text encoder, 12 layers",
    ),
    Component(
        kind="text_encoder",
        name="imagebind-text-huge",
        ref=f"{_ENCODERS}:TextConfig",
        preset={"width": 1024, "depth": 24, "heads": 16, "ffn": 4096},
        summary="ImageBind's causal text encoder, 24 layers (the checkpoint's)",
    ),
    Component(
        kind="modality_encoder",
        name="imagebind-audio",
        ref=f"{_ENCODERS}:AudioConfig",
        summary="ImageBind's audio encoder: overlapping patches of a mel spectrogram, ViT-B",
    ),
    Component(
        kind="modality_encoder",
        name="imagebind-depth",
        ref=f"{_ENCODERS}:MapConfig",
        preset={"modality": "depth", "width": 384, "depth": 12, "heads": 8, "ffn": 1536},
        summary="ImageBind's depth encoder, ViT-S/16 on disparity",
    ),
    Component(
        kind="modality_encoder",
        name="imagebind-thermal",
        ref=f"{_ENCODERS}:MapConfig",
        preset={"modality": "thermal"},
        summary="ImageBind's thermal encoder, ViT-B/16",
    ),
    Component(
        kind="modality_encoder",
        name="imagebind-imu",
        ref=f"{_ENCODERS}:IMUConfig",
        summary="ImageBind's motion encoder: five seconds of acceleration and rotation, 6 layers",
    ),
    Component(
        kind="wiring",
        name="bind",
        ref="zoo_modalities.imagebind.bind:BindConfig",
        summary="images, text and any further modalities in one space, the image as the hub",
    ),
    Component(
        kind="objective",
        name="bind-contrastive",
        ref="zoo_modalities.imagebind.objective:BindContrastiveConfig",
        summary="contrast of every modality with images, and of no other pair",
    ),
    Component(
        kind="data",
        name="openmoji-modalities",
        ref="zoo_modalities.data.icons:ModalitiesConfig",
        summary="icons and names with derived views: spoken names, depth, thermal, clips, motion (simulated)",
    ),
    Component(
        kind="task",
        name="emergent-retrieval",
        ref="zoo_modalities.evaluation.emergent:EmergentRetrievalConfig",
        summary="retrieval between modalities that were bound to images only, never to each other",
    ),
    Component(
        kind="task",
        name="emergent-classification",
        ref="zoo_modalities.evaluation.emergent:EmergentClassificationConfig",
        summary="items of any modality classified by the texts of classes",
    ),
    *(
        Component(
            kind="checkpoint",
            name=name,
            ref="zoo_modalities.imagebind.weights:from_state",
            summary="the release's imagebind_huge.pth, by its own keys",
        )
        for name in ("imagebind", "imagebind-huge")
    ),
)
