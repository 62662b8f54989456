"""Components of BLIP-2's first stage in the zoo's own manifest (``zoo.builtin``). Data only."""

from __future__ import annotations

from zoo.registry import Component

BLIP2 = (
    Component(
        kind="wiring",
        name="querying",
        ref="zoo.models.querying:QueryingConfig",
        summary="image encoder and a Q-Former that compares, matches and writes (BLIP-2, stage 1)",
    ),
    Component(
        kind="wiring",
        name="bridge-staged",
        ref="zoo.models.staged_bridge:StagedBridgeConfig",
        summary="bridge whose Q-Former has the heads of stage 1 too: both stages of BLIP-2 in one run",
    ),
    Component(
        kind="objective",
        name="grounded-text",
        ref="zoo.objectives.next_token:NextTokenConfig",
        preset={"part": "writer"},
        summary="cross-entropy of the caption that the Q-Former writes from its queries (BLIP-2)",
    ),
)
