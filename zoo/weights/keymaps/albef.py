"""ALBEF (models/model_pretrain.py, model_vqa.py, xbert.py of the release): ViT, a BERT whose last layers read the
image, the answer decoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from zoo.nn.config import TrunkConfig
from zoo.weights.keymaps import KeyMap, bert, drop, rename, vit

MOMENTUM = (
    "visual_encoder_m.{**}",
    "text_encoder_m.{**}",
    "text_decoder_m.{**}",
    "vision_proj_m.{p}",
    "text_proj_m.{p}",
)
"""Names of the momentum copies; :func:`keymap` and :func:`vqa_keymap` with ``copy="_m"`` know them."""
STATE = KeyMap(drop("image_queue"), drop("text_queue"), drop("queue_ptr"))
"""Training state that no model needs."""


def keymap(copy: str = "") -> KeyMap:
    """Return the map of the pre-training model to parts ``stem``, ``vit``, ``embed``, ``text`` (text and fusion
    layers), ``lm``, ``vision_proj``, ``text_proj``, ``itm_head``, ``temp``.

    Args:
        copy: ``_m`` for the momentum copies, which have neither ``itm_head`` nor ``temp``.
    """
    shared = (
        vit.keymap("vit.", "stem.").under(f"visual_encoder{copy}.")
        + bert.lm_keymap("text.", "embed.", "lm.").under(f"text_encoder{copy}.")
        + KeyMap(*(rename(f"{name}{copy}.{{p}}", f"{name}.{{p}}") for name in ("vision_proj", "text_proj")))
    )
    if copy:
        return shared
    return shared + KeyMap(rename("itm_head.{p}", "itm_head.{p}"), rename("temp", "temp")) + STATE


def vqa_keymap(copy: str = "") -> KeyMap:
    """Return the map of the VQA model to ``stem``, ``vit``, ``embed``, ``text`` and the answer decoder ``decoder``,
    ``decoder_embed``, ``lm``. Its question encoder is a BERT without a head."""
    return (
        vit.keymap("vit.", "stem.").under(f"visual_encoder{copy}.")
        + bert.keymap("text.", "embed.").under(f"text_encoder{copy}.")
        + bert.lm_keymap("decoder.", "decoder_embed.", "lm.").under(f"text_decoder{copy}.")
    )


def text_config(hf: Mapping[str, Any]) -> TrunkConfig:
    """Return the text and fusion layers of ``config_bert.json``: the layers from ``fusion_layer`` on read the image.

    Text alone is ``layers=slice(0, fusion_layer)``, fusion of text states ``layers=slice(fusion_layer, None)``.
    """
    text, depth = hf["fusion_layer"], hf["num_hidden_layers"]
    return replace(
        bert.trunk_config(hf, context_width=hf["encoder_width"]), blocks=("sf",) * text + ("scf",) * (depth - text)
    )


def decoder_config(hf: Mapping[str, Any], depth: int) -> TrunkConfig:
    """Return the answer decoder: ``depth`` layers which all read the question's states (as wide as the text)."""
    return bert.trunk_config({**hf, "num_hidden_layers": depth, "add_cross_attention": True})


def fusion_keymap(head: bool, stored_head: bool, copy: str = "") -> KeyMap:
    """Return the map of the pre-training and retrieval models to the wiring ``fusion``.

    Args:
        head: the model predicts masked words; else a stored head is left, as :data:`HEAD` names it.
        stored_head: the file's BERT has its head, as the pre-training model's.
        copy: ``_m`` for the momentum copies, to a ``Momentum.teacher``.
    """
    trunk, embed = "text_encoder.trunk.", "text_encoder.embed."
    if stored_head and head:
        text = bert.lm_keymap(trunk, embed, "text_encoder.lm_head.")
    else:
        text = bert.keymap(trunk, embed).under("bert." if stored_head else "")
    shared = (
        vit.keymap("encoder.trunk.", "encoder.embed.").under(f"visual_encoder{copy}.")
        + text.under(f"text_encoder{copy}.")
        + KeyMap(
            rename(f"vision_proj{copy}.{{p}}", "image_projection.{p}"),
            rename(f"text_proj{copy}.{{p}}", "text_projection.{p}"),
        )
    )
    if copy:
        return shared
    own = KeyMap(rename("itm_head.{p}", "matching_head.{p}"), rename("temp", "temperature"))
    return shared + own + STATE + KeyMap(drop("idx_queue"))


def answerer_keymap(copy: str = "") -> KeyMap:
    """Return the map of the VQA model to the wiring ``answerer``."""
    return (
        vit.keymap("encoder.trunk.", "encoder.embed.").under(f"visual_encoder{copy}.")
        + bert.keymap("text_encoder.trunk.", "text_encoder.embed.").under(f"text_encoder{copy}.")
        + bert.lm_keymap("decoder.trunk.", "decoder.embed_tokens.", "decoder.head.").under(f"text_decoder{copy}.")
    )


HEAD = ("text_encoder.cls.{**}",)
"""Names of the head over words, for models that have none."""
