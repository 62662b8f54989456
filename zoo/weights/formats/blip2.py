"""BLIP-2 checkpoints (OPT, stage 2) as recipes: transformers folders and LAVIS files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoo.errors import WeightsError
from zoo.recipe import Recipe, resolve
from zoo.weights.formats import Official
from zoo.weights.formats.clip import _preprocessing
from zoo.weights.formats.llava import decoder_fields
from zoo.weights.keymaps import blip2 as maps

PUBLISHED = {2560: "blip2-opt", 4096: "blip2-opt-6.7b"}
"""Width of the language model -> recipe."""

VISION = {"hidden_size": 1408, "intermediate_size": 6144, "num_hidden_layers": 39, "num_attention_heads": 16}
VISION |= {"image_size": 224, "patch_size": 14}
QFORMER = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
"""Defaults of transformers' ``Blip2VisionConfig`` and ``Blip2QFormerConfig``, which a ``config.json`` may leave out."""


def from_transformers(config: Mapping[str, Any], folder: Path) -> Official:
    """A folder of ``Blip2ForConditionalGeneration``; see ``blip2_t5`` for an encoder-decoder language model, and
    ``blip2_stage1`` for ``Blip2ForImageTextRetrieval``.

    Raises:
        WeightsError: A Q-Former with a text branch.
    """
    if "Blip2ForImageTextRetrieval" in (config.get("architectures") or []):
        from zoo.weights.formats import blip2_stage1

        return blip2_stage1.from_transformers(config, folder)
    text = config.get("text_config") or {"model_type": "opt"}
    if "t5" in str(text.get("model_type")):
        from zoo.weights.formats import blip2_t5

        return blip2_t5.from_transformers(config, folder)
    encoder, connector = tower_fields(config, folder)
    decoder = decoder_fields(text, folder)
    image_id = config.get("image_token_index", config.get("image_token_id"))
    values = {"encoder": encoder, "connector": connector, "decoder": decoder}
    if image_id is not None:
        values["wiring"] = {"image_id": int(image_id)}
    recipe = resolve(PUBLISHED.get(decoder["width"], "blip2-opt"), values=values)
    return Official(recipe=recipe, keymap=maps.HF, form="transformers blip-2")


def tower_fields(config: Mapping[str, Any], folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of encoder and connector for a ``config.json`` with ``vision_config`` and ``qformer_config``.

    Raises:
        WeightsError: What the zoo's EVA tower or Q-Former does not have.
    """
    vision = {**VISION, **(config.get("vision_config") or {})}
    bert = {**QFORMER, **(config.get("qformer_config") or {})}
    if bert.get("use_qformer_text_input"):
        raise WeightsError("config.json: use_qformer_text_input: the zoo reads Q-Formers without a text branch")
    for section, name in ((vision, "vision_config"), (bert, "qformer_config")):
        if section.get("hidden_act", "gelu") != "gelu":
            raise WeightsError(f"config.json: {name}.hidden_act = {section['hidden_act']!r}; expected gelu")
    if not vision.get("qkv_bias", True):
        raise WeightsError("config.json: vision_config.qkv_bias = false; the zoo's EVA tower has biases of q and v")
    eps = float(vision.get("layer_norm_eps", 1e-6))
    encoder = {
        "image_size": int(vision["image_size"]),
        "patch_size": int(vision["patch_size"]),
        "width": int(vision["hidden_size"]),
        "depth": int(vision["num_hidden_layers"]),
        "heads": int(vision["num_attention_heads"]),
        "ffn": int(vision["intermediate_size"]),
        "eps": eps,
        "resize": "squash",
        **_preprocessing(folder),
    }
    connector = {
        "queries": int(config.get("num_query_tokens", 32)),
        "width": int(bert["hidden_size"]),
        "depth": int(bert["num_hidden_layers"]),
        "heads": int(bert["num_attention_heads"]),
        "ffn": int(bert["intermediate_size"]),
        "cross_every": int(bert.get("cross_attention_frequency", 2)),
        "dropout": float(bert.get("hidden_dropout_prob", 0.1)),
        "eps": float(bert.get("layer_norm_eps", 1e-12)),
        "input_eps": eps,  # transformers gives LAVIS' ln_vision the tower's eps
    }
    return encoder, connector


def from_state(recipe: Recipe, state: Mapping[str, Any]) -> Official | None:
    """A bare LAVIS or transformers file of a BLIP-2 recipe; None for the zoo's own names.

    LAVIS' files of stage 2 hold what was trained; encoder and decoder are then new.
    """
    if any(name.startswith(("encoder.", "connector.", "decoder.")) for name in state):
        return None
    encoder: Any = recipe.parts["encoder"][1]
    theirs = not any(name.startswith(("Qformer.", "visual_encoder.")) for name in state)
    language = "t5" if recipe.wiring[0] == "bridge-seq2seq" else "opt"
    keymap = maps.HF if theirs else maps.lavis(encoder.depth, encoder.depth + 1, language)
    mapped, _ = keymap.load(state)
    held = {name.split(".")[0] for name in mapped}
    new = [f"{slot}.{{**}}" for slot in ("encoder", "decoder") if slot not in held]
    if "connector.proj.weight" not in mapped:  # a stage 1 file
        new.append("connector.proj.{p}")
    form = "transformers blip-2" if theirs else "LAVIS blip-2"
    return Official(recipe=recipe, keymap=keymap, form=form, ignored=maps.STAGE1, new=tuple(new))
