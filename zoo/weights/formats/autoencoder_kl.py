"""diffusers' ``AutoencoderKL`` folders as recipes: Stable Diffusion's first stages and those of the same build."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoo.errors import WeightsError
from zoo.recipe import Recipe, resolve
from zoo.weights.formats import Official
from zoo.weights.keymaps import KeyMap, rename

OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names of the attention's projections in files from before diffusers 0.17."""

KEYMAP = KeyMap(
    *(
        rename(
            f"{half}.mid_block.attentions.0.{old}.{{p}}",
            f"image_tokenizer.vae.{half}.mid_block.attentions.0.{new}.{{p}}",
        )
        for half in ("encoder", "decoder")
        for old, new in OLD.items()
    ),
    *(rename(f"{part}.{{**}}", f"image_tokenizer.vae.{part}.{{**}}") for part in ("encoder", "decoder")),
    *(rename(f"{part}.{{p}}", f"image_tokenizer.vae.{part}.{{p}}") for part in ("quant_conv", "post_quant_conv")),
)

FIXED: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "act_fn": "silu",
    "latents_mean": None,
    "latents_std": None,
}
"""What the zoo's autoencoder has in one form only."""


def from_folder(config: Mapping[str, Any], folder: Path) -> Official:
    """A folder of ``AutoencoderKL``; raises WeightsError for something that the zoo's autoencoder does not have."""
    return _official(resolve("kl-tokenizer", values={"image_tokenizer": fields_of(config, folder)}))


def fields_of(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Fields of ``KLConfig``; keys that ``config.json`` leaves out have the defaults of diffusers' class.

    Raises:
        WeightsError: Something in the configuration that the zoo's autoencoder does not have.
    """
    for key, value in FIXED.items():
        if config.get(key, value) != value:
            raise WeightsError(
                f"config.json of {str(folder)!r}: {key} = {config[key]!r}; the zoo reads {value!r} alone"
            )
    widths = [int(w) for w in config.get("block_out_channels", [64])]
    for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        kinds = list(config.get(key, [kind]))
        if kinds != [kind] * len(widths):
            raise WeightsError(
                f"config.json of {str(folder)!r}: {key} = {kinds}; the zoo reads {len(widths)} times {kind}"
            )
    if any(w % widths[0] for w in widths):
        raise WeightsError(f"config.json of {str(folder)!r}: block_out_channels = {widths}, no multiples of the first")
    around = bool(config.get("use_quant_conv", True))
    if around != bool(config.get("use_post_quant_conv", True)):
        raise WeightsError(f"config.json of {str(folder)!r}: use_quant_conv and use_post_quant_conv differ")
    size, patch = config.get("sample_size", 32), 2 ** (len(widths) - 1)
    if not isinstance(size, int) or size % patch:
        raise WeightsError(f"config.json of {str(folder)!r}: sample_size = {size!r}; expected a multiple of {patch}")
    scaling = float(config.get("scaling_factor", 0.18215))
    if scaling <= 0:
        raise WeightsError(f"config.json of {str(folder)!r}: scaling_factor = {scaling} must be above 0")
    return {
        "image_size": size,
        "patch_size": patch,
        "channels": int(config.get("latent_channels", 4)),
        "width": widths[-1],
        "mult": [w // widths[0] for w in widths],
        "blocks": int(config.get("layers_per_block", 1)),
        "groups": int(config.get("norm_num_groups", 32)),
        "attention": bool(config.get("mid_block_add_attention", True)),
        "quant_conv": around,
        "scaling": scaling,
        "shift": float(config.get("shift_factor") or 0.0),
        "upcast": bool(config.get("force_upcast", True)),
    }


def from_state(recipe: Recipe, state: Mapping[str, Any]) -> Official | None:
    """A bare file in diffusers' names; its sizes are those of the recipe. None for the zoo's own names."""
    return _official(recipe) if "encoder.conv_in.weight" in state else None


def _official(recipe: Recipe) -> Official:
    new = ("image_tokenizer.moments", "image_tokenizer.measured")  # the factors are the configuration's
    return Official(recipe=recipe, keymap=KEYMAP, form="diffusers AutoencoderKL", new=new)
