"""The Q-Former of BLIP-2: transformers' and LAVIS' names to those of ``zoo.connectors.qformer.QFormer``."""

from __future__ import annotations

from zoo.weights.keymaps import KeyMap, Rule, drop, rename


def _attention(source: str, target: str, inner: str) -> tuple[Rule, ...]:
    names = {"query": "q", "key": "k", "value": "v"}
    start, end = f"encoder.layer.{{i}}.{source}", f"trunk.layers.{{i}}.{target}"
    return (
        *(rename(f"{start}.{inner}.{old}.{{p}}", f"{end}.{new}.{{p}}") for old, new in names.items()),
        rename(f"{start}.output.dense.{{p}}", f"{end}.out.{{p}}"),
        rename(f"{start}.output.LayerNorm.{{p}}", f"{end}_norm.{{p}}"),
    )


def _ffn(suffix: str, expert: str) -> tuple[Rule, ...]:
    start, end = "encoder.layer.{i}", "trunk.layers.{i}"
    return (
        rename(f"{start}.intermediate{suffix}.dense.{{p}}", f"{end}.ffn{expert}.up.{{p}}"),
        rename(f"{start}.output{suffix}.dense.{{p}}", f"{end}.ffn{expert}.down.{{p}}"),
        rename(f"{start}.output{suffix}.LayerNorm.{{p}}", f"{end}.ffn_norm{expert}.{{p}}"),
    )


def keymap(text: bool = False, *, lavis: bool = False) -> KeyMap:
    """The map of transformers' ``Blip2QFormerModel``, or of what LAVIS keeps under ``Qformer.bert.``.

    Args:
        text: The Q-Former has its text branch, whose feed-forward networks are expert 0 and the queries' expert 1.
        lavis: LAVIS' spelling.
    """
    inner = "self" if lavis else "attention"
    rules = [
        rename("embeddings.LayerNorm.{p}" if lavis else "layernorm.{p}", "norm.{p}"),
        *_attention("attention", "attn", inner),
        *_attention("crossattention", "cross", inner),
        *_ffn("_query", ".1" if text else ""),
        drop("embeddings.position_ids"),
    ]
    if text:
        rules += [
            *_ffn("", ".0"),
            rename("embeddings.word_embeddings.{p}", "text.tokens.{p}"),
            rename("embeddings.position_embeddings.{p}", "text.positions.{p}"),
        ]
    return KeyMap(*rules)
