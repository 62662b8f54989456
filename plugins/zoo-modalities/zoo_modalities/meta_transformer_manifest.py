"""What Meta-Transformer adds: twelve tokenizers, the shared encoder's sizes, the wiring, losses, a task, and data."""

from __future__ import annotations

from zoo.registry import Component

PACKAGE = "zoo_modalities.meta_transformer"
VIT = "zoo.encoders.vit:ViTConfig"

_TOKENIZERS = (
    ("image", "images:ImageTokensConfig", "patches of an image"),
    ("text", "images:TextTokensConfig", "words of a text, by a table"),
    ("point-cloud", "points:PointTokensConfig", "groups of neighbours in a cloud of points"),
    ("audio", "sequences:AudioTokensConfig", "overlapping patches of a log mel spectrogram"),
    ("video", "images:VideoTokensConfig", "boxes of space and time in a clip"),
    ("infrared", "images:InfraredTokensConfig", "patches of an infrared picture"),
    ("hyperspectral", "sequences:HyperspectralTokensConfig", "bands of a hyper-spectral pixel"),
    ("x-ray", "images:XRayTokensConfig", "patches of an X-ray picture"),
    ("time-series", "sequences:SeriesTokensConfig", "steps of a time series"),
    ("tabular", "sequences:TabularTokensConfig", "columns of a row of a table"),
    ("imu", "sequences:IMUTokensConfig", "windows of a motion sensor's recording"),
    ("graph", "graphs:GraphTokensConfig", "nodes and edges of a graph"),
)
_B16 = {"width": 768, "depth": 12, "heads": 12, "ffn": 3072, "patch_size": 16, "eps": 1e-5}
_L14 = {"width": 1024, "depth": 24, "heads": 16, "ffn": 4096, "patch_size": 14, "eps": 1e-5}

META_TRANSFORMER: tuple[Component, ...] = (
    *(
        Component(kind="data_tokenizer", name=name, ref=f"{PACKAGE}.{ref}", summary=summary)
        for name, ref, summary in _TOKENIZERS
    ),
    Component(
        kind="data_tokenizer",
        name="image-14",
        ref=f"{PACKAGE}.images:ImageTokensConfig",
        preset={"patch_size": 14},
        summary="patches of 14 pixels of an image",
    ),
    Component(
        kind="encoder", name="meta-transformer-b16", ref=VIT, preset=_B16, summary="the shared encoder, ViT-B/16"
    ),
    Component(
        kind="encoder", name="meta-transformer-l14", ref=VIT, preset=_L14, summary="the shared encoder, ViT-L/14"
    ),
    Component(
        kind="wiring",
        name="meta-transformer",
        ref=f"{PACKAGE}.model:MetaTransformerConfig",
        summary="a tokenizer of any modality, a shared transformer and a head",
    ),
    Component(
        kind="objective",
        name="regression",
        ref=f"{PACKAGE}.objectives:RegressionConfig",
        summary="squared or absolute distance of values",
    ),
    Component(
        kind="objective",
        name="element-labels",
        ref=f"{PACKAGE}.objectives:ElementLabelsConfig",
        summary="cross-entropy over the labels of an item's elements",
    ),
    *(
        Component(
            kind="checkpoint",
            name=name,
            ref=f"{PACKAGE}.checkpoint:from_state",
            summary="the released encoder file",
        )
        for name in ("meta-transformer", "meta-transformer-l14")
    ),
    Component(
        kind="task",
        name="modality-classification",
        ref=f"{PACKAGE}.task:ModalityClassificationConfig",
        summary="accuracy over labels of any modality, beside that of always naming the most frequent one",
    ),
    Component(
        kind="data",
        name="digits",
        ref="zoo_modalities.data.real:DigitsConfig",
        summary="handwritten digits of 8 x 8 pixels (scikit-learn, real)",
    ),
    *(
        Component(
            kind="data",
            name=name,
            ref="zoo_modalities.data.real:TableConfig",
            preset={"table": name},
            summary=summary,
        )
        for name, summary in (
            ("breast-cancer", "tumours by 30 measurements, malignant or benign (scikit-learn, real)"),
            ("wine", "wines by 13 measurements, three growers (scikit-learn, real)"),
            ("iris", "irises by 4 measurements, three species (scikit-learn, real)"),
        )
    ),
    Component(
        kind="data",
        name="icon-points",
        ref="zoo_modalities.data.lifted:IconPointsConfig",
        summary="point clouds of icons lifted out of the plane (simulated)",
    ),
    Component(
        kind="data",
        name="motions",
        ref="zoo_modalities.data.motions:MotionsConfig",
        summary="icons that move in one of five ways, as clips or as a sensor measures it (simulated)",
    ),
    *(
        Component(kind="data", name=name, ref=f"zoo_modalities.data.simulated:{ref}", summary=summary)
        for name, ref, summary in (
            ("spoken-digits", "SpokenDigitsConfig", "ten words said by a synthesizer, in noise (simulated)"),
            ("materials", "MaterialsConfig", "hyper-spectral pixels of six materials (simulated)"),
            ("xray-objects", "XRayConfig", "X-ray pictures of a chest, clear or with a shadow (simulated)"),
            ("infrared-objects", "InfraredConfig", "infrared pictures of warm bodies (simulated)"),
            ("processes", "ProcessesConfig", "time series of six processes (simulated)"),
            ("graph-families", "GraphsConfig", "graphs of six families (simulated)"),
            ("sentences", "SentencesConfig", "short sentences of praise or complaint (simulated)"),
        )
    ),
)
