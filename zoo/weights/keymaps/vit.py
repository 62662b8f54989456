"""ViT of timm (ALBEF, BLIP, Meta-Transformer and others): fused qkv with a bias, final norm on all tokens."""

from __future__ import annotations

from zoo.nn.config import TrunkConfig
from zoo.weights.keymaps import KeyMap, rename, split
from zoo.weights.keymaps.eva import STEM

BLOCK = KeyMap(
    rename("{i}.norm1.{p}", "{i}.attn_norm.{p}"),
    split("{i}.attn.qkv.{p}", ["{i}.attn.q.{p}", "{i}.attn.k.{p}", "{i}.attn.v.{p}"]),
    rename("{i}.attn.proj.{p}", "{i}.attn.out.{p}"),
    rename("{i}.norm2.{p}", "{i}.ffn_norm.{p}"),
    rename("{i}.mlp.fc1.{p}", "{i}.ffn.up.{p}"),
    rename("{i}.mlp.fc2.{p}", "{i}.ffn.down.{p}"),
)
"""The layers alone, numbered."""


def keymap(trunk: str = "trunk.", embed: str = "embed.") -> KeyMap:
    """Return the map of a timm ``VisionTransformer`` without head to a patch embedding and a trunk."""
    return (
        STEM.under("", embed)
        + BLOCK.under("blocks.", f"{trunk}layers.")
        + KeyMap(rename("norm.{p}", f"{trunk}final_norm.{{p}}"))
    )


def trunk_config(
    *,
    width: int,
    depth: int,
    heads: int,
    ffn: int | None = None,
    eps: float = 1e-6,
    final_norm: bool = True,
    drop_path: float = 0.0,
) -> TrunkConfig:
    """Return the trunk of a timm ViT (models/vit.py of ALBEF and BLIP); ``ffn`` is 4 times the width by default."""
    return TrunkConfig(
        width=width,
        depth=depth,
        heads=heads,
        ffn=4 * width if ffn is None else ffn,
        eps=eps,
        final_norm=final_norm,
        drop_path=drop_path,
    )
