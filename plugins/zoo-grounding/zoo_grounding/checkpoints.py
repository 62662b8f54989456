"""LISA's released checkpoints: the names of dvlab-research/LISA to those of the wiring ``segmenter``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoo.encoders.open_clip import kept_blocks
from zoo.recipe import Recipe
from zoo.weights.formats import Official
from zoo.weights.keymaps import KeyMap, drop, llava, rename

_OURS = ("encoder.", "connector.", "decoder.", "text_hidden.", "mask_decoder.")

HIDDEN = KeyMap(rename("model.text_hidden_fcs.0.{i}.{p}", "text_hidden.{i}.{p}"))
"""What turns the state before a target's token into a prompt."""

LANGUAGE = KeyMap(
    drop("{**}rotary_emb.inv_freq"),
    rename("model.mm_projector.{p}", "connector.proj.{p}"),
    rename("lm_head.weight", "decoder.lm.lm_head.weight"),
    rename("model.embed_tokens.weight", "decoder.lm.model.embed_tokens.weight"),
    rename("model.layers.{**}", "decoder.lm.model.layers.{**}"),
    rename("model.norm.weight", "decoder.lm.model.norm.weight"),
)
"""LLaVA v1's projector and language model in the release's names."""

_UNREAD = (  # of SAM's prompt encoder: points, boxes and earlier masks prompt nothing in LISA
    "prompt_encoder.point_embeddings.{i}.weight",
    "prompt_encoder.not_a_point_embed.weight",
    "prompt_encoder.mask_downscaling.{i}.{p}",
    "pixel_mean",
    "pixel_std",
)

_LAYERS = {"layers.0": "proj_in", "layers.1": "layers.0", "layers.2": "proj_out"}
"""Segment anything's MLPs of three layers -> transformers' names."""


def sam(source: str, target: str = "mask_decoder.") -> KeyMap:
    """The whole of SAM under ``source`` to ``zoo_grounding.sam.Sam`` under ``target``."""
    image, decoder = "image_encoder.", "mask_decoder."
    two_way = "transformer.layers.{i}."
    rules = [
        rename(f"{image}pos_embed", "image_encoder.pos_embed"),
        rename(f"{image}patch_embed.proj.{{p}}", "image_encoder.patch_embed.projection.{p}"),
        rename(f"{image}blocks.{{i}}.norm1.{{p}}", "image_encoder.layers.{i}.layer_norm1.{p}"),
        rename(f"{image}blocks.{{i}}.norm2.{{p}}", "image_encoder.layers.{i}.layer_norm2.{p}"),
        rename(f"{image}blocks.{{i}}.attn.{{**}}", "image_encoder.layers.{i}.attn.{**}"),
        rename(f"{image}blocks.{{i}}.mlp.{{q}}.{{p}}", "image_encoder.layers.{i}.mlp.{q}.{p}"),
        rename(f"{image}neck.0.{{p}}", "image_encoder.neck.conv1.{p}"),
        rename(f"{image}neck.1.{{p}}", "image_encoder.neck.layer_norm1.{p}"),
        rename(f"{image}neck.2.{{p}}", "image_encoder.neck.conv2.{p}"),
        rename(f"{image}neck.3.{{p}}", "image_encoder.neck.layer_norm2.{p}"),
        rename("prompt_encoder.pe_layer.positional_encoding_gaussian_matrix", "positions.positional_embedding"),
        rename("prompt_encoder.no_mask_embed.weight", "no_mask.weight"),
        rename(f"{decoder}iou_token.weight", "decoder.iou_token.weight"),
        rename(f"{decoder}mask_tokens.weight", "decoder.mask_tokens.weight"),
        rename(f"{decoder}output_upscaling.0.{{p}}", "decoder.upscale_conv1.{p}"),
        rename(f"{decoder}output_upscaling.1.{{p}}", "decoder.upscale_layer_norm.{p}"),
        rename(f"{decoder}output_upscaling.3.{{p}}", "decoder.upscale_conv2.{p}"),
        *(
            rename(
                f"{decoder}output_hypernetworks_mlps.{{i}}.{theirs}.{{p}}",
                f"decoder.output_hypernetworks_mlps.{{i}}.{ours}.{{p}}",
            )
            for theirs, ours in _LAYERS.items()
        ),
        *(
            rename(f"{decoder}iou_prediction_head.{theirs}.{{p}}", f"decoder.iou_prediction_head.{ours}.{{p}}")
            for theirs, ours in _LAYERS.items()
        ),
        *(rename(f"{decoder}{two_way}norm{n}.{{p}}", f"decoder.{two_way}layer_norm{n}.{{p}}") for n in (1, 2, 3, 4)),
        rename(f"{decoder}{two_way}mlp.{{q}}.{{p}}", f"decoder.{two_way}mlp.{{q}}.{{p}}"),
        *(
            rename(f"{decoder}{two_way}{name}.{{q}}.{{p}}", f"decoder.{two_way}{name}.{{q}}.{{p}}")
            for name in ("self_attn", "cross_attn_token_to_image", "cross_attn_image_to_token")
        ),
        rename(
            f"{decoder}transformer.final_attn_token_to_image.{{q}}.{{p}}",
            "decoder.transformer.final_attn_token_to_image.{q}.{p}",
        ),
        rename(f"{decoder}transformer.norm_final_attn.{{p}}", "decoder.transformer.layer_norm_final_attn.{p}"),
    ]
    return KeyMap(*(drop(name) for name in _UNREAD), *rules).under(source, target)


def keymap(recipe: Recipe) -> KeyMap:
    """The map of a whole checkpoint: LLaVA's names, the projection of states, and SAM below ``model.visual_model.``."""
    encoder: Any = recipe.parts["encoder"][1]
    tower = llava.tower(kept_blocks(encoder.layer, encoder.depth), encoder.depth)
    return sam("model.visual_model.") + HIDDEN + tower + LANGUAGE


def from_state(recipe: Recipe, state: Mapping[str, Any]) -> Official | None:
    """A released LISA, its LoRA merged (``merge_lora_weights_and_save_hf_model.py``); None for the zoo's own names.

    Checkpoints leave CLIP's tower out, since it never learned: it then stays new, and ``init`` or CLIP's own file fills
    it. The tables of the language model have rows for ``[SEG]``, ``<im_start>`` and ``<im_end>`` behind Llama's.
    """
    if any(name.startswith(_OURS) for name in state):
        return None
    held = any("vision_tower" in name for name in state)
    return Official(recipe=recipe, keymap=keymap(recipe), form="LISA", new=() if held else ("encoder.{**}",))
