"""An example plugin: one connector (``gated-mlp``) and one recipe (``llava-gated``). Nothing heavy is imported here."""

from __future__ import annotations

from zoo.plugin import Plugin
from zoo.registry import Component

PLUGIN = Plugin(
    name="zoo-example",
    components=(
        Component(
            kind="connector",
            name="gated-mlp",
            ref="zoo_example.gated_mlp:GatedMLPConfig",
            summary="layer norm and a SwiGLU projector, one token in, one out",
        ),
    ),
    conf="pkg://zoo_example/conf",
)
