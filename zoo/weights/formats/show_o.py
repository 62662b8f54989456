"""Show-o's folders (showlab/show-o and its 512 px and CLIP-ViT forms) as recipes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from zoo.errors import WeightsError
from zoo.recipe import Recipe, resolve
from zoo.weights.formats import Official
from zoo.weights.keymaps import KeyMap, phi, rename

NEW_TOKENS = 10
"""Pad and nine tokens of tasks and boundaries, in the order of the style's specials."""

IGNORED = ("showo.model.layers.{i}.self_attn.rotary_emb.{p}",)

NEW = ("image_tokenizer.{**}", "encoder.{**}")
"""Parts that have checkpoints of their own: showlab/magvitv2, and the CLIP ViT."""


def keymap() -> KeyMap:
    """Return the map of the released names to ``decoder`` and ``connector``."""
    decoder = phi.keymap("decoder.trunk.", "decoder.embedding.tokens.", "decoder.lm_head.")
    return decoder.under("showo.") + KeyMap(rename("mm_projector.{i}.{p}", "connector.proj.{i}.{p}"))


def from_folder(config: Mapping[str, Any], folder: Path) -> Official:
    """A folder whose ``config.json`` says ``_class_name`` Showo.

    Its tensors tell the sizes of the language model. Image tokenizer and CLIP ViT stay new.

    Raises:
        WeightsError: Numbers of tokens that do not add up, or another number of image codes than a square's.
    """
    from zoo.weights.files import read_folder, stem_of

    def told(name: str, default: int) -> int:
        return int(config.get(name, default))

    text, codes, images = told("llm_vocab_size", 50295), told("codebook_size", 8192), told("num_vq_tokens", 256)
    size, new = told("vocab_size", 58498), told("num_new_special_tokens", NEW_TOKENS)
    if new != NEW_TOKENS or text + new + codes + 1 != size:
        raise WeightsError(
            f"config.json of {str(folder)!r}: {text} text ids, {new} new tokens, {codes} codes and a mask do not make"
            f" vocab_size = {size}: expected {NEW_TOKENS} new tokens and a sum that fits"
        )
    side = math.isqrt(images)
    if side * side != images:
        raise WeightsError(f"config.json of {str(folder)!r}: num_vq_tokens = {images} is no square grid of codes")
    state = read_folder(folder, stem_of(folder), pickled=True)
    return _official(state, bool(config.get("w_clip_vit")), text, codes, side, folder)


def from_state(recipe: Recipe, state: Mapping[str, Tensor]) -> Official | None:
    """A bare file of a Show-o recipe; None for the zoo's own names."""
    if not any(name.startswith("showo.") for name in state):
        return None
    seen = "connector" in recipe.parts
    tokenizer: Any = recipe.parts["image_tokenizer"][1]
    rows = _shape(state, "showo.model.embed_tokens.weight")[0]
    text = rows - NEW_TOKENS - int(tokenizer.vocab_size) - 1
    return _official(state, seen, text, int(tokenizer.vocab_size), tokenizer.grid[0], None)


def _official(
    state: Mapping[str, Tensor], seen: bool, text: int, codes: int, side: int, folder: Path | None
) -> Official:
    rows, width = _shape(state, "showo.model.embed_tokens.weight")
    if rows != text + NEW_TOKENS + codes + 1 or text < 1:
        raise WeightsError(
            f"the file has an embedding of {rows} rows; expected {text} text ids, {NEW_TOKENS} new tokens, {codes}"
            " codes and a mask: is its config.json, or the recipe's codebook, another model's?"
        )
    if seen != ("mm_projector.0.weight" in state):
        lacks = "lacks" if seen else "has"
        raise WeightsError(f"the file {lacks} mm_projector: Show-o with CLIP-ViT has one (show-o-clip-vit), others not")
    depth = 1 + max(int(n.split(".")[3]) for n in state if n.startswith("showo.model.layers."))
    head = _shape(state, "showo.model.layers.0.self_attn.q_layernorm.weight")[0]
    decoder: dict[str, Any] = {
        "width": width,
        "depth": depth,
        "heads": width // head,
        "kv_heads": _shape(state, "showo.model.layers.0.self_attn.k_proj.weight")[0] // head,
        "ffn": _shape(state, "showo.model.layers.0.mlp.fc1.weight")[0],
        "vocab_size": text,
    }
    if folder is not None and any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        decoder["tokenizer"] = f"hf:{folder}"
    if decoder["kv_heads"] == decoder["heads"]:
        decoder["kv_heads"] = 0
    model = "show-o-clip-vit" if seen else "show-o" if side < 32 else "show-o-512"
    values: dict[str, Any] = {"decoder": decoder, "image_tokenizer": {"image_size": 16 * side, "vocab_size": codes}}
    recipe = resolve(model, values=values)
    return Official(recipe=recipe, keymap=keymap(), form="Show-o", ignored=IGNORED, new=NEW)


def _shape(state: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    if name not in state:
        raise WeightsError(f"the file has no {name}: it is no Show-o, or not whole")
    return tuple(state[name].shape)
