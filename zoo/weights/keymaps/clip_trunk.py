"""CLIP's vision tower of transformers on the zoo's trunk, for systems that read several of its layers or hide patches
(PixelLM). Whole towers stay with open_clip: see :mod:`zoo.weights.keymaps.clip`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoo.nn.config import Act, TrunkConfig
from zoo.weights.keymaps import KeyMap, drop, rename

_ACTS: dict[str, Act] = {"quick_gelu": "quick_gelu", "gelu": "gelu"}


def keymap(trunk: str = "trunk.", embed: str = "embed.") -> KeyMap:
    """Return the map of ``vision_model`` to a patch embedding (no patch bias, norm of eps 1e-5) and a trunk; its final
    norm is ``post_layernorm``, for the pooled token only: run the trunk with ``final_norm=False`` for patches."""
    return KeyMap(
        drop("embeddings.position_ids"),
        rename("embeddings.class_embedding", f"{embed}cls", lambda t: t[None, None], lambda t: t[0, 0]),
        rename("embeddings.patch_embedding.{p}", f"{embed}patch.{{p}}"),
        rename("embeddings.position_embedding.weight", f"{embed}positions", lambda t: t[None], lambda t: t[0]),
        rename("pre_layrnorm.{p}", f"{embed}norm.{{p}}"),  # spelt so
        rename("encoder.layers.{i}.layer_norm1.{p}", f"{trunk}layers.{{i}}.attn_norm.{{p}}"),
        *(
            rename(f"encoder.layers.{{i}}.self_attn.{letter}_proj.{{p}}", f"{trunk}layers.{{i}}.attn.{letter}.{{p}}")
            for letter in "qkv"
        ),
        rename("encoder.layers.{i}.self_attn.out_proj.{p}", f"{trunk}layers.{{i}}.attn.out.{{p}}"),
        rename("encoder.layers.{i}.layer_norm2.{p}", f"{trunk}layers.{{i}}.ffn_norm.{{p}}"),
        rename("encoder.layers.{i}.mlp.fc1.{p}", f"{trunk}layers.{{i}}.ffn.up.{{p}}"),
        rename("encoder.layers.{i}.mlp.fc2.{p}", f"{trunk}layers.{{i}}.ffn.down.{{p}}"),
        rename("post_layernorm.{p}", f"{trunk}final_norm.{{p}}"),
    )


def trunk_config(hf: Mapping[str, Any]) -> TrunkConfig:
    """Return the trunk of a transformers CLIP ``vision_config``; OpenAI's towers have QuickGELU."""
    return TrunkConfig(
        width=hf["hidden_size"],
        depth=hf["num_hidden_layers"],
        heads=hf["num_attention_heads"],
        ffn=hf["intermediate_size"],
        eps=hf.get("layer_norm_eps", 1e-5),
        act=_ACTS[hf.get("hidden_act", "quick_gelu")],
    )
