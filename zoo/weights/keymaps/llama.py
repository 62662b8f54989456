"""Llama of transformers (and everything with its layout): trunk, embedding, head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoo.nn.config import TrunkConfig
from zoo.weights.keymaps import KeyMap, drop, rename

TRUNK = KeyMap(
    rename("layers.{i}.input_layernorm.{p}", "layers.{i}.attn_norm.{p}"),
    rename("layers.{i}.self_attn.q_proj.{p}", "layers.{i}.attn.q.{p}"),
    rename("layers.{i}.self_attn.k_proj.{p}", "layers.{i}.attn.k.{p}"),
    rename("layers.{i}.self_attn.v_proj.{p}", "layers.{i}.attn.v.{p}"),
    rename("layers.{i}.self_attn.o_proj.{p}", "layers.{i}.attn.out.{p}"),
    rename("layers.{i}.post_attention_layernorm.{p}", "layers.{i}.ffn_norm.{p}"),
    rename("layers.{i}.mlp.gate_proj.{p}", "layers.{i}.ffn.gate.{p}"),
    rename("layers.{i}.mlp.up_proj.{p}", "layers.{i}.ffn.up.{p}"),
    rename("layers.{i}.mlp.down_proj.{p}", "layers.{i}.ffn.down.{p}"),
    rename("norm.{p}", "final_norm.{p}"),
    drop("layers.{i}.self_attn.rotary_emb.inv_freq"),
)


def keymap(trunk: str = "trunk.", embed: str = "embed.tokens.", head: str = "head.") -> KeyMap:
    """Return the map of a whole ``LlamaForCausalLM`` to a model whose parts have these prefixes."""
    return TRUNK.under("model.", trunk) + KeyMap(
        rename("model.embed_tokens.{p}", f"{embed}{{p}}"),
        rename("lm_head.{p}", f"{head}{{p}}"),
    )


def trunk_config(hf: Mapping[str, Any]) -> TrunkConfig:
    """Return the trunk of a transformers Llama ``config.json``."""
    rope = hf.get("rope_parameters") or {}
    return TrunkConfig(
        width=hf["hidden_size"],
        depth=hf["num_hidden_layers"],
        heads=hf["num_attention_heads"],
        kv_heads=hf.get("num_key_value_heads"),
        head_dim=hf.get("head_dim"),
        ffn=hf["intermediate_size"],
        norm="rms",
        eps=hf.get("rms_norm_eps", 1e-6),
        bias="qkv" if hf.get("attention_bias") else "",
        out_bias=bool(hf.get("attention_bias")),
        ffn_bias=bool(hf.get("mlp_bias")),
        act="silu",
        gated=True,
        rope=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
        rope_theta=rope.get("rope_theta") or hf.get("rope_theta") or 10000.0,
    )


def ffn_width(width: int, multiple_of: int = 256, multiplier: float | None = None) -> int:
    """Return the hidden width of the released Llama code: 2/3 of 4·width, times ``multiplier``, rounded up.

    Chameleon, LlamaGen and Transfusion count it the same way.
    """
    hidden = 8 * width // 3
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return -(-hidden // multiple_of) * multiple_of
