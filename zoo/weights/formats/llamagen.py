"""LlamaGen's released files (``c2i_B_256.pt``, ``t2i_XL_stage1_256.pt``, ...) as recipes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoo.errors import WeightsError
from zoo.recipe import Recipe, resolve
from zoo.weights.formats import Official
from zoo.weights.keymaps import KeyMap
from zoo.weights.keymaps import llamagen as maps

HEADS = {768: 12, 1024: 16, 1280: 20, 1536: 24, 2560: 40, 2048: 32, 3200: 32, 4096: 32}
"""Width -> heads of the published sizes."""


def from_state(recipe: Recipe, state: Mapping[str, Any]) -> Official | None:
    """A bare file of a LlamaGen recipe; None for the zoo's own names.

    The image tokenizer, and the text encoder of a text-conditional model, come from files of their own and stay new.

    Raises:
        WeightsError: A file of the other kind of condition, or of no published width.
    """
    if "tok_embeddings.weight" not in state:
        return None
    captioned = "cls_embedding.uncond_embedding" in state
    if captioned != ("text_encoder" in recipe.parts):
        kind, other = ("t2i", "llamagen-t2i") if captioned else ("c2i", "llamagen-c2i")
        raise WeightsError(f"the file is a {kind} model of LlamaGen, {recipe.model} is not: say model={other!r}, ...")
    values = _sizes(state, captioned)
    recipe = resolve(recipe.model, values=values)
    return Official(
        recipe=recipe,
        keymap=keymap(recipe),
        form="LlamaGen",
        ignored=("freqs_cis", "causal_mask", "layers.{i}.attention.kv_cache.{p}"),
        new=("image_tokenizer.{**}", "text_encoder.{**}"),
    )


def _sizes(state: Mapping[str, Any], captioned: bool) -> dict[str, dict[str, Any]]:
    """The fields that the tensors tell.

    Raises:
        WeightsError: A width that was not published, whose number of heads nothing tells, or a tensor that is missing.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in state:
            raise WeightsError(f"the file has LlamaGen's tok_embeddings.weight but no {name}: is it whole?")
        return tuple(state[name].shape)

    codes, width = shape("tok_embeddings.weight")
    if width not in HEADS:
        raise WeightsError(
            f"the file has width {width}, which no published LlamaGen has ({', '.join(map(str, HEADS))}), and"
            " tensors do not tell the number of heads"
        )
    heads = HEADS[width]
    fused = shape("layers.0.attention.wqkv.weight")[0]
    kv_heads = (fused - width) // 2 // (width // heads)
    values: dict[str, dict[str, Any]] = {
        "decoder": {
            "width": width,
            "depth": 1 + max(int(name.split(".")[1]) for name in state if name.startswith("layers.")),
            "heads": heads,
            "kv_heads": 0 if kv_heads == heads else kv_heads,
            "ffn": shape("layers.0.feed_forward.w1.weight")[0],
        },
        "image_tokenizer": {"vocab_size": codes},
    }
    if captioned:
        tokens, features = shape("cls_embedding.uncond_embedding")
        return {**values, "text_encoder": {"width": features}, "wiring": {"prefix_tokens": tokens}}
    classes = shape("cls_embedding.embedding_table.weight")[0] - 1
    return {**values, "wiring": {"classes": classes}}


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
