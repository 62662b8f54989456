"""Transfusion: a Llama in transformers' names with a linear patch codec (there are no released weights)."""

from __future__ import annotations

from typing import Any

from zoo.nn.config import TrunkConfig
from zoo.weights.keymaps import KeyMap, llama, rename


def keymap() -> KeyMap:
    """Return the map to ``trunk``, ``embed``, ``head``, ``patch_in`` and ``patch_out``."""
    return llama.keymap() + KeyMap(
        rename("patch_in.{p}", "patch_in.{p}"),
        rename("patch_out.{p}", "patch_out.{p}"),
    )


def trunk_config(
    *,
    width: int,
    depth: int,
    heads: int,
    ffn: int | None = None,
    kv_heads: int | None = None,
    eps: float = 1e-5,
    rope_theta: float = 10000.0,
    **training: Any,
) -> TrunkConfig:
    """Return the trunk of arXiv 2408.11039, section 4.1: RMSNorm before, SwiGLU, rotary positions, no biases.

    Args:
        width: D.
        depth: layers.
        heads: attention heads.
        ffn: hidden width; 8·D/3 rounded up to a multiple of 256 by default, which gives the parameters of Table 2.
        kv_heads: heads of keys and values; ``heads`` by default, as in the paper.
        eps: of the norms.
        rope_theta: base of the rotary angles.
        training: further fields of TrunkConfig (dropout, checkpoint).
    """
    return TrunkConfig(
        width=width,
        depth=depth,
        heads=heads,
        kv_heads=kv_heads,
        ffn=llama.ffn_width(width) if ffn is None else ffn,
        norm="rms",
        eps=eps,
        bias="",
        out_bias=False,
        ffn_bias=False,
        act="silu",
        gated=True,
        rope=width // heads,
        rope_theta=rope_theta,
        **training,
    )
