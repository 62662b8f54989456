"""ImageBind (imagebind/models/imagebind_model.py of the release): a stem, a trunk and a head for each modality."""

from __future__ import annotations

from collections.abc import Mapping

from zoo.nn.config import TrunkConfig
from zoo.weights.keymaps import KeyMap, Rule, drop, rename, split

WITH_BIAS_KV = ("audio", "depth", "thermal", "imu")
MODALITIES = ("vision", "text", *WITH_BIAS_KV)

# official names of the patch matrix and of the positions; the stem norm stands beside the matrix
_MATRIX = {
    "vision": "rgbt_stem.proj.1",
    "audio": "rgbt_stem.proj",
    "thermal": "rgbt_stem.proj",
    "depth": "depth_stem.proj",
    "imu": "imu_stem.proj",
}
_PROJECTION = {"text": ("proj.0", "proj.1"), "imu": ("0", "3")}  # the others: 0 and 2


def blocks(heads: int) -> KeyMap:
    """Return the map of ``blocks`` (nn.MultiheadAttention with or without a learned key and value) to a trunk."""

    def by_head(name: str) -> Rule:
        return rename(
            f"{{i}}.attn.{name}", f"{{i}}.attn.{name}", lambda t: t.reshape(heads, -1), lambda t: t.reshape(1, 1, -1)
        )

    return KeyMap(
        rename("{i}.norm_1.{p}", "{i}.attn_norm.{p}"),
        *(
            split(f"{{i}}.attn.in_proj_{kind}", [f"{{i}}.attn.{letter}.{kind}" for letter in "qkv"])
            for kind in ("weight", "bias")
        ),
        by_head("bias_k"),
        by_head("bias_v"),
        rename("{i}.attn.out_proj.{p}", "{i}.attn.out.{p}"),
        rename("{i}.norm_2.{p}", "{i}.ffn_norm.{p}"),
        rename("{i}.mlp.fc1.{p}", "{i}.ffn.up.{p}"),
        rename("{i}.mlp.fc2.{p}", "{i}.ffn.down.{p}"),
    )


def _stem(modality: str) -> KeyMap:
    if modality == "text":
        return KeyMap(
            rename("token_embedding.{p}", "tokens.{p}"),
            rename("pos_embed", "positions.weight", lambda t: t[0], lambda t: t[None]),
            drop("mask"),  # the causal mask
        )
    matrix = _MATRIX[modality]
    rules = [
        rename("cls_token", "cls"),
        rename("pos_embed" if modality == "imu" else "pos_embedding_helper.pos_embed", "positions"),
        rename(f"{matrix}.{{p}}", "patch.{p}"),
    ]
    if modality != "vision":
        rules.append(rename(f"{matrix.split('.')[0]}.norm_layer.{{p}}", "patch_norm.{p}"))
    return KeyMap(*rules)


def keymap(heads: Mapping[str, int]) -> KeyMap:
    """Return the map of ``ImageBindModel`` to parts ``stems.<modality>`` (``patch``, ``patch_norm`` with eps 1e-5,
    ``cls``, ``positions``; vision also ``norm`` before the trunk; text a token embedding), ``trunks.<modality>``,
    ``heads.<modality>`` (``norm``, ``proj``, ``log_scale``).

    Args:
        heads: attention heads of each modality, which the learned keys and values are cut by.
    """
    out = KeyMap()
    for name, count in heads.items():
        norm, projection = _PROJECTION.get(name, ("0", "2"))
        out += _stem(name).under(f"modality_preprocessors.{name}.", f"stems.{name}.")
        out += blocks(count).under(f"modality_trunks.{name}.blocks.", f"trunks.{name}.layers.")
        out += KeyMap(
            rename(f"modality_trunks.{name}.pre_transformer_layer.0.{{p}}", f"stems.{name}.norm.{{p}}"),
            rename(f"modality_heads.{name}.{norm}.{{p}}", f"heads.{name}.norm.{{p}}"),
            rename(f"modality_heads.{name}.{projection}.{{p}}", f"heads.{name}.proj.{{p}}"),
            rename(f"modality_postprocessors.{name}.1.log_logit_scale", f"heads.{name}.log_scale"),
        )
    return out


def trunk_config(modality: str, *, width: int, depth: int, heads: int, drop_path: float = 0.0) -> TrunkConfig:
    """Return a modality's trunk; its output norm lives in the head. Initialise it with ``zoo.nn.init_xavier_``."""
    return TrunkConfig(
        width=width,
        depth=depth,
        heads=heads,
        ffn=4 * width,
        eps=1e-6,
        final_norm=False,
        bias_kv=modality in WITH_BIAS_KV,
        drop_path=drop_path,
    )
