"""CLIP checkpoints of transformers and open_clip as recipes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoo.errors import WeightsError
from zoo.recipe import Recipe, resolve
from zoo.weights.files import read_json
from zoo.weights.formats import Official
from zoo.weights.keymaps import KeyMap
from zoo.weights.keymaps import clip as maps

ACTIVATIONS = {"quick_gelu": True, "gelu": False}
RECIPES = {
    ("clip", 768, 12, 32, 224), ("clip-vit-b-16", 768, 12, 16, 224),
    ("clip-vit-l-14", 1024, 24, 14, 224), ("clip-vit-l-14-336", 1024, 24, 14, 336),
}  # fmt: skip
"""(recipe, width, depth, patch_size, image_size) of the published vision transformers."""

RESNETS = {
    (3, 4, 6, 3): "clip-rn50", (3, 4, 23, 3): "clip-rn101", (4, 6, 10, 6): "clip-rn50x4",
    (6, 8, 18, 8): "clip-rn50x16", (3, 15, 36, 10): "clip-rn50x64",
}  # fmt: skip
"""Bottlenecks a stage -> recipe."""

LEGACY_EOS = 2
"""``eos_token_id`` of hub configurations from before transformers pooled by it; they pool at the largest id."""


def vision_fields(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Fields of ``OpenCLIPViTConfig`` for the ``vision_config`` of a transformers ``config.json``.

    Keys that ``config.json`` leaves out have ``CLIPVisionConfig``'s defaults. Mean, deviation and resizing come from
    ``preprocessor_config.json`` where there is one.

    Raises:
        WeightsError: An activation open_clip's tower does not have, or other than three channels.
    """
    width = int(config.get("hidden_size", 768))
    if int(config.get("num_channels", 3)) != 3:
        raise WeightsError(f"config.json: num_channels = {config['num_channels']}; the zoo's image encoders read 3")
    return {
        "image_size": _side(config.get("image_size", 224)),
        "patch_size": _side(config.get("patch_size", 32)),
        "width": width,
        "depth": int(config.get("num_hidden_layers", 12)),
        "heads": int(config.get("num_attention_heads", 12)),
        "ffn": int(config.get("intermediate_size", 3072)),
        "quick_gelu": _quick_gelu(config),
        "eps": float(config.get("layer_norm_eps", 1e-5)),
        **_preprocessing(folder),
    }


def from_transformers(config: Mapping[str, Any], folder: Path) -> Official:
    """A folder of ``CLIPModel``.

    Raises:
        WeightsError: Something in the configuration that the zoo's towers do not have.
    """
    vision = vision_fields(_section(config, "vision"), folder)
    text = text_fields(_section(config, "text"))
    if any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        text["tokenizer"] = f"hf:{folder}"
    shared = int(config.get("projection_dim", 512))
    return Official(
        recipe=_recipe(vision, text, shared),
        keymap=maps.TRANSFORMERS,
        form="transformers clip",
    )


def text_fields(section: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of ``OpenCLIPTextConfig`` for the ``text_config`` of a transformers ``config.json``, or for that of a
    ``CLIPTextModel``; what it leaves out has ``CLIPTextConfig``'s defaults.

    Raises:
        WeightsError: An activation open_clip's tower does not have.
    """
    vocabulary = int(section.get("vocab_size", 49408))
    return {
        "vocab_size": vocabulary,
        "context_length": int(section.get("max_position_embeddings", 77)),
        "width": int(section.get("hidden_size", 512)),
        "depth": int(section.get("num_hidden_layers", 12)),
        "heads": int(section.get("num_attention_heads", 8)),
        "ffn": int(section.get("intermediate_size", 2048)),
        "quick_gelu": _quick_gelu(section),
        "eps": float(section.get("layer_norm_eps", 1e-5)),
        **_pooling(section.get("eos_token_id", 49407), vocabulary),
    }


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    # old hub files wrote the values twice, and transformers lets those of *_config_dict win
    return {**(config.get(f"{name}_config") or {}), **(config.get(f"{name}_config_dict") or {})}


def _pooling(eos: Any, vocab_size: int) -> dict[str, Any]:
    if not isinstance(eos, int):
        raise WeightsError(f"config.json: eos_token_id = {eos!r}; expected one number")
    if eos == LEGACY_EOS:  # CLIP's own end is the largest id; in any other vocabulary only the rule itself is the rule
        return {} if vocab_size == 49408 else {"pooling": "argmax"}
    return {"eos_id": eos}


def from_open_clip(folder: Path) -> Official:
    """A folder or hub repository of open_clip (``open_clip_config.json``).

    Raises:
        WeightsError: A tower open_clip builds from other classes, or an option the zoo's towers do not have.
    """
    about = read_json(folder / "open_clip_config.json")
    config, preprocess = about.get("model_cfg") or {}, about.get("preprocess_cfg") or {}
    if "multimodal_cfg" in config:  # CoCa, which open_clip keeps in the same kind of folder
        from zoo.weights.formats import coca

        return coca.from_open_clip(about, folder)
    vision, text = dict(config.get("vision_cfg") or {}), dict(config.get("text_cfg") or {})
    quick_gelu, shared = bool(config.get("quick_gelu", False)), int(config["embed_dim"])
    for key in (*(f"vision_cfg.{k}" for k in set(vision) - VISION), *(f"text_cfg.{k}" for k in set(text) - TEXT)):
        raise WeightsError(
            f"open_clip_config.json of {str(folder)!r} sets {key}, which the zoo's CLIP towers do not have"
        )
    width, layers = int(vision.get("width", 768)), vision.get("layers", 12)
    image: dict[str, Any] = {"image_size": _side(vision.get("image_size", 224))}
    image |= {k: [float(v) for v in preprocess[k]] for k in ("mean", "std") if k in preprocess}
    if isinstance(layers, list):
        image |= {"blocks": layers, "stem_width": width, "embed_width": shared}
    else:
        image |= {
            "patch_size": _side(vision.get("patch_size", 16)),
            "width": width,
            "depth": int(layers),
            "heads": width // int(vision.get("head_width", 64)),
            "ffn": int(width * float(vision.get("mlp_ratio", 4.0))),
            "quick_gelu": quick_gelu,
        }
    text_width = int(text.get("width", 512))
    words: dict[str, Any] = {
        "vocab_size": int(text.get("vocab_size", 49408)),
        "context_length": int(text.get("context_length", 77)),
        "width": text_width,
        "depth": int(text.get("layers", 12)),
        "heads": int(text.get("heads", 8)),
        "ffn": int(text_width * float(text.get("mlp_ratio", 4.0))),
        "quick_gelu": quick_gelu,
    }
    if words["vocab_size"] != 49408:
        words["pooling"] = "argmax"
    return Official(recipe=_recipe(image, words, shared), keymap=maps.OPEN_CLIP, form="open_clip")


VISION = {"image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio"}
TEXT = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}


def from_state(recipe: Recipe, state: Mapping[str, Any]) -> Official:
    """A bare file of a CLIP recipe, in open_clip's, transformers' or the zoo's own names."""
    if any(name.startswith("vision_model.") for name in state):
        return Official(recipe=recipe, keymap=maps.TRANSFORMERS, form="transformers clip")
    if any(name.startswith("visual.") for name in state):
        return Official(recipe=recipe, keymap=maps.OPEN_CLIP, form="open_clip")
    return Official(recipe=recipe, keymap=KeyMap(), form="zoo")


def _recipe(vision: dict[str, Any], text: dict[str, Any], shared: int) -> Recipe:
    if "blocks" in vision:
        model = RESNETS.get(tuple(vision["blocks"]), "clip-rn50")
        return resolve(model, values={"encoder": vision, "text_encoder": text})
    size = tuple(vision[k] for k in ("width", "depth", "patch_size", "image_size"))
    model = next((name for name, *known in RECIPES if tuple(known) == size), "clip")
    values: dict[str, Any] = {"encoder": vision, "text_encoder": text}
    if shared != text["width"]:
        values["wiring"] = {"shared_width": shared}
    return resolve(model, values=values)


def _quick_gelu(config: Mapping[str, Any]) -> bool:
    act = config.get("hidden_act", "quick_gelu")
    if act not in ACTIVATIONS:
        raise WeightsError(f"config.json: hidden_act = {act!r}; the zoo's CLIP towers know {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[act]


def _side(size: Any) -> int:
    if isinstance(size, list | tuple) and len(set(size)) == 1:
        size = size[0]
    if not isinstance(size, int):
        raise WeightsError(f"config.json: {size!r} is no side of a square")
    return size


def _preprocessing(folder: Path) -> dict[str, Any]:
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return {}
    config = read_json(path)
    config = config.get("image_processor", config)
    fields: dict[str, Any] = {}
    for key, name in (("mean", "image_mean"), ("std", "image_std")):
        if isinstance(config.get(name), list):
            fields[key] = [float(v) for v in config[name]]
    size = config.get("size")
    if isinstance(size, dict) and "height" in size and not config.get("do_center_crop", False):
        fields["resize"] = "squash"
    return fields
