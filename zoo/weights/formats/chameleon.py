"""Chameleon as recipes: transformers folders, and the released folders and files (``consolidated.pth``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.errors import WeightsError
from zoo.recipe import Recipe, resolve
from zoo.weights.files import read_file, read_folder, read_json, stem_of
from zoo.weights.formats import Official
from zoo.weights.keymaps import KeyMap, rename
from zoo.weights.keymaps import chameleon as maps

PARTS = {"trunk": "decoder.trunk.", "embed": "decoder.embedding.tokens.", "head": "decoder.lm_head."}

BOI, EOI = "<racm3:break>", "<eoss>"
"""The ids around an image, as the tokenizer spells them."""

CODE, LETTERS = "IMGIMG", "ABCDEFGHIJ"
"""An image code is spelled ``IMGIMG``, its digits as letters, ``Z``."""

VQ = "model.vqmodel."

CONSOLIDATED = "consolidated.pth"
"""The released weights in one file."""

HEADS = {4096: (32, 32), 8192: (64, 8)}
"""Width -> heads and key/value heads of the released sizes, which tensors alone do not tell."""


def from_transformers(config: Mapping[str, Any], folder: Path) -> Official:
    """A folder of ``ChameleonForConditionalGeneration``, with or without the decoder of its image tokenizer.

    The ids of image codes are in no order; the zoo's codes follow the ids, so that the rows of the codebook are put
    in the order of their ids.

    Raises:
        WeightsError: A vocabulary whose codes leave gaps, or a field that the zoo's Chameleon does not have.
    """
    from zoo.weights.formats.image_tokenizers import sizes

    for key, expected in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
        if config.get(key, expected) != expected:
            raise WeightsError(f"config.json: {key} = {config[key]!r}; the zoo's Chameleon has {expected!r}")
    rope = config.get("rope_parameters") or {}
    width, heads = int(config.get("hidden_size", 4096)), int(config.get("num_attention_heads", 32))
    kv_heads = int(config.get("num_key_value_heads") or heads)
    decoder: dict[str, Any] = {
        "width": width,
        "depth": int(config.get("num_hidden_layers", 32)),
        "heads": heads,
        "kv_heads": 0 if kv_heads == heads else kv_heads,
        "ffn": int(config.get("intermediate_size", 11008)),
        "vocab_size": int(config.get("vocab_size", 65536)),
        "context_length": int(config.get("max_position_embeddings", 4096)),
        "eps": float(config.get("rms_norm_eps", 1e-5)),
        "rope_theta": float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        "placement": "branch" if config.get("swin_norm") else "pre",
        "tie": bool(config.get("tie_word_embeddings", False)),
    }
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        decoder["tokenizer"] = f"hf:{folder}"
    named = {str(k): int(v) for k, v in (config.get("vocabulary_map") or {}).items()}
    wiring, order = places(named, decoder["vocab_size"])
    about = dict(config.get("vq_config") or {})
    state = {n.removeprefix(VQ): t for n, t in read_folder(folder, stem_of(folder)).items() if n.startswith(VQ)}
    fields, tokenizer_map = sizes("Chameleon's VQGAN", state)
    if fields["vocab_size"] != len(order):
        raise WeightsError(f"the vocabulary names {len(order)} image codes, the codebook has {fields['vocab_size']}")
    groups, unknown = _groups(state)
    image = {**fields, **groups, "image_size": int(about.get("resolution", 512))}
    tokenizer_map = _ordered(tokenizer_map, order)
    recipe = resolve(
        "chameleon-34b" if config.get("swin_norm") else "chameleon-7b",
        values={"decoder": decoder, "image_tokenizer": image, "wiring": wiring},
    )
    lacks = not any(name.startswith("decoder.") for name in state)
    return Official(
        recipe=recipe,
        keymap=maps.keymap(**PARTS) + tokenizer_map.under(VQ, "image_tokenizer."),
        form="transformers chameleon",
        new=("image_tokenizer.decoder.{**}",) if lacks else (),
        unknown=unknown,
        ignored=("model.layers.{i}.self_attn.rotary_emb.{p}",),
    )


def from_release(folder: Path) -> tuple[Official, dict[str, Tensor]]:
    """A folder of the release, unsharded: ``consolidated.pth`` and ``params.json``, with ``text_tokenizer.json`` and
    ``vqgan.ckpt`` beside them or in ``../../tokenizer``. Without the latter the image tokenizer stays new.

    Returns:
        What it is, and its tensors, those of the image tokenizer behind ``vqgan.``.

    Raises:
        WeightsError: Weights of something else, or a vocabulary whose codes leave gaps.
    """
    from zoo.weights.formats.image_tokenizers import sizes

    params = read_json(folder / "params.json")
    params = dict(params.get("model") or params)
    state = read_file(folder / CONSOLIDATED)
    if "tok_embeddings.weight" not in state or not {"dim", "n_heads"} <= set(params):
        raise WeightsError(f"{str(folder)!r} has params.json and {CONSOLIDATED} of something else than Chameleon")
    text, drawn = (
        next((p for p in (folder / name, folder / "../../tokenizer" / name) if p.is_file()), None)
        for name in ("text_tokenizer.json", "vqgan.ckpt")
    )
    values: dict[str, dict[str, Any]] = {}
    order: list[int] = []
    unknown: tuple[str, ...] = ()
    if text is not None:
        about = read_json(text)
        named = {str(k): int(v) for k, v in (about.get("model") or {}).get("vocab", {}).items()}
        named |= {str(t["content"]): int(t["id"]) for t in about.get("added_tokens", [])}
        values["wiring"], order = places(named, len(state["tok_embeddings.weight"]))
        values["image_tokenizer"] = {"vocab_size": len(order)}
    if drawn is not None and not order:
        raise WeightsError(f"{str(folder)!r} has {drawn.name} and no text_tokenizer.json, which orders its codes")
    tokenizer_map = KeyMap()
    if drawn is not None:
        image = read_file(drawn)
        fields, tokenizer_map = sizes("Chameleon's VQGAN", image)
        groups, unknown = _groups(image)
        values["image_tokenizer"] = fields | groups
        tokenizer_map = _ordered(tokenizer_map, order).under("vqgan.", "image_tokenizer.")
        state |= {f"vqgan.{name}": tensor for name, tensor in image.items()}
    heads = int(params["n_heads"])
    values["decoder"] = {
        "eps": float(params.get("norm_eps", 1e-5)),
        "rope_theta": float(params.get("rope_theta", 10000.0)),
    }
    model = "chameleon-34b" if params.get("swin_norm") else "chameleon-7b"
    official = _released(model, state, heads, int(params.get("n_kv_heads") or heads), values)
    if drawn is None:
        return official, state
    whole = dataclasses.replace(
        official,
        keymap=official.keymap + tokenizer_map,
        new=(),
        ignored=(*official.ignored, "vqgan.loss.{**}"),
        unknown=unknown,
    )
    return whole, state


def from_state(recipe: Recipe, state: Mapping[str, Tensor]) -> Official | None:
    """A bare ``consolidated.pth``; None for other names.

    Raises:
        WeightsError: A file of no published width: tensors do not tell the number of heads; give its folder.
    """
    if "tok_embeddings.weight" not in state:
        return None
    width = state["tok_embeddings.weight"].shape[1]
    if width not in HEADS:
        raise WeightsError(
            f"the file has width {width}, and tensors do not tell the number of heads: give its folder with params.json"
        )
    return _released(recipe.model, state, *HEADS[width], {})


def _released(
    model: str, state: Mapping[str, Tensor], heads: int, kv_heads: int, said: Mapping[str, Mapping[str, Any]]
) -> Official:
    rows, width = state["tok_embeddings.weight"].shape
    decoder: dict[str, Any] = {
        "width": width,
        "depth": 1 + max(int(name.split(".")[1]) for name in state if name.startswith("layers.")),
        "heads": heads,
        "kv_heads": 0 if kv_heads == heads else kv_heads,
        "ffn": state["layers.0.feed_forward.w13.weight"].shape[0] // 2,
        "vocab_size": rows,
        **said.get("decoder", {}),
    }
    recipe = resolve(model, values={**said, "decoder": decoder})
    keymap = maps.official_keymap(heads=heads, kv_heads=kv_heads, head_dim=width // heads, per_head=True, **PARTS)
    return Official(
        recipe=recipe, keymap=keymap, form="Chameleon", new=("image_tokenizer.{**}",), ignored=("rope.freqs",)
    )


def places(named: Mapping[str, int], text: int) -> tuple[dict[str, Any], list[int]]:
    """Where the vocabulary has its boundaries and codes: fields of the wiring, and the codes in the order of their ids.

    Raises:
        WeightsError: A boundary is missing, or the ids of the codes leave gaps.
    """
    spelled = {code: id for name, id in named.items() if (code := _code(name)) is not None}
    lost = [name for name in (BOI, EOI) if name not in named]
    if lost or not spelled:
        raise WeightsError(f"the vocabulary has no {lost[0] if lost else CODE + '...'}: it is no Chameleon's")
    ids = sorted(spelled.values())
    if ids != list(range(ids[0], ids[0] + len(ids))) or sorted(spelled) != list(range(len(spelled))) or ids[-1] >= text:
        raise WeightsError(f"the vocabulary's {len(ids)} image codes leave gaps or lie outside its {text} ids")
    order = sorted(spelled, key=lambda code: spelled[code])
    return {"places": {"boi": named[BOI], "eoi": named[EOI]}, "code_place": ids[0]}, order


def _code(name: str) -> int | None:
    digits = name.removeprefix(CODE).removesuffix("Z")
    if name != f"{CODE}{digits}Z" or not digits or set(digits) - set(LETTERS):
        return None
    return int("".join(str(LETTERS.index(letter)) for letter in digits))


def _groups(state: Mapping[str, Tensor]) -> tuple[dict[str, int], tuple[str, ...]]:
    """Groups of the image tokenizer's norms: 32, as both codes have, unless its channels are too few for that."""
    fit = state["encoder.conv_in.weight"].shape[0] % 64 == 0
    return {"groups": 32 if fit else 1}, () if fit else ("image_tokenizer.groups",)


def _ordered(keymap: KeyMap, order: list[int]) -> KeyMap:
    """The map of an image tokenizer whose codebook's rows move into the order of their ids, and back on saving."""
    index = torch.tensor(order)
    rule = rename(
        "quantize.embedding.weight",
        "quantizer.codebook",
        lambda rows: rows[index],
        lambda rows: rows[torch.argsort(index)],
    )
    return KeyMap(*(rule if r.source == rule.source else r for r in keymap.rules))
