"""Released VLMo files (microsoft/unilm, folder vlmo) as recipes: pre-trained, of stage 2, and fine-tuned."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from zoo.errors import WeightsError
from zoo.recipe import Recipe, resolve
from zoo.trunks.multiway import MultiwayConfig
from zoo.weights.formats import Official
from zoo.weights.keymaps import vlmo as maps

PUBLISHED = {(768, 12): "vlmo", (544, 24): "vlmo-base-plus", (1024, 24): "vlmo-large"}
"""Width and depth -> recipe."""

TEXT_ROWS = 196
"""Longest text of stage 2, for which every released relative table is made."""

TASK_HEADS = ("vqa_classifier.{**}", "nlvr2_classifier.{**}", "rank_output.{**}")
"""Heads of fine-tuned files for tasks the wiring has no head for; they are left, and the report says so."""

NEW = (
    "trunk.trunk.layers.{i}.ffn.2.{**}", "trunk.trunk.layers.{i}.ffn_norm.2.{**}", "contrast.{**}", "pooler.{p}",
    "matching.{p}", "words.{**}", "logit_scale", "pair_logit_scale", "codes.{**}", "trunk.stem.mask_token",
)  # fmt: skip
"""What files of a stage or a task lack: pair experts before stage 3, heads of other tasks."""


def from_state(recipe: Recipe, state: Mapping[str, Any]) -> Official | None:
    """A bare state dict of the released code; None for other names.

    Sizes are read from the tensors. The number of heads cannot be where positions are learned (base-plus): it is the
    recipe's.

    Raises:
        WeightsError: A published size that is not ``recipe``'s, or tensors that fit no size.
    """
    if "transformer.patch_embed.proj.weight" not in state:
        return None
    trunk = recipe.parts["trunk"][1]
    assert isinstance(trunk, MultiwayConfig)
    fields = sizes(state, trunk)
    named = PUBLISHED.get((fields["width"], fields["depth"]))
    if named is not None and named != recipe.model:
        raise WeightsError(
            f"the file is a VLMo of width {fields['width']} and {fields['depth']} layers, not {recipe.model}: load it"
            f" with model={named!r}"
        )
    return Official(
        recipe=resolve(recipe.model, values={"trunk": fields}),
        keymap=maps.keymap(layers=fields["depth"], relative=fields["relative"]),
        form="VLMo",
        ignored=TASK_HEADS,
        new=NEW,
    )


def sizes(state: Mapping[str, Tensor], default: MultiwayConfig) -> dict[str, Any]:
    """Fields of ``MultiwayConfig`` that the tensors tell; the rest are ``default``'s.

    Raises:
        WeightsError: A tensor that every VLMo has is missing, or the relative table fits no image.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in state:
            raise WeightsError(f"the file has a VLMo's patch embedding but no {name}: is it whole?")
        return tuple(state[name].shape)

    width, _, patch, _ = shape("transformer.patch_embed.proj.weight")
    depth = 1 + max((int(n.split(".")[2]) for n in state if n.startswith("transformer.blocks.")), default=-1)
    pair_layers = sum(f"transformer.blocks.{i}.mlp_vl.fc1.weight" in state for i in range(depth))
    vocab, _ = shape("text_embeddings.word_embeddings.weight")
    text = state.get("text_embeddings.position_embeddings.weight")
    fields: dict[str, Any] = {
        "patch_size": patch,
        "width": width,
        "depth": depth,
        "ffn": shape("transformer.blocks.0.mlp_imag.fc1.weight")[0],
        "vocab_size": vocab,
        "pair_layers": pair_layers or min(default.pair_layers, depth),
        "layer_scale": 0.1 if "transformer.blocks.0.gamma_1" in state else None,
        "relative": "relative_position_bias_table" in state,
        "context_length": len(text) if text is not None else default.context_length,
    }
    if fields["relative"]:
        rows, columns = shape("relative_position_bias_table")
        side, fields["text_rows"] = relative_sizes(rows, fields["context_length"])
        fields["heads"] = columns // depth
    else:
        side = math.isqrt(shape("transformer.pos_embed")[1] - 1)
        fields["heads"], fields["text_rows"] = default.heads, fields["context_length"]
    return {**fields, "image_size": side * patch}


def relative_sizes(rows: int, text: int) -> tuple[int, int]:
    """Patches on a side of the image, and text rows, of a relative table of (2s-1)^2 + 5 + 2t ``rows``.

    Many pairs (s, t) give the same sum. The published t = 196 is tried first, then the largest image that leaves at
    least ``text`` text rows.

    Raises:
        WeightsError: No such pair.
    """
    whole = math.isqrt(max(0, rows - 5 - 2 * TEXT_ROWS))
    if rows > 5 + 2 * TEXT_ROWS and whole % 2 and whole**2 + 5 + 2 * TEXT_ROWS == rows:
        return (whole + 1) // 2, TEXT_ROWS
    for side in range(math.isqrt(rows), 0, -1):
        left = rows - 5 - (2 * side - 1) ** 2
        if left >= 2 * text and left % 2 == 0:
            return side, left // 2
    raise WeightsError(f"a relative table of {rows} rows fits no image with texts of {text} tokens: is it a VLMo's?")
