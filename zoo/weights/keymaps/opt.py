"""OPT of transformers on the trunk: a proof that it fits. Bridges read text with transformers' own class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoo.errors import ConfigError
from zoo.nn.config import Act, TrunkConfig
from zoo.weights.keymaps import KeyMap, rename, tie

FIRST_POSITION = 2
"""Row of position 0 in the position table."""

_ACTS: dict[str, Act] = {"relu": "relu", "gelu": "gelu"}

TRUNK = KeyMap(
    rename("layers.{i}.self_attn_layer_norm.{p}", "layers.{i}.attn_norm.{p}"),
    *(rename(f"layers.{{i}}.self_attn.{c}_proj.{{p}}", f"layers.{{i}}.attn.{c}.{{p}}") for c in "qkv"),
    rename("layers.{i}.self_attn.out_proj.{p}", "layers.{i}.attn.out.{p}"),
    rename("layers.{i}.final_layer_norm.{p}", "layers.{i}.ffn_norm.{p}"),
    rename("layers.{i}.fc1.{p}", "layers.{i}.ffn.up.{p}"),
    rename("layers.{i}.fc2.{p}", "layers.{i}.ffn.down.{p}"),
    rename("final_layer_norm.{p}", "final_norm.{p}"),
)


def keymap(trunk: str = "trunk.", embed: str = "embed.") -> KeyMap:
    """Return the map of an ``OPTForCausalLM`` whose head is the token table."""
    return (
        KeyMap(tie("lm_head.weight", "model.decoder.embed_tokens.weight"))
        + KeyMap(
            rename("model.decoder.embed_tokens.{p}", f"{embed}tokens.{{p}}"),
            rename("model.decoder.embed_positions.{p}", f"{embed}positions.{{p}}"),
        )
        + TRUNK.under("model.decoder.", trunk)
    )


def trunk_config(hf: Mapping[str, Any]) -> TrunkConfig:
    """Return the trunk of a transformers OPT ``config.json``.

    Raises:
        ConfigError: the 350 million model, whose norms and widths are its own.
    """
    if (
        not hf.get("do_layer_norm_before", True)
        or hf.get("word_embed_proj_dim", hf["hidden_size"]) != hf["hidden_size"]
    ):
        raise ConfigError("OPT with norms behind its layers or a projected embedding (350m) is not mapped; use another")
    return TrunkConfig(
        width=hf["hidden_size"],
        depth=hf["num_hidden_layers"],
        heads=hf["num_attention_heads"],
        ffn=hf["ffn_dim"],
        eps=1e-5,
        act=_ACTS[hf.get("activation_function") or hf.get("activation") or "relu"],
    )
