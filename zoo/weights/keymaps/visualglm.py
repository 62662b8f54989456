"""ChatGLM-6B as VisualGLM carries it (the release's modeling_chatglm.py): residuals that carry the norm, rotary on two
axes, a fused matrix that holds q, k and v inside each head."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zoo.nn.config import TrunkConfig
from zoo.weights.keymaps import KeyMap, Rule, drop, regroup, rename
from zoo.weights.keymaps.rotary import axes_to_two_halves, two_halves_to_axes

RESIDUAL_SCALE = math.sqrt(2 * 28)
"""alpha of a released class default: it does not follow the depth of the model."""


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


def keymap(heads: int) -> KeyMap:
    """Return the map of the language half to parts ``trunk``, ``embed``, ``head`` and ``projector``."""
    return trunk_keymap(heads).under("transformer.", "trunk.") + KeyMap(
        rename("transformer.word_embeddings.{p}", "embed.tokens.{p}"),
        rename("lm_head.{p}", "head.{p}"),
        rename("image_encoder.glm_proj.{p}", "projector.{p}"),
    )


def trunk_config(*, width: int, depth: int, heads: int, ffn: int | None = None, eps: float = 1e-5) -> TrunkConfig:
    """Return ChatGLM's trunk: norm(x)·sqrt(56) + f(norm(x)), rotary on (position, block position)."""
    return TrunkConfig(
        width=width,
        depth=depth,
        heads=heads,
        ffn=4 * width if ffn is None else ffn,
        eps=eps,
        placement="scaled",
        residual_scale=RESIDUAL_SCALE,
        act="gelu_tanh",
        rope=width // heads,
        rope_axes=2,
        rope_half=True,
    )
