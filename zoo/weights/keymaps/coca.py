"""CoCa of open_clip: a text tower whose CLS stands last, a decoder that alternates reading text and reading the image.
The image tower with its attentional pooler stays open_clip's."""

from __future__ import annotations

from torch import Tensor

from zoo.nn.config import Act, TrunkConfig
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
    """Return the map of ``TextTransformer`` with ``embed_cls`` to ``text_embed`` (its last position is that of CLS),
    ``text_cls``, ``text`` (whose final norm is for CLS only) and ``text_projection``."""
    return SELF.under("transformer.resblocks.{i}.", "text.layers.{i}.") + KeyMap(
        rename("token_embedding.weight", "text_embed.tokens.weight"),
        rename("positional_embedding", "text_embed.positions.weight"),
        rename("cls_emb", "text_cls"),
        rename("ln_final.{p}", "text.final_norm.{p}"),
        rename("text_projection", "text_projection.weight", _transposed, _transposed),
    )


def decoder_keymap(depth: int) -> KeyMap:
    """Return the map of ``MultimodalTransformer`` to ``decoder`` and ``head``.

    Args:
        depth: open_clip's number of layers; ours are twice as many, reading text in even and the image in odd ones.
    """
    out = KeyMap(
        rename("ln_final.{p}", "decoder.final_norm.{p}"),
        rename("text_projection", "head.weight", _transposed, _transposed),
    )
    for i in range(depth):
        out += SELF.under(f"resblocks.{i}.", f"decoder.layers.{2 * i}.")
        out += CROSS.under(f"cross_attn.{i}.", f"decoder.layers.{2 * i + 1}.")
    return out


def keymap(depth: int) -> KeyMap:
    """Return the map of a whole open_clip ``CoCa``; the image tower goes to ``encoder.tower`` as it is.

    Args:
        depth: layers of the multimodal decoder.
    """
    return (
        text_keymap().under("text.")
        + decoder_keymap(depth).under("text_decoder.")
        + KeyMap(rename("visual.{**}", "encoder.tower.{**}"), rename("logit_scale", "logit_scale"))
    )


def text_config(*, width: int, depth: int, heads: int, ffn: int | None = None, act: Act = "gelu") -> TrunkConfig:
    """Return the text tower."""
    return TrunkConfig(width=width, depth=depth, heads=heads, ffn=4 * width if ffn is None else ffn, eps=1e-5, act=act)


def decoder_config(
    *, width: int, depth: int, heads: int, ffn: int | None = None, context_width: int | None = None, act: Act = "gelu"
) -> TrunkConfig:
    """Return the decoder: ``depth`` times a causal layer and a layer that reads the image through a norm of its own."""
    return TrunkConfig(
        width=width,
        depth=2 * depth,
        heads=heads,
        ffn=4 * width if ffn is None else ffn,
        eps=1e-5,
        act=act,
        blocks=("sf", "cf") * depth,
        context_width=context_width,
        context_norm=True,
    )
