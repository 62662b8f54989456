"""A plugin's own tests, whether the plugin is installed or only lies in its folder."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path

from zoo.plugin import GROUP, Catalogue, catalogue, registered


def importable(name: str, root: Path) -> None:
    """Let tests import a plugin that is not installed: put its folder ``root`` on ``sys.path``. For conftest.py, whose
    tests are imported before any fixture runs."""
    if not entry_points(group=GROUP, name=name) and str(root) not in sys.path:
        sys.path.insert(0, str(root))


@contextmanager
def in_catalogue(name: str, package: str) -> Iterator[Catalogue]:
    """The catalogue with the plugin ``name`` in it, from its entry point where it is installed, else from
    ``package.PLUGIN``.

    Raises:
        ModuleNotFoundError: ``package`` is neither installed nor importable (``importable``).
    """
    if entry_points(group=GROUP, name=name):
        yield catalogue()
        return
    with registered(importlib.import_module(package).PLUGIN) as found:
        yield found
