"""Phi of transformers, which Show-o is made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoo.nn.config import TrunkConfig
from zoo.weights.keymaps import KeyMap, rename

TRUNK = KeyMap(
    rename("layers.{i}.input_layernorm.{p}", "layers.{i}.attn_norm.{p}"),
    rename("layers.{i}.self_attn.q_proj.{p}", "layers.{i}.attn.q.{p}"),
    rename("layers.{i}.self_attn.k_proj.{p}", "layers.{i}.attn.k.{p}"),
    rename("layers.{i}.self_attn.v_proj.{p}", "layers.{i}.attn.v.{p}"),
    rename("layers.{i}.self_attn.dense.{p}", "layers.{i}.attn.out.{p}"),
    rename("layers.{i}.self_attn.q_layernorm.{p}", "layers.{i}.attn.q_norm.{p}"),
    rename("layers.{i}.self_attn.k_layernorm.{p}", "layers.{i}.attn.k_norm.{p}"),
    rename("layers.{i}.mlp.fc1.{p}", "layers.{i}.ffn.up.{p}"),
    rename("layers.{i}.mlp.fc2.{p}", "layers.{i}.ffn.down.{p}"),
    rename("final_layernorm.{p}", "final_norm.{p}"),
)


def keymap(trunk: str = "trunk.", embed: str = "embed.tokens.", head: str = "head.") -> KeyMap:
    """Return the map of a whole ``PhiForCausalLM`` to a model whose parts have these prefixes."""
    return TRUNK.under("model.", trunk) + KeyMap(
        rename("model.embed_tokens.{p}", f"{embed}{{p}}"),
        rename("lm_head.{p}", f"{head}{{p}}"),
    )


def trunk_config(hf: Mapping[str, Any]) -> TrunkConfig:
    """Return the trunk of a transformers Phi ``config.json``: one norm, attention and FFN in parallel."""
    rope = hf.get("rope_parameters") or {}
    head = hf["hidden_size"] // hf["num_attention_heads"]
    partial = rope.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 0.5
    return TrunkConfig(
        width=hf["hidden_size"],
        depth=hf["num_hidden_layers"],
        heads=hf["num_attention_heads"],
        kv_heads=hf.get("num_key_value_heads"),
        ffn=hf["intermediate_size"],
        eps=hf.get("layer_norm_eps", 1e-5),
        placement="parallel",
        act="gelu_tanh",
        rope=int(head * partial),
        rope_theta=rope.get("rope_theta") or hf.get("rope_theta") or 10000.0,
        qk_norm="layer" if hf.get("qk_layernorm") else "none",
    )
