"""The contract of patch codecs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zoo.diffusion.times import LEVELS
from zoo.part import seeded
from zoo.testing.config import check_config, check_construction, check_gradients, check_reload, close, expect, scaled
from zoo.testing.config import shake as shaken

if TYPE_CHECKING:
    from torch import Tensor, nn

CHANNELS, GRID, WIDTH = 4, (8, 16), 24


def check_patch_codec(name: str, *, scale: str | None = "tiny") -> None:
    """Check a patch codec: latents [N, C, h, w] of any grid that divides, their noise levels, and states of a trunk.

    Raises:
        AssertionError: Naming the broken promise.
    """
    import torch

    what = f"patch codec {name!r}"
    check_config("patch_codec", name)
    config = scaled("patch_codec", name, scale)

    def build() -> nn.Module:
        module: nn.Module = config.build(channels=CHANNELS, width=WIDTH)
        return module

    check_construction(build, what)
    with seeded(0, what):
        module: Any = shaken(build())
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(3, CHANNELS, *GRID, generator=generator)
    states = torch.randn(3, module.cells(GRID), WIDTH, generator=generator)
    level = torch.tensor([0.0, 400.0, LEVELS])

    def run(m: Any, rows: slice = slice(None)) -> dict[str, Tensor]:
        tokens, skips = m.encode(latents[rows], level[rows])
        return {"tokens": tokens, "prediction": m.decode(states[rows], skips, level[rows], GRID)}

    with torch.no_grad():
        outputs = run(module)
    cells = (GRID[0] // module.patch) * (GRID[1] // module.patch)
    expect(module.cells(GRID) == cells, f"{what}: cells of {GRID} are {module.cells(GRID)}, expected {cells}")
    for key, shape in {"tokens": (3, cells, WIDTH), "prediction": (3, CHANNELS, *GRID)}.items():
        expect(outputs[key].shape == shape, f"{what}: {key} of shape {tuple(outputs[key].shape)}, expected {shape}")
    weighted = sum((value * torch.randn(value.shape, generator=generator)).mean() for value in run(module).values())
    check_gradients(module, torch.as_tensor(weighted), what)
    with torch.no_grad():
        check_reload(module, build, run, what)
        for key, value in run(module, slice(0, 1)).items():
            close(outputs[key][:1], value, f"{what}: row 0 of {key} depends on what shares its batch", 1e-5)
        other = module.encode(latents, level.flip(0))[0]
        expect(
            float((other[0] - outputs["tokens"][0]).abs().max()) > 1e-3, f"{what}: the noise level makes no difference"
        )
        moved = latents.clone()
        moved[:, :, : module.patch, : module.patch] += 1
        nearest = (module.encode(moved, level)[0] - outputs["tokens"]).abs().amax((0, 2)).argmax()
        expect(int(nearest) == 0, f"{what}: the first pixels change token {int(nearest)} most: tokens are in row order")
