"""diffusers' pipeline folders as recipes: Stable Diffusion 1 and 2, and SDXL."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoo.errors import ConfigError, WeightsError, near
from zoo.plugin import catalogue
from zoo.recipe import Recipe, resolve
from zoo.registry import to_plain
from zoo.weights.files import State, read_folder, read_json, stem_of
from zoo.weights.formats import Official, autoencoder_kl
from zoo.weights.formats.clip import text_fields
from zoo.weights.formats.diffusers_scheduler import scheduler_fields
from zoo.weights.keymaps.stable_diffusion import STABLE_DIFFUSION, stable_diffusion_xl

INDEX = "model_index.json"

PARTS = {
    "StableDiffusionPipeline": ("text_encoder", "unet", "vae"),
    "StableDiffusionXLPipeline": ("text_encoder", "text_encoder_2", "unet", "vae"),
}
"""Pipeline class -> folders that hold weights of the model; a safety checker's are not read."""

CLASSES = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
}

UNET_FIXED: dict[str, Any] = {
    "center_input_sample": False, "flip_sin_to_cos": True, "freq_shift": 0, "only_cross_attention": False,
    "mid_block_type": "UNetMidBlock2DCrossAttn", "downsample_padding": 1, "mid_block_scale_factor": 1,
    "dropout": 0.0, "act_fn": "silu", "norm_eps": 1e-5, "reverse_transformer_layers_per_block": None,
    "encoder_hid_dim": None, "encoder_hid_dim_type": None, "num_attention_heads": None,
    "dual_cross_attention": False, "class_embed_type": None, "num_class_embeds": None,
    "resnet_time_scale_shift": "default", "resnet_skip_time_act": False, "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional", "time_embedding_dim": None, "time_embedding_act_fn": None,
    "timestep_post_act": None, "time_cond_proj_dim": None, "conv_in_kernel": 3, "conv_out_kernel": 3,
    "attention_type": "default", "class_embeddings_concat": False, "mid_block_only_cross_attention": None,
    "cross_attention_norm": None,
}  # fmt: skip
"""What the zoo's U-Net has in one form only: diffusers' default."""

KNOWN = {
    "unet-sd15": "stable-diffusion-v1-5",
    "unet-sd21": "stable-diffusion-2-1",
    "unet-sdxl": "stable-diffusion-xl",
}
"""Denoiser -> recipe of its sizes."""


def read_pipeline(folder: Path) -> tuple[Official, State]:
    """A folder that a pipeline's ``save_pretrained`` wrote, and its tensors, named by their part's folder first.

    Raises:
        WeightsError: A pipeline of another class, parts of other classes, or something in their configuration that the
            zoo's parts do not have.
    """
    index = read_json(folder / INDEX)
    kind = str(index.get("_class_name"))
    if kind not in PARTS:
        raise WeightsError(
            f"{str(folder)!r} is a diffusers pipeline of class {kind!r}, which the zoo does not read; it reads"
            f" {' and '.join(PARTS)}{near(kind, PARTS)}"
        )
    for part in PARTS[kind]:
        found = (index.get(part) or [None, None])[1]
        if found != CLASSES[part]:
            raise WeightsError(f"{INDEX} of {str(folder)!r}: {part} is a {found}, the zoo reads {CLASSES[part]}")
    official = _official(kind, index, folder)
    state: State = {}
    for part in PARTS[kind]:
        state |= {f"{part}.{name}": t for name, t in read_folder(folder / part, stem_of(folder / part)).items()}
    return official, state


def _official(kind: str, index: Mapping[str, Any], folder: Path) -> Official:
    configs = {part: read_json(folder / part / "config.json") for part in PARTS[kind]}
    xl = kind == "StableDiffusionXLPipeline"
    denoiser = unet_fields(configs["unet"], folder)
    image = autoencoder_kl.fields_of(configs["vae"], folder / "vae")
    sample = configs["unet"].get("sample_size")
    if not isinstance(sample, int):
        raise WeightsError(f"config.json of {str(folder / 'unet')!r}: sample_size = {sample!r}; expected one number")
    image["image_size"] = sample * image["patch_size"]
    if configs["unet"].get("in_channels", 4) != image["channels"]:
        raise WeightsError(
            f"the U-Net of {str(folder)!r} reads {configs['unet'].get('in_channels', 4)} channels and its autoencoder"
            f" has {image['channels']}: inpainting and editing U-Nets with more inputs are not read"
        )
    text, pad = _text(configs["text_encoder"], folder, "tokenizer")
    width = text["width"]
    wiring: dict[str, Any] = {"pad_id": pad, "unconditional": "empty"}
    objective, drawing = scheduler_fields(folder / "scheduler", corrected=not xl)
    depth = text["depth"]
    if xl:
        text = _pair(text, configs["text_encoder_2"], folder)
        width += text["second_width"]
        wiring["unconditional"] = "zeros" if index.get("force_zeros_for_empty_prompt", True) else "empty"
        if denoiser["size_width"] and pooled_width(configs["unet"], denoiser["size_width"]) != text["projected"]:
            raise WeightsError(f"the U-Net of {str(folder)!r} reads a pooled text of another width than there is")
    if xl != bool(denoiser["size_width"]):
        raise WeightsError(f"the U-Net of {str(folder)!r} is not one of {kind}: its addition_embed_type differs")
    if width != configs["unet"].get("cross_attention_dim"):
        raise WeightsError(
            f"the U-Net of {str(folder)!r} reads states of width {configs['unet'].get('cross_attention_dim')}, its text"
            f" encoder makes {width}"
        )
    recipe = _recipe(xl, {
        "text_encoder": text,
        "denoiser": denoiser,
        "image_tokenizer": image,
        "objective": {"diffusion": objective},
        "wiring": {**wiring, **drawing},
    })  # fmt: skip
    new = ("image_tokenizer.moments", "image_tokenizer.measured")  # the factors are the configuration's
    return Official(
        recipe=recipe, keymap=stable_diffusion_xl(depth) if xl else STABLE_DIFFUSION, form=f"diffusers {kind}", new=new
    )


def _recipe(xl: bool, values: dict[str, Any]) -> Recipe:
    """The published recipe whose U-Net has these sizes; with others the one of the same kind."""
    for name, model in KNOWN.items():
        preset = to_plain(catalogue()["denoiser"].parse(name))
        if preset == values["denoiser"]:
            return resolve(model, values=values)
    return resolve("stable-diffusion-xl" if xl else "stable-diffusion-v1-5", values=values)


def unet_fields(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Fields of ``UNetConfig`` for the ``config.json`` of a ``UNet2DConditionModel``.

    Raises:
        WeightsError: Something that the zoo's U-Net does not have.
    """
    where = f"config.json of {str(folder / 'unet')!r}"
    for key, value in UNET_FIXED.items():
        if config.get(key, value) != value:
            raise WeightsError(f"{where}: {key} = {config[key]!r}; the zoo reads {value!r} alone")
    if config.get("out_channels", 4) != config.get("in_channels", 4):
        raise WeightsError(
            f"{where}: it reads {config.get('in_channels', 4)} channels and predicts {config.get('out_channels', 4)};"
            " the zoo's U-Net has as many on both sides"
        )
    widths = [int(w) for w in config.get("block_out_channels", (320, 640, 1280, 1280))]
    down = list(config.get("down_block_types", ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]))
    up = list(config.get("up_block_types", ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3))
    attends = [name == "CrossAttnDownBlock2D" for name in down]
    if up != ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)] or set(down) - {
        "CrossAttnDownBlock2D",
        "DownBlock2D",
    }:
        raise WeightsError(
            f"{where}: blocks {down} down, {up} up; the zoo reads (CrossAttn)DownBlock2D and their mirror"
        )
    layers = _levels(config.get("transformer_layers_per_block", 1), len(widths), where)
    if not attends[-1] and layers[-1] != 1:
        raise WeightsError(f"{where}: {layers[-1]} transformer blocks in the middle and none at the last level")
    addition = config.get("addition_embed_type")
    if addition not in (None, "text_time"):
        raise WeightsError(f"{where}: addition_embed_type = {addition!r}; the zoo reads none and 'text_time'")
    blocks = config.get("layers_per_block", 2)
    if not isinstance(blocks, int):
        raise WeightsError(f"{where}: layers_per_block = {blocks!r}; the zoo reads one number")
    return {
        "widths": widths,
        "blocks": blocks,
        "depths": [n if a else 0 for n, a in zip(layers, attends, strict=True)],
        "attention_heads": _levels(config.get("attention_head_dim", 8), len(widths), where),
        "linear": bool(config.get("use_linear_projection", False)),
        "groups": int(config.get("norm_num_groups", 32)),
        "size_width": int(config["addition_time_embed_dim"]) if addition else 0,
        "upcast_attention": bool(config.get("upcast_attention") or False),
    }


def pooled_width(config: Mapping[str, Any], size_width: int) -> int:
    """Width of the pooled text that a U-Net of SDXL reads beside its six sizes."""
    return int(config.get("projection_class_embeddings_input_dim") or 0) - 6 * size_width


def _levels(value: Any, count: int, where: str) -> list[int]:
    values = [value] * count if isinstance(value, int) else list(value)
    if len(values) != count or not all(isinstance(v, int) for v in values):
        raise WeightsError(f"{where}: {value!r} is not one number a level")
    return values


def _text(config: Mapping[str, Any], folder: Path, tokenizer: str) -> tuple[dict[str, Any], int]:
    """Fields of the text encoder, and the id with which its tokenizer fills texts up."""
    from zoo.data.text import named_tokenizer

    if config.get("use_attention_mask"):
        raise WeightsError(f"the text encoder of {str(folder)!r} hides pads (use_attention_mask); the zoo's reads them")
    path = folder / tokenizer
    if not path.is_dir():
        raise WeightsError(f"{str(folder)!r} has no folder {tokenizer!r}: copy the pipeline whole")
    length = read_json(path / "tokenizer_config.json").get("model_max_length", 77)
    fields = text_fields(config)
    if length != fields["context_length"]:
        raise WeightsError(
            f"the tokenizer of {str(folder)!r} fills texts to {length} tokens, its text encoder reads"
            f" {fields['context_length']}"
        )
    try:
        words = named_tokenizer(f"hf:{path}")
    except ConfigError as error:
        raise WeightsError(str(error)) from None
    return {**fields, "eos_id": words.eos_id, "tokenizer": f"hf:{path}"}, words.pad_id


def _pair(first: dict[str, Any], config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Fields of ``CLIPTextPairConfig``; the last block of the first one is not read."""
    second, pad = _text(config, folder, "tokenizer_2")
    first.pop("pooling", None), second.pop("pooling", None)
    for key in ("vocab_size", "context_length", "eps", "eos_id"):
        if first[key] != second[key]:
            raise WeightsError(f"the two text encoders of {str(folder)!r} differ in {key}: {first[key]}, {second[key]}")
    own = {f"second_{key}": second[key] for key in ("width", "depth", "heads", "ffn", "quick_gelu")}
    projected = int(config.get("projection_dim", 512))
    return {**first, "depth": first["depth"] - 1, **own, "projected": projected, "second_pad": pad}
