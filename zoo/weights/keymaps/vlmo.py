"""VLMo: shared attention, feed-forward experts for text (0), image (1) and pairs (2)."""

from __future__ import annotations

from zoo.nn.config import TrunkConfig
from zoo.weights.keymaps import KeyMap, drop, rename, split

TEXT, IMAGE, TEXT_IN_PAIR, IMAGE_IN_PAIR = range(4)
"""Modality ids: what a token is, and whether it stands in a joint sequence (released ``modality_type``)."""

EXPERTS = {"text": 0, "imag": 1, "vl": 2}

TRUNK = KeyMap(
    rename("blocks.{i}.norm1.{p}", "layers.{i}.attn_norm.{p}"),
    split(
        "blocks.{i}.attn.qkv.weight",
        ["layers.{i}.attn.q.weight", "layers.{i}.attn.k.weight", "layers.{i}.attn.v.weight"],
    ),
    rename("blocks.{i}.attn.q_bias", "layers.{i}.attn.q.bias"),
    rename("blocks.{i}.attn.v_bias", "layers.{i}.attn.v.bias"),
    rename("blocks.{i}.attn.proj.{p}", "layers.{i}.attn.out.{p}"),
    rename("blocks.{i}.gamma_1", "layers.{i}.attn_scale"),
    rename("blocks.{i}.gamma_2", "layers.{i}.ffn_scale"),
    *(rename(f"blocks.{{i}}.norm2_{old}.{{p}}", f"layers.{{i}}.ffn_norm.{new}.{{p}}") for old, new in EXPERTS.items()),
    *(rename(f"blocks.{{i}}.mlp_{old}.fc1.{{p}}", f"layers.{{i}}.ffn.{new}.up.{{p}}") for old, new in EXPERTS.items()),
    *(
        rename(f"blocks.{{i}}.mlp_{old}.fc2.{{p}}", f"layers.{{i}}.ffn.{new}.down.{{p}}")
        for old, new in EXPERTS.items()
    ),
    rename("norm.{p}", "final_norm.{p}"),
)
STEM = KeyMap(
    rename("cls_token", "cls"),
    rename("pos_embed", "positions"),
    rename("patch_embed.proj.{p}", "patch.{p}"),
)
HEADS = KeyMap(
    rename("pooler.dense.{p}", "pooler.{p}"),
    rename("mlm_score.transform.dense.{p}", "mlm.dense.{p}"),
    rename("mlm_score.transform.LayerNorm.{p}", "mlm.norm.{p}"),
    rename("mlm_score.decoder.weight", "mlm.decoder.weight"),
    rename("mlm_score.bias", "mlm.decoder.bias"),
    rename("itm_score.fc.{p}", "itm.{p}"),
    rename("itc_{name}_proj.fc.{p}", "itc.{name}.{p}"),
    rename("logit_scale", "logit_scale"),
    rename("logit_vl_scale", "logit_vl_scale"),
)


def keymap(*, layers: int, relative: bool = True) -> KeyMap:
    """Return the map of a whole VLMo to ``trunk``, ``stem``, ``text``, ``types`` and the heads.

    Args:
        layers: depth of the trunk, which the released relative table is cut into.
        relative: base and large; base-plus has learned positions instead.
    """
    positions = "text_embeddings.position_embeddings.weight"
    return (
        STEM.under("transformer.", "stem.")
        + TRUNK.under("transformer.", "trunk.")
        + KeyMap(
            # [rows, layers * heads], layer-major columns
            rename(
                "relative_position_bias_table",
                "trunk.rel_bias",
                lambda t: t.view(len(t), layers, -1),
                lambda t: t.flatten(1),
            ),
            rename("text_embeddings.word_embeddings.{p}", "text.tokens.{p}"),
            rename("text_embeddings.token_type_embeddings.{p}", "text.types.{p}"),
            rename("text_embeddings.LayerNorm.{p}", "text.norm.{p}"),
            drop(positions) if relative else rename(positions, "text.positions.weight"),  # released, but never read
            drop("text_embeddings.position_ids"),
            rename("token_type_embeddings.{p}", "types.{p}"),
        )
        + HEADS
    )


def trunk_config(
    *,
    width: int,
    depth: int,
    heads: int,
    ffn: int,
    vl_start: int,
    rel_rows: int = 0,
    layer_scale: float | None = None,
    drop_path: float = 0.0,
) -> TrunkConfig:
    """Return the trunk of VLMo (unilm vlmo/modules/multiway_transformer.py).

    Args:
        width: D.
        depth: layers.
        heads: attention heads.
        ffn: hidden width of every expert.
        vl_start: the first layer with a pair expert; below it the tokens of a pair take the expert of their own kind.
        rel_rows: rows of the relative position table (0: learned positions, as in base-plus).
        layer_scale: initial LayerScale, 0.1 in base and large, None in base-plus.
        drop_path: of the last layer.
    """
    return TrunkConfig(
        width=width,
        depth=depth,
        heads=heads,
        ffn=ffn,
        eps=1e-6,
        bias="qv",
        rel_rows=rel_rows,
        layer_scale=layer_scale,
        drop_path=drop_path,
        routed=("ffn_norm", "ffn"),
        routes=tuple((0, 1, 0, 1) if layer < vl_start else (0, 1, 2, 2) for layer in range(depth)),
    )
