"""Layouts of other libraries' checkpoints: what recipe they are, and where each tensor goes.

``TRANSFORMERS`` names, for the ``model_type`` of a ``config.json``, a function ``(config, folder) -> Official``;
``FILES`` names, for a recipe, a function ``(recipe, state) -> Official`` that reads a bare file given with
``model="clip-vit-b-32"``; a plugin adds such a function of a recipe of its own as a component of kind ``checkpoint``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.errors import WeightsError, near
from zoo.plugin import catalogue
from zoo.recipe import Recipe
from zoo.weights.keymaps import KeyMap

TRANSFORMERS: dict[str, str] = {
    "clip": "zoo.weights.formats.clip:from_transformers",
    "llava": "zoo.weights.formats.llava:from_transformers",
    "llava_llama": "zoo.weights.formats.llava:from_transformers",
    "blip-2": "zoo.weights.formats.blip2:from_transformers",
    "instructblip": "zoo.weights.formats.instructblip:from_transformers",
    "blip": "zoo.weights.formats.blip:from_transformers",
    "cogvlm": "zoo.weights.formats.cogvlm:from_transformers",
    "CogVLMForCausalLM": "zoo.weights.formats.cogvlm:from_transformers",
    "chatglm": "zoo.weights.formats.visualglm:from_transformers",
    "AutoencoderKL": "zoo.weights.formats.autoencoder_kl:from_folder",
    "MAGVITv2": "zoo.weights.formats.image_tokenizers:from_folder",
    "Showo": "zoo.weights.formats.show_o:from_folder",
    "chameleon": "zoo.weights.formats.chameleon:from_transformers",
    "phi": "zoo.weights.formats.text_models:from_transformers",
    "llama": "zoo.weights.formats.text_models:from_transformers",
}
"""``model_type``, or where there is none the first of ``architectures`` or ``_class_name``, -> "module:function"."""

PICKLED_KINDS = frozenset({"Showo"})
"""Kinds of folders that were released as ``pytorch_model.bin`` alone."""

FILES: dict[str, str] = dict.fromkeys(
    (
        *("clip", "clip-vit-b-16", "clip-vit-l-14", "clip-vit-l-14-336"),
        *("clip-rn50", "clip-rn101", "clip-rn50x4", "clip-rn50x16", "clip-rn50x64"),
    ),
    "zoo.weights.formats.clip:from_state",
)
FILES |= dict.fromkeys(("llava", "llava-1.5", "llava-1.5-13b"), "zoo.weights.formats.llava:from_state")
FILES |= dict.fromkeys(("blip2-opt", "blip2-opt-6.7b"), "zoo.weights.formats.blip2:from_state")
FILES |= dict.fromkeys(("blip2-flan-t5", "blip2-flan-t5-xxl"), "zoo.weights.formats.blip2:from_state")
FILES |= dict.fromkeys(("blip2", "blip2-vit-l"), "zoo.weights.formats.blip2_stage1:from_state")
FILES |= dict.fromkeys(
    (
        *("instructblip-vicuna-7b", "instructblip-vicuna-13b", "instructblip-flan-t5-xl", "instructblip-flan-t5-xxl"),
        *("minigpt4", "minigpt4-7b", "minigpt4-llama2"),
    ),
    "zoo.weights.formats.instructblip:from_state",
)
FILES |= dict.fromkeys(("kl-tokenizer", "kl-tokenizer-gan"), "zoo.weights.formats.autoencoder_kl:from_state")
FILES |= dict.fromkeys(("coca", "coca-vit-l-14"), "zoo.weights.formats.coca:from_state")
FILES |= dict.fromkeys(("cogvlm-base-224", "cogvlm-base-490", "cogvlm-chat"), "zoo.weights.formats.cogvlm:from_state")
FILES |= {"visualglm-6b": "zoo.weights.formats.visualglm:from_state"}
FILES |= dict.fromkeys(("vlmo", "vlmo-base-plus", "vlmo-large"), "zoo.weights.formats.vlmo:from_state")
FILES |= dict.fromkeys(
    (
        *("blip", "blip-large", "blip-retrieval", "blip-retrieval-large"),
        *("blip-caption", "blip-caption-large", "blip-vqa", "blip-nlvr"),
    ),
    "zoo.weights.formats.blip:from_state",
)
FILES |= dict.fromkeys(("albef", "albef-retrieval", "albef-vqa"), "zoo.weights.formats.albef:from_state")
FILES |= dict.fromkeys(
    (
        *("beit3", "beit3-large", "beit3-captioning", "beit3-retrieval"),
        *("beit3-vqa", "beit3-nlvr2", "beit3-in1k"),
    ),
    "zoo.weights.formats.beit3:from_state",
)
FILES |= dict.fromkeys(
    ("magvitv2", "open-magvit2", "llamagen-vq-16", "llamagen-vq-8", "chameleon-vq"),
    "zoo.weights.formats.image_tokenizers:from_state",
)
FILES |= dict.fromkeys(
    (
        *("llamagen-c2i", "llamagen-c2i-l", "llamagen-c2i-b-384", "llamagen-c2i-l-384", "llamagen-c2i-xl-384"),
        *("llamagen-c2i-xxl-384", "llamagen-c2i-3b-384", "llamagen-t2i", "llamagen-t2i-512"),
    ),
    "zoo.weights.formats.llamagen:from_state",
)
FILES |= dict.fromkeys(("show-o", "show-o-512", "show-o-clip-vit"), "zoo.weights.formats.show_o:from_state")
FILES |= dict.fromkeys(("chameleon-7b", "chameleon-34b"), "zoo.weights.formats.chameleon:from_state")
"""Recipe name -> "module:function"."""


@dataclass(frozen=True, kw_only=True)
class Official:
    """A checkpoint of another library, understood.

    Attributes:
        recipe: The model its configuration describes, exactly.
        keymap: Its names to ours.
        form: What to call it in reports.
        ignored: Templates of its names that may be left (beside those the map drops).
        new: Templates of our names it does not have.
        unknown: Paths of fields (``encoder.heads``) that its tensors do not tell, and that a caller has to say.
    """

    recipe: Recipe
    keymap: KeyMap
    form: str
    ignored: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()


def transformers_format(config: Mapping[str, Any], folder: Path) -> Official:
    """Understand a transformers folder by its ``model_type``.

    Raises:
        WeightsError: A type the zoo does not read; the message lists near ones.
    """
    kind = folder_kind(config)
    if kind not in TRANSFORMERS:
        raise WeightsError(
            f"{str(folder)!r} is a transformers checkpoint of type {kind!r}, which the zoo does not read"
            f"{near(kind, TRANSFORMERS)}"
        )
    official: Official = _function(TRANSFORMERS[kind])(config, folder)
    return official


def folder_kind(config: Mapping[str, Any]) -> str:
    """What a ``config.json`` says it is: ``model_type``, the first of ``architectures``, or diffusers' ``_class_name``;
    empty where it says nothing."""
    return str(config.get("model_type") or (config.get("architectures") or [config.get("_class_name") or ""])[0])


def file_format(recipe: Recipe, state: Mapping[str, Any]) -> Official | None:
    """Understand a bare state dict of ``recipe``; None when neither the zoo nor a plugin knows another layout of it."""
    released = catalogue()["checkpoint"]
    if recipe.model in FILES:
        read = _function(FILES[recipe.model])
    elif recipe.model in released:
        read = released.load(recipe.model)
    else:
        return None
    official: Official = read(recipe, state)
    return official


def _function(ref: str) -> Callable[..., Any]:
    module, _, name = ref.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function
