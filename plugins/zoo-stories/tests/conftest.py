"""Golden tensors of the released code, and denoisers drawn at random."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from zoo import torchvision_ops
from zoo.plugin import catalogue, registered

ROOT = Path(__file__).parents[1]

if not entry_points(group="zoo.plugins", name="stories"):
    sys.path.insert(0, str(ROOT))


def pytest_configure() -> None:
    torchvision_ops.ensure()


@pytest.fixture(scope="session", autouse=True)
def found() -> Any:
    """The catalogue with this plugin in it, from its entry point where it is installed."""
    if entry_points(group="zoo.plugins", name="stories"):
        yield catalogue()
        return
    from zoo_stories import PLUGIN

    with registered(PLUGIN) as with_it:
        yield with_it


@dataclass(frozen=True)
class Golden:
    config: dict[str, Any]
    weights: dict[str, Tensor]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


@pytest.fixture(scope="session")
def golden() -> Golden:
    """What StoryDiffusion's released code computed (tests/goldens/storydiffusion.json says how)."""
    folder = ROOT / "tests" / "goldens"
    tensors = load_file(folder / "storydiffusion.safetensors")
    parts = {
        part: {key.removeprefix(part + "/"): t for key, t in tensors.items() if key.startswith(part + "/")}
        for part in ("weights", "inputs", "outputs")
    }
    return Golden(json.loads((folder / "storydiffusion.json").read_text())["config"], **parts)


@pytest.fixture(scope="session")
def unet() -> Callable[..., Any]:
    """``unet(seed)``: a denoiser of two levels over latents of 4 channels, with weights that all matter."""

    def built(seed: int = 0, kind: str = "unet") -> Any:
        from zoo.denoisers.dit import DiTConfig
        from zoo.denoisers.unet import UNetConfig

        torch.manual_seed(seed)
        if kind == "dit":
            denoiser: Any = DiTConfig(width=32, depth=2, heads=2, patch=2).build(16, grid=(8, 8))
        else:
            config = UNetConfig(widths=[16, 32], depths=[1, 1], blocks=1, attention_heads=[2, 2], groups=4)
            denoiser = config.build(16, grid=(8, 8))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in sorted(denoiser.named_parameters()):
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter.ndim <= 1:
                    gain = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                    parameter.copy_(gain + 0.2 * noise)
                else:
                    parameter.copy_(noise * parameter[0].numel() ** -0.5)
        return denoiser.eval().requires_grad_(False)

    return built
