"""The catalogue with this plugin in it, and golden tensors of the released code."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from zoo import torchvision_ops
from zoo.plugin import Catalogue, catalogue, registered

ROOT = Path(__file__).parents[1]

if not entry_points(group="zoo.plugins", name="modalities"):
    sys.path.insert(0, str(ROOT))


def pytest_configure() -> None:
    torchvision_ops.ensure()


@pytest.fixture(scope="session", autouse=True)
def found() -> Iterator[Catalogue]:
    """The catalogue, with the plugin from its entry point where it is installed."""
    if entry_points(group="zoo.plugins", name="modalities"):
        yield catalogue()
        return
    from zoo_modalities import PLUGIN

    with registered(PLUGIN) as with_it:
        yield with_it


@dataclass(frozen=True)
class Golden:
    """What a published system computed: official weights, inputs, outputs, and the json beside them."""

    info: dict[str, Any]
    weights: dict[str, Tensor]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]

    @property
    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = self.info["config"]
        return config


@cache
def read_golden(name: str) -> Golden:
    folder = ROOT / "tests" / "goldens"
    tensors = load_file(folder / f"{name}.safetensors")
    parts = {
        part: {key.removeprefix(part + "/"): t for key, t in tensors.items() if key.startswith(part + "/")}
        for part in ("weights", "inputs", "outputs")
    }
    return Golden(json.loads((folder / f"{name}.json").read_text()), **parts)


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Golden]:
    """``golden("imagebind")`` reads goldens/imagebind.*; treat the tensors as read-only."""
    return read_golden
