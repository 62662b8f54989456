"""Fixtures for all tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from zoo.torchvision_ops import ensure

GOLDENS = Path(__file__).parent / "goldens"


def pytest_configure() -> None:
    """Let every process import lightning: xdist's own rebuilds the warnings of its workers from their classes."""
    ensure()


@dataclass(frozen=True)
class Golden:
    """What a published system computed: official weights, inputs, outputs, and the json beside them."""

    info: dict[str, Any]
    weights: dict[str, Tensor]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]

    @property
    def config(self) -> dict[str, Any]:
        return self.info["config"]


@cache
def _load(name: str) -> Golden:
    tensors = load_file(GOLDENS / f"{name}.safetensors")
    parts = {
        part: {key.removeprefix(part + "/"): t for key, t in tensors.items() if key.startswith(part + "/")}
        for part in ("weights", "inputs", "outputs")
    }
    return Golden(json.loads((GOLDENS / f"{name}.json").read_text()), **parts)


@pytest.fixture
def golden() -> Callable[[str], Golden]:
    """``golden("show_o")`` reads tests/goldens/show_o.*; treat the tensors as read-only."""
    return _load


@pytest.fixture
def shake() -> Callable[[nn.Module], nn.Module]:
    """Give every parameter of a module a random value that matters: gains not 1, biases not 0."""

    def shaken(module: nn.Module, seed: int = 0) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in sorted(module.named_parameters()):
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter.ndim <= 1:
                    parameter.copy_((1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0) + 0.3 * noise)
                else:
                    parameter.copy_(noise * (0.6 if "embed" in name else 1.0 / parameter.shape[-1] ** 0.5))
        return module

    return shaken
