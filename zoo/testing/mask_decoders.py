"""The contract of mask decoders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zoo.part import Features, seeded
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

TEXT_WIDTH, IMAGE_WIDTH, GRID = 48, 40, (8, 8)


def check_mask_decoder(name: str, *, scale: str | None = "tiny") -> None:
    """Check a mask decoder: two images and four targets in, logits [4, h, w] out, each target on its own.

    Raises:
        AssertionError: Naming the broken promise.
    """
    import torch

    what = f"mask decoder {name!r}"
    check_config("mask_decoder", name)
    config = scaled("mask_decoder", name, scale)

    def build() -> nn.Module:
        module: nn.Module = config.build(text_width=TEXT_WIDTH, image_width=IMAGE_WIDTH)
        return module

    check_construction(build, what)
    with seeded(0, what):
        module: Any = shake(build())
    expect(module.prompts >= 1 and module.width >= 1, f"{what}: prompts = {module.prompts}, width = {module.width}")
    expect(bool(module.layers) or module.image_size >= 1, f"{what}: it reads neither pixels nor an encoder's blocks")
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randn(4, module.prompts, module.width, generator=generator)
    side = module.image_size
    pixels = torch.randn(2, 3, side, side, generator=generator) if side else None
    features = [
        Features(torch.randn(2, GRID[0] * GRID[1], IMAGE_WIDTH, generator=generator), grid=GRID) for _ in module.layers
    ]
    row = torch.tensor([0, 1, 1, 0])

    def look(m: Any, images: slice = slice(None)) -> tuple[Tensor, ...]:
        own = [Features(f.tokens[images], grid=GRID) for f in features]
        seen: tuple[Tensor, ...] = m.encode(None if pixels is None else pixels[images], own)
        return seen

    def run(m: Any) -> dict[str, Tensor]:
        return {"logits": m.decode(look(m), prompts, row)}

    with torch.no_grad():
        seen, logits = look(module), run(module)["logits"]
        expect(all(len(level) == 2 for level in seen), f"{what}: encode does not return two rows for two images")
        expect(
            logits.ndim == 3 and len(logits) == 4 and bool(torch.isfinite(logits).all()),
            f"{what}: logits of shape {tuple(logits.shape)} for four targets, expected finite [4, h, w]",
        )
        none = module.decode(seen, prompts[:0], row[:0])
        expect(none.shape == (0, *logits.shape[1:]), f"{what}: no target gives logits of {tuple(none.shape)}")
        alone = module.decode(seen, prompts[2:3], row[2:3])
        close(logits[2:3], alone, f"{what}: a target depends on what shares its batch", 1e-5)
        single = module.decode(look(module, slice(1, 2)), prompts[1:3], torch.zeros(2, dtype=torch.long))
        close(logits[1:3], single, f"{what}: an image depends on what shares its batch", 1e-5)
        swapped = module.decode(seen, prompts, 1 - row)
        expect(float((swapped - logits).abs().max()) > 1e-3, f"{what}: the image makes no difference")
        for place in range(module.prompts):
            moved = prompts.clone()
            moved[0, place] += 1
            change = (module.decode(seen, moved, row) - logits).abs().amax((1, 2))
            expect(float(change[0]) > 1e-4, f"{what}: prompt {place} of a target makes no difference")
            expect(float(change[1:].max()) < 1e-5, f"{what}: a prompt of one target reaches another")
    logits = run(module)["logits"]
    weighted = (logits * torch.randn(logits.shape, generator=generator)).mean()
    check_gradients(module, weighted, what)
    with torch.no_grad():
        check_deterministic(module, run, what)
        check_reload(module, build, run, what)
