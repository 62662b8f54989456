"""Masks of pixels as slots, and canvases that grow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.errors import ConfigError
from zoo.sampling.canvas import check_masks, extended, slots_of


def test_mask_image_of_show_o(golden: Callable[[str], Any]) -> None:
    g = golden("show_o")
    mask = g.inputs["inpaint_pixel_mask"][:, 0]
    stored = g.outputs["inpaint_token_mask"]
    assert torch.equal(slots_of(mask, (4, 4), "bicubic").expand_as(stored), stored)


def test_one_pixel_marks_its_slot() -> None:
    masks = torch.zeros(2, 12, 8, dtype=torch.bool)
    masks[0, 5, 7] = True
    slots = slots_of(masks, (3, 2))
    assert slots.nonzero().tolist() == [[0, 3]]
    assert not slots_of(masks, (3, 2), "bicubic").any()


@pytest.mark.parametrize(
    ("masks", "told"),
    [
        (torch.zeros(2, 16, 16), "torch.float32: expected bool"),
        (torch.zeros(3, 16, 16, dtype=torch.bool), "expected one of 16x16 for 2 images"),
        (torch.zeros(16, 16, dtype=torch.bool), "expected one of 16x16 for 2 images"),
        (torch.zeros(2, 16, 12, dtype=torch.bool), "masks are 16x12 pixels, images are drawn at 16x16: resize"),
    ],
)
def test_bad_masks(masks: Tensor, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check_masks(masks, 2, (16, 16))


class Recorder:
    """Draws 100, 101, ... over the unknown slots and remembers what it was shown."""

    def __init__(self) -> None:
        self.windows: list[tuple[Tensor, Tensor]] = []

    def __call__(self, codes: Tensor, unknown: Tensor) -> Tensor:
        self.windows.append((codes, unknown))
        return torch.arange(codes.shape[1]).expand_as(codes) + 100


@pytest.mark.parametrize("offset", [-1, 0, 1])
@pytest.mark.parametrize("direction", ["left", "right", "up", "down"])
def test_one_round(direction: str, offset: int) -> None:
    codes, draw = torch.arange(16).view(1, 4, 4), Recorder()
    wide = extended(codes, direction, (4, 4), draw, offset)
    new = 2 + offset
    across = direction in ("left", "right")
    assert wide.shape == ((1, 4, 4 + new) if across else (1, 4 + new, 4))
    old = {"left": (..., slice(new, None)), "right": (..., slice(0, 4))}.get(direction)
    old = old or {"up": (slice(None), slice(new, None)), "down": (slice(None), slice(0, 4))}[direction]
    assert torch.equal(wide[old], codes)
    ((seen, unknown),) = draw.windows
    seen, unknown = seen.view(4, 4), unknown.view(4, 4)
    fresh = {
        "left": (slice(None), slice(0, new)), "right": (slice(None), slice(4 - new, None)),
        "up": slice(0, new), "down": slice(4 - new, None),
    }[direction]  # fmt: skip
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[fresh] = True
    assert torch.equal(unknown, expected)
    kept = {
        "left": codes[0, :, : 4 - new], "right": codes[0, :, new:], "up": codes[0, : 4 - new], "down": codes[0, new:],
    }[direction]  # fmt: skip
    assert torch.equal(seen[~expected], kept.flatten())
    drawn = torch.arange(16).view(4, 4)[fresh] + 100  # in the window's own row order
    place = {
        "left": (0, ..., slice(0, new)),
        "right": (0, ..., slice(4, None)),
        "up": (0, slice(0, new)),
        "down": (0, slice(4, None)),
    }
    assert torch.equal(wide[place[direction]], drawn)


def test_rounds_over_a_canvas_wider_than_the_window() -> None:
    """Right twice, then down: the row below is drawn in windows that know what the one before drew."""
    canvas, draw = torch.arange(16).view(1, 4, 4), Recorder()
    for direction in ("right", "right", "down"):
        before = canvas
        canvas = extended(canvas, direction, (4, 4), draw)
        assert torch.equal(canvas[:, : before.shape[1], : before.shape[2]], before)
    assert canvas.shape == (1, 6, 8)
    below = [unknown.view(4, 4)[2:] for _, unknown in draw.windows[2:]]
    assert [int(unknown.sum()) for unknown in below] == [8, 4, 4]
    assert not below[1][:, :2].any()
    assert bool((canvas[:, 4:] >= 100).all())


def test_non_square_windows() -> None:
    codes, draw = torch.arange(24).view(1, 4, 6), Recorder()
    assert extended(codes, "up", (4, 6), draw).shape == (1, 6, 6)
    assert extended(codes, "left", (4, 6), draw).shape == (1, 4, 9)
    assert [int(unknown.sum()) for _, unknown in draw.windows] == [12, 12]


def test_bad_rounds() -> None:
    codes = torch.zeros(1, 4, 4, dtype=torch.long)
    with pytest.raises(ConfigError, match=r"direction = 'rigth': expected one of .* did you mean right"):
        extended(codes, "rigth", (4, 4), Recorder())
    with pytest.raises(ConfigError, match="offset = 2 draws 4 of a window's 4 slots"):
        extended(codes, "right", (4, 4), Recorder(), offset=2)
    with pytest.raises(ConfigError, match="smaller than the window"):
        extended(codes, "right", (8, 8), Recorder())
