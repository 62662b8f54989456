"""BERT and what is built on it: encoders, decoders with cross-attention, the Q-Former of BLIP-2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoo.nn.config import Act, TrunkConfig
from zoo.weights.keymaps import KeyMap, Rule, drop, rename, tie

_ACTS: dict[str, Act] = {"gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu"}


def _attention(source: str, target: str, norm: str) -> tuple[Rule, ...]:
    return (
        rename(f"layer.{{i}}.{source}.self.query.{{p}}", f"layers.{{i}}.{target}.q.{{p}}"),
        rename(f"layer.{{i}}.{source}.self.key.{{p}}", f"layers.{{i}}.{target}.k.{{p}}"),
        rename(f"layer.{{i}}.{source}.self.value.{{p}}", f"layers.{{i}}.{target}.v.{{p}}"),
        rename(f"layer.{{i}}.{source}.output.dense.{{p}}", f"layers.{{i}}.{target}.out.{{p}}"),
        rename(f"layer.{{i}}.{source}.output.LayerNorm.{{p}}", f"layers.{{i}}.{norm}.{{p}}"),
    )


def _ffn(suffix: str = "", expert: str = "") -> tuple[Rule, ...]:
    return (
        rename(f"layer.{{i}}.intermediate{suffix}.dense.{{p}}", f"layers.{{i}}.ffn{expert}.up.{{p}}"),
        rename(f"layer.{{i}}.output{suffix}.dense.{{p}}", f"layers.{{i}}.ffn{expert}.down.{{p}}"),
        rename(f"layer.{{i}}.output{suffix}.LayerNorm.{{p}}", f"layers.{{i}}.ffn_norm{expert}.{{p}}"),
    )


ATTENTION = KeyMap(*_attention("attention", "attn", "attn_norm"), *_attention("crossattention", "cross", "cross_norm"))
ENCODER = ATTENTION + KeyMap(*_ffn())
QFORMER_ENCODER = ATTENTION + KeyMap(*_ffn("", ".0"), *_ffn("_query", ".1"))
EMBEDDINGS = KeyMap(
    rename("word_embeddings.{p}", "tokens.{p}"),
    rename("position_embeddings.{p}", "positions.{p}"),
    rename("token_type_embeddings.{p}", "types.{p}"),
    rename("LayerNorm.{p}", "norm.{p}"),
    drop("position_ids"),
    drop("token_type_ids"),
)
# the head owns dense, norm and output bias; its matrix is the token table
MLM_HEAD = KeyMap(
    rename("transform.dense.{p}", "dense.{p}"),
    rename("transform.LayerNorm.{p}", "norm.{p}"),
    tie("decoder.bias", "bias"),
    rename("bias", "bias"),
)


def keymap(trunk: str = "trunk.", embed: str = "embed.") -> KeyMap:
    """Return the map of a ``BertModel`` without pooler."""
    return EMBEDDINGS.under("embeddings.", embed) + ENCODER.under("encoder.", trunk)


def lm_keymap(trunk: str = "trunk.", embed: str = "embed.", head: str = "head.") -> KeyMap:
    """Return the map of a BERT with its language modelling head, whose matrix is the token table."""
    return (
        KeyMap(tie("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"))
        + keymap(trunk, embed).under("bert.")
        + MLM_HEAD.under("cls.predictions.", head)
    )


def qformer_keymap(trunk: str = "trunk.", embed: str = "embed.", head: str = "head.") -> KeyMap:
    """Return the map of LAVIS's ``Qformer``: experts text 0 and query 1 in the FFN and its norm."""
    return (
        KeyMap(tie("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"))
        + EMBEDDINGS.under("bert.embeddings.", embed)
        + QFORMER_ENCODER.under("bert.encoder.", trunk)
        + MLM_HEAD.under("cls.predictions.", head)
    )


def trunk_config(hf: Mapping[str, Any], *, context_width: int | None = None) -> TrunkConfig:
    """Return the trunk of a transformers BERT ``config.json``; every layer cross-attends if the config says so."""
    block = "scf" if hf.get("add_cross_attention") else "sf"
    return TrunkConfig(
        width=hf["hidden_size"],
        depth=hf["num_hidden_layers"],
        heads=hf["num_attention_heads"],
        ffn=hf["intermediate_size"],
        eps=hf.get("layer_norm_eps", 1e-12),
        placement="post",
        final_norm=False,
        dropout=hf.get("hidden_dropout_prob", 0.1),
        attention_dropout=hf.get("attention_probs_dropout_prob", 0.1),
        blocks=(block,) * hf["num_hidden_layers"],
        context_width=context_width,
        act=_ACTS[hf.get("hidden_act", "gelu")],
    )


def qformer_config(
    *, width: int, depth: int, heads: int, ffn: int, context_width: int, every: int = 2, dropout: float = 0.1
) -> TrunkConfig:
    """Return the Q-Former's trunk (BLIP-2, arXiv 2301.12597, section 3.1, and LAVIS Qformer.py).

    Modality 0 is text, 1 the queries: shared self-attention, cross-attention for queries in every ``every``-th layer
    from the first, an FFN and FFN norm each.
    """
    return TrunkConfig(
        width=width,
        depth=depth,
        heads=heads,
        ffn=ffn,
        eps=1e-12,
        placement="post",
        final_norm=False,
        dropout=dropout,
        attention_dropout=dropout,
        blocks=tuple("scf" if i % every == 0 else "sf" for i in range(depth)),
        context_width=context_width,
        cross_modalities=(1,),
        routed=("ffn_norm", "ffn"),
        routes=(0, 1),
    )
