"""Self-attention of a diffusers U-Net (``attn1``), which StoryDiffusion's consistent attention replaces."""

from __future__ import annotations

from zoo.nn.config import TrunkConfig
from zoo.weights.keymaps import KeyMap, rename

ATTENTION = KeyMap(
    rename("to_q.{p}", "q.{p}"),
    rename("to_k.{p}", "k.{p}"),
    rename("to_v.{p}", "v.{p}"),
    rename("to_out.0.{p}", "out.{p}"),
)
"""diffusers' ``Attention`` to :class:`zoo.nn.attention.Attention`."""


def attention_config(*, width: int, heads: int) -> TrunkConfig:
    """Return what :class:`zoo.nn.attention.Attention` reads of a config: q, k, v without biases, an output with one."""
    return TrunkConfig(width=width, depth=1, heads=heads, ffn=width, bias="", out_bias=True, blocks=("s",))
