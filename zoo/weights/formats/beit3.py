"""Released BEiT-3 files (microsoft/unilm, folder beit3) as recipes: pre-trained, and fine-tuned for each task."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from zoo.errors import WeightsError
from zoo.recipe import Recipe, resolve
from zoo.weights.formats import Official
from zoo.weights.keymaps import beit3 as maps

HEADS = {768: 12, 1024: 16}
"""Width -> attention heads of the released sizes; no tensor tells them."""

LARGE = {"beit3": "beit3-large"}
"""Recipes that have a large twin."""

FIRST = 2
"""Rows of both position tables that nobody reads."""

KINDS = {
    "head.dense1.weight": ("images", ("beit3-nlvr2",)),
    "pooler.dense.weight": ("pair", ("beit3-vqa",)),
    "fc_norm.weight": ("image", ("beit3-in1k",)),
}
"""A tensor of a fine-tuned file -> what its head reads, and the recipes for it."""

MASKED = ("beit3", "beit3-large", "beit3-captioning", "beit3-retrieval")
"""Recipes of files with heads over words, over codes, or of the contrast."""

NEW = ("contrast.{**}", "words.{**}", "codes.{**}", "logit_scale", "image_tokenizer.{**}")
"""What one released file or another lacks: heads of other tasks, and the tokenizer, which was a model of its own."""


def from_state(recipe: Recipe, state: Mapping[str, Any]) -> Official | None:
    """A bare state dict of the released code; None for other names. Sizes are read from the tensors.

    Raises:
        WeightsError: The file is of another task than ``recipe``, of a size that is not ``recipe``'s, or not whole.
    """
    if "beit3.text_embed.weight" not in state:
        return None
    task, models = next((found for name, found in KINDS.items() if name in state), ("masked", MASKED))
    if recipe.model not in models:
        raise WeightsError(
            f"the file is a BEiT-3 with the heads of {models[0]}, not of {recipe.model}: load it with"
            f" model={models[0]!r}"
        )
    fields = sizes(state)
    large = LARGE.get(recipe.model)
    if fields["width"] == 1024 and large is not None:
        raise WeightsError(f"the file is a BEiT-3 of width 1024, not {recipe.model}: load it with model={large!r}")
    values: dict[str, Any] = {"trunk": fields}
    if "image_tokenizer" in recipe.parts:
        codes = {"vocab_size": len(state["mim_head.weight"])} if "mim_head.weight" in state else {}
        values["image_tokenizer"] = {key: fields[key] for key in ("image_size", "patch_size")} | codes
    if task != "masked":
        last = {"pair": "head.3.bias", "images": "head.dense2.bias", "image": "head.bias"}[task]
        values["wiring"] = {"classes": len(_tensor(state, last))}
    left = ("mlm_head.{p}", "mim_head.{p}") if recipe.wiring[0] == "experts" else ()
    keymap = maps.model_keymap(task)
    if left:
        keymap = type(keymap)(*(r for r in keymap.rules if not r.source[0].startswith(("mlm_head", "mim_head"))))
    return Official(
        recipe=resolve(recipe.model, values=values),
        keymap=keymap,
        form="BEiT-3",
        ignored=left,
        new=NEW if task == "masked" else (),
        unknown=() if fields["width"] in HEADS else ("trunk.heads",),
    )


def sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Fields of ``MultiwayConfig`` that the tensors tell.

    Raises:
        WeightsError: A tensor that every BEiT-3 has is missing, or the image's positions are no square.
    """
    width, _, patch, _ = _tensor(state, "beit3.vision_embed.proj.weight").shape
    rows = len(_tensor(state, "beit3.encoder.embed_positions.A.weight")) - FIRST - 1
    side = math.isqrt(max(0, rows))
    if side == 0 or side**2 != rows:
        raise WeightsError(
            f"the image's positions have {rows} rows for patches, which is no square: is the file whole?"
        )
    text = len(_tensor(state, "beit3.encoder.embed_positions.B.weight")) - FIRST
    start = "beit3.encoder.layers."
    fields: dict[str, Any] = {
        "image_size": side * patch,
        "patch_size": patch,
        "width": width,
        "depth": 1 + max((int(n.split(".")[3]) for n in state if n.startswith(start)), default=-1),
        "ffn": len(_tensor(state, f"{start}0.ffn.A.fc1.weight")),
        "vocab_size": len(_tensor(state, "beit3.text_embed.weight")),
        "text_rows": text,
        "context_length": min(64, text),
    }
    return fields | {"heads": HEADS.get(width, math.gcd(width, 12))}  # a guess that divides is asked for again


def _tensor(state: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise WeightsError(f"the file has a BEiT-3's word embedding but no {name}: is it whole?")
    return state[name]
