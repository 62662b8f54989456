"""The contract of output connectors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zoo.errors import ZooError
from zoo.part import seeded
from zoo.testing.config import (
    check_config,
    check_construction,
    check_deterministic,
    check_gradients,
    check_reload,
    close,
    expect,
    scaled,
    shake,
    try_build,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

STATES, WIDTHS, PATCHES = 4, {"in_width": 48, "out_width": 64, "image_width": 64}, 16


def check_output_connector(name: str, *, scale: str | None = "tiny") -> None:
    """Check an output connector: states [N, 4, 48] in, a condition [N, outputs, 64] out, by way of what is aligned.

    Raises:
        AssertionError: Naming the broken promise.
    """
    import torch

    what = f"output_connector {name!r}"
    check_config("output_connector", name)
    config = scaled("output_connector", name, scale)

    def build() -> nn.Module:
        module: nn.Module = config.build(in_tokens=STATES, image_tokens=PATCHES, **WIDTHS)
        return module

    check_construction(build, what)
    with seeded(0, what):
        module: Any = shake(build())
    states = torch.randn(3, STATES, WIDTHS["in_width"], generator=torch.Generator().manual_seed(0))

    def run(m: Any, rows: slice = slice(None)) -> dict[str, Tensor]:
        aligned = m.align(states[rows])
        return {"aligned": aligned, "tokens": m.condition(aligned).tokens}

    with torch.no_grad():
        out = run(module)
        expect(module.width == WIDTHS["out_width"], f"{what}: width = {module.width}, expected {WIDTHS['out_width']}")
        for key, shape in {"aligned": module.aligned, "tokens": (module.outputs, module.width)}.items():
            expect(out[key].shape == (3, *shape), f"{what}: {key} of shape {tuple(out[key].shape)}, not {(3, *shape)}")
        close(module(states).tokens, out["tokens"], f"{what}: forward is not condition(align(states))", 1e-6)
        rows = out["tokens"].flatten(1)
        expect(float((rows[0] - rows[1]).abs().max()) > 1e-3, f"{what}: two different inputs give the same tokens")
        for key, value in run(module, slice(0, 1)).items():
            close(out[key][:1], value, f"{what}: row 0 of {key} depends on what shares its batch", 1e-5)
        expect(module.unconditional in ("states", "text", "image"), f"{what}: unconditional = {module.unconditional!r}")
        if module.aligns == "image":
            patches = torch.randn(3, PATCHES, WIDTHS["image_width"], generator=torch.Generator().manual_seed(1))
            wanted = module.target(patches)
            expect(wanted.shape == (3, *module.aligned), f"{what}: a target of shape {tuple(wanted.shape)}")
        else:
            expect(module.aligned[1] == module.width, f"{what}: what is aligned with text is no condition")
        _check_mask(module, states, what)
    check_gradients(module, run(module)["tokens"].square().mean() + run(module)["aligned"].square().mean(), what)
    with torch.no_grad():
        check_deterministic(module, run, what)
        check_reload(module, build, run, what)
    none = try_build(lambda: config.build(in_tokens=5, in_width=48, out_width=64))
    if isinstance(none, ZooError):
        expect("\n" not in str(none), f"{what}: the message has several lines: {none}")


def _check_mask(module: Any, states: Tensor, what: str) -> None:
    """States that are not there change nothing."""
    import torch

    mask = torch.ones(states.shape[:2], dtype=torch.bool)
    mask[1, 2:] = False
    noise = torch.where(mask[..., None], states, states + 3)
    one, two = module(states, mask).tokens, module(noise, mask).tokens
    close(one, two, f"{what}: masked states reach the condition", 1e-5)
    close(one[0], module(states).tokens[0], f"{what}: a mask of ones changes the condition", 1e-5)
