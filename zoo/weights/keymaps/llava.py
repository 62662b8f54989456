"""LLaVA: the released code's names, those of llava-hf's hub files, and those of transformers 5, to a bridge's.

The image tower keeps open_clip's names and the language model its own, so only prefixes and the projector move.
"""

from __future__ import annotations

from zoo.weights.keymaps import KeyMap, drop, rename
from zoo.weights.keymaps import clip as clip_maps

TOWERS = (
    "model.vision_tower.vision_tower.vision_model.",  # haotian-liu/LLaVA
    "vision_tower.vision_model.",  # llava-hf on the hub
    "model.vision_tower.vision_model.",
    "model.vision_tower.",  # transformers 5
    "vision_tower.",
)
"""Prefixes of the image tower, longest first where one begins another."""


def tower(kept: int, depth: int) -> KeyMap:
    """The image tower; blocks from ``kept`` to ``depth`` and the pooled token's norm, which nothing reads, are
    dropped.
    """
    out = KeyMap()
    for prefix in TOWERS:
        unread = [drop(f"{prefix}encoder.layers.{i}.{{**}}") for i in range(kept, depth)]
        out += KeyMap(*unread, drop(f"{prefix}post_layernorm.{{p}}")) + clip_maps.vision(prefix)
    return out


PROJECTOR = KeyMap(
    rename("multi_modal_projector.linear_1.{p}", "connector.proj.0.{p}"),
    rename("multi_modal_projector.linear_2.{p}", "connector.proj.2.{p}"),
    rename("model.multi_modal_projector.linear_1.{p}", "connector.proj.0.{p}"),
    rename("model.multi_modal_projector.linear_2.{p}", "connector.proj.2.{p}"),
    rename("model.mm_projector.{i}.{p}", "connector.proj.{i}.{p}"),
    rename("model.mm_projector.{p}", "connector.proj.{p}"),
)

LANGUAGE = KeyMap(
    drop("{**}rotary_emb.inv_freq"),
    rename("language_model.model.{**}", "decoder.lm.model.{**}"),
    rename("language_model.lm_head.weight", "decoder.lm.lm_head.weight"),
    rename("model.language_model.{**}", "decoder.lm.model.{**}"),
    rename("lm_head.weight", "decoder.lm.lm_head.weight"),
    rename("model.embed_tokens.weight", "decoder.lm.model.embed_tokens.weight"),
    rename("model.layers.{**}", "decoder.lm.model.layers.{**}"),
    rename("model.norm.weight", "decoder.lm.model.norm.weight"),
)


def keymap(kept: int, depth: int) -> KeyMap:
    """The map of a whole checkpoint.

    Args:
        kept: Blocks of the image tower that are built.
        depth: Blocks the checkpoint has.
    """
    return tower(kept, depth) + PROJECTOR + LANGUAGE
