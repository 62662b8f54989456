"""InstructBLIP's and MiniGPT-4's checkpoints as recipes: transformers folders and files of the released codes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoo.recipe import Recipe, resolve
from zoo.weights.formats import Official
from zoo.weights.formats import blip2 as blip2_formats
from zoo.weights.formats import llava as llava_formats
from zoo.weights.keymaps import blip2 as blip2_maps
from zoo.weights.keymaps import instructblip as maps

PUBLISHED = {4096: "instructblip-vicuna-7b", 5120: "instructblip-vicuna-13b"}
"""Width of the language model -> recipe."""

T5 = {2048: "instructblip-flan-t5-xl", 4096: "instructblip-flan-t5-xxl"}


def from_transformers(config: Mapping[str, Any], folder: Path) -> Official:
    """A folder of ``InstructBlipForConditionalGeneration``, whose Q-Former reads the instruction.

    Raises:
        WeightsError: What the zoo's EVA tower, Q-Former or language models do not have.
    """
    encoder, connector = blip2_formats.tower_fields(config, folder)
    bert = {"vocab_size": 30522, "max_position_embeddings": 512, **(config.get("qformer_config") or {})}
    connector |= {
        "vocab_size": int(bert["vocab_size"]),
        "context_length": int(bert["max_position_embeddings"]),
    }
    if (folder / "qformer_tokenizer").is_dir():
        connector["tokenizer"] = f"hf:{folder / 'qformer_tokenizer'}"
    text = config.get("text_config") or {"model_type": "llama"}
    if "t5" in str(text.get("model_type")):
        from zoo.weights.formats import blip2_t5

        decoder = blip2_t5.decoder_fields(text, folder, "language_model.lm_head.weight")
        model = T5.get(decoder["width"], T5[2048])
    else:
        decoder = llava_formats.decoder_fields(text, folder)
        model = PUBLISHED.get(decoder["width"], PUBLISHED[4096])
    values: dict[str, Any] = {"encoder": encoder, "connector": connector, "decoder": decoder}
    image_id = config.get("image_token_index", config.get("image_token_id"))
    if image_id is not None:
        values["wiring"] = {"image_id": int(image_id)}
    return Official(recipe=resolve(model, values=values), keymap=maps.HF, form="transformers instructblip")


def from_state(recipe: Recipe, state: Mapping[str, Any]) -> Official | None:
    """A bare file of LAVIS (``instruct_blip_*_trimmed.pth``), of MiniGPT-4, or of transformers; None for the zoo's own
    names.

    Such files hold what was trained and perhaps more: MiniGPT-4's ``llama_proj`` alone, InstructBLIP's all but the
    language model. What is not in a file is new.
    """
    if any(name.startswith(("encoder.", "connector.", "decoder.")) for name in state):
        return None
    encoder: Any = recipe.parts["encoder"][1]
    connector: Any = recipe.parts["connector"][1]
    text = bool(getattr(connector, "text", False))
    minigpt4 = recipe.model.startswith("minigpt4")
    if text and any(name.startswith(("qformer.", "language_model.")) for name in state):
        keymap, form = maps.HF, "transformers instructblip"
    else:
        language = "llama" if minigpt4 else "t5" if recipe.wiring[0] == "bridge-seq2seq" else "llm"
        keymap = maps.lavis(encoder.depth, encoder.depth + 1, language, text=text)
        form = "MiniGPT-4" if minigpt4 else "LAVIS instructblip"
    mapped, _ = keymap.load(state)
    held = {".".join(name.split(".")[:2]) for name in mapped}
    new = [f"{slot}.{{**}}" for slot in ("encoder", "decoder") if not any(n.startswith(slot + ".") for n in held)]
    pieces = ("query_tokens", "ln_vision", "norm", "trunk", "text", "proj")
    new += [
        f"connector.{piece}{tail}" for piece in pieces if f"connector.{piece}" not in held for tail in ("", ".{**}")
    ]
    return Official(recipe=recipe, keymap=keymap, form=form, ignored=_left(text), new=tuple(new))


def _left(text: bool) -> tuple[str, ...]:
    """Names a file may have beside what the model reads: without a text branch, its weights and stage 1's heads."""
    return ("Qformer.cls.{**}",) if text else blip2_maps.STAGE1
