"""Many modalities: ImageBind, Meta-Transformer, and data of each modality. Nothing heavy is imported here."""

from __future__ import annotations

from zoo.plugin import Plugin
from zoo_modalities.imagebind_manifest import IMAGEBIND
from zoo_modalities.meta_transformer_manifest import META_TRANSFORMER

PLUGIN = Plugin(
    name="zoo-modalities",
    components=(*IMAGEBIND, *META_TRANSFORMER),
    conf="pkg://zoo_modalities/conf",
)
