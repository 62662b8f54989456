"""VisualGLM checkpoints as recipes: folders and files in the names of the hub or of SwissArmyTransformer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoo.errors import WeightsError
from zoo.recipe import Recipe, resolve
from zoo.weights.formats import Official
from zoo.weights.keymaps import visualglm as maps

VISION: dict[str, Any] = {"hidden_size": 1408, "inner_hidden_size": 6144, "num_layers": 39, "num_attention_heads": 16}
VISION |= {"image_size": [224, 224], "patch_size": 14, "layernorm_epsilon": 1e-6}
QFORMER: dict[str, Any] = {"hidden_size": 768, "num_layers": 12, "num_attention_heads": 12, "layernorm_epsilon": 1e-12}
TEXT: dict[str, Any] = {"hidden_size": 4096, "inner_hidden_size": 16384, "num_layers": 28, "num_attention_heads": 32}
TEXT |= {"vocab_size": 130528, "max_sequence_length": 2048, "layernorm_epsilon": 1e-5}
"""What the released configurations say."""


def from_transformers(config: Mapping[str, Any], folder: Path) -> Official:
    """A folder of the hub's ``ChatGLMForConditionalGenerationWithImage``; its code is not run.

    Raises:
        WeightsError: ChatGLM without an image encoder, without its two position streams, or an oblong image.
    """
    if "eva_config" not in config and "image_length" not in config:
        raise WeightsError("config.json: a ChatGLM without eva_config sees no images; the zoo reads visualglm-6b")
    if not config.get("position_encoding_2d", True):
        raise WeightsError("config.json: position_encoding_2d = false; the zoo's ChatGLM has two position streams")
    vision, text = {**VISION, **(config.get("eva_config") or {})}, {**TEXT, **config}
    bert = {**QFORMER, **(config.get("qformer_config") or {})}
    size = vision["image_size"]
    if isinstance(size, list) and len(set(size)) != 1:
        raise WeightsError(f"config.json: eva_config.image_size = {size}; expected a square")
    values: dict[str, dict[str, Any]] = {
        "encoder": {
            "image_size": int(size[0] if isinstance(size, list) else size),
            "patch_size": int(vision["patch_size"]),
            "width": int(vision["hidden_size"]),
            "depth": int(vision["num_layers"]),
            "heads": int(vision["num_attention_heads"]),
            "ffn": int(vision["inner_hidden_size"]),
            "eps": float(vision["layernorm_epsilon"]),
        },
        "connector": {
            "queries": int(config.get("image_length", 32)),
            "width": int(bert["hidden_size"]),
            "depth": int(bert["num_layers"]),
            "heads": int(bert["num_attention_heads"]),
            "ffn": int(bert.get("inner_hidden_size") or 4 * int(bert["hidden_size"])),
            "eps": float(bert["layernorm_epsilon"]),
        },
        "decoder": {
            "width": int(text["hidden_size"]),
            "depth": int(text["num_layers"]),
            "heads": int(text["num_attention_heads"]),
            "ffn": int(text["inner_hidden_size"]),
            "vocab_size": int(text["vocab_size"]),
            "context_length": int(text["max_sequence_length"]),
            "eps": float(text["layernorm_epsilon"]),
            "sop_id": int(config.get("bos_token_id", 130004)),
        },
    }
    if (folder / "tokenizer.json").is_file():
        values["decoder"]["tokenizer"] = f"hf:{folder}"
    recipe = resolve("visualglm-6b", values=values)
    return Official(recipe=recipe, keymap=_map(recipe, sat=False), form="VisualGLM of the hub")


def from_state(recipe: Recipe, state: Mapping[str, Any]) -> Official | None:
    """A bare file in the names of the hub or of SwissArmyTransformer; None for the zoo's own names.

    A file of ChatGLM-6B alone leaves encoder and connector new.
    """
    if any(name.startswith(("encoder.", "connector.", "decoder.")) for name in state):
        return None
    sat = any(name.startswith("mixins.") for name in state)
    keymap = _map(recipe, sat=sat)
    held = {name.split(".")[0] for name in keymap.load(state)[0]}
    new = [f"{slot}.{{**}}" for slot in ("encoder", "connector") if slot not in held]
    form = "VisualGLM of SwissArmyTransformer" if sat else "VisualGLM of the hub"
    return Official(recipe=recipe, keymap=keymap, form=form, new=tuple(new))


def _map(recipe: Recipe, *, sat: bool) -> Any:
    decoder: Any = recipe.parts["decoder"][1]
    connector: Any = recipe.parts["connector"][1]
    return maps.keymap(decoder.heads, connector.depth, sat=sat)
