"""Meta-Transformer (the release's encoder snippet and Hyper-spectrum/metatransformer.py): timm blocks without a final
norm, frozen, behind one tokenizer per modality."""

from __future__ import annotations

from zoo.nn.config import TrunkConfig
from zoo.weights.keymaps import KeyMap, rename, vit

ENCODER = vit.BLOCK.under("", "layers.")
"""The released encoder files (``0.norm1.weight``, ...) to a trunk."""
IMAGE = KeyMap(rename("proj.{p}", "patch.{p}"))
"""Data2Seq's image tokenizer to a patch embedding without CLS and positions."""
HYPER = KeyMap(
    rename("cls_token", "stem.cls"),
    rename("pos_embedding", "stem.positions"),
    rename("patch_to_embedding.{p}", "stem.patch.{p}"),
    rename("mlp_head.0.{p}", "norm.{p}"),
    rename("mlp_head.1.{p}", "head.{p}"),
) + ENCODER.under("transformer.", "trunk.")
"""The hyper-spectral classifier to ``stem`` (``patch``, ``cls``, ``positions``), ``trunk``, ``norm``, ``head``."""


def trunk_config(*, width: int, depth: int, heads: int, ffn: int | None = None) -> TrunkConfig:
    """Return the shared encoder: nn.LayerNorm's eps of 1e-5, no final norm."""
    return vit.trunk_config(width=width, depth=depth, heads=heads, ffn=ffn, eps=1e-5, final_norm=False)
