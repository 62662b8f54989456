"""ALBEF checkpoints as recipes: the released .pth files (salesforce/ALBEF) of pre-training, retrieval and VQA."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from zoo.errors import WeightsError
from zoo.recipe import Recipe, resolve
from zoo.weights.formats import Official
from zoo.weights.keymaps import albef as maps

WIDTH = 768
"""Width of every published ALBEF, whose heads are 64 wide."""


def from_state(recipe: Recipe, state: Mapping[str, Tensor]) -> Official | None:
    """A bare file of the released code; None for other names.

    Depths, widths and vocabulary are read from the tensors. An image size that is not the recipe's is kept for the
    recipe's positions to be interpolated. Of a width that is not published the heads cannot be known: the caller must
    say them.

    Raises:
        WeightsError: A file of another ALBEF model than the recipe, a part is missing, or sizes that do not fit.
    """
    if "visual_encoder.pos_embed" not in state:
        return None
    answers = recipe.wiring[0] == "answerer"
    if answers != any(name.startswith("text_decoder.") for name in state):
        other = "albef" if answers else "albef-vqa"
        what = "no answer decoder" if answers else "an answer decoder"
        raise WeightsError(f"the file holds {what}, unlike {recipe.model}: load it with model={other!r}")
    values, unknown = sizes(recipe, state)
    ignored: tuple[str, ...] = maps.MOMENTUM
    new: tuple[str, ...] = ()
    if answers:
        keymap = maps.answerer_keymap()
    else:
        text: Any = recipe.parts["text_encoder"][1]
        stored = any(name.startswith("text_encoder.cls.") for name in state)
        keymap = maps.fusion_keymap(text.lm_head, stored)
        if text.lm_head:
            new = () if stored else ("text_encoder.lm_head.{**}",)
        else:
            ignored = (*ignored, *maps.HEAD)
    return Official(
        recipe=resolve(recipe.model, values=values),
        keymap=keymap,
        form="ALBEF",
        ignored=ignored,
        new=new,
        unknown=unknown,
    )


def sizes(recipe: Recipe, state: Mapping[str, Tensor]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Fields of parts and wiring that the tensors tell, and paths of those that they do not.

    Raises:
        WeightsError: A tensor that every ALBEF has is missing, or parts of the file that do not fit each other.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in state:
            raise WeightsError(f"the file has ALBEF's image encoder but no {name}: is it whole?")
        return tuple(state[name].shape)

    def layers(prefix: str, holding: str = "") -> int:
        found = {int(n.removeprefix(prefix).split(".")[0]) for n in state if n.startswith(prefix) and holding in n}
        return len(found)

    width, _, patch, _ = shape("visual_encoder.patch_embed.proj.weight")
    patches = shape("visual_encoder.pos_embed")[1] - 1
    side = math.isqrt(patches)
    if side**2 != patches:
        raise WeightsError(f"visual_encoder.pos_embed has {patches} patches, of no square image")
    published: Any = recipe.parts["encoder"][1]
    encoder = {
        "patch_size": patch,
        "width": width,
        "depth": layers("visual_encoder.blocks."),
        "ffn": shape("visual_encoder.blocks.0.mlp.fc1.weight")[0],
        "image_size": published.image_size if (width, patch) == (WIDTH, published.patch_size) else side * patch,
    }
    values: dict[str, dict[str, Any]] = {"encoder": encoder}
    stem = "text_encoder.bert." if any(n.startswith("text_encoder.bert.") for n in state) else "text_encoder."
    for slot, prefix in (("text_encoder", stem), ("decoder", "text_decoder.bert.")):
        if slot not in recipe.parts:
            continue
        rows, inner = shape(f"{prefix}embeddings.word_embeddings.weight")
        depth, fusion = layers(f"{prefix}encoder.layer."), layers(f"{prefix}encoder.layer.", ".crossattention.")
        values[slot] = {
            "vocab_size": rows,
            "context_length": shape(f"{prefix}embeddings.position_embeddings.weight")[0],
            "types": shape(f"{prefix}embeddings.token_type_embeddings.weight")[0],
            "width": inner,
            "depth": depth,
            "ffn": shape(f"{prefix}encoder.layer.0.intermediate.dense.weight")[0],
        }
        if slot == "decoder":
            values[slot]["added"] = 0
            continue
        if not 0 < fusion < depth:
            raise WeightsError(f"{fusion} of the text encoder's {depth} layers read the image: this is no ALBEF")
        values[slot] |= {"text_share": (depth - fusion) / depth, "cross_share": fusion / depth}
        read = shape(f"{prefix}encoder.layer.{depth - 1}.crossattention.self.key.weight")[1]
        if read != width:
            raise WeightsError(f"the text encoder reads images of width {read}, the image encoder's is {width}")
    unknown = []
    for slot, fields in values.items():
        if fields["width"] == WIDTH:
            fields["heads"] = 12
        else:  # any that divides, until the caller says which
            fields["heads"] = 1
            unknown.append(f"{slot}.heads")
    if "vision_proj.weight" in state:
        values["wiring"] = {"embed_width": shape("vision_proj.weight")[0]}
    return values, tuple(unknown)
