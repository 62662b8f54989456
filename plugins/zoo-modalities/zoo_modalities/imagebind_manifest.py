"""What ImageBind adds: its encoders, its wiring and objective, data of its modalities, its tasks."""

from __future__ import annotations

from zoo.registry import Component

IMAGEBIND: tuple[Component, ...] = ()
