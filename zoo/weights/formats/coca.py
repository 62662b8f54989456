"""CoCa checkpoints of open_clip as recipes: folders and bare state dicts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoo.errors import WeightsError
from zoo.recipe import Recipe, resolve
from zoo.weights.formats import Official
from zoo.weights.keymaps import KeyMap
from zoo.weights.keymaps import coca as maps

PUBLISHED = {(1024, 24, 14): "coca-vit-l-14"}
"""Width, depth and patch size of the image tower -> recipe; ``coca`` otherwise."""

KNOWN: dict[str, set[str]] = {
    "vision_cfg": {
        "image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio", "attentional_pool",
        "attn_pooler_queries", "attn_pooler_heads", "output_tokens",
    },
    "text_cfg": {
        "context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "embed_cls", "output_tokens",
        "correct_cls_mask", "pad_id",
    },
    # open_clip's decoder asks for width, heads and layers only
    "multimodal_cfg": {
        "context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "dim_head", "n_queries",
        "attn_pooler_heads",
    },
}  # fmt: skip
"""Keys of a model configuration that the zoo's CoCa has."""


def from_open_clip(about: Mapping[str, Any], folder: Path) -> Official:
    """A folder or hub repository of open_clip whose ``model_cfg`` has a ``multimodal_cfg``.

    Raises:
        WeightsError: An option the zoo's CoCa does not have, or halves that do not fit each other.
    """
    config, preprocess = dict(about["model_cfg"]), about.get("preprocess_cfg") or {}
    vision, text, decoder = (dict(config.get(name) or {}) for name in KNOWN)
    for name, section in zip(KNOWN, (vision, text, decoder), strict=True):
        for key in sorted(set(section) - KNOWN[name]):
            raise WeightsError(
                f"open_clip_config.json of {str(folder)!r} sets {name}.{key}, which the zoo's CoCa does not have"
            )
    if vision.get("attentional_pool") is not True:
        raise WeightsError(
            f"open_clip_config.json of {str(folder)!r}: vision_cfg.attentional_pool ="
            f" {vision.get('attentional_pool')!r}; the zoo reads CoCa with one attentional pooler, true"
        )
    if not text.get("embed_cls"):
        raise WeightsError(f"open_clip_config.json of {str(folder)!r}: the zoo reads CoCa with text_cfg.embed_cls true")
    act = "quick_gelu" if config.get("quick_gelu") else "gelu"
    shared, width, text_width = int(config["embed_dim"]), int(vision.get("width", 768)), int(text.get("width", 512))
    decoder_width = int(decoder.get("width", 512))
    if not shared == text_width == decoder_width:
        raise WeightsError(
            f"open_clip_config.json of {str(folder)!r}: embed_dim = {shared}, text_cfg.width = {text_width} and"
            f" multimodal_cfg.width = {decoder_width} must be equal"
        )
    words = {
        "vocab_size": int(text.get("vocab_size", 49408)),
        "context_length": int(text.get("context_length", 77)),
        "width": shared,
        "act": act,
    }
    values: dict[str, Any] = {
        "encoder": {
            "image_size": int(vision.get("image_size", 224)),
            "patch_size": int(vision.get("patch_size", 16)),
            "width": width,
            "depth": int(vision.get("layers", 12)),
            "heads": width // int(vision.get("head_width", 64)),
            "ffn": int(width * float(vision.get("mlp_ratio", 4.0))),
            "quick_gelu": act == "quick_gelu",
            **{key: [float(v) for v in preprocess[key]] for key in ("mean", "std") if key in preprocess},
        },
        "connector": {
            "queries": int(vision.get("attn_pooler_queries", 256)),
            "heads": int(vision.get("attn_pooler_heads", 8)),
        },
        "text_encoder": {
            **words,
            "depth": int(text.get("layers", 12)),
            "heads": int(text.get("heads", 8)),
            "ffn": int(shared * float(text.get("mlp_ratio", 4.0))),
            "pad_id": int(text.get("pad_id", 0)),
            "cls_mask": "corrected" if text.get("correct_cls_mask") else "legacy",
        },
        "decoder": {
            **words,
            "depth": int(decoder.get("layers", 12)),
            "heads": int(decoder.get("heads", 8)),
            "ffn": 4 * shared,
        },
    }
    encoder = values["encoder"]
    model = PUBLISHED.get((encoder["width"], encoder["depth"], encoder["patch_size"]), "coca")
    return _official(resolve(model, values=values))


def from_state(recipe: Recipe, state: Mapping[str, Any]) -> Official:
    """A bare file of a CoCa recipe in open_clip's names, whose class token was trained with the legacy mask, or in the
    zoo's."""
    if not any(name.startswith("visual.") for name in state):
        return Official(recipe=recipe, keymap=KeyMap(), form="zoo")
    return _official(recipe.with_(text_encoder={"cls_mask": "legacy"}))


def _official(recipe: Recipe) -> Official:
    encoder, decoder = recipe.parts["encoder"][1], recipe.parts["decoder"][1]
    fused = bool(getattr(encoder, "width", 0) == getattr(decoder, "width", -1))
    depth = int(getattr(decoder, "depth", 0))
    return Official(recipe=recipe, keymap=maps.keymap(depth, fused), form="open_clip coca")
