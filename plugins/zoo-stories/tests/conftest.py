"""Golden tensors of the released code, and denoisers drawn at random."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from zoo import torchvision_ops
from zoo.plugin import Catalogue
from zoo.testing.goldens import Golden, read_golden
from zoo.testing.installed import importable, in_catalogue

ROOT = Path(__file__).parents[1]

importable("stories", ROOT)


def pytest_configure() -> None:
    torchvision_ops.ensure()


@pytest.fixture(scope="session", autouse=True)
def found() -> Iterator[Catalogue]:
    """The catalogue with this plugin in it, from its entry point where it is installed."""
    with in_catalogue("stories", "zoo_stories") as found:
        yield found


@pytest.fixture(scope="session")
def golden() -> Golden:
    """What StoryDiffusion's released code computed (tests/goldens/storydiffusion.json says how)."""
    return read_golden(ROOT / "tests" / "goldens", "storydiffusion")


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
