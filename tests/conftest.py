"""Fixtures for all tests."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from zoo.testing.goldens import Golden, read_golden
from zoo.torchvision_ops import ensure

GOLDENS = Path(__file__).parent / "goldens"


def pytest_configure() -> None:
    """Let every process import lightning: xdist's own rebuilds the warnings of its workers from their classes."""
    ensure()


@pytest.fixture
def golden() -> Callable[[str], Golden]:
    """``golden("show_o")`` reads tests/goldens/show_o.*; treat the tensors as read-only."""
    return partial(read_golden, GOLDENS)


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
