"""The contract of data tokenizers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

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
)

if TYPE_CHECKING:
    from torch import Tensor, nn

WIDTH = 48


def check_data_tokenizer(name: str, *, scale: str | None = "tiny") -> None:
    """Check a data tokenizer: samples to tensors to tokens [B, N, D], each row on its own, gradients to all it learns.

    Raises:
        AssertionError: Naming the broken promise.
    """
    import torch

    what = f"data tokenizer {name!r}"
    check_config("data_tokenizer", name)
    config = scaled("data_tokenizer", name, scale)
    expect(bool(config.modality), f"{what}: its configuration names no modality")

    def build() -> nn.Module:
        module: nn.Module = config.build(WIDTH)
        return module

    check_construction(build, what)
    with seeded(0, what):
        module: Any = shake(build())
    example = config.example(3)
    collated = config.collate(config.examples(3))
    expect(list(collated) == list(example), f"{what}: collate gives {list(collated)}, example {list(example)}")
    for key, value in example.items():
        expect(len(value) == 3, f"{what}: {key} of an example of three has {len(value)} rows")
        kinds = (collated[key].dtype, collated[key].ndim)
        expect(kinds == (value.dtype, value.ndim), f"{what}: collate and example differ in kind at {key}: {kinds}")
    again = config.collate(config.examples(3))
    expect(all(torch.equal(again[k], v) for k, v in collated.items()), f"{what}: collate of the same samples differs")

    def run(m: Any, rows: slice = slice(None), batch: Mapping[str, Tensor] = collated) -> dict[str, Tensor]:
        made = m({key: value[rows] for key, value in batch.items()})
        real = made.mask if made.mask is not None else made.tokens.new_ones(made.tokens.shape[:2])
        out = {"tokens": made.tokens * real[..., None], "mask": real.float()}
        return out if made.positions is None else {**out, "positions": made.positions}

    with torch.no_grad():
        for batch in (example, collated):
            out = run(module, batch=batch)
            shape, most = tuple(out["tokens"].shape), (3, module.tokens, WIDTH)
            right = shape[0] == 3 and 1 <= shape[1] <= module.tokens and shape[2] == WIDTH == module.width
            expect(right, f"{what}: tokens of shape {shape}, expected at most {most}")
            expect(bool(torch.isfinite(out["tokens"]).all()), f"{what}: tokens are not finite")
            expect(bool((out["mask"].sum(1) >= 1).all()), f"{what}: an item without a token")
        expect(float((out["tokens"][0] - out["tokens"][1]).abs().max()) > 1e-4, f"{what}: two items, the same tokens")
        alone = run(module, slice(0, 1))
        length = alone["tokens"].shape[1]
        for key, value in out.items():
            close(value[:1, :length], alone[key], f"{what}: row 0 of {key} depends on what shares its batch", 1e-5)
    generator = torch.Generator().manual_seed(0)
    floats = [v for v in run(module).values() if v.requires_grad]
    total = sum((v * torch.randn(v.shape, generator=generator)).mean() for v in floats)
    if any(True for _ in module.parameters()):
        check_gradients(module, torch.as_tensor(total), what)
    with torch.no_grad():
        check_deterministic(module, run, what)
        check_reload(module, build, run, what)
