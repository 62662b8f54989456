"""CogVLM checkpoints as recipes: folders and files in the names of the hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoo.errors import WeightsError
from zoo.recipe import Recipe, resolve
from zoo.weights.formats import Official
from zoo.weights.keymaps import cogvlm as maps

TEMPLATES = ("base", "chat", "vqa", "chat_old")
"""What ``template_version`` of a ``config.json`` may be."""

VISION: dict[str, Any] = {"hidden_size": 1792, "intermediate_size": 15360, "num_hidden_layers": 63, "num_heads": 16}
VISION |= {"image_size": 490, "patch_size": 14, "layer_norm_eps": 1e-6}
TEXT: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
TEXT |= {"vocab_size": 32000, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5}
"""Defaults of the hub's configuration classes, which a ``config.json`` may leave out."""


def from_transformers(config: Mapping[str, Any], folder: Path) -> Official:
    """A folder of the hub's ``CogVLMForCausalLM``; its code is not run.

    Raises:
        WeightsError: An activation or a template that CogVLM does not have.
    """
    vision, text = {**VISION, **(config.get("vision_config") or {})}, {**TEXT, **config}
    for section, name, act in ((vision, "vision_config.hidden_act", "gelu"), (text, "hidden_act", "silu")):
        if section.get("hidden_act", act) != act:
            raise WeightsError(f"config.json: {name} = {section['hidden_act']!r}; CogVLM has {act}")
    form = str(config.get("template_version", "chat"))
    if form not in TEMPLATES:
        raise WeightsError(f"config.json: template_version = {form!r}: expected one of {', '.join(TEMPLATES)}")
    size = int(vision["image_size"])
    encoder = {
        "image_size": size,
        "patch_size": int(vision["patch_size"]),
        "width": int(vision["hidden_size"]),
        "depth": int(vision["num_hidden_layers"]),
        "heads": int(vision.get("num_attention_heads", vision["num_heads"])),
        "ffn": int(vision["intermediate_size"]),
        "eps": float(vision["layer_norm_eps"]),
    }
    ffn = int(text["intermediate_size"])
    decoder: dict[str, Any] = {
        "width": int(text["hidden_size"]),
        "depth": int(text["num_hidden_layers"]),
        "heads": int(text["num_attention_heads"]),
        "ffn": ffn,
        "vocab_size": int(text["vocab_size"]),
        "context_length": int(text["max_position_embeddings"]),
        "eps": float(text["rms_norm_eps"]),
    }
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        decoder["tokenizer"] = f"hf:{folder}"
    values = {
        "encoder": encoder,
        "connector": {"ffn": ffn},
        "decoder": decoder,
        "wiring": {"template": f"cogvlm_{form}"},
    }
    model = "cogvlm-chat" if form != "base" else "cogvlm-base-490" if size == 490 else "cogvlm-base-224"
    return Official(recipe=resolve(model, values=values), keymap=maps.keymap(), form="CogVLM of the hub")


def from_state(recipe: Recipe, state: Mapping[str, Any]) -> Official | None:
    """A bare file in the hub's names; None for the zoo's own.

    Raises:
        WeightsError: SwissArmyTransformer's names.
    """
    if any(name.startswith(("encoder.", "connector.", "decoder.")) for name in state):
        return None
    if any(name.startswith(("mixins.", "transformer.")) for name in state):
        raise WeightsError(
            "this file has SwissArmyTransformer's names; the zoo reads the hub's: give the folder of cogvlm-chat-hf,"
            " cogvlm-base-224-hf or cogvlm-base-490-hf"
        )
    return Official(recipe=recipe, keymap=maps.keymap(), form="CogVLM of the hub")
