"""StoryDiffusion (arXiv 2405.01434) for the zoo: ``zoo story``, and ``zoo_stories.tell`` in a notebook.

Nothing heavy is imported here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zoo.plugin import Plugin
from zoo_stories.manifest import COMPONENTS

if TYPE_CHECKING:
    from zoo_stories.consistency import Consistency as Consistency
    from zoo_stories.telling import Story as Story
    from zoo_stories.telling import tell as tell

PLUGIN = Plugin(name="zoo-stories", components=COMPONENTS, conf="pkg://zoo_stories/conf")

_LAZY = {"Consistency": "consistency", "Story": "telling", "tell": "telling"}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
