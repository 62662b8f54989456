"""Which codes of an image are drawn anew: masks of pixels, and images that grow beyond their edges."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import ConfigError, near

DIRECTIONS = ("left", "right", "up", "down")
RULES = ("any", "bicubic")

Draw = Callable[[Tensor, Tensor], Tensor]
"""(codes ``[B, h·w]``, unknown ``[B, h·w]`` bool) of one window to its codes ``[B, h·w]``."""


def slots_of(masks: Tensor, grid: tuple[int, int], rule: str = "any") -> Tensor:
    """The slots that are drawn anew where pixels are.

    Args:
        masks: ``[N, H, W]`` bool, or floats in [0, 1].
        grid: Height and width of the code grid.
        rule: ``any`` takes a slot with one such pixel, ``bicubic`` resizes the mask and takes 0.5 and more (Show-o's
            inference_t2i.py), which loses thin lines.

    Returns:
        ``[N, h·w]`` bool, in row order.

    Raises:
        ConfigError: No such rule.
    """
    if rule not in RULES:
        raise ConfigError(f"rule = {rule!r}: expected one of {', '.join(RULES)}{near(rule, RULES)}")
    values = masks[:, None].float()  # [N, 1, H, W]
    if rule == "any":
        return (F.adaptive_max_pool2d(values, grid) > 0).flatten(1)
    return (F.interpolate(values, size=grid, mode="bicubic") >= 0.5).flatten(1)


def check_masks(masks: Tensor, count: int, size: tuple[int, int]) -> None:
    """Refuse masks that are not ``[count, H, W]`` bool of the ``size`` (H, W)."""
    if masks.dtype != torch.bool:
        raise ConfigError(f"masks are {masks.dtype}: expected bool, True where pixels are drawn anew")
    if masks.ndim != 3 or len(masks) != count:
        raise ConfigError(
            f"masks have shape {tuple(masks.shape)}: expected one of {size[0]}x{size[1]} for {count} images"
        )
    if tuple(masks.shape[1:]) != size:
        raise ConfigError(
            f"masks are {masks.shape[1]}x{masks.shape[2]} pixels, images are drawn at {size[0]}x{size[1]}:"
            " resize the masks to that"
        )


def extended(codes: Tensor, direction: str, window: tuple[int, int], draw: Draw, offset: int = 0) -> Tensor:
    """One round of extrapolation: the canvas grows by half a window and ``offset`` in a direction.

    The new slots are drawn in windows of the model's own grid, of which the part that is there is known (Show-o's
    inference_t2i.py, whose ``down`` fails; a canvas that is already wider or higher than the window is grown along
    that side by overlapping windows, half a window apart, which the released code cannot).

    Args:
        codes: ``[B, h, w]`` the canvas, at least as large as the window.
        direction: ``left``, ``right``, ``up`` or ``down``.
        window: Height and width of the grid that the model draws.
        draw: The model.
        offset: Slots drawn beyond half of the window; less is then known.

    Returns:
        ``[B, h', w']``; the canvas stands in it unchanged.

    Raises:
        ConfigError: No such direction, or an offset that leaves nothing known or nothing new.
    """
    check_direction(direction)
    across = direction in ("left", "right")
    if not across:  # as if lying on its side
        turned = extended(
            codes.mT, "left" if direction == "up" else "right", window[::-1], _turned(draw, window), offset
        )
        return turned.mT
    (batch, height, width), (tall, wide) = codes.shape, window
    new = wide // 2 + offset
    if not 0 < new < wide:
        raise ConfigError(f"offset = {offset} draws {new} of a window's {wide} slots anew: expected 1 to {wide - 1}")
    if height < tall or width < wide - new:
        raise ConfigError(f"a canvas of {height}x{width} codes is smaller than the window of {tall}x{wide}")
    room = torch.zeros(batch, height, new, dtype=codes.dtype, device=codes.device)
    parts = [room, codes] if direction == "left" else [codes, room]
    canvas = torch.cat(parts, 2)
    unknown = torch.zeros_like(canvas, dtype=torch.bool)
    at = 0 if direction == "left" else width + new - wide
    unknown[:, :, slice(0, new) if direction == "left" else slice(width, None)] = True
    for top in _tops(height, tall):
        here = (slice(None), slice(top, top + tall), slice(at, at + wide))
        drawn = draw(canvas[here].flatten(1), unknown[here].flatten(1)).view(batch, tall, wide)
        canvas[here] = torch.where(unknown[here], drawn, canvas[here])
        unknown[here] = False
    return canvas


def _tops(height: int, tall: int) -> Sequence[int]:
    """Where windows begin that cover ``height``, half of one known to the next."""
    tops = list(range(0, height - tall, max(tall // 2, 1)))
    return [*tops, height - tall]


def _turned(draw: Draw, window: tuple[int, int]) -> Draw:
    """The model for windows that lie on their side."""

    def turned(codes: Tensor, unknown: Tensor) -> Tensor:
        def back(flat: Tensor) -> Tensor:
            return flat.view(-1, *window[::-1]).mT.flatten(1)

        return draw(back(codes), back(unknown)).view(-1, *window).mT.flatten(1)

    return turned


def check_direction(direction: str) -> None:
    """Refuse what is no direction."""
    if direction not in DIRECTIONS:
        raise ConfigError(
            f"direction = {direction!r}: expected one of {', '.join(DIRECTIONS)}{near(direction, DIRECTIONS)}"
        )
