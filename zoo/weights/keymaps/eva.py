"""EVA ViT of the BLIP-2 family: fused qkv without a bias, q and v with one of their own, no output norm."""

from __future__ import annotations

from zoo.nn.config import TrunkConfig
from zoo.weights.keymaps import KeyMap, rename, split

TRUNK = KeyMap(
    rename("blocks.{i}.norm1.{p}", "layers.{i}.attn_norm.{p}"),
    split(
        "blocks.{i}.attn.qkv.weight",
        ["layers.{i}.attn.q.weight", "layers.{i}.attn.k.weight", "layers.{i}.attn.v.weight"],
    ),
    rename("blocks.{i}.attn.q_bias", "layers.{i}.attn.q.bias"),
    rename("blocks.{i}.attn.v_bias", "layers.{i}.attn.v.bias"),
    rename("blocks.{i}.attn.proj.{p}", "layers.{i}.attn.out.{p}"),
    rename("blocks.{i}.norm2.{p}", "layers.{i}.ffn_norm.{p}"),
    rename("blocks.{i}.mlp.fc1.{p}", "layers.{i}.ffn.up.{p}"),
    rename("blocks.{i}.mlp.fc2.{p}", "layers.{i}.ffn.down.{p}"),
)
STEM = KeyMap(
    rename("cls_token", "cls"),
    rename("pos_embed", "positions"),
    rename("patch_embed.proj.{p}", "patch.{p}"),
)


def keymap(trunk: str = "trunk.", embed: str = "embed.") -> KeyMap:
    """Return the map of ``visual_encoder`` to a patch embedding and a trunk."""
    return STEM.under("", embed) + TRUNK.under("", trunk)


def trunk_config(*, width: int, depth: int, heads: int, ffn: int, drop_path: float = 0.0) -> TrunkConfig:
    """Return the trunk of EVA ViT-g (LAVIS eva_vit.py); ``depth`` counts the blocks that are kept."""
    return TrunkConfig(
        width=width, depth=depth, heads=heads, ffn=ffn, eps=1e-6, bias="qv", final_norm=False, drop_path=drop_path
    )
