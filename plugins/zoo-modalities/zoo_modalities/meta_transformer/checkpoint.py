"""The released files: the blocks of the shared encoder alone, ``0.norm1.weight`` and so on.

There is no patch embedding, no position, no class token and no final norm in them: those belong to a modality. A path
such as ``Meta-Transformer_base_patch16_encoder.pth`` is read with ``model="meta-transformer"``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoo.errors import WeightsError
from zoo.recipe import Recipe, resolve
from zoo.weights.formats import Official
from zoo_modalities.meta_transformer.keymaps import ENCODER

HEADS = {768: 12, 1024: 16}
"""Width -> heads of the released sizes, which tensors do not tell."""


def from_state(recipe: Recipe, state: Mapping[str, Any]) -> Official | None:
    """A bare state dict of blocks; None for other names. Sizes are read from the tensors.

    Raises:
        WeightsError: A block is missing.
    """
    if "0.norm1.weight" not in state or "0.attn.qkv.weight" not in state:
        return None
    blocks = {int(name.split(".")[0]) for name in state if name.split(".")[0].isdigit()}
    if blocks != set(range(len(blocks))):
        missing = sorted(set(range(max(blocks))) - blocks)
        raise WeightsError(f"the file is a Meta-Transformer encoder without block {missing[0]}: is it whole?")
    width = len(state["0.norm1.weight"])
    if "0.mlp.fc1.weight" not in state:
        raise WeightsError("the file is a Meta-Transformer encoder without 0.mlp.fc1.weight: is it whole?")
    fields = {"width": width, "depth": len(blocks), "ffn": len(state["0.mlp.fc1.weight"])}
    fields["heads"] = HEADS.get(width, max(1, width // 64))
    return Official(
        recipe=resolve(recipe.model, values={"encoder": fields}),
        keymap=ENCODER.under("", "encoder.trunk."),
        form="Meta-Transformer encoder",
        new=("data_tokenizer.{**}", "head.{**}"),
        unknown=() if width in HEADS else ("encoder.heads",),
    )
