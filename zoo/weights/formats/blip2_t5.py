"""BLIP-2 with FlanT5 as recipes: transformers folders (LAVIS files: ``blip2.from_state``)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoo.errors import WeightsError
from zoo.recipe import resolve
from zoo.weights.files import read_json
from zoo.weights.formats import Official
from zoo.weights.keymaps import blip2 as maps

PUBLISHED = {2048: "blip2-flan-t5", 4096: "blip2-flan-t5-xxl"}
"""Width of the language model -> recipe."""

TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "tokenizer.model")


def from_transformers(config: Mapping[str, Any], folder: Path) -> Official:
    """A folder of ``Blip2ForConditionalGeneration`` with an encoder-decoder language model.

    Raises:
        WeightsError: A language model that is no T5, or what the zoo's EVA tower or Q-Former does not have.
    """
    from zoo.weights.formats.blip2 import tower_fields

    encoder, connector = tower_fields(config, folder)
    decoder = decoder_fields(config.get("text_config") or {}, folder, "language_model.lm_head.weight")
    values: dict[str, Any] = {"encoder": encoder, "connector": connector, "decoder": decoder}
    image_id = config.get("image_token_index", config.get("image_token_id"))
    if image_id is not None:
        values["wiring"] = {"image_id": int(image_id)}
    recipe = resolve(PUBLISHED.get(decoder["width"], "blip2-flan-t5"), values=values)
    return Official(recipe=recipe, keymap=maps.HF, form="transformers blip-2")


def decoder_fields(section: Mapping[str, Any], folder: Path, head: str) -> dict[str, Any]:
    """Fields of ``Seq2SeqLMConfig`` for the text section of a ``config.json``.

    Args:
        head: The output projection's name in the folder's weights. transformers 5 ties every T5 it builds and says so
            in every configuration; whether a folder is tied shows in whether it holds this tensor.

    Raises:
        WeightsError: A family that is no T5.
    """
    from zoo.decoders.seq2seq_lm import FAMILIES, Seq2SeqLMConfig
    from zoo.registry import to_plain

    family = str(section.get("model_type", "t5"))
    if family not in FAMILIES:
        raise WeightsError(f"config.json: text model {family!r}; the zoo reads {', '.join(FAMILIES)}")
    names = stored_names(folder)
    config = Seq2SeqLMConfig.from_library(section, "openmoji-bpe", tied=None if names is None else head not in names)
    fields = to_plain(config)
    del fields["tokenizer"]
    if any((folder / name).is_file() for name in TOKENIZER_FILES):
        fields["tokenizer"] = f"hf:{folder}"
    return fields


def stored_names(folder: Path) -> set[str] | None:
    """Names of the tensors in a folder's safetensors, without reading them; None where it has none."""
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if whole.is_file():
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(whole), "pt") as file:
                return set(file.keys())
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{str(whole)!r} is truncated or damaged ({error}): copy it again") from error
    if index.is_file():
        return set(read_json(index).get("weight_map") or {})
    return None
