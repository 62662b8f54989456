"""MiniGPT-5 (model.py of the release): what stands between the language model's states and the image decoder."""

from __future__ import annotations

from zoo.weights.keymaps import KeyMap, rename, torch_transformer


def keymap() -> KeyMap:
    """Return the map to ``fc`` (Linear, GELU, Linear), ``encoder``, ``decoder``, ``queries`` (an embedding)."""
    return KeyMap(
        rename("fc.{i}.{p}", "fc.{i}.{p}"),
        rename("t2i_decoder_prompt", "queries.weight", lambda t: t[0], lambda t: t[None]),
    ) + torch_transformer.keymap().under("llm_to_t2i_mapping.")
