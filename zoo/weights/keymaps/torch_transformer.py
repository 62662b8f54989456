"""``nn.Transformer`` of torch: MiniGPT-5 and NExT-GPT map language states to image conditions with one."""

from __future__ import annotations

from dataclasses import replace

from zoo.nn.config import Act, TrunkConfig
from zoo.weights.keymaps import KeyMap, Rule, rename, split


def _attention(source: str, target: str) -> tuple[Rule, ...]:
    ours = f"layers.{{i}}.{target}"
    return (
        *(
            split(f"layers.{{i}}.{source}.in_proj_{kind}", [f"{ours}.{letter}.{kind}" for letter in "qkv"])
            for kind in ("weight", "bias")
        ),
        rename(f"layers.{{i}}.{source}.out_proj.{{p}}", f"{ours}.out.{{p}}"),
    )


def _norms(*names: str) -> tuple[Rule, ...]:
    return tuple(rename(f"layers.{{i}}.norm{n}.{{p}}", f"layers.{{i}}.{name}.{{p}}") for n, name in enumerate(names, 1))


_FFN = (
    rename("layers.{i}.linear1.{p}", "layers.{i}.ffn.up.{p}"),
    rename("layers.{i}.linear2.{p}", "layers.{i}.ffn.down.{p}"),
    rename("norm.{p}", "final_norm.{p}"),
)
ENCODER = KeyMap(*_attention("self_attn", "attn"), *_norms("attn_norm", "ffn_norm"), *_FFN)
DECODER = KeyMap(
    *_attention("self_attn", "attn"),
    *_attention("multihead_attn", "cross"),
    *_norms("attn_norm", "cross_norm", "ffn_norm"),
    *_FFN,
)


def keymap(encoder: str = "encoder.", decoder: str = "decoder.") -> KeyMap:
    """Return the map of a whole ``nn.Transformer`` to two trunks."""
    return ENCODER.under("encoder.", encoder) + DECODER.under("decoder.", decoder)


def trunk_configs(
    *,
    width: int,
    heads: int,
    ffn: int,
    encoder_depth: int,
    decoder_depth: int,
    act: Act = "relu",
    dropout: float = 0.1,
    norm_first: bool = True,
) -> tuple[TrunkConfig, TrunkConfig]:
    """Return encoder and decoder of an ``nn.Transformer``; both end in a norm, no attention is masked by default."""
    encoder = TrunkConfig(
        width=width,
        depth=encoder_depth,
        heads=heads,
        ffn=ffn,
        eps=1e-5,
        placement="pre" if norm_first else "post",
        act=act,
        dropout=dropout,
        attention_dropout=dropout,
    )
    return encoder, replace(encoder, depth=decoder_depth, blocks=("scf",) * decoder_depth)
