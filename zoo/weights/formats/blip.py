"""BLIP checkpoints as recipes: the official files (salesforce/BLIP) and transformers folders."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from zoo.errors import WeightsError
from zoo.recipe import Recipe, resolve
from zoo.weights.formats import Official
from zoo.weights.formats.clip import _preprocessing
from zoo.weights.keymaps import blip as maps

MAPS = {
    "med": maps.med_keymap,
    "fusion": maps.fusion_keymap,
    "writer": maps.writer_keymap,
    "answerer": maps.answerer_keymap,
    "comparer": maps.comparer_keymap,
}
"""Wiring -> the map of the official model it is."""

NEEDS = {
    "med": ("visual_encoder", "text_encoder", "text_decoder", "vision_proj", "text_proj", "itm_head"),
    "fusion": ("visual_encoder", "text_encoder", "vision_proj", "text_proj", "itm_head"),
    "writer": ("visual_encoder", "text_decoder"),
    "answerer": ("visual_encoder", "text_encoder", "text_decoder"),
    "comparer": ("visual_encoder", "text_encoder", "cls_head"),
}
"""Wiring -> what of the official model it is made of; fine-tuning starts from files that hold more."""

LEFT = {
    "med": (),
    "fusion": ("text_decoder.{**}",),
    "writer": ("text_encoder.{**}", "vision_proj.{p}", "text_proj.{p}", "itm_head.{p}", "temp"),
    "answerer": ("vision_proj.{p}", "text_proj.{p}", "itm_head.{p}", "temp"),
    "comparer": (),
}
STATE = ("image_queue", "text_queue", "queue_ptr", "ptr_queue", "idx_queue")

FILES = {
    "med": "blip",
    "fusion": "blip-retrieval",
    "writer": "blip-caption",
    "answerer": "blip-vqa",
    "comparer": "blip-nlvr",
}

CLASSES = {
    "BlipForConditionalGeneration": "writer",
    "BlipForQuestionAnswering": "answerer",
    "BlipForImageTextRetrieval": "fusion",
}
"""transformers class -> wiring."""

VISION: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
VISION |= {"image_size": 384, "patch_size": 16, "layer_norm_eps": 1e-5}
TEXT: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
}
TEXT |= {"vocab_size": 30524, "max_position_embeddings": 512, "layer_norm_eps": 1e-12, "hidden_dropout_prob": 0.0}
"""Defaults of transformers' ``BlipVisionConfig`` and ``BlipTextConfig``, which a ``config.json`` may leave out."""


def from_transformers(config: Mapping[str, Any], folder: Path) -> Official:
    """A folder of ``BlipForConditionalGeneration``, ``BlipForQuestionAnswering`` or ``BlipForImageTextRetrieval``.

    Raises:
        WeightsError: Another class, or a configuration the zoo's parts cannot follow.
    """
    named = [str(name) for name in config.get("architectures") or []]
    wiring = next((CLASSES[name] for name in named if name in CLASSES), None)
    if wiring is None:
        raise WeightsError(f"config.json: architectures = {named}: the zoo reads BLIP folders of {', '.join(CLASSES)}")
    vision = {**VISION, **(config.get("vision_config") or {})}
    text = {**TEXT, **(config.get("text_config") or {})}
    for section, name in ((vision, "vision_config"), (text, "text_config")):
        if section.get("hidden_act", "gelu") != "gelu":
            raise WeightsError(f"config.json: {name}.hidden_act = {section['hidden_act']!r}; expected gelu")
    told = text.get("encoder_hidden_size", 768)
    if wiring == "answerer" and text["hidden_size"] != told:
        raise WeightsError(
            f"config.json: text_config.encoder_hidden_size = {told}, but answers read states of width"
            f" {text['hidden_size']}: expected them equal"
        )
    if told != vision["hidden_size"]:
        raise WeightsError(
            f"config.json: text_config.encoder_hidden_size = {told}, but the image encoder's width is"
            f" {vision['hidden_size']}"
        )
    eps = float(text["layer_norm_eps"])
    words: dict[str, Any] = {
        "width": int(text["hidden_size"]),
        "depth": int(text["num_hidden_layers"]),
        "heads": int(text["num_attention_heads"]),
        "ffn": int(text["intermediate_size"]),
        "vocab_size": int(text["vocab_size"]),
        "context_length": int(text["max_position_embeddings"]),
        "dropout": float(text["hidden_dropout_prob"]),
        "eps": eps,
    }
    if any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        words["tokenizer"] = f"hf:{folder}"
    image_size = vision["image_size"]
    encoder = {
        "image_size": int(image_size if isinstance(image_size, int) else image_size[0]),
        "patch_size": int(vision["patch_size"]),
        "width": int(vision["hidden_size"]),
        "depth": int(vision["num_hidden_layers"]),
        "heads": int(vision["num_attention_heads"]),
        "ffn": int(vision["intermediate_size"]),
        "eps": float(vision["layer_norm_eps"]),
        "resize": "squash",
        **_preprocessing(folder),
    }
    values: dict[str, Any] = {"encoder": encoder}
    if wiring != "writer":
        values["text_encoder"] = words
    if wiring != "fusion":
        values["decoder"] = words
        smoothing = float(text.get("label_smoothing", 0.0))
        values["objective"] = {"next-token" if wiring == "writer" else "answers": {"label_smoothing": smoothing}}
    else:
        values["wiring"] = {"embed_width": int(config.get("image_text_hidden_size", 256))}
    recipe = resolve(_published(wiring, encoder["width"]), values=values)
    keymap = maps.transformers(MAPS[wiring]())
    return Official(recipe=recipe, keymap=keymap, form="transformers blip", new=("temperature",))


def from_state(recipe: Recipe, state: Mapping[str, Tensor]) -> Official | None:
    """A bare file of the released code, of a BLIP recipe; None for other names.

    Sizes are read from the tensors; the number of heads is one for every 64 of a width in every published size, and
    must be said for others. A file that holds more than the recipe has, such as the pre-trained model for a captioner,
    leaves the rest.

    Raises:
        WeightsError: A file of another BLIP than the recipe's, or a part is missing.
    """
    if "visual_encoder.pos_embed" not in state:
        return None
    wiring = recipe.wiring[0]
    held = {name.split(".")[0] for name in state}
    lacking = [part for part in NEEDS[wiring] if part not in held]
    if lacking:
        fits = [FILES[w] for w, parts in NEEDS.items() if set(parts) <= held]
        raise WeightsError(
            f"the file holds no {lacking[0]}, which {recipe.model} has: load it with model={' or '.join(fits) or '...'}"
        )
    values = sizes(state, wiring)
    named = _published(wiring, values["encoder"]["width"])
    if named != recipe.model and values["encoder"]["width"] in (768, 1024):
        raise WeightsError(
            f"the file's image encoder is {values['encoder']['width']} wide, which is not {recipe.model}'s: load it"
            f" with model={named!r}"
        )
    unknown = tuple(f"{slot}.heads" for slot, fields in values.items() if fields.get("width", 64) % 64)
    return Official(
        recipe=resolve(recipe.model, values=values),
        keymap=MAPS[wiring](),
        form="BLIP",
        ignored=(*LEFT[wiring], *maps.MOMENTUM, *STATE),
        unknown=unknown,
    )


def sizes(state: Mapping[str, Tensor], wiring: str) -> dict[str, Any]:
    """Fields of the parts and of the wiring that the tensors tell.

    Raises:
        WeightsError: A tensor that every BLIP has is missing, or the positions are of no square image.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in state:
            raise WeightsError(f"the file has a BLIP's image encoder but no {name}: is it whole?")
        return tuple(state[name].shape)

    def layers(prefix: str) -> int:
        return 1 + max((int(n.removeprefix(prefix).split(".")[0]) for n in state if n.startswith(prefix)), default=-1)

    width, _, patch, _ = shape("visual_encoder.patch_embed.proj.weight")
    patches = shape("visual_encoder.pos_embed")[1] - 1
    side = math.isqrt(patches)
    if side**2 != patches:
        raise WeightsError(f"visual_encoder.pos_embed has {patches} patches, of no square image")
    values: dict[str, Any] = {
        "encoder": {
            "image_size": side * patch,
            "patch_size": patch,
            "width": width,
            "depth": layers("visual_encoder.blocks."),
            "heads": _heads(width),
            "ffn": shape("visual_encoder.blocks.0.mlp.fc1.weight")[0],
        }
    }
    for slot, prefix in (("text_encoder", "text_encoder."), ("decoder", "text_decoder.bert.")):
        if prefix.split(".")[0] not in NEEDS[wiring]:
            continue
        rows, inner = shape(f"{prefix}embeddings.word_embeddings.weight")
        values[slot] = {
            "vocab_size": rows,
            "context_length": shape(f"{prefix}embeddings.position_embeddings.weight")[0],
            "width": inner,
            "depth": layers(f"{prefix}encoder.layer."),
            "heads": _heads(inner),
            "ffn": shape(f"{prefix}encoder.layer.0.intermediate.dense.weight")[0],
        }
    if wiring == "comparer":
        depth = values["text_encoder"]["depth"]
        merge = "text_encoder.encoder.layer.{}.crossattention.output.merge_layer.weight"
        averaging = sum(merge.format(i) not in state for i in range(depth))
        values["text_encoder"]["average_share"] = averaging / depth
    if "vision_proj" in NEEDS[wiring]:
        values["wiring"] = {"embed_width": shape("vision_proj.weight")[0]}
    return values


def _heads(width: int) -> int:
    return width // 64 if width % 64 == 0 else 1


def _published(wiring: str, width: int) -> str:
    large = width == 1024 and wiring not in ("answerer", "comparer")
    return FILES[wiring] + ("-large" if large else "")
