"""Released image tokenizers as recipes: showlab/magvitv2, Open-MAGVIT2, LlamaGen's VQ and Chameleon's VQGAN."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from zoo.errors import WeightsError
from zoo.recipe import Recipe, resolve
from zoo.weights.formats import Official
from zoo.weights.keymaps import KeyMap, rename
from zoo.weights.keymaps import image_tokenizers as maps
from zoo.weights.report import some

PUBLISHED = 128
"""Channels of the first level of every published size, with 32 groups a norm; tensors do not tell groups."""

PART = "image_tokenizer."

EMA = "model_ema."
"""Before the names of averaged copies, in which dots are left out (Open-MAGVIT2)."""

TRAINING = ("loss.{**}", "discriminator.{**}", "perceptual_loss.{**}", "model_ema.{**}")
"""What only the release's training needs."""


def from_state(recipe: Recipe, state: Mapping[str, Tensor]) -> Official | None:
    """A bare state dict of one of the releases; None for other names.

    Sizes are read from the tensors; the image's is the recipe's. Groups of norms cannot be, and are 32 where the first
    level has 128 channels.

    Raises:
        WeightsError: A tokenizer of another family than ``recipe``'s, or parts of it that are missing.
    """
    kind = family(state)
    if kind is None:
        return None
    wanted = _recipe_family(recipe)
    if kind != wanted:
        raise WeightsError(
            f"the file is a tokenizer in the layout of {kind}, and {recipe.model} has {wanted}'s: load it"
            f" with the recipe that fits"
        )
    ema = any(name.startswith(EMA + "encoder") for name in state)
    fields, keymap = sizes(kind, state)
    ignored: tuple[str, ...] = TRAINING
    if ema:
        keymap, ignored = averaged(keymap, state), (*TRAINING, "encoder.{**}", "decoder.{**}")
    told = fields["width"] == PUBLISHED * fields["encoder_mult"][-1]
    lacks = not any(name.startswith("decoder.") for name in state)
    own = resolve(recipe.model, values={"image_tokenizer": fields | {"groups": 32 if told else 1}})
    _check_whole(own, keymap, state, lacks)
    return Official(
        recipe=own,
        keymap=keymap.under("", PART),
        form=f"{kind} (averaged weights)" if ema else kind,
        ignored=ignored,
        new=(PART + "decoder.{**}",) if lacks else (),
        unknown=() if told else (PART + "groups",),
    )


def _check_whole(recipe: Recipe, keymap: KeyMap, state: Mapping[str, Tensor], lacks: bool) -> None:
    """Refuse a file that does not fill the tokenizer: the groups a caller says are a change, and a change would explain
    what is missing."""
    import torch

    config: Any = recipe.parts["image_tokenizer"][1]
    with torch.device("meta"):
        wanted = config.build().state_dict()
    filled, _ = keymap.load(state)
    lost = [name for name in wanted if name not in filled and not (lacks and name.startswith("decoder."))]
    if lost:
        raise WeightsError(f"the file lacks {len(lost)} tensors of the tokenizer: {some(lost)}; is it whole?")


def from_folder(config: Mapping[str, Any], folder: Path) -> Official:
    """A folder of Show-o's tokenizer (``_class_name`` MAGVITv2).

    Raises:
        WeightsError: Other tensors than its.
    """
    from zoo.weights.files import read_folder, stem_of

    official = from_state(resolve("magvitv2"), read_folder(folder, stem_of(folder)))
    if official is None:
        raise WeightsError(f"{str(folder)!r} says it is {config.get('_class_name')!r} and has none of its tensors")
    return official


def family(state: Mapping[str, Tensor]) -> str | None:
    """Whose layout a state dict has, by names that only that layout has; None = none of these."""
    marks = {
        "encoder.quant_conv.weight": "Show-o's MAGVIT-v2",
        "encoder.mid_block.0.conv1.weight": "Open-MAGVIT2",
        "encoder.conv_blocks.0.res.0.conv1.weight": "LlamaGen's VQ",
    }
    for name, kind in marks.items():
        if name in state:
            return kind
    vqgan = {"encoder.down.0.block.0.conv1.weight", "quantize.embedding.weight", "quant_conv.weight"}
    return "Chameleon's VQGAN" if vqgan <= set(state) else None


def _recipe_family(recipe: Recipe) -> str:
    config: Any = recipe.parts["image_tokenizer"][1]
    if hasattr(config, "bit_order"):
        return "Open-MAGVIT2" if config.adaptive else "Show-o's MAGVIT-v2"
    return "LlamaGen's VQ" if config.unit else "Chameleon's VQGAN"


def sizes(kind: str, state: Mapping[str, Tensor]) -> tuple[dict[str, Any], KeyMap]:
    """The fields of the tokenizer that its tensors tell, and its key map.

    Raises:
        WeightsError: A tensor that every such file has is missing.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in state:
            raise WeightsError(f"the file has a tokenizer in the layout of {kind} but no {name}: is it whole?")
        return tuple(state[name].shape)

    words = ("conv_blocks", "conv_blocks", "res") if kind == "LlamaGen's VQ" else ("down", "up", "block")
    base = shape("encoder.conv_in.weight")[0]
    fields: dict[str, Any] = {}
    levels, attending = 0, [False]
    for half, level in (("encoder", words[0]), ("decoder", words[1])):
        count = _count(state, rf"{half}\.{level}\.(\d+)\.")
        if half == "encoder":
            levels = count
        elif not count:  # transformers keeps none
            fields |= {"decoder_mult": fields["encoder_mult"]}
            fields |= {"decoder_blocks": [n + 1 for n in fields["encoder_blocks"]]}
            continue
        order = range(count) if half == "encoder" or level != "conv_blocks" else range(count - 1, -1, -1)
        widths = [shape(f"{half}.{level}.{i}.{words[2]}.0.conv1.weight")[0] for i in order]
        fields[f"{half}_mult"] = [max(1, w // base) for w in widths]
        fields[f"{half}_blocks"] = [_count(state, rf"{half}\.{level}\.{i}\.{words[2]}\.(\d+)\.") for i in order]
        if half == "encoder":
            attending = [_count(state, rf"{half}\.{level}\.{i}\.attn\.(\d+)\.") > 0 for i in order]
    fields |= {"patch_size": 2 ** (levels - 1), "width": base * fields["encoder_mult"][-1]}
    if kind == "Open-MAGVIT2":
        fields["middle"] = _count(state, r"encoder\.mid_block\.(\d+)\.")
        fields["vocab_size"] = 2 ** shape("encoder.conv_out.weight")[0]
        return fields, maps.open_magvit2()
    if kind == "Show-o's MAGVIT-v2":
        fields["vocab_size"] = 2 ** shape("encoder.quant_conv.weight")[0]
        fields["attention"] = attending
        return fields, maps.magvitv2()
    fields["vocab_size"], fields["code_width"] = shape("quantize.embedding.weight")
    fields["latent"] = shape("encoder.conv_out.weight")[0]
    fields["attention"] = attending
    return fields, maps.llamagen_vq(levels) if kind == "LlamaGen's VQ" else maps.chameleon_vq()


def averaged(keymap: KeyMap, state: Mapping[str, Tensor]) -> KeyMap:
    """The map from the averaged copies of every tensor that ``keymap`` maps; the tensors themselves are left.

    Raises:
        WeightsError: Not every tensor has its copy.
    """
    rules = []
    for name in state:
        if not name.startswith(("encoder.", "decoder.")):
            continue
        copy = EMA + name.replace(".", "")
        if copy not in state:
            raise WeightsError(f"the file has averaged weights but none of {name} ({copy}): is it whole?")
        ours, _ = keymap.load({name: state[name]})
        rules += [rename(copy, target) for target in ours]
    return KeyMap(*rules)


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """One more than the largest number that ``pattern`` finds at the beginning of a name."""
    found = [re.match(pattern, name) for name in state]
    return 1 + max((int(match[1]) for match in found if match), default=-1)
