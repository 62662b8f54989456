"""A KL autoencoder: diffusers' ``AutoencoderKL`` in the field's terms, its latents at unit variance.

Latent diffusion's first stage (arXiv 2112.10752, section 3.1; 83.7 M parameters at the sizes of Stable Diffusion).
Published weights come with a scaling factor (and newer ones with a shift): ``(z - shift) * scaling`` is what a
diffusion model sees. Where the autoencoder is trained here both are measured, channel by channel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from zoo.draws import randn
from zoo.errors import ConfigError
from zoo.objectives.base import full_precision
from zoo.tokenizers.base import LatentTokenizer, LatentTokenizerConfig

DECAY = 0.99
"""Of the running moments: the last hundred steps or so, in which a decayed learning rate moves the weights little."""


@dataclass
class Posterior:
    """A diagonal Gaussian over the unscaled latents of images.

    Attributes:
        mean: [B, C, h, w].
        logvar: [B, C, h, w], in [-30, 20].
    """

    mean: Tensor
    logvar: Tensor

    @property
    def std(self) -> Tensor:
        return (0.5 * self.logvar).exp()

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """One draw, with the gradient of mean and variance; from the global stream without a generator."""
        like = self.mean
        if generator is None:
            return like + self.std * randn(like.shape, like.device, like.dtype)
        return like + self.std * torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)


@dataclass(frozen=True, kw_only=True)
class KLConfig(LatentTokenizerConfig):
    """The KL autoencoder; defaults: the sizes of Stable Diffusion's with Transfusion's 8 channels.

    Attributes:
        width: Channels at the latent grid.
        mult: Width of every level relative to the first one, fine to coarse; each level but the last halves the grid.
        blocks: Residual blocks a level in the encoder; the decoder has one more.
        groups: Of the group norms.
        attention: A single-head attention in the middle, at the latent grid.
        quant_conv: 1 x 1 convolutions around the latents.
        scaling: Factor of the latents; 0 = measured while it trains, a factor for each channel.
        shift: Subtracted before; with ``scaling`` = 0 it is measured as well.
        upcast: Runs in fp32 even where a model computes in fewer bits (SDXL's overflows in fp16).
    """

    scale_settles: ClassVar[frozenset[str]] = frozenset({"blocks", "groups"})

    width: int = 512
    mult: list[int] = field(default_factory=lambda: [1, 2, 4, 4])
    blocks: int = 2
    groups: int = 32
    attention: bool = True
    quant_conv: bool = True
    scaling: float = 0.0
    shift: float = 0.0
    upcast: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.mult or min(self.mult) < 1 or self.patch_size != 2 ** (len(self.mult) - 1):
            raise ValueError(
                f"patch_size = {self.patch_size} must be 2 to the number of steps between mult's {len(self.mult)}"
                f" levels, {2 ** max(0, len(self.mult) - 1)}: each one halves the grid"
            )
        first, rest = divmod(self.width, self.mult[-1])
        if rest or self.groups < 1 or any(first * m % self.groups for m in self.mult):
            raise ValueError(
                f"width = {self.width} must be a multiple of mult's last, {self.mult[-1]}, and every level's width one"
                f" of groups = {self.groups}"
            )
        if self.blocks < 1 or self.scaling < 0:
            raise ValueError("blocks must be 1 or more and scaling 0 (measured) or more")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of every level, fine to coarse."""
        return tuple(self.width // self.mult[-1] * m for m in self.mult)

    def scaled(self, sizes: Mapping[str, Any]) -> Self:
        """At a scale, half its width at the latent grid, one block a level, and four channels a norm's group.

        A scale's ``width`` is a transformer's; convolutions at the full resolution cost many times more. Its
        ``patch_size`` is left out: how far a grid of 64 pixels may shrink is the tokenizer's own trade (8 x 8 latents
        of 8 channels keep one number in 24, as Transfusion does; 4 x 4 would keep one in 96).
        """
        own = {key: sizes[key] for key in ("image_size",) if key in sizes}
        if "width" in sizes:
            first = max(1, sizes["width"] // 2 // self.mult[-1])
            groups = max(1, min(32, first // 4))
            own |= {"width": first * self.mult[-1], "groups": groups, "blocks": 1}
        return dataclasses.replace(self, **own)

    def build(self) -> KLTokenizer:
        return KLTokenizer(self)


class KLTokenizer(LatentTokenizer):
    """``vae``, diffusers' ``AutoencoderKL``, and the moments of its latents.

    Attributes:
        moments: [2, C] running means of the latents and of their squares; used where the configuration gives no factor.
        measured: Scalar, the weight of what ``moments`` has seen: 1 - decay to the number of steps.
    """

    moments: Tensor
    measured: Tensor

    def __init__(self, config: KLConfig) -> None:
        super().__init__()
        from zoo import torchvision_ops

        torchvision_ops.ensure()
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        self.config = config
        self.channels, self.grid = config.channels, config.grid
        levels = len(config.mult)
        self.vae: Any = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=config.widths,
            layers_per_block=config.blocks,
            latent_channels=config.channels,
            norm_num_groups=config.groups,
            sample_size=config.image_size,
            scaling_factor=config.scaling or 1.0,
            shift_factor=config.shift,
            use_quant_conv=config.quant_conv,
            use_post_quant_conv=config.quant_conv,
            mid_block_add_attention=config.attention,
        )
        self.register_buffer("moments", torch.zeros(2, config.channels))
        self.register_buffer("measured", torch.zeros(()))

    @property
    def last_layer(self) -> nn.Parameter:
        weight: nn.Parameter = self.vae.decoder.conv_out.weight
        return weight

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Posterior]:
        """Encode [B, 3, H, W], draw latents in training mode (else take their means), and draw the image again.

        In training with gradients the moments of the latents follow.

        Returns:
            The reconstruction [B, 3, H, W], and the unscaled Gaussian.
        """
        posterior = self.posterior(pixel_values)
        if self.training and torch.is_grad_enabled() and not pixel_values.is_meta:
            self._follow(posterior)
        return self._draw(posterior.sample() if self.training else posterior.mean), posterior

    def posterior(self, pixel_values: Tensor) -> Posterior:
        """The Gaussian over unscaled latents of [B, 3, H, W], H and W multiples of ``patch_size``.

        Raises:
            ConfigError: Another number of channels, or sides that the grid does not divide.
        """
        patch = self.config.patch_size
        height, width = pixel_values.shape[-2:]
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3 or height % patch or width % patch:
            raise ConfigError(
                f"pixel values have shape {tuple(pixel_values.shape)}, the image tokenizer reads [batch, 3, H, W] with"
                f" sides that are multiples of {patch}: resize the images"
            )
        encoded: Tensor = self._run(lambda x: self.vae.encode(x).latent_dist.parameters, pixel_values)
        mean, logvar = encoded.chunk(2, 1)  # [B, C, h, w]
        return Posterior(mean, logvar.clamp(-30.0, 20.0))

    def factors(self) -> tuple[Tensor, Tensor]:
        """Shift and scaling of every channel, [C, 1, 1] fp32 each: the configured ones, or those measured.

        Before its first training step an autoencoder without configured factors has shift 0 and scaling 1.
        """
        if self.config.scaling:
            fixed = self.moments[0, :, None, None]  # [C, 1, 1]
            return torch.full_like(fixed, self.config.shift), torch.full_like(fixed, self.config.scaling)
        seen = self.measured > 0
        mean, square = self.moments / self.measured.clamp(min=1e-12)
        shift = torch.where(seen, mean, 0.0)
        scaling = torch.where(seen, (square - mean.square()).clamp(min=1e-12).rsqrt(), 1.0)
        return shift[:, None, None], scaling[:, None, None]

    @torch.no_grad()
    def statistics(self, pixel_values: Tensor) -> Tensor:
        """Mean and standard deviation of the scaled latents, [B, 2C, h, w]."""
        posterior = self.posterior(pixel_values)
        shift, scaling = self.factors()
        return torch.cat([(posterior.mean - shift) * scaling, posterior.std * scaling], 1)

    def decode(self, latents: Tensor) -> Tensor:
        """The images of scaled latents [B, C, h, w]: [B, 3, H, W] in the input's normalisation."""
        shift, scaling = self.factors()
        return self._draw(latents / scaling + shift)

    def _draw(self, latents: Tensor) -> Tensor:
        drawn: Tensor = self._run(lambda z: self.vae.decode(z).sample, latents)
        return drawn

    def _run(self, network: Any, x: Tensor) -> Tensor:
        """Run in the weights' dtype (or the autocast one), and return fp32 at least."""
        x = x.to(self.vae.decoder.conv_out.weight.dtype)
        if self.config.upcast:
            with full_precision(x):
                y: Tensor = network(x)
        else:
            y = network(x)
        return y.float() if y.dtype in (torch.float16, torch.bfloat16) else y

    @torch.no_grad()
    def _follow(self, posterior: Posterior) -> None:
        """Move the moments towards those of the batch's draws, over all ranks: of a draw z, E[z^2] = mean^2 + var."""
        mean = posterior.mean.mean((0, 2, 3))
        square = (posterior.mean.square() + posterior.logvar.exp()).mean((0, 2, 3))
        now = torch.stack([mean, square]).to(self.moments.dtype)  # [2, C]
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(now)
            now /= dist.get_world_size()
        self.moments.mul_(DECAY).add_(now, alpha=1 - DECAY)
        self.measured.mul_(DECAY).add_(1 - DECAY)
