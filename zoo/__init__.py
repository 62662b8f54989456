"""zoo: a plugin-based multimodal model zoo for comparing architectures.

    import zoo
    zoo.list_models()
    model = zoo.build("llava", connector="mlp", scale="tiny")

Importing this module imports nothing heavy; names load on first use (PEP 562).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from zoo.api import build, compose, describe, from_pretrained, list_models
    from zoo.errors import ZooError
    from zoo.plugin import Plugin
    from zoo.recipe import Recipe
    from zoo.registry import Component

_HOMES = {
    "build": "zoo.api",
    "from_pretrained": "zoo.api",
    "list_models": "zoo.api",
    "describe": "zoo.api",
    "compose": "zoo.api",
    "Plugin": "zoo.plugin",
    "Component": "zoo.registry",
    "Recipe": "zoo.recipe",
    "ZooError": "zoo.errors",
}

__all__ = [
    "Component",
    "Plugin",
    "Recipe",
    "ZooError",
    "__version__",
    "build",
    "compose",
    "describe",
    "from_pretrained",
    "list_models",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'zoo' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
