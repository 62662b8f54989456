"""CoCa of open_clip: CLIP's image tower with an attentional pooler, a text tower whose CLS stands last, a decoder that
alternates reading text and reading the image."""

from __future__ import annotations

from torch import Tensor

from zoo.weights.keymaps import KeyMap, rename, split


def _transposed(matrix: Tensor) -> Tensor:
    return matrix.T.contiguous()


def _block(attention: str, norm: str) -> KeyMap:
    """One ``ResidualAttentionBlock``, whose attention is a layer's ``attn`` or ``cross``."""
    return KeyMap(
        rename("ln_1.{p}", f"{norm}.{{p}}"),
        rename("ln_1_kv.{p}", f"{attention}.context_norm.{{p}}"),
        *(
            split(f"attn.in_proj_{kind}", [f"{attention}.{letter}.{kind}" for letter in "qkv"])
            for kind in ("weight", "bias")
        ),
        rename("attn.out_proj.{p}", f"{attention}.out.{{p}}"),
        rename("ln_2.{p}", "ffn_norm.{p}"),
        rename("mlp.c_fc.{p}", "ffn.up.{p}"),
        rename("mlp.c_proj.{p}", "ffn.down.{p}"),
    )


SELF, CROSS = _block("attn", "attn_norm"), _block("cross", "cross_norm")


def text_keymap() -> KeyMap:
    """Return the map of ``TextTransformer`` with ``embed_cls`` to a ``CausalText``, without its projection."""
    return SELF.under("transformer.resblocks.{i}.", "trunk.layers.{i}.") + KeyMap(
        rename("token_embedding.weight", "embed_tokens.tokens.weight"),
        rename("positional_embedding", "embed_tokens.positions.weight"),
        rename("cls_emb", "cls"),
        rename("ln_final.{p}", "trunk.final_norm.{p}"),
    )


def decoder_keymap(depth: int) -> KeyMap:
    """Return the map of ``MultimodalTransformer`` to a ``MultimodalDecoder``.

    Args:
        depth: open_clip's number of layers; the trunk has twice as many, reading text in even and the image in odd
            ones.
    """
    out = KeyMap(
        rename("ln_final.{p}", "trunk.final_norm.{p}"),
        rename("text_projection", "lm_head.weight", _transposed, _transposed),
    )
    for i in range(depth):
        out += SELF.under(f"resblocks.{i}.", f"trunk.layers.{2 * i}.")
        out += CROSS.under(f"cross_attn.{i}.", f"trunk.layers.{2 * i + 1}.")
    return out


def pooler_keymap(fused: bool) -> KeyMap:
    """Return the map of ``AttentionalPooler`` and the ``ln_post`` behind it to a ``Pooler``.

    Args:
        fused: Tower and queries are equally wide, for which ``nn.MultiheadAttention`` keeps one matrix.
    """
    matrices = (
        [split("attn_pool.attn.in_proj_weight", [f"{letter}.weight" for letter in "qkv"])]
        if fused
        else [rename(f"attn_pool.attn.{letter}_proj_weight", f"{letter}.weight") for letter in "qkv"]
    )
    return KeyMap(
        rename("attn_pool.query", "query_tokens"),
        rename("attn_pool.ln_q.{p}", "query_norm.{p}"),
        rename("attn_pool.ln_k.{p}", "context_norm.{p}"),
        *matrices,
        split("attn_pool.attn.in_proj_bias", [f"{letter}.bias" for letter in "qkv"]),
        rename("attn_pool.attn.out_proj.{p}", "out.{p}"),
        rename("ln_post.{p}", "norm.{p}"),
    )


def keymap(depth: int, fused: bool = False) -> KeyMap:
    """Return the map of a whole open_clip ``CoCa`` to a ``Captioner``.

    Args:
        depth: Layers of the multimodal decoder.
        fused: As ``pooler_keymap``.
    """
    return (
        pooler_keymap(fused).under("visual.", "connector.captions.")
        + KeyMap(
            rename("visual.proj", "image_projection.weight", _transposed, _transposed),
            rename("text.text_projection", "text_projection.weight", _transposed, _transposed),
            rename("visual.{**}", "encoder.tower.{**}"),
            rename("logit_scale", "logit_scale"),
        )
        + text_keymap().under("text.", "text_encoder.")
        + decoder_keymap(depth).under("text_decoder.", "decoder.")
    )
