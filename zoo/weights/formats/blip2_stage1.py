"""Checkpoints of BLIP-2's first stage as recipes: LAVIS files and transformers' retrieval folders."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from zoo.encoders.open_clip import OpenCLIPViTConfig
from zoo.errors import WeightsError
from zoo.recipe import Recipe, resolve
from zoo.weights.formats import Official
from zoo.weights.keymaps import blip2_stage1 as maps

HEADS = {1408: 16, 1024: 16, 768: 12}
"""Published width -> attention heads, of image towers and Q-Former."""

DROPPED = 1
"""Blocks of the image tower that a file may hold and nobody reads: the last."""


def from_transformers(config: Mapping[str, Any], folder: Path) -> Official:
    """A folder of ``Blip2ForImageTextRetrieval``.

    Raises:
        WeightsError: A configuration the zoo's parts cannot follow.
    """
    from zoo.weights.formats.blip2 import tower_fields

    bert = dict(config.get("qformer_config") or {})
    encoder, connector = tower_fields({**config, "qformer_config": {**bert, "use_qformer_text_input": False}}, folder)
    connector |= {
        "text": True,
        "vocab_size": int(bert.get("vocab_size", 30522)),
        "context_length": int(bert.get("max_position_embeddings", 512)),
    }
    if any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        connector["tokenizer"] = f"hf:{folder}"
    values = {
        "encoder": encoder,
        "connector": connector,
        "wiring": {"embed_width": int(config.get("image_text_hidden_size", 256))},
    }
    recipe = resolve("blip2", values=values)
    return Official(recipe=recipe, keymap=maps.HF, form="transformers blip-2", new=maps.HF_NEW)


def from_state(recipe: Recipe, state: Mapping[str, Tensor]) -> Official | None:
    """A bare LAVIS or transformers file of a stage 1 recipe; None for the zoo's own names.

    Sizes of LAVIS' files are read from the tensors; the number of heads only where the width is a published one. A file
    without the frozen image tower leaves it new.

    Raises:
        WeightsError: No stage 1 file.
    """
    if any(name.startswith(("encoder.", "connector.", "heads.")) for name in state):
        return None
    if "qformer.layernorm.weight" in state:
        return Official(recipe=recipe, keymap=maps.HF, form="transformers blip-2", new=maps.HF_NEW)
    if "Qformer.bert.embeddings.word_embeddings.weight" not in state or "itm_head.weight" not in state:
        raise WeightsError(
            f"the file holds no Q-Former with a text branch and a matching head, which {recipe.model} has: a file of"
            " stage 2 loads with model=blip2-opt"
        )
    held: Any = recipe.parts["encoder"][1]
    clip = isinstance(held, OpenCLIPViTConfig)
    values = sizes(state, clip)
    depth = values.get("encoder", {}).get("depth", held.depth)
    # of CLIP's tower the recipe counts the block that nobody reads, of EVA-CLIP's it does not
    kept = depth + held.layer + 1 if clip else depth
    if "encoder" not in values:
        depth, kept = held.depth, held.depth + held.layer + 1
    unknown = tuple(f"{slot}.heads" for slot in ("encoder", "connector") if _unpublished(values.get(slot)))
    return Official(
        recipe=resolve(recipe.model, values=values),
        keymap=maps.lavis(kept, kept + DROPPED, clip=clip),
        form="LAVIS blip-2",
        new=() if "encoder" in values else ("encoder.{**}",),
        unknown=unknown,
    )


def _unpublished(fields: Mapping[str, Any] | None) -> bool:
    return fields is not None and fields["width"] not in HEADS


def sizes(state: Mapping[str, Tensor], clip: bool) -> dict[str, Any]:
    """Fields of parts and wiring that the tensors of a LAVIS file tell; no ``encoder`` where it holds no image tower.

    Raises:
        WeightsError: A tensor every such file has is missing, or the positions are of no square image.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in state:
            raise WeightsError(f"the file has a Q-Former but no {name}: is it whole?")
        return tuple(state[name].shape)

    def layers(prefix: str) -> int:
        return 1 + max((int(n.removeprefix(prefix).split(".")[0]) for n in state if n.startswith(prefix)), default=-1)

    rows, width = shape("Qformer.bert.embeddings.word_embeddings.weight")
    cross = "Qformer.bert.encoder.layer.{}.crossattention.self.key.weight"
    depth = layers("Qformer.bert.encoder.layer.")
    reading = [i for i in range(depth) if cross.format(i) in state]
    values: dict[str, Any] = {
        "connector": {
            "queries": shape("query_tokens")[1],
            "width": width,
            "depth": depth,
            "heads": HEADS.get(width, 1),
            "ffn": shape("Qformer.bert.encoder.layer.0.intermediate.dense.weight")[0],
            "cross_every": reading[1] if len(reading) > 1 else depth,
            "vocab_size": rows,
            "context_length": shape("Qformer.bert.embeddings.position_embeddings.weight")[0],
        },
        "wiring": {"embed_width": shape("vision_proj.weight")[0]},
    }
    if not any(name.startswith("visual_encoder.") for name in state):
        return values
    tower = "visual_encoder."
    names = (
        ("conv1.weight", "positional_embedding", "transformer.resblocks.", "mlp.c_fc.weight")
        if clip
        else ("patch_embed.proj.weight", "pos_embed", "blocks.", "mlp.fc1.weight")
    )
    patch, places, blocks, inner = (tower + name for name in (*names[:3], f"{names[2]}0.{names[3]}"))
    wide, _, side, _ = shape(patch)
    count = shape(places)[-2] - 1
    grid = math.isqrt(count)
    if grid**2 != count:
        raise WeightsError(f"{places} has {count} patches, of no square image")
    found = layers(blocks)
    # the released files hold 39 of EVA-CLIP's 40 blocks, or 23 of CLIP's 24; a whole tower has one more to drop
    published = {1408: 39, 1024: 23}.get(wide, found)
    kept = min(found, published)
    values["encoder"] = {
        "image_size": grid * side,
        "patch_size": side,
        "width": wide,
        "depth": kept + DROPPED if clip else kept,
        "heads": HEADS.get(wide, 1),
        "ffn": shape(inner)[0],
    }
    return values
