"""Folders of text models, for ``init=``: a unified decoder starts from a language model (Show-o from Phi)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoo.recipe import resolve
from zoo.weights.formats import Official
from zoo.weights.keymaps import llama, phi

TEXT = "decoder.text."
"""Before the names of a text model's own tables: a model that reads images as well puts them into its joined ones
(``UnifiedRows.adopt``)."""


def from_transformers(config: Mapping[str, Any], folder: Path) -> Official:
    """A folder of ``PhiForCausalLM``, or of ``LlamaForCausalLM``, the same trunk as ``decoder``.

    It is no model of the zoo's alone: a run starts from it with ``init=FOLDER``.
    """
    kind = str(config.get("model_type"))
    hf = dict(config)
    trunk = (phi if kind == "phi" else llama).trunk_config(hf)
    keymap = (phi if kind == "phi" else llama).keymap("decoder.trunk.", f"{TEXT}embed.", f"{TEXT}head.")
    sizes: dict[str, Any] = {
        "width": trunk.width,
        "depth": trunk.depth,
        "heads": trunk.heads,
        "kv_heads": 0 if trunk.kv_heads in (None, trunk.heads) else trunk.kv_heads,
        "ffn": trunk.ffn,
    }
    recipe = resolve("show-o" if kind == "phi" else "chameleon", values={"decoder": sizes})
    return Official(
        recipe=recipe,
        keymap=keymap,
        form=f"transformers {kind}",
        ignored=("model.rotary_emb.{p}", "model.layers.{i}.self_attn.rotary_emb.{p}"),
    )
