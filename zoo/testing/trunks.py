"""The contract of trunk parts, which read images, texts, and both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zoo.part import seeded
from zoo.testing.config import check_config, check_construction, close, expect, scaled, shake
from zoo.testing.parts import _alone, _common, _random, _shape

if TYPE_CHECKING:
    from torch import Tensor


def check_trunk(name: str, *, scale: str | None = "tiny") -> None:
    """Check a trunk part: an image alone, a text alone, and both in one sequence; pads that nobody reads.

    Raises:
        AssertionError: Naming the broken promise.
    """
    import torch

    what = f"trunk {name!r}"
    check_config("trunk", name)
    config = scaled("trunk", name, scale)
    check_construction(config.build, what)
    with seeded(0, what):
        module: Any = shake(config.build())
    length = min(12, config.context_length)
    pixels = _random(3, 3, config.image_size, config.image_size)
    ids = torch.randint(0, config.vocab_size, (3, length), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(length) < torch.tensor([length, length - 3, length - 5])[:, None]  # [B, T]
    hidden = None
    if getattr(config, "mask_token", False):
        hidden = torch.arange(module.grid[0] * module.grid[1]).expand(3, -1) % 3 == 0

    def run(m: Any, rows: slice = slice(None), ids: Tensor = ids) -> dict[str, Tensor]:
        image = m.embed_image(pixels[rows], None if hidden is None else hidden[rows])
        text, real = m.embed_text(ids[rows]), mask[rows]
        pair = m(image, text, real)
        return {
            "image": m(image=image).image,
            "text": m(text=text, mask=real).text * real[..., None],
            "image of a pair": pair.image,
            "text of a pair": pair.text * real[..., None],
        }

    with torch.no_grad():
        out = run(module)
        for key, value in out.items():
            rows = module.tokens if key.startswith("image") else length
            _shape(value, (3, rows, module.width), f"{what}: rows of the {key}")
        expect(module.tokens >= module.grid[0] * module.grid[1], f"{what}: a grid of {module.grid} has more patches")
        padded = run(module, ids=torch.where(mask, ids, (ids + 1) % config.vocab_size))
        for key, value in out.items():
            close(value, padded[key], f"{what}: what stands in a pad reaches the {key}", 1e-5)
        moved = (out["image"] - out["image of a pair"]).abs().max()
        expect(float(moved) > 1e-3, f"{what}: the image of a pair does not read the text")
        moved = (out["text"] - out["text of a pair"]).abs().max()
        expect(float(moved) > 1e-3, f"{what}: the text of a pair does not read the image")
        cut = int(mask[2].sum())
        short = module(text=module.embed_text(ids[2:, :cut]), mask=mask[2:, :cut]).text
        close(out["text"][2:, :cut], short, f"{what}: the amount of padding reaches the text")
    _common(module, config.build, run, what)
    with torch.no_grad():
        _alone(lambda rows: run(module, rows), what)
