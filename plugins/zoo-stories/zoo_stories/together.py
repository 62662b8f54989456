"""A denoiser whose images read each other, for as long as a ``with`` block lasts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from zoo.denoisers.base import Denoiser
from zoo_stories.attention import ConsistentAttention, Passes
from zoo_stories.consistency import Consistency, choose_layers, windows


@contextmanager
def consistent(denoiser: Denoiser, consistency: Consistency, passes: Passes | None = None) -> Iterator[Passes]:
    """Let the images that a denoiser is given at once read each other; afterwards everything is as it was.

    No weight is added or changed. Before each batch say who is in it: ``passes.begin(cast)``. Rows are whole branches
    of guidance one after the other, each with all images of the cast in order (as ``zoo.sampling.guidance`` has them).

    Args:
        passes: What an earlier block kept, to read its banks.

    Raises:
        ConfigError: The denoiser has no such attention, or ``layers`` names none.
    """
    before = denoiser.attention_processors()
    chosen = set(choose_layers(before, consistency.layers))
    passes = Passes(consistency) if passes is None else passes
    passes.consistency = consistency
    passes.begin(None)
    new = {name: ConsistentAttention(passes, name, old) if name in chosen else old for name, old in before.items()}
    denoiser.set_attention_processors(new)

    def see(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        latents = args[0] if args else kwargs["latents"]
        time = args[1] if len(args) > 1 else kwargs["time"]
        passes.see(float(time.flatten()[0]), (latents.shape[-2], latents.shape[-1]))

    hook = denoiser.register_forward_pre_hook(see, with_kwargs=True)
    plain = denoiser.forward

    def windowed(latents: Tensor, time: Tensor, *others: Any, **named: Any) -> Tensor:
        """Forward window by window; images in several windows get the mean of their predictions."""
        cast = passes.cast
        found = [] if cast is None else windows(len(cast.numbers), consistency.window, consistency.stride)
        if cast is None or len(found) < 2:
            return plain(latents, time, *others, **named)
        count, rows = len(cast.numbers), len(latents)
        first = torch.arange(0, rows, count)  # of each branch
        total, times = torch.zeros_like(latents), torch.zeros(rows, device=latents.device)
        try:
            for window in found:
                passes.cast = cast.select(window)
                own = (first[:, None] + torch.tensor(list(window))).flatten().to(latents.device)
                args = (_rows(value, own, rows) for value in (latents, time, *others))
                total[own] += plain(*args, **{key: _rows(value, own, rows) for key, value in named.items()})
                times[own] += 1
        finally:
            passes.cast = cast
        return total / times.view(-1, *(1,) * (total.ndim - 1))

    if consistency.window and consistency.long == "passes":
        denoiser.__dict__["forward"] = windowed
    try:
        yield passes
    finally:
        denoiser.__dict__.pop("forward", None)
        hook.remove()
        denoiser.set_attention_processors(before)
        passes.cast = None


def _rows(value: Any, own: Tensor, rows: int) -> Any:
    return value[own] if isinstance(value, Tensor) and value.ndim and len(value) == rows else value
