"""What Meta-Transformer adds: its tokenizers, its wiring, data of its modalities, its tasks."""

from __future__ import annotations

from zoo.registry import Component

META_TRANSFORMER: tuple[Component, ...] = ()
