"""ImageBind's checkpoint (imagebind/models/imagebind_model.py of the release) as a recipe of the wiring ``bind``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor

from zoo.errors import WeightsError
from zoo.recipe import Recipe
from zoo.weights.formats import Official
from zoo.weights.keymaps import KeyMap, Rule, drop, rename, split
from zoo_modalities.imagebind.bind import BindConfig

# official names of the patch matrix; the stem's norm stands beside it. Audio and thermal are stored as pictures.
_MATRIX = {
    "vision": "rgbt_stem.proj.1",
    "audio": "rgbt_stem.proj",
    "thermal": "rgbt_stem.proj",
    "depth": "depth_stem.proj",
    "imu": "imu_stem.proj",
}
_HEADS = {"text": ("proj.0", "proj.1"), "imu": ("0", "3")}  # norm and matrix; of the others 0 and 2


def blocks(heads: int) -> KeyMap:
    """Return the map of ``blocks`` (nn.MultiheadAttention with or without a learned key and value) to a trunk.

    Args:
        heads: Attention heads, by which the learned keys and values are cut.
    """

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
    """Return the map of ``ImageBindModel`` to the wiring ``bind``.

    Args:
        heads: Official name of each modality -> its attention heads.
    """
    ours = {
        "vision": ("encoder", "image_projection", ""),
        "text": ("text_encoder", "text_projection", "logit_scale"),
    }
    out = KeyMap()
    for name, count in heads.items():
        encoder, projection, scale = ours.get(name, (f"encoders.{name}", f"projections.{name}", f"scales.{name}"))
        norm, matrix = _HEADS.get(name, ("0", "2"))
        out += _stem(name).under(f"modality_preprocessors.{name}.", f"{encoder}.embed.")
        out += blocks(count).under(f"modality_trunks.{name}.blocks.", f"{encoder}.trunk.layers.")
        out += KeyMap(
            rename(f"modality_trunks.{name}.pre_transformer_layer.0.{{p}}", f"{encoder}.embed.norm.{{p}}"),
            rename(f"modality_heads.{name}.{norm}.{{p}}", f"{encoder}.norm.{{p}}"),
            rename(f"modality_heads.{name}.{matrix}.{{p}}", f"{projection}.{{p}}"),
        )
        if scale:
            out += KeyMap(rename(f"modality_postprocessors.{name}.1.log_logit_scale", scale))
    return out


def keymap_of(recipe: Recipe) -> KeyMap:
    """The map for a recipe of the wiring ``bind`` with ImageBind's encoders.

    Raises:
        WeightsError: One of its encoders is another, which the release has no weights of.
    """
    parts = {"vision": recipe.parts["encoder"], "text": recipe.parts["text_encoder"]}
    wiring = cast(BindConfig, recipe.wiring[1])
    others = wiring.encoder_configs()
    names = {m: wiring.encoders.get(m, f"imagebind-{m}") for m in others}
    for name in (*(name for name, _ in parts.values()), *names.values()):
        if not name.startswith("imagebind-"):
            raise WeightsError(f"the release of ImageBind has no weights of {name!r}: choose ImageBind's own encoders")
    configs: dict[str, Any] = {**{m: config for m, (_, config) in parts.items()}, **others}
    return keymap({name: config.heads for name, config in configs.items()})


def from_state(recipe: Recipe, state: Mapping[str, Tensor]) -> Official:
    """A state dict of ``ImageBindModel`` (``imagebind_huge.pth``), or of the zoo's own names.

    Modalities that the recipe does not have are left.

    Raises:
        WeightsError: The image tower has another width than the recipe's.
    """
    if not any(name.startswith("modality_trunks.") for name in state):
        return Official(recipe=recipe, keymap=KeyMap(), form="zoo")
    stem = state.get("modality_preprocessors.vision.rgbt_stem.proj.1.weight")
    config: Any = recipe.parts["encoder"][1]
    if stem is None or len(stem) != config.width:
        found = "none" if stem is None else f"width {len(stem)}"
        raise WeightsError(
            f"the file's image tower has {found}, that of {recipe.model} width {config.width}: imagebind_huge.pth is"
            " model='imagebind-huge'"
        )
    known = {"vision", "text", *cast(BindConfig, recipe.wiring[1]).modalities}
    others = sorted({name.split(".")[1] for name in state} - known)
    ignored = tuple(f"{part}.{name}.{{**}}" for name in others for part in sorted({n.split(".")[0] for n in state}))
    return Official(recipe=recipe, keymap=keymap_of(recipe), form="ImageBind", ignored=ignored)
