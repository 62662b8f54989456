"""Whether a story fits in memory, asked before it is drawn."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zoo.errors import ConfigError
from zoo.models.base import evaluating
from zoo.sampling.guidance import weights
from zoo.sampling.latents import branches
from zoo_stories.consistency import Consistency, choose_layers
from zoo_stories.drawing import decoded

GIB = 2**30
SHARE = 0.9
"""Of what is free, that a story may take."""


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that operations make and that are still there; what an operation needs for itself
    alone is not seen.

    Attributes:
        now, peak: Bytes, and the most there were.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now, self.peak = 0, 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in self.known and id(storage) not in given:
                    self._add(storage)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def peak_bytes(step: Callable[[], Any], device: torch.device) -> int:
    """Most bytes of tensors that were there at once during ``step``, beyond those that were when it began."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - before
    live = LiveBytes()
    with live:
        step()
    return live.peak


def free_bytes(device: torch.device) -> int | None:
    """What the device has free, or could free; None where nobody says."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    about = Path("/proc/meminfo")
    if about.is_file():
        for line in about.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def needed_bytes(model: Any, frames: int, rules: Consistency, guidance: float | None, steps: int | None) -> int:
    """About how much drawing ``frames`` frames takes beyond the model itself.

    One frame is forwarded and decoded once to see what it takes; frames that are drawn at once take as much each. Keys
    and values that an image gathers, and the banks of ``long="banks"``, are counted.
    """
    device, denoiser = model.device, model.denoiser
    mix = weights(model.config.guidance if guidance is None else guidance, "scale")
    at_once = min(frames, rules.window or frames)
    like = next(denoiser.parameters())
    with evaluating(model):
        condition = model.no_condition()
        if len(mix) == 2:
            condition = branches([condition, condition])
        grid = model.image_config.grid
        latents = torch.zeros(len(mix), denoiser.channels, *grid, dtype=like.dtype, device=device)
        time = torch.full((len(mix),), 500.0, device=device)
        tokens = condition.tokens.to(like.dtype)
        pooled = None if condition.pooled is None else condition.pooled.to(like.dtype)
        forward = peak_bytes(lambda: denoiser(latents, time, tokens, condition.mask, pooled), device)
        decode = peak_bytes(lambda: decoded(model, latents[:1]), device)
    rows = at_once if rules.long != "layers" else frames
    largest, banked = 0, 0
    levels = denoiser.attention_levels()
    for name in choose_layers(denoiser.attention_processors(), rules.layers):
        layer = denoiser.net.get_submodule(name.removesuffix(".processor"))
        token = 2 * len(mix) * layer.to_v.out_features * like.element_size()  # a key and a value in every branch
        count = (grid[0] * grid[1]) // levels[name] ** 2
        kept = round(token * count * rules.share(count))
        largest, banked = max(largest, kept * max(0, at_once - 1)), banked + kept * at_once
    drawing = forward * rows + largest
    if rules.long == "banks" and frames > at_once:
        drawing += banked * model.config.denoising(None, steps).steps
    return max(drawing, decode * at_once)


def check_memory(
    model: Any,
    frames: int,
    rules: Consistency,
    *,
    guidance: float | None = None,
    steps: int | None = None,
    limit: int | None = None,
) -> int:
    """Refuse a story that does not fit, before anything is drawn; return the bytes it needs.

    Args:
        limit: Bytes it may take; by default most of what is free.

    Raises:
        ConfigError: It needs more; the message says how many frames at once would do.
    """
    free = free_bytes(model.device)
    room = limit if limit is not None else None if free is None else int(SHARE * free)
    needed = needed_bytes(model, frames, rules, guidance, steps)
    if room is None or needed <= room:
        return needed
    at_once = min(frames, rules.window or frames)
    fits = int(at_once * room / needed)
    advice = f"draw {fits} at once (window = {fits})" if fits >= 2 else "draw smaller images, or fewer of them"
    raise ConfigError(
        f"{frames} frames, {at_once} of them at once, need about {_size(needed)} and {_size(room)} are there: {advice}"
    )


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB / 2 else f"{count / 2**20:.1f} MiB"
