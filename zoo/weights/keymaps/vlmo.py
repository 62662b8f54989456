"""VLMo: shared attention, feed-forward experts for text (0), image (1) and pairs (2)."""

from __future__ import annotations

from zoo.weights.keymaps import KeyMap, drop, rename, split

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
    rename("mlm_score.transform.dense.{p}", "words.dense.{p}"),
    rename("mlm_score.transform.LayerNorm.{p}", "words.norm.{p}"),
    rename("mlm_score.decoder.weight", "words.decoder.weight"),
    rename("mlm_score.bias", "words.decoder.bias"),
    rename("itm_score.fc.{p}", "matching.{p}"),
    rename("itc_image_proj.fc.{p}", "contrast.image.{p}"),
    rename("itc_text_proj.fc.{p}", "contrast.text.{p}"),
    rename("itc_vl_image_proj.fc.{p}", "contrast.pair_image.{p}"),
    rename("itc_vl_text_proj.fc.{p}", "contrast.pair_text.{p}"),
    rename("logit_scale", "logit_scale"),
    rename("logit_vl_scale", "pair_logit_scale"),
)


def keymap(*, layers: int, relative: bool = True) -> KeyMap:
    """Return the map of a whole VLMo to the wiring ``experts``.

    Args:
        layers: depth of the trunk, which the released relative table is cut into.
        relative: base and large; base-plus has learned positions instead.
    """
    positions = "text_embeddings.position_embeddings.weight"
    return (
        STEM.under("transformer.", "trunk.stem.")
        + TRUNK.under("transformer.", "trunk.trunk.")
        + KeyMap(
            # [rows, layers * heads], layer-major columns
            rename(
                "relative_position_bias_table",
                "trunk.trunk.rel_bias",
                lambda t: t.view(len(t), layers, -1),
                lambda t: t.flatten(1),
            ),
            rename("text_embeddings.word_embeddings.{p}", "trunk.text.tokens.{p}"),
            rename("text_embeddings.token_type_embeddings.{p}", "trunk.text.types.{p}"),
            rename("text_embeddings.LayerNorm.{p}", "trunk.text.norm.{p}"),
            # released, but never read with relative positions
            drop(positions) if relative else rename(positions, "trunk.text.positions.weight"),
            drop("text_embeddings.position_ids"),
            # a third row serves the second image of NLVR2
            rename("token_type_embeddings.weight", "trunk.kinds.weight", lambda t: t[:2], lambda t: t),
        )
        + HEADS
    )
