"""What a denoiser is: noisy latents, their noise level and a sequence of condition tokens in, a prediction out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.part import PartConfig

READERS = ("attn2.to_k", "attn2.to_v", "caption_projection")
"""How diffusers calls the modules that read a condition and nothing else."""


class Denoiser(nn.Module):
    """Base of denoisers.

    Attributes:
        channels: Of the latents, C.
        condition_width: Of the condition's tokens, D.
        pooled_width: Of the vector it reads beside them; 0 = it reads none.
        reads_sizes: It is told the sizes of the image and of the picture that the image was cut from.
        net: The network underneath; one of diffusers' has attention processors.
    """

    channels: int
    condition_width: int
    pooled_width: int = 0
    reads_sizes: bool = False
    net: nn.Module

    def forward(
        self,
        latents: Tensor,
        time: Tensor,
        condition: Tensor,
        condition_mask: Tensor | None = None,
        pooled: Tensor | None = None,
        size_ids: Tensor | None = None,
    ) -> Tensor:
        """The prediction [N, C, h, w] of noisy latents [N, C, h, w].

        Args:
            time: [N], noise levels of 0 (clean) to 1,000 (noise), as ``Process.level`` gives them.
            condition: [N, S, D] tokens, S of any length.
            condition_mask: [N, S] bool, True = read; None reads all.
            pooled: [N, P], where ``pooled_width`` is above 0.
            size_ids: [N, 6], of a denoiser that reads sizes (SDXL, arXiv 2307.01952, section 2.2): height and width of
                the original, top and left of the crop, height and width of the image, pixels; None = an image that was
                not cropped, of eight pixels a latent.
        """
        raise TypeError(f"{type(self).__name__} defines no forward")

    def attention_processors(self) -> dict[str, Any]:
        """Name -> processor of every attention: ``...attn1.processor`` reads the image, ``...attn2.processor`` the
        condition."""
        processors: dict[str, Any] = dict(self._attentive().attn_processors)
        return processors

    def set_attention_processors(self, processors: Mapping[str, Any]) -> None:
        """Exchange processors: all those of ``attention_processors``, by name.

        Raises:
            ConfigError: Other names.
        """
        mine = self.attention_processors()
        if set(mine) != set(processors):
            strange = sorted(set(mine) ^ set(processors))
            raise ConfigError(f"{len(mine)} attention processors are expected, by name; {strange[0]!r} is wrong")
        self._attentive().set_attn_processor(dict(processors))

    def attention_levels(self) -> dict[str, int]:
        """Name of every attention processor -> side, in latent pixels, of what one of the image's tokens stands for:
        h w / side² tokens of latents [N, C, h, w]."""
        raise TypeError(f"{type(self).__name__} defines no attention_levels")

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """Within it keys and values of a condition, and what is in front of them, are computed once as long as the same
        tensor is given: they are the same at every step of drawing. Without gradients only."""
        maps = [module for name, module in self.net.named_modules() if name.endswith(READERS)]
        before = [module.__dict__.get("forward") for module in maps]
        for module in maps:
            module.forward = _Memory(module.forward)
        try:
            yield
        finally:
            for module, own in zip(maps, before, strict=True):
                del module.forward
                if own is not None:
                    module.forward = own

    def _attentive(self) -> Any:
        if not hasattr(self.net, "set_attn_processor"):
            raise ConfigError(f"{type(self.net).__name__} has no attention processors: choose a denoiser on diffusers")
        return self.net

    def _check(self, condition: Tensor, pooled: Tensor | None) -> None:
        """Refuse a condition of another width, in one line.

        Raises:
            ConfigError: It does not fit.
        """
        if condition.ndim != 3 or condition.shape[2] != self.condition_width:
            raise ConfigError(
                f"the condition has shape {tuple(condition.shape)}, the denoiser reads [N, S, {self.condition_width}]"
            )
        if self.pooled_width and (pooled is None or pooled.shape[1] != self.pooled_width):
            got = "none" if pooled is None else f"one of width {pooled.shape[1]}"
            raise ConfigError(f"the denoiser reads a pooled vector of width {self.pooled_width} and was given {got}")


@dataclass(frozen=True, kw_only=True)
class DenoiserConfig(PartConfig):
    """Fields every denoiser has; widths and channels are told by its neighbours when it is built."""

    @property
    def reads_pooled(self) -> bool:
        """Whether it reads one vector of the condition beside its tokens."""
        return False

    def build(
        self, condition_width: int, *, channels: int = 4, grid: tuple[int, int] = (32, 32), pooled_width: int = 0
    ) -> Denoiser:
        """Build the denoiser.

        Args:
            condition_width: Of the tokens it reads.
            channels: Of the latents.
            grid: Height and width of the latents it mostly draws; others work as well.
            pooled_width: Of the vector that comes with the tokens; taken where it ``reads_pooled``.

        Raises:
            ConfigError: It reads a vector and there is none.
        """
        raise TypeError(f"{type(self).__name__} defines no build")


class _Memory:
    """A module's forward, computed again only where the input is another tensor than the last one, which it keeps: its
    memory cannot become another's meanwhile."""

    def __init__(self, compute: Callable[[Tensor], Tensor]) -> None:
        self.compute = compute
        self.last: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return self.compute(x)
        if self.last is not None:
            known, out = self.last
            if known.data_ptr() == x.data_ptr() and known.shape == x.shape and known.dtype == x.dtype:
                return out
        out = self.compute(x)
        self.last = (x, out)
        return out
