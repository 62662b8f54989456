"""Tasks that judge generated images, in the zoo's own manifest (``zoo.builtin``). Data only."""

from __future__ import annotations

from zoo.registry import Component

DRAWING = (
    Component(
        kind="task",
        name="text-to-image",
        ref="zoo.evaluation.text_to_image:TextToImageConfig",
        summary="images drawn from texts: an evaluator's score, rank of the text, distances to real images",
    ),
    Component(
        kind="task",
        name="illustrated-answers",
        ref="zoo.evaluation.illustrated:IllustratedConfig",
        summary="answers that hold a text and an image: how many do, and what text-to-image measures of the images",
    ),
    Component(
        kind="task",
        name="scene-check",
        ref="zoo.evaluation.scene_check:SceneCheckConfig",
        summary="share of a caption's objects, counts and positions that a drawn scene shows",
    ),
)
