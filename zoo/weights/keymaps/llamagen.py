"""LlamaGen: Llama with positions on two axes and none for the condition; neighbouring rotary pairs."""

from __future__ import annotations

from zoo.nn.config import TrunkConfig
from zoo.weights.keymaps import KeyMap, rename
from zoo.weights.keymaps.rotary import split_neighbours


def keymap(
    *,
    heads: int,
    head_dim: int,
    kv_heads: int | None = None,
    trunk: str = "trunk.",
    embed: str = "embed.tokens.",
    head: str = "head.",
    caption: str = "caption.",
    unconditional: str = "caption.unconditional",
) -> KeyMap:
    """Return the map of a released file, c2i or t2i, to a model whose parts have these prefixes.

    The table of classes is ``classes``; its last row is "no class".

    Args:
        heads: attention heads.
        head_dim: width of a head.
        kv_heads: heads of keys and values, ``heads`` by default.
        trunk: prefix of the trunk.
        embed: prefix of the code table.
        head: prefix of the output matrix.
        caption: prefix of the caption MLP.
        unconditional: name of the features of no caption.
    """
    qkv = [f"{trunk}layers.{{i}}.attn.{letter}.weight" for letter in "qkv"]
    return KeyMap(
        rename("layers.{i}.attention_norm.{p}", f"{trunk}layers.{{i}}.attn_norm.{{p}}"),
        split_neighbours("layers.{i}.attention.wqkv.weight", qkv, heads, kv_heads or heads, head_dim),
        rename("layers.{i}.attention.wo.{p}", f"{trunk}layers.{{i}}.attn.out.{{p}}"),
        rename("layers.{i}.ffn_norm.{p}", f"{trunk}layers.{{i}}.ffn_norm.{{p}}"),
        rename("layers.{i}.feed_forward.w1.{p}", f"{trunk}layers.{{i}}.ffn.gate.{{p}}"),
        rename("layers.{i}.feed_forward.w3.{p}", f"{trunk}layers.{{i}}.ffn.up.{{p}}"),
        rename("layers.{i}.feed_forward.w2.{p}", f"{trunk}layers.{{i}}.ffn.down.{{p}}"),
        rename("norm.{p}", f"{trunk}final_norm.{{p}}"),
        rename("tok_embeddings.{p}", f"{embed}{{p}}"),
        rename("output.{p}", f"{head}{{p}}"),
        rename("cls_embedding.embedding_table.{p}", "classes.{p}"),
        rename("cls_embedding.cap_proj.{layer}.{p}", f"{caption}{{layer}}.{{p}}"),
        rename("cls_embedding.uncond_embedding", unconditional),
    )


def trunk_config(
    *,
    width: int,
    depth: int,
    heads: int,
    ffn: int,
    kv_heads: int | None = None,
    eps: float = 1e-5,
    rope_theta: float = 10000.0,
    dropout: float = 0.0,
    drop_path: float = 0.0,
) -> TrunkConfig:
    """Return the trunk of LlamaGen (autoregressive/models/gpt.py).

    Position ids are (row, column) of an image token and -1, -1 for the condition, whose released rotation rows are
    zero: cos = sin = 0, so its queries and keys vanish.
    """
    return TrunkConfig(
        width=width,
        depth=depth,
        heads=heads,
        kv_heads=kv_heads,
        ffn=ffn,
        norm="rms",
        eps=eps,
        bias="",
        out_bias=False,
        ffn_bias=False,
        act="silu",
        gated=True,
        rope=width // heads,
        rope_theta=rope_theta,
        rope_axes=2,
        dropout=dropout,
        drop_path=drop_path,
    )
