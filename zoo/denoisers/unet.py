"""diffusers' ``UNet2DConditionModel``: Stable Diffusion's denoiser (arXiv 2112.10752, section 3.3; SDXL 2307.01952)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from zoo.denoisers.base import Denoiser, DenoiserConfig
from zoo.errors import ConfigError

SIZES = 6
"""Numbers that SDXL is told of an image: original height and width, top and left of the crop, height and width."""


@dataclass(frozen=True, kw_only=True)
class UNetConfig(DenoiserConfig):
    """Residual blocks and transformers over the condition at several grids; defaults: Stable Diffusion 1.5's sizes.

    Attributes:
        widths: Channels of every level, fine to coarse; each but the last halves the grid.
        blocks: Residual blocks a level on the way down; one more on the way up.
        depths: Transformer blocks behind each residual block of a level; 0 = none. The middle has as many as the last
            level, or one.
        attention_heads: Of every level (diffusers calls this number ``attention_head_dim``).
        linear: The transformers' outer projections are linear maps and no 1 x 1 convolutions (from Stable Diffusion 2).
        groups: Of the group norms.
        size_width: Of the sinusoid of each of the six numbers that SDXL is told of an image; it then reads the pooled
            text as well. 0 = neither.
        upcast_attention: Attention in fp32 (Stable Diffusion 2.1 in 768 pixels).
    """

    scale_settles: ClassVar[frozenset[str]] = frozenset(
        {"widths", "blocks", "depths", "attention_heads", "groups", "size_width"}
    )

    widths: list[int] = field(default_factory=lambda: [320, 640, 1280, 1280])
    blocks: int = 2
    depths: list[int] = field(default_factory=lambda: [1, 1, 1, 0])
    attention_heads: list[int] = field(default_factory=lambda: [8, 8, 8, 8])
    linear: bool = False
    groups: int = 32
    size_width: int = 0
    upcast_attention: bool = False

    def __post_init__(self) -> None:
        if not self.widths or not len(self.widths) == len(self.depths) == len(self.attention_heads):
            raise ValueError(
                f"widths = {self.widths}, depths = {self.depths} and attention_heads = {self.attention_heads} must have"
                " one number a level"
            )
        if self.blocks < 1 or self.groups < 1 or min(self.depths) < 0 or self.size_width < 0:
            raise ValueError("blocks and groups must be 1 or more, depths and size_width 0 or more")
        if any(width % self.groups for width in self.widths):
            raise ValueError(f"every one of widths = {self.widths} must be a multiple of groups = {self.groups}")
        if any(h < 1 or width % h for width, h in zip(self.widths, self.attention_heads, strict=True)):
            raise ValueError(
                f"every one of widths = {self.widths} must be a multiple of its number in attention_heads ="
                f" {self.attention_heads}"
            )

    @property
    def reads_pooled(self) -> bool:
        return self.size_width > 0

    def scaled(self, sizes: Mapping[str, Any]) -> Self:
        """A scale's width at the coarser of two levels, half of it at the finer, one block each, heads as wide as the
        scale's; whether the finer level attends stays."""
        if "width" not in sizes:
            return self
        widths = [max(1, sizes["width"] // 2), sizes["width"]]
        heads = [max(1, width // sizes.get("head_dim", 32)) for width in widths]
        return dataclasses.replace(
            self,
            widths=widths,
            depths=[min(1, self.depths[0]), 1],
            attention_heads=heads,
            blocks=1,
            groups=max(1, min(32, widths[0] // 4)),
            size_width=min(self.size_width, 16),
        )

    def build(
        self, condition_width: int, *, channels: int = 4, grid: tuple[int, int] = (32, 32), pooled_width: int = 0
    ) -> UNet:
        return UNet(self, condition_width, channels, grid, pooled_width)


class UNet(Denoiser):
    """``net``, a ``UNet2DConditionModel``. Drawn at random it predicts zero and its residual branches are zero, as in
    the released training code of latent diffusion (``zero_module``)."""

    def __init__(
        self, config: UNetConfig, condition_width: int, channels: int, grid: tuple[int, int], pooled_width: int
    ) -> None:
        super().__init__()
        if config.reads_pooled and not pooled_width:
            raise ConfigError(
                "denoiser.size_width is above 0, so that the denoiser reads a pooled text as well, and the condition"
                " has none: set denoiser.size_width=0, or choose a text encoder that pools"
            )
        from zoo import torchvision_ops

        torchvision_ops.ensure()
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        self.config, self.channels, self.condition_width = config, channels, condition_width
        self.pooled_width = pooled_width if config.reads_pooled else 0
        self.reads_sizes = config.reads_pooled
        more: dict[str, Any] = {}
        if config.reads_pooled:
            more = {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": config.size_width,
                "projection_class_embeddings_input_dim": pooled_width + SIZES * config.size_width,
            }
        self.net: Any = UNet2DConditionModel(
            sample_size=grid[0] if grid[0] == grid[1] else grid,
            in_channels=channels,
            out_channels=channels,
            down_block_types=tuple("CrossAttnDownBlock2D" if d else "DownBlock2D" for d in config.depths),
            up_block_types=tuple("CrossAttnUpBlock2D" if d else "UpBlock2D" for d in reversed(config.depths)),
            block_out_channels=tuple(config.widths),
            layers_per_block=config.blocks,
            norm_num_groups=config.groups,
            cross_attention_dim=condition_width,
            transformer_layers_per_block=tuple(max(1, d) for d in config.depths),
            attention_head_dim=tuple(config.attention_heads),
            use_linear_projection=config.linear,
            upcast_attention=config.upcast_attention,
            **more,
        )
        _start(self.net)

    def forward(
        self,
        latents: Tensor,
        time: Tensor,
        condition: Tensor,
        condition_mask: Tensor | None = None,
        pooled: Tensor | None = None,
        size_ids: Tensor | None = None,
    ) -> Tensor:
        self._check(condition, pooled)
        more: dict[str, Any] = {}
        if self.pooled_width:
            if size_ids is None:
                height, width = (8 * side for side in latents.shape[-2:])
                size_ids = latents.new_tensor([[height, width, 0, 0, height, width]]).expand(len(latents), -1)
            more["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": size_ids.to(latents.dtype)}
        out: Tensor = self.net(
            latents, time, encoder_hidden_states=condition, encoder_attention_mask=condition_mask, **more
        ).sample
        return out

    def attention_levels(self) -> dict[str, int]:
        levels = len(self.config.widths)

        def side(name: str) -> int:
            block, number = (*name.split("."), "0")[:2]
            if block == "mid_block":
                return int(2 ** (levels - 1))
            return int(2 ** int(number)) if block == "down_blocks" else int(2 ** (levels - 1 - int(number)))

        return {name: side(name) for name in self.attention_processors()}


def _start(net: nn.Module) -> None:
    """Zero the last layer of every residual branch and of the whole (the release's openaimodel.py and attention.py)."""
    with torch.no_grad():
        for name, module in net.named_modules():
            last = name.rpartition(".")[2]
            ends = last in ("conv2", "conv_out") or (last == "proj_out" and ".attentions." in name)
            if ends and isinstance(module, nn.Conv2d | nn.Linear):
                module.weight.zero_()
                if module.bias is not None:
                    module.bias.zero_()
