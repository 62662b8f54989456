"""LlamaGen's released files (``c2i_B_256.pt``, ``t2i_XL_stage1_256.pt``, ...) as recipes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoo.errors import WeightsError
from zoo.recipe import Recipe
from zoo.weights.formats import Official
from zoo.weights.keymaps import KeyMap
from zoo.weights.keymaps import llamagen as maps


def from_state(recipe: Recipe, state: Mapping[str, Any]) -> Official | None:
    """A bare file of a LlamaGen recipe; None for the zoo's own names.

    The image tokenizer, and the text encoder of a text-conditional model, come from files of their own and stay new.

    Raises:
        WeightsError: A file of the other kind of condition.
    """
    if "tok_embeddings.weight" not in state:
        return None
    captioned = "cls_embedding.uncond_embedding" in state
    if captioned != ("text_encoder" in recipe.parts):
        kind, other = ("t2i", "llamagen-t2i") if captioned else ("c2i", "llamagen-c2i")
        raise WeightsError(f"the file is a {kind} model of LlamaGen, {recipe.model} is not: say model={other!r}, ...")
    return Official(
        recipe=recipe,
        keymap=keymap(recipe),
        form="LlamaGen",
        ignored=("freqs_cis", "causal_mask"),
        new=("image_tokenizer.{**}", "text_encoder.{**}"),
    )


def keymap(recipe: Recipe) -> KeyMap:
    """The released names to those of the recipe's model."""
    decoder: Any = recipe.parts["decoder"][1]
    return maps.keymap(
        heads=decoder.heads,
        head_dim=decoder.width // decoder.heads,
        kv_heads=decoder.kv_heads or decoder.heads,
        trunk="decoder.trunk.",
        embed="decoder.embedding.tokens.",
        head="decoder.lm_head.",
        caption="connector.",
        unconditional="unconditional",
    )
