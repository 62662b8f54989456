"""ChatGLM-6B as VisualGLM carries it (the release's modeling_chatglm.py): residuals that carry the norm, rotary on two
axes, a fused matrix that holds q, k and v inside each head."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.weights.keymaps import KeyMap, Rule, drop, regroup, rename, split
from zoo.weights.keymaps.blip2 import _with_k, _without_k
from zoo.weights.keymaps.rotary import axes_to_two_halves, two_halves_to_axes


def _fused(heads: int) -> Rule:
    """[heads, (q, k, v), head] rows, each half of a head rotated by a position of its own."""

    def to(fused: Tensor) -> tuple[Tensor, ...]:
        head = fused.shape[0] // (3 * heads)
        q, k, v = (part.flatten(0, 1) for part in fused.reshape(heads, 3, head, *fused.shape[1:]).unbind(1))
        return two_halves_to_axes(q, head), two_halves_to_axes(k, head), v

    def back(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        head = q.shape[0] // heads
        parts = axes_to_two_halves(q, head), axes_to_two_halves(k, head), v
        return torch.stack([part.reshape(heads, head, *q.shape[1:]) for part in parts], 1).flatten(0, 2)

    return regroup(
        "layers.{i}.attention.query_key_value.{p}", [f"layers.{{i}}.attn.{letter}.{{p}}" for letter in "qkv"], to, back
    )


def trunk_keymap(heads: int) -> KeyMap:
    """Return the map of ``transformer.layers`` and ``final_layernorm`` to a trunk of ``heads`` heads."""
    return KeyMap(
        rename("layers.{i}.input_layernorm.{p}", "layers.{i}.attn_norm.{p}"),
        _fused(heads),
        rename("layers.{i}.attention.dense.{p}", "layers.{i}.attn.out.{p}"),
        rename("layers.{i}.post_attention_layernorm.{p}", "layers.{i}.ffn_norm.{p}"),
        rename("layers.{i}.mlp.dense_h_to_4h.{p}", "layers.{i}.ffn.up.{p}"),
        rename("layers.{i}.mlp.dense_4h_to_h.{p}", "layers.{i}.ffn.down.{p}"),
        rename("final_layernorm.{p}", "final_norm.{p}"),
        drop("layers.{i}.attention.rotary_emb.inv_freq"),  # computed, and ignored on loading in the release too
    )


_FUSED, _QKV = "layers.{i}.attention.query_key_value", "layers.{i}.attn."
_OUT_AND_MLP = (
    rename("layers.{i}.attention.dense.{p}", "layers.{i}.attn.out.{p}"),
    rename("layers.{i}.mlp.dense_h_to_4h.{p}", "layers.{i}.ffn.up.{p}"),
    rename("layers.{i}.mlp.dense_4h_to_h.{p}", "layers.{i}.ffn.down.{p}"),
)


def _batched(tensor: Tensor) -> Tensor:
    return tensor[None]


def _single(tensor: Tensor) -> Tensor:
    return tensor[0]


VIT = KeyMap(
    rename("transformer.word_embeddings.weight", "encoder.embed.cls", _batched, _single),  # a table of one token, CLS
    rename("transformer.position_embeddings.weight", "encoder.embed.positions", _batched, _single),
    rename("mixins.patch_embedding.proj.{p}", "encoder.embed.patch.{p}"),
    rename("mixins.cls.ln_vision.{p}", "connector.ln_vision.{p}"),
) + KeyMap(
    rename("layers.{i}.input_layernorm.{p}", "layers.{i}.attn_norm.{p}"),
    split(f"{_FUSED}.weight", [f"{_QKV}{letter}.weight" for letter in "qkv"]),
    regroup(f"{_FUSED}.bias", [f"{_QKV}q.bias", f"{_QKV}v.bias"], _without_k, _with_k),
    rename("layers.{i}.post_attention_layernorm.{p}", "layers.{i}.ffn_norm.{p}"),
    *_OUT_AND_MLP,
).under("transformer.", "encoder.trunk.")
"""SwissArmyTransformer's EVA ViT-g, and ln_vision, which it keeps in the place of a classifier."""


def qformer_keymap(depth: int) -> KeyMap:
    """Return the map of SwissArmyTransformer's Q-Former of ``depth`` layers.

    Its "post" order puts a layer's norms before its branches and lets the residual carry the normed rows, so that every
    norm of BERT stands in the layer after: the first one is the norm of the queries, the last one is the final norm.
    """
    norms = [rename("layers.0.input_layernorm.{p}", "norm.{p}")]
    for i in range(1, depth):
        norms.append(rename(f"layers.{i}.input_layernorm.{{p}}", f"trunk.layers.{i - 1}.ffn_norm.{{p}}"))
    norms.append(rename("final_layernorm.{p}", f"trunk.layers.{depth - 1}.ffn_norm.{{p}}"))
    layers = KeyMap(
        split(f"{_FUSED}.{{p}}", [f"{_QKV}{letter}.{{p}}" for letter in "qkv"]),
        rename("layers.{i}.post_attention_layernorm.{p}", "layers.{i}.attn_norm.{p}"),
        rename("layers.{i}.cross_attention.query.{p}", "layers.{i}.cross.q.{p}"),
        split("layers.{i}.cross_attention.key_value.{p}", [f"layers.{{i}}.cross.{letter}.{{p}}" for letter in "kv"]),
        rename("layers.{i}.cross_attention.dense.{p}", "layers.{i}.cross.out.{p}"),
        rename("layers.{i}.post_cross_attention_layernorm.{p}", "layers.{i}.cross_norm.{p}"),
        *_OUT_AND_MLP,
    ).under("", "trunk.")
    queries = KeyMap(rename("word_embeddings.weight", "query_tokens", _batched, _single))
    return (KeyMap(*norms) + layers + queries).under("transformer.", "connector.")


def keymap(heads: int, qformer_depth: int = 12, *, sat: bool = False) -> KeyMap:
    """Return the map of a release to a bridge of ``vit``, ``qformer`` and ``glm-lm``.

    Args:
        heads: attention heads of the language model.
        qformer_depth: layers of the Q-Former.
        sat: the names of SwissArmyTransformer's file, not of the hub's.
    """
    image, head = ("mixins.eva.model.", "mixins.chatglm-final.") if sat else ("image_encoder.", "")
    return (
        trunk_keymap(heads).under("transformer.", "decoder.trunk.")
        + KeyMap(
            rename("transformer.word_embeddings.{p}", "decoder.embedding.tokens.{p}"),
            rename(f"{head}lm_head.{{p}}", "decoder.lm_head.{p}"),
            rename(f"{image}glm_proj.{{p}}", "connector.proj.{p}"),
            drop("mixins.chatglm-attn.rotary_emb.inv_freq"),
        )
        + VIT.under(f"{image}vit.")
        + qformer_keymap(qformer_depth).under(f"{image}qformer.")
    )
