"""BLIP-2, stage 2: transformers' and LAVIS' names to a bridge's."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.weights.keymaps import KeyMap, drop, eva, qformer, regroup, rename, split


def _without_k(bias: Tensor) -> tuple[Tensor, Tensor]:
    """[q, k, v] -> q, v: a bias of the keys moves all scores of a row alike, and the softmax does not see it."""
    q, _, v = bias.chunk(3)
    return q.contiguous(), v.contiguous()


def _with_k(q: Tensor, v: Tensor) -> Tensor:
    return torch.cat([q, torch.zeros_like(q), v])


_THEIRS, _OURS = "vision_model.encoder.layers.{i}.", "encoder.trunk.layers.{i}."

HF_VISION = KeyMap(
    rename("vision_model.embeddings.class_embedding", "encoder.embed.cls"),
    rename("vision_model.embeddings.position_embedding", "encoder.embed.positions"),
    rename("vision_model.embeddings.patch_embedding.{p}", "encoder.embed.patch.{p}"),
    rename(f"{_THEIRS}layer_norm1.{{p}}", f"{_OURS}attn_norm.{{p}}"),
    split(f"{_THEIRS}self_attn.qkv.weight", [f"{_OURS}attn.{p}.weight" for p in "qkv"]),
    regroup(f"{_THEIRS}self_attn.qkv.bias", [f"{_OURS}attn.q.bias", f"{_OURS}attn.v.bias"], _without_k, _with_k),
    rename(f"{_THEIRS}self_attn.projection.{{p}}", f"{_OURS}attn.out.{{p}}"),
    rename(f"{_THEIRS}layer_norm2.{{p}}", f"{_OURS}ffn_norm.{{p}}"),
    rename(f"{_THEIRS}mlp.fc1.{{p}}", f"{_OURS}ffn.up.{{p}}"),
    rename(f"{_THEIRS}mlp.fc2.{{p}}", f"{_OURS}ffn.down.{{p}}"),
    rename("vision_model.post_layernorm.{p}", "connector.ln_vision.{p}"),
)

HF = (
    HF_VISION
    + KeyMap(rename("query_tokens", "connector.query_tokens"))
    + qformer.keymap().under("qformer.", "connector.")
    + KeyMap(
        rename("language_projection.{p}", "connector.proj.{p}"),
        rename("language_model.{**}", "decoder.lm.{**}"),
    )
)
"""``Blip2ForConditionalGeneration``, whose language model keeps its own names."""


def lavis(depth: int, blocks: int, language: str = "opt") -> KeyMap:
    """The map of LAVIS' ``Blip2OPT`` and, with ``language="t5"``, ``Blip2T5``.

    Args:
        depth: Blocks of the image tower that are kept; the last of the ``blocks`` in a file of EVA-CLIP is not.
    """
    return (
        KeyMap(*(drop(f"visual_encoder.blocks.{i}.{{**}}") for i in range(depth, blocks)))
        + eva.keymap("encoder.trunk.", "encoder.embed.").under("visual_encoder.")
        + KeyMap(
            rename("ln_vision.{p}", "connector.ln_vision.{p}"),
            rename("query_tokens", "connector.query_tokens"),
        )
        + qformer.keymap(lavis=True).under("Qformer.bert.", "connector.")
        + KeyMap(
            rename(f"{language}_proj.{{p}}", "connector.proj.{p}"),
            rename(f"{language}_model.{{**}}", "decoder.lm.{**}"),
        )
    )


STAGE1 = (
    "Qformer.cls.{**}",
    "Qformer.bert.embeddings.word_embeddings.{**}",
    "Qformer.bert.embeddings.position_embeddings.{**}",
    "Qformer.bert.encoder.layer.{i}.intermediate.{**}",
    "Qformer.bert.encoder.layer.{i}.output.{**}",
    "vision_proj.{**}",
    "text_proj.{**}",
    "itm_head.{**}",
    "temp",
)
"""What stage 1 trains and stage 2 leaves: the text branch and the heads."""
