"""The plugin in the catalogue, installed or not, and golden tensors of the released codes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from zoo import torchvision_ops
from zoo.plugin import Catalogue
from zoo.testing.goldens import Golden, read_golden
from zoo.testing.installed import importable, in_catalogue

ROOT = Path(__file__).parents[1]

importable("grounding", ROOT)


def pytest_configure() -> None:
    torchvision_ops.ensure()


@pytest.fixture(scope="session", autouse=True)
def found() -> Iterator[Catalogue]:
    """The catalogue with this plugin in it, from its entry point where it is installed."""
    with in_catalogue("grounding", "zoo_grounding") as found:
        yield found


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Golden]:
    """``golden("pixellm")`` reads goldens/pixellm.* beside this file; treat the tensors as read-only."""
    return partial(read_golden, ROOT / "tests" / "goldens")
