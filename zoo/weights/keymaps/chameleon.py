"""Chameleon, in transformers' names and in those of the released files."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.errors import WeightsError
from zoo.nn.config import TrunkConfig
from zoo.weights.keymaps import KeyMap, Rule, llama, rename, split
from zoo.weights.keymaps.rotary import half_to_neighbours, neighbours_to_half, split_neighbours

TRUNK = llama.TRUNK + KeyMap(
    rename("layers.{i}.self_attn.q_norm.{p}", "layers.{i}.attn.q_norm.{p}"),
    rename("layers.{i}.self_attn.k_norm.{p}", "layers.{i}.attn.k_norm.{p}"),
)


def keymap(trunk: str = "trunk.", embed: str = "embed.tokens.", head: str = "head.") -> KeyMap:
    """Return the map of transformers' ``ChameleonForConditionalGeneration`` without its image tokenizer."""
    return TRUNK.under("model.", trunk) + KeyMap(
        rename("model.embed_tokens.{p}", f"{embed}{{p}}"),
        rename("lm_head.{p}", f"{head}{{p}}"),
    )


def official_keymap(
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    per_head: bool = False,
    trunk: str = "trunk.",
    embed: str = "embed.tokens.",
    head: str = "head.",
) -> KeyMap:
    """Return the map of one unsharded file of the released layout, whose rotary embedding pairs neighbours.

    Args:
        heads: attention heads.
        kv_heads: heads of keys and values.
        head_dim: width of a head.
        per_head: the trunk owns a QK-norm affine for every head (``qk_norm_per_head``, as transformers keeps it); the
            file has one for all. Saving then refuses affines that have come to differ.
        trunk: prefix of the trunk.
        embed: prefix of the token table.
        head: prefix of the output matrix.
    """

    def affine(letter: str, count: int) -> Rule:
        def to(one: Tensor) -> Tensor:
            one = neighbours_to_half(one, head_dim)
            return one.repeat(count, 1) if per_head else one

        def back(ours: Tensor) -> Tensor:
            if per_head and not torch.equal(ours, ours[:1].expand_as(ours)):
                raise WeightsError(
                    f"the {letter}-norm differs between heads, and the released layout has one for all;"
                    " save in transformers' layout"
                )
            return half_to_neighbours(ours[0] if per_head else ours, head_dim)

        source = f"layers.{{i}}.attention.{letter}_normalization.{{p}}"
        return rename(source, f"{trunk}layers.{{i}}.attn.{letter}_norm.{{p}}", to, back)

    return KeyMap(
        rename("layers.{i}.attention_norm.{p}", f"{trunk}layers.{{i}}.attn_norm.{{p}}"),
        split_neighbours(
            "layers.{i}.attention.wqkv.weight",
            [f"{trunk}layers.{{i}}.attn.{letter}.weight" for letter in "qkv"],
            heads,
            kv_heads,
            head_dim,
        ),
        affine("q", heads),
        affine("k", kv_heads),
        rename("layers.{i}.attention.wo.{p}", f"{trunk}layers.{{i}}.attn.out.{{p}}"),
        rename("layers.{i}.ffn_norm.{p}", f"{trunk}layers.{{i}}.ffn_norm.{{p}}"),
        split(
            "layers.{i}.feed_forward.w13.{p}",
            [f"{trunk}layers.{{i}}.ffn.gate.{{p}}", f"{trunk}layers.{{i}}.ffn.up.{{p}}"],
        ),
        rename("layers.{i}.feed_forward.w2.{p}", f"{trunk}layers.{{i}}.ffn.down.{{p}}"),
        rename("norm.{p}", f"{trunk}final_norm.{{p}}"),
        rename("tok_embeddings.{p}", f"{embed}{{p}}"),
        rename("output.{p}", f"{head}{{p}}"),
    )


def trunk_config(
    *,
    width: int,
    depth: int,
    heads: int,
    ffn: int,
    kv_heads: int | None = None,
    eps: float = 1e-5,
    qk_eps: float = 1e-5,
    rope_theta: float = 10000.0,
    swin_norm: bool = False,
    per_head: bool = True,
    dropout: float = 0.0,
) -> TrunkConfig:
    """Return the trunk of Chameleon (arXiv 2405.09818, section 2.3).

    Args:
        width: D.
        depth: layers.
        heads: attention heads.
        ffn: hidden width.
        kv_heads: heads of keys and values, 8 in the 34B.
        eps: of the RMSNorms.
        qk_eps: of the LayerNorms on queries and keys.
        rope_theta: base of the rotary angles.
        swin_norm: norms on the branch outputs (34B) instead of before the branches (7B). Every shape fits both.
        per_head: whether each head has its own QK-norm affine.
        dropout: after attention and FFN, 0.1 in the 7B.
    """
    return TrunkConfig(
        width=width,
        depth=depth,
        heads=heads,
        kv_heads=kv_heads,
        ffn=ffn,
        norm="rms",
        eps=eps,
        placement="branch" if swin_norm else "pre",
        bias="",
        out_bias=False,
        ffn_bias=False,
        act="silu",
        gated=True,
        rope=width // heads,
        rope_theta=rope_theta,
        qk_norm="layer",
        qk_norm_per_head=per_head,
        qk_eps=qk_eps,
        dropout=dropout,
    )
