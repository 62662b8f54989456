"""LLaVA checkpoints as recipes: transformers folders, folders of the released code, and bare files of either."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoo.encoders.open_clip import kept_blocks
from zoo.errors import WeightsError
from zoo.recipe import Recipe, resolve
from zoo.weights.files import read_json
from zoo.weights.formats import Official
from zoo.weights.formats.clip import vision_fields
from zoo.weights.keymaps import llava as maps

PUBLISHED = {4096: "llava-1.5", 5120: "llava-1.5-13b"}
"""Width of the language model -> recipe."""

TOWERS = {"openai/clip-vit-large-patch14": 224, "openai/clip-vit-large-patch14-336": 336}
"""Released image towers -> pixels."""


def from_transformers(config: Mapping[str, Any], folder: Path) -> Official:
    """A folder of ``LlavaForConditionalGeneration``, or of haotian-liu/LLaVA, whose ``model_type`` may be the same.

    Raises:
        WeightsError: An image tower, projector or feature choice that the zoo's bridge does not have.
    """
    if "mm_projector_type" in config or "mm_vision_tower" in config:
        return _released(config, folder)
    vision = dict(config.get("vision_config") or {})
    kind = vision.get("model_type", "clip_vision_model")
    if kind != "clip_vision_model":
        raise WeightsError(f"config.json: a LLaVA with the image tower {kind!r}; the zoo reads clip_vision_model")
    act = config.get("projector_hidden_act", "gelu")
    if act != "gelu" or not config.get("multimodal_projector_bias", True):
        raise WeightsError(f"config.json: projector_hidden_act = {act!r}; the zoo's mlp has exact GELU and biases")
    # what config.json leaves out is LLaVA's tower, not CLIPVisionConfig's default
    large = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    if not vision.get("hidden_size"):
        vision = {**large, "patch_size": 14, "image_size": 336, **vision}
    encoder = vision_fields(vision, folder) | _features(
        config.get("vision_feature_layer", -2), config.get("vision_feature_select_strategy", "default") == "default"
    )
    decoder = decoder_fields(config.get("text_config") or {"model_type": "llama"}, folder)
    image_id = config.get("image_token_index", config.get("image_token_id", 32000))
    values = {
        "encoder": encoder,
        "decoder": decoder,
        "wiring": {"image_id": int(image_id), "template": "vicuna_v1"},
    }
    recipe = resolve(PUBLISHED.get(decoder["width"], "llava-1.5"), values=values)
    return Official(recipe=recipe, keymap=_map(recipe), form="transformers llava")


def _released(config: Mapping[str, Any], folder: Path) -> Official:
    projector = str(config.get("mm_projector_type", "linear"))
    layers = {"linear": 0, "identity": -1}.get(projector)
    if layers is None:
        number = projector.removeprefix("mlp").removesuffix("x_gelu")
        if f"mlp{number}x_gelu" != projector or not number.isdigit():
            raise WeightsError(f"config.json: mm_projector_type = {projector!r}: expected linear or mlpNx_gelu")
        layers = int(number)
    if config.get("mm_use_im_start_end"):
        raise WeightsError("config.json: mm_use_im_start_end puts tokens around images, which the zoo does not")
    tower = str(config.get("mm_vision_tower", ""))
    if tower in TOWERS:
        large = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        vision = vision_fields({**large, "patch_size": 14, "image_size": TOWERS[tower]}, folder)
    elif (Path(tower) / "config.json").is_file():
        about = read_json(Path(tower) / "config.json")
        vision = vision_fields(about.get("vision_config") or about, Path(tower))
    else:
        raise WeightsError(f"config.json: mm_vision_tower = {tower!r}: expected {' or '.join(TOWERS)}, or a folder")
    patch = str(config.get("mm_vision_select_feature", "patch")) == "patch"
    vision |= _features(config.get("mm_vision_select_layer", -2), patch)
    vision["resize"] = "pad" if config.get("image_aspect_ratio") == "pad" else "crop"
    decoder = decoder_fields({**config, "model_type": "llama"}, folder)
    model = "llava" if layers < 1 else PUBLISHED.get(decoder["width"], "llava-1.5")
    values: dict[str, Any] = {
        "encoder": vision,
        "decoder": decoder,
        "wiring": {"template": "llava_v1" if model == "llava" else "vicuna_v1"},
    }
    if layers > 0:
        values["connector"] = {"depth": layers}
    choices = {"connector": "identity"} if layers < 0 else None
    recipe = resolve(model, choices=choices, values=values)
    return Official(recipe=recipe, keymap=_map(recipe), form="LLaVA")


def from_state(recipe: Recipe, state: Mapping[str, Any]) -> Official | None:
    """A bare file of a LLaVA recipe in any of its official names; None for the zoo's own.

    A file of the projector alone (``mm_projector.bin``) leaves encoder and decoder new.
    """
    if any(name.startswith(("encoder.", "connector.", "decoder.")) for name in state):
        return None
    mapped, _ = _map(recipe).load(state)
    held = {name.split(".")[0] for name in mapped}
    new = tuple(f"{slot}.{{**}}" for slot in ("encoder", "decoder") if slot not in held)
    return Official(recipe=recipe, keymap=_map(recipe), form="LLaVA", new=new)


def decoder_fields(section: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Fields of ``CausalLMConfig`` for the text section of a ``config.json``, with its family's defaults for what it
    omits.

    Raises:
        WeightsError: A family that is no causal LM of transformers.
    """
    from zoo.decoders.causal_lm import CausalLMConfig
    from zoo.registry import to_plain

    family = str(section.get("model_type", "llama"))
    config = CausalLMConfig.complete(family, section)
    if config is None:
        raise WeightsError(f"config.json: text model {family!r} is no causal language model of transformers")
    fields = to_plain(CausalLMConfig.from_library(config, "openmoji-bpe"))
    del fields["tokenizer"]
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        fields["tokenizer"] = f"hf:{folder}"
    return fields


def _features(layer: Any, drops_class: bool) -> dict[str, Any]:
    if not isinstance(layer, int):
        raise WeightsError(f"config.json: vision_feature_layer = {layer!r}; the zoo's bridge reads one layer")
    # transformers counts the embeddings as layer 0, so that n > 0 is block n - 1; negative numbers mean the same
    return {"layer": layer - 1 if layer > 0 else layer, "cls": not drops_class, "pool": False}


def _map(recipe: Recipe) -> Any:
    encoder: Any = recipe.parts["encoder"][1]
    return maps.keymap(kept_blocks(encoder.layer, encoder.depth), encoder.depth)
