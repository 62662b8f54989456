"""CogVLM in the layout of the hub: visual experts beside the language weights, EVA2-E vision, a gated adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from zoo.nn.config import TrunkConfig
from zoo.weights.keymaps import KeyMap, Rule, drop, rename, split

EXPERTS = {"language": 0, "vision": 1}
"""Expert numbers, which are the modality ids. The begin-of-image token is visual, the end-of-image token is not."""


def _expert(name: str, number: int) -> tuple[Rule, ...]:
    attention = f"layers.{{i}}.self_attn.{name}_expert"
    return (
        split(
            f"{attention}_query_key_value.{{p}}",
            [f"layers.{{i}}.attn.{part}.{number}.{{p}}" for part in "qkv"],
        ),
        rename(f"{attention}_dense.{{p}}", f"layers.{{i}}.attn.out.{number}.{{p}}"),
        *(
            rename(f"layers.{{i}}.mlp.{name}_mlp.{part}_proj.{{p}}", f"layers.{{i}}.ffn.{number}.{part}.{{p}}")
            for part in ("gate", "up", "down")
        ),
    )


TRUNK = KeyMap(
    rename("layers.{i}.input_layernorm.{p}", "layers.{i}.attn_norm.{p}"),
    *(rule for name, number in EXPERTS.items() for rule in _expert(name, number)),
    rename("layers.{i}.post_attention_layernorm.{p}", "layers.{i}.ffn_norm.{p}"),
    rename("norm.{p}", "final_norm.{p}"),
    drop("layers.{i}.self_attn.rotary_emb.inv_freq"),
)
VIT = KeyMap(
    rename("layers.{i}.input_layernorm.{p}", "layers.{i}.attn_norm.{p}"),
    split("layers.{i}.attention.query_key_value.{p}", [f"layers.{{i}}.attn.{part}.{{p}}" for part in "qkv"]),
    rename("layers.{i}.attention.dense.{p}", "layers.{i}.attn.out.{p}"),
    rename("layers.{i}.post_attention_layernorm.{p}", "layers.{i}.ffn_norm.{p}"),
    rename("layers.{i}.mlp.fc1.{p}", "layers.{i}.ffn.up.{p}"),
    rename("layers.{i}.mlp.fc2.{p}", "layers.{i}.ffn.down.{p}"),
)


def _batched(tensor: Tensor) -> Tensor:
    return tensor[None]


def _single(tensor: Tensor) -> Tensor:
    return tensor[0]


STEM = KeyMap(
    rename("cls_embedding", "cls", _batched, _single),
    rename("position_embedding.weight", "positions", _batched, _single),
    rename("proj.{p}", "patch.{p}"),
)
ADAPTER = KeyMap(
    rename("linear_proj.{p}", "linear.{p}"),
    rename("norm1.{p}", "norm.{p}"),
    rename("gate_proj.{p}", "ffn.gate.{p}"),
    rename("dense_h_to_4h.{p}", "ffn.up.{p}"),
    rename("dense_4h_to_h.{p}", "ffn.down.{p}"),
)


def keymap() -> KeyMap:
    """Return the map to ``stem``, ``vit``, ``adapter``, ``boi``, ``eoi``, ``trunk``, ``embed`` and ``head``."""
    return (
        STEM.under("model.vision.patch_embedding.", "stem.")
        + VIT.under("model.vision.transformer.", "vit.")
        + ADAPTER.under("model.vision.linear_proj.", "adapter.")
        + TRUNK.under("model.", "trunk.")
        + KeyMap(
            rename("model.vision.boi", "boi"),
            rename("model.vision.eoi", "eoi"),
            rename("model.embed_tokens.{p}", "embed.tokens.{p}"),
            rename("lm_head.{p}", "head.{p}"),
        )
    )


def trunk_config(
    *, width: int, depth: int, heads: int, ffn: int, eps: float = 1e-5, rope_theta: float = 10000.0
) -> TrunkConfig:
    """Return the language model: Llama whose matrices exist twice and whose norms are shared.

    All patches of an image share one position id, and the next token takes the last id + 1.
    """
    return TrunkConfig(
        width=width,
        depth=depth,
        heads=heads,
        ffn=ffn,
        norm="rms",
        eps=eps,
        bias="",
        out_bias=False,
        ffn_bias=False,
        act="silu",
        gated=True,
        rope=width // heads,
        rope_theta=rope_theta,
        routed=("qkv", "out", "ffn"),
        routes=(0, 1),
    )


def vit_config(vision: Mapping[str, Any]) -> TrunkConfig:
    """Return the trunk of the ``vision_config`` of the hub: norms on the branch outputs, none at the end."""
    return TrunkConfig(
        width=vision["hidden_size"],
        depth=vision["num_hidden_layers"],
        heads=vision["num_attention_heads"],
        ffn=vision["intermediate_size"],
        eps=vision["layer_norm_eps"],
        act=vision["hidden_act"],
        placement="branch",
        final_norm=False,
    )
