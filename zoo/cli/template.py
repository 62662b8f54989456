"""The prompt a model is trained on, token by token, for ``zoo show NAME --template``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.errors import ConfigError, ZooError

if TYPE_CHECKING:
    from rich.text import Text
    from torch import Tensor

    from zoo.recipe import Recipe

CAPTION = "a red bicycle leaning on a wall"
TURNS = (("What is in the picture?", "A red bicycle."), ("What colour is the wall?", "White."))

TRAINED, GIVEN = "bold green", "dim"


def show_template(recipe: Recipe) -> None:
    """Print a caption and a dialogue of two turns as every stage lays them out; stages that agree are one.

    Raises:
        ConfigError: The model reads no prompts.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console()
    recipe, lines = with_tokenizers(recipe)
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    shown: dict[str, tuple[list[str], list[Text]]] = {}
    for stage, rows in stages(recipe):
        shown.setdefault("\n".join(row.plain for row in rows), ([], rows))[0].append(stage)
    console.print(Text.assemble("trained tokens are ", ("[green]", TRAINED), ", all others are ", ("given", GIVEN)))
    for names, rows in shown.values():
        console.print()
        console.print(f"stage {', '.join(names)}", markup=False, highlight=False)
        for row in rows:
            console.print(row, soft_wrap=True)


def stages(recipe: Recipe) -> Iterator[tuple[str, list[Text]]]:
    """Name of each stage and its lines. The model is built without weights.

    Raises:
        ConfigError: The model reads no prompts.
    """
    import torch
    from PIL import Image

    from zoo.api import build_module
    from zoo.data.sample import Sample

    with torch.device("meta"):
        module = build_module(recipe, 0)
    image = Image.new("RGB", (8, 8))
    samples = {
        "caption": Sample("caption", image, (CAPTION,)),
        "dialogue": Sample("dialogue", image, (CAPTION,), {"turns": [list(turn) for turn in TURNS]}),
    }
    for index, stage in enumerate(recipe.stages):
        module.set_stage(index)
        processor = module.model.processor
        if not hasattr(processor, "layout"):
            raise ConfigError(
                f"{recipe.name} reads no prompts: take a model that bridges to a language model, e.g. llava"
            )
        name = f"{stage.name} (template {processor.layout.name})"
        yield name, [row for kind, sample in samples.items() for row in laid_out(kind, processor([sample]), processor)]


def laid_out(kind: str, batch: dict[str, Tensor], processor: Any) -> list[Text]:
    """A sample's rows: one where targets stand among what is read, two where a second sequence is written."""
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    mask = batch["attention_mask"][0].tolist()
    ids = [token for token, real in zip(ids, mask, strict=True) if real]
    slot = processor.image_token_id
    if batch["labels"].shape == batch["input_ids"].shape and "decoder_input_ids" not in batch:
        labels = [label for label, real in zip(labels, mask, strict=True) if real]
        return [line(kind, ids, [label >= 0 for label in labels], processor.tokenizer, slot)]
    written = [label for label in labels if label >= 0]
    return [
        line(f"{kind}, read", ids, [False] * len(ids), processor.tokenizer, slot),
        line(f"{kind}, written", written, [True] * len(written), processor.tokenizer, slot),
    ]


def line(kind: str, ids: list[int], trained: list[bool], tokenizer: Any, slot: int) -> Text:
    """``kind`` and its tokens between bars; runs of trained ones are coloured, and bracketed for terminals without
    colour."""
    from rich.text import Text

    names = {tokenizer.pad_id: "<pad>", tokenizer.eos_id: "<eos>", tokenizer.bos_id: "<bos>"}
    out = Text(f"  {kind} ({len(ids)} tokens, {sum(trained)} trained): ")
    place, before = 0, False
    while place < len(ids):
        count = 1
        if ids[place] == slot:
            while place + count < len(ids) and ids[place + count] == slot:
                count += 1
            text = f"<image> x {count}"
        else:
            text = names.get(ids[place]) or tokenizer.decode([ids[place]]).replace("\n", "\\n") or f"<{ids[place]}>"
        now = trained[place]
        if place or now:
            out.append("[" if now and not before else "]" if before and not now else "|", GIVEN)
        out.append(text, TRAINED if now else GIVEN)
        place, before = place + count, now
    if before:
        out.append("]", GIVEN)
    return out


def with_tokenizers(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """The recipe with tokenizers that are on this machine, and a line for each that is not: those of scale tiny stand
    in for them. Nothing is downloaded."""
    from zoo.recipe import read_scale

    stand_in = str(read_scale("tiny").sizes["tokenizer"])
    parts, lines = dict(recipe.parts), []
    for slot, (name, config) in recipe.parts.items():
        wanted = getattr(config, "tokenizer", None)
        if isinstance(wanted, str) and wanted and not at_hand(wanted):
            try:
                parts[slot] = (name, dataclasses.replace(config, tokenizer=stand_in))  # type: ignore[call-arg]
            except ValueError:  # a pretrained part has no other
                raise ConfigError(
                    f"the tokenizer {wanted!r} of {slot} {name!r} is not on this machine: choose another {slot}"
                ) from None
            lines.append(
                f"the tokenizer {wanted} of {slot} is not on this machine; shown with {stand_in} of scale=tiny"
            )
    return dataclasses.replace(recipe, parts=parts), lines


def at_hand(name: str) -> bool:
    """Whether a text tokenizer can be made without the network."""
    kind, _, path = name.partition(":")
    if kind == "hf":
        from huggingface_hub import try_to_load_from_cache

        if Path(path).expanduser().is_dir():
            return True
        files = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
        return path.count("/") == 1 and any(isinstance(try_to_load_from_cache(path, file), str) for file in files)
    from zoo.data.text import named_tokenizer

    try:
        named_tokenizer(name)
    except ZooError:
        return False
    return True
