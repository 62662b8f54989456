"""LISA (model/LISA.py of the release): LLaVA with a segmentation token; SAM stays outside the trunk."""

from __future__ import annotations

from zoo.weights.keymaps import KeyMap, clip_trunk, llama, rename

SAM = ("model.visual_model.{**}",)
"""Names of the SAM that a checkpoint carries."""

HIDDEN = KeyMap(rename("model.text_hidden_fcs.0.{i}.{p}", "text_hidden.{i}.{p}"))
"""What turns the state before a segmentation token into a prompt: Linear, ReLU, Linear."""


def keymap() -> KeyMap:
    """Return the map to parts ``stem``, ``vit``, ``projector``, ``embed``, ``trunk``, ``head``, ``text_hidden``.

    Official checkpoints leave the CLIP tower out; it is then loaded from CLIP's own.
    """
    return (
        clip_trunk.keymap("vit.", "stem.").under("model.vision_tower.vision_tower.vision_model.")
        + llama.keymap()
        + HIDDEN
        + KeyMap(rename("model.mm_projector.{p}", "projector.{p}"))
    )
