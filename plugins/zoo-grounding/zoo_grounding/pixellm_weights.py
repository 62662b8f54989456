"""PixelLM's released weights (model/PixelLM.py): names and sizes, and the CLIP tower that the files leave out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.encoders.open_clip import kept_blocks
from zoo.errors import WeightsError
from zoo.recipe import Recipe, resolve
from zoo.weights.formats import Official
from zoo.weights.keymaps import KeyMap, clip_trunk, drop, load_into, rename

if TYPE_CHECKING:
    from zoo_grounding.clip_levels import CLIPLevels

TOWER = "model.vision_tower.vision_tower.vision_model."
TOWER_HEADS = {1024: 16}
LANGUAGE_HEADS = {4096: 32, 5120: 40}
DECODER_HEADS = {256: 8}
"""Width -> heads of the published parts, which tensors do not tell."""

_UNREAD = (
    "model.prompt_encoder.mask_downscaling.{**}",
    "model.prompt_encoder.not_a_point_embed.{p}",
    "model.prompt_encoder.point_embeddings.{**}",
    "model.mask_decoder.iou_prediction_head.{**}",
    "model.mask_decoder.output_hypernetworks_mlps.1.{**}",
    "model.mask_decoder.output_hypernetworks_mlps.2.{**}",
    "model.mask_decoder.output_hypernetworks_mlps.3.{**}",
)
"""What SAM's prompts and the other mask slots need, and no mask of PixelLM."""

DECODER = KeyMap(
    *(drop(name) for name in _UNREAD),
    rename("model.out_mm_projector.{i}.{p}", "mask_decoder.image_proj.{i}.{p}"),
    rename("model.image_feature_neck.{i}.{p}", "mask_decoder.neck.{i}.{p}"),
    rename("model.prompt_encoder.no_mask_embed.weight", "mask_decoder.no_mask"),
    rename("model.prompt_encoder.pe_layer.{p}", "mask_decoder.grid.{p}"),
    rename("model.mask_decoder.pe1.{p}", "mask_decoder.fine_grid.{p}"),
    rename("model.mask_decoder.transformer.{**}", "mask_decoder.transformer.{**}"),
    rename("model.mask_decoder.iou_token.weight", "mask_decoder.iou_token"),
    rename("model.mask_decoder.mask_tokens.weight", "mask_decoder.mask_tokens"),
    rename("model.mask_decoder.level_embed.weight", "mask_decoder.level_embed"),
    rename("model.mask_decoder.upsample_2x.{**}", "mask_decoder.upsample.{**}"),
    rename("model.mask_decoder.output_upscaling.{**}", "mask_decoder.upscale.{**}"),
    rename("model.mask_decoder.output_hypernetworks_mlps.0.{**}", "mask_decoder.hyper.{**}"),
)

LANGUAGE = KeyMap(
    drop("{**}rotary_emb.inv_freq"),
    rename("lm_head.weight", "decoder.lm.lm_head.weight"),
    rename("model.embed_tokens.weight", "decoder.lm.model.embed_tokens.weight"),
    rename("model.layers.{**}", "decoder.lm.model.layers.{**}"),
    rename("model.norm.weight", "decoder.lm.model.norm.weight"),
)


def keymap(kept: int, depth: int) -> KeyMap:
    """The map of a whole checkpoint.

    Args:
        kept: Blocks of the image tower that are built.
        depth: Blocks the checkpoint has.
    """
    unread = [drop(f"{TOWER}encoder.layers.{i}.{{**}}") for i in range(kept, depth)]
    return (
        KeyMap(*unread, drop(f"{TOWER}post_layernorm.{{p}}"))
        + clip_trunk.keymap("encoder.trunk.", "encoder.embed.").under(TOWER)
        + KeyMap(
            rename("model.mm_projector.{i}.{p}", "connector.proj.{i}.{p}"),
            rename("model.text_hidden_fcs.0.{i}.{p}", "text_hidden.{i}.{p}"),
        )
        + DECODER
        + LANGUAGE
    )


def from_state(recipe: Recipe, state: Mapping[str, Any]) -> Official | None:
    """A file of a PixelLM recipe under the released names; None for the zoo's own.

    Sizes are those of the tensors. The released files leave the CLIP tower out, which is then new: see `fill_tower`.
    Adapters are new, as the files hold their sum with the weights.

    Raises:
        WeightsError: A tensor that tells a size is missing.
    """
    if "model.text_hidden_fcs.0.0.weight" not in state:
        return None
    values, unknown = _sizes(recipe, state)
    recipe = resolve(recipe.model, values=values)
    encoder: Any = recipe.parts["encoder"][1]
    new = ["decoder.{**}.lora_A.default.weight", "decoder.{**}.lora_B.default.weight"]
    new += ["mask_decoder.fusion.{p}"] if getattr(recipe.parts["mask_decoder"][1], "fusion", "") == "learned" else []
    if f"{TOWER}embeddings.class_embedding" not in state:
        new.append("encoder.{**}")
    return Official(
        recipe=recipe,
        keymap=keymap(kept_blocks(encoder.layer, encoder.depth), encoder.depth),
        form="PixelLM",
        new=tuple(new),
        unknown=tuple(unknown),
    )


def _sizes(recipe: Recipe, state: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The fields that the tensors tell, and the paths of those that they do not."""

    def shape(name: str) -> tuple[int, ...]:
        if name not in state:
            raise WeightsError(f"the file has PixelLM's text_hidden_fcs but no {name}: is it whole?")
        return tuple(state[name].shape)

    def count(prefix: str) -> int:
        return 1 + max(
            (int(name[len(prefix) :].split(".")[0]) for name in state if name.startswith(prefix)), default=-1
        )

    mask: Any = recipe.parts["mask_decoder"][1]
    rows, width = shape("model.embed_tokens.weight")
    channels = shape("model.mask_decoder.mask_tokens.weight")[1]
    first = "model.mask_decoder.transformer.0."
    wiring: Any = recipe.wiring[1]
    added = mask.prompts + (2 if wiring.image_marks else 0)
    values: dict[str, dict[str, Any]] = {
        "decoder": {
            "vocab_size": rows - added,
            "width": width,
            "depth": count("model.layers."),
            "ffn": shape("model.layers.0.mlp.gate_proj.weight")[0],
        },
        "mask_decoder": {
            "width": channels,
            "depth": count(f"{first}layers."),
            "ffn": shape(f"{first}layers.0.mlp.lin1.weight")[0],
        },
    }
    known = {"decoder": LANGUAGE_HEADS.get(width), "mask_decoder": DECODER_HEADS.get(channels)}
    if f"{TOWER}embeddings.class_embedding" in state:
        patch = shape(f"{TOWER}embeddings.patch_embedding.weight")
        cells = round((shape(f"{TOWER}embeddings.position_embedding.weight")[0] - 1) ** 0.5)
        values["encoder"] = {
            "width": patch[0],
            "patch_size": patch[2],
            "image_size": patch[2] * cells,
            "depth": count(f"{TOWER}encoder.layers."),
            "ffn": shape(f"{TOWER}encoder.layers.0.mlp.fc1.weight")[0],
        }
        known["encoder"] = TOWER_HEADS.get(patch[0])
    for slot, heads in known.items():
        # heads that divide nothing would be refused before anybody can say them
        values[slot]["heads"] = heads or 1
    return values, [f"{slot}.heads" for slot, heads in known.items() if heads is None]


def resized_positions(table: Tensor, cells: int) -> Tensor:
    """Resize CLIP's position table ``[1 + n·n, D]`` to ``[1 + cells·cells, D]`` as the release does.

    The release takes the last row for that of CLS (CLIP's is the first) and leaves it at the end. Checkpoints do not
    carry the CLIP tower, so official results need just this.

    Raises:
        WeightsError: the table is not that of a square grid and a CLS.
    """
    grid, last = table[:-1], table[-1:]
    side = round(len(grid) ** 0.5)
    if side * side != len(grid):
        raise WeightsError(f"a position table of {len(table)} rows; expected a square number and one for CLS")
    image = grid.T.reshape(1, -1, side, side)
    return torch.cat([F.interpolate(image, (cells, cells), mode="bilinear")[0].flatten(1).T, last])


def fill_tower(encoder: CLIPLevels, state: Mapping[str, Tensor]) -> None:
    """Fill the encoder with OpenAI's tower as transformers names it (``vision_model.*``, as in
    openai/clip-vit-large-patch14-336), its positions resized as the release does where the image is larger.

    Raises:
        WeightsError: Tensors are missing, or are of other sizes.
    """
    prefix = "vision_model."
    own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    table = "embeddings.position_embedding.weight"
    if table not in own:
        raise WeightsError(f"no {prefix}{table} among {len(state)} tensors: expected CLIP's tower of transformers")
    cells = encoder.grid[0]
    if len(own[table]) != 1 + cells * cells:
        own[table] = resized_positions(own[table], cells)
    c = encoder.config
    unread = [drop(f"encoder.layers.{i}.{{**}}") for i in range(c.kept, c.depth)]
    unread += [drop("post_layernorm.{p}")] if encoder.trunk.final_norm is None else []
    load_into(encoder, own, KeyMap(*unread) + clip_trunk.keymap())
