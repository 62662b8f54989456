"""NExT-GPT (nextgpt/model/multimodal_projector/projector.py of the release): the projection of one modality."""

from __future__ import annotations

from zoo.weights.keymaps import KeyMap, rename, torch_transformer


def keymap(*, legacy: bool = False) -> KeyMap:
    """Return the map to ``zoo.output_connectors.projection``; ``legacy`` names of the first code base, ``fc`` and
    ``model`` for ``in_fc`` and ``out_fc``."""
    first, last = ("fc", "model") if legacy else ("in_fc", "out_fc")
    return KeyMap(
        rename(f"{first}.{{p}}", "fc.{p}"),
        rename(f"{last}.{{p}}", "out.{p}"),
        rename("query_embs", "queries.weight", lambda t: t[0], lambda t: t[None]),
    ) + torch_transformer.keymap().under("tfm.")
