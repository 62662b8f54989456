"""What the convolutional image tokenizers with codes share: sizes, and the way from pixels to codes and back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.objectives.base import full_precision
from zoo.tokenizers.base import ImageTokenizer, ImageTokenizerConfig
from zoo.tokenizers.conv import ConvDecoder, ConvEncoder, Levels
from zoo.tokenizers.quantizer import Quantized

CHANNELS = 4
"""Channels a group that a scale leaves: as many as the published sizes have (128 in 32 groups)."""


@dataclass(frozen=True, kw_only=True)
class ConvTokenizerConfig(ImageTokenizerConfig):
    """Sizes of the encoder and the decoder; the lists count from the finest grid to the code grid.

    The number of levels follows from ``patch_size``: every level but the last halves the grid. A list may be longer
    than that, and its last entries count: [1, 1, 2, 2, 4] is [1, 2, 2, 4] at ``patch_size`` 8.

    Attributes:
        width: Channels of the encoder at the code grid.
        encoder_mult: Channels of the encoder's levels, in the unit that makes the last of them ``width``.
        decoder_mult: Of the decoder's levels, in the same unit.
        encoder_blocks: Residual blocks of the encoder's levels; a scale has one a level.
        decoder_blocks: Of the decoder's.
        attention: Levels with an attention after every block; what the list lacks at its front has none.
        middle: Residual blocks at the code grid, in both.
        middle_attention: One attention after the first of them.
        groups: Groups of every norm. With one channel a group a norm would undo what the biases before it say, so a
            scale leaves four.
        bias: Residual blocks and the first convolution have biases.
        even: Pad by one on all sides before going down; otherwise at the right and the bottom only.
        depth_to_space: Go up by a convolution to four places a place; otherwise by nearest neighbours.
        fold: Side of the squares of pixels that are folded into channels before the first level; 1 = none.
    """

    scale_settles: ClassVar[frozenset[str]] = frozenset({"groups", "encoder_blocks", "decoder_blocks"})

    image_size: int = 256
    width: int = 512
    encoder_mult: list[int] = field(default_factory=lambda: [1, 1, 2, 2, 4])
    decoder_mult: list[int] = field(default_factory=lambda: [1, 1, 2, 2, 4])
    encoder_blocks: list[int] = field(default_factory=lambda: [2] * 5)
    decoder_blocks: list[int] = field(default_factory=lambda: [3] * 5)
    attention: list[bool] = field(default_factory=list)
    middle: int = 2
    middle_attention: bool = True
    groups: int = 32
    bias: bool = True
    even: bool = False
    depth_to_space: bool = False
    fold: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        steps = self.patch_size / self.fold if self.fold > 0 else 0
        if steps < 1 or not math.log2(steps).is_integer():
            raise ValueError(f"patch_size = {self.patch_size} must be fold = {self.fold} times a power of two")
        for name in ("encoder_mult", "decoder_mult", "encoder_blocks", "decoder_blocks"):
            values = getattr(self, name)
            if len(values) < self.levels or min(values) < 1:
                raise ValueError(
                    f"{name} = {values} must have {self.levels} entries of 1 or more: patch_size = {self.patch_size}"
                    f" needs {self.levels} levels"
                )
        if self.width % self.encoder_mult[-1]:
            raise ValueError(
                f"width = {self.width} must be a multiple of the last entry of encoder_mult = {self.encoder_mult}"
            )
        widths = {self.base, *self.encoder.widths, *self.decoder.widths}
        wrong = [w for w in sorted(widths) if self.groups < 1 or w % self.groups or w < 2 * self.groups]
        if wrong:
            raise ValueError(
                f"groups = {self.groups} must divide the channels of every level ({wrong[0]} is one) into groups of 2"
                " or more"
            )
        if self.middle < self.middle_attention:
            raise ValueError(f"middle = {self.middle} must be 1 or more where middle_attention is true")

    @property
    def levels(self) -> int:
        """Number of grids, the code grid among them."""
        return 1 + round(math.log2(self.patch_size // self.fold))

    @property
    def base(self) -> int:
        """Channels that an entry of 1 stands for."""
        return self.width // self.encoder_mult[-1]

    @property
    def encoder(self) -> Levels:
        """Sizes of the encoder."""
        return self._levels(self.encoder_mult, self.encoder_blocks)

    @property
    def decoder(self) -> Levels:
        """Sizes of the decoder."""
        return self._levels(self.decoder_mult, self.decoder_blocks)

    def _levels(self, mult: list[int], blocks: list[int]) -> Levels:
        attention = [False] * self.levels + self.attention
        return Levels(
            base=self.base,
            widths=tuple(self.base * m for m in mult[-self.levels :]),
            blocks=tuple(blocks[-self.levels :]),
            attention=tuple(attention[-self.levels :]),
            middle=self.middle,
            middle_attention=self.middle_attention,
            groups=self.groups,
            bias=self.bias,
        )

    def scaled(self, sizes: Mapping[str, Any]) -> Self:
        """As every part's; with a width, also one block a level and groups of four channels."""
        changes: dict[str, Any] = {k: sizes[k] for k in ("image_size", "patch_size", "vocab_size") if k in sizes}
        if "width" in sizes:
            groups = max(1, sizes["width"] // self.encoder_mult[-1] // CHANNELS)
            changes |= {
                "width": sizes["width"],
                "groups": groups,
                "encoder_blocks": [1] * len(self.encoder_blocks),
                "decoder_blocks": [1] * len(self.decoder_blocks),
            }
        return dataclasses.replace(self, **changes)

    def build(self) -> ConvTokenizer:
        raise TypeError(f"{type(self).__name__} defines no build")


class ConvTokenizer(ImageTokenizer):
    """``encoder``, ``to_code``, ``from_code``, ``decoder``: fully convolutional, so that any image whose sides are
    multiples of ``patch_size`` can be encoded, and any grid drawn.

    Args:
        config: Sizes.
        latent: Channels between the encoder and ``to_code``, and between ``from_code`` and the decoder.
        code_width: Channels of a code's vector.
        project: There are 1 x 1 convolutions between the two; otherwise both widths are one.
        kernel: Side of the encoder's last convolution.
        adaptive: The decoder's levels are normalised by the codes.
    """

    def __init__(
        self,
        config: ConvTokenizerConfig,
        *,
        latent: int,
        code_width: int,
        project: bool,
        kernel: int = 3,
        adaptive: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.codes, self.grid, self.fold = config.vocab_size, config.grid, config.fold
        folded = 3 * self.fold**2
        self.encoder = ConvEncoder(config.encoder, latent, fan_in=folded, even=config.even, kernel=kernel)
        self.to_code = nn.Conv2d(latent, code_width, 1) if project else None
        self.from_code = nn.Conv2d(code_width, latent, 1) if project else None
        self.decoder = ConvDecoder(
            config.decoder,
            latent,
            out=folded,
            depth_to_space=config.depth_to_space,
            code_width=code_width if adaptive else 0,
        )
        self.adaptive = adaptive

    def quantise(self, latents: Tensor) -> Quantized:
        """The codes and vectors of latents [B, h, w, C], and what trains them."""
        raise TypeError(f"{type(self).__name__} defines no quantise")

    def nearest(self, latents: Tensor) -> Tensor:
        """The codes of latents: [B, h, w, C] to [B, h, w] int64."""
        raise TypeError(f"{type(self).__name__} defines no nearest")

    def vectors(self, codes: Tensor) -> Tensor:
        """The vectors of codes: [...] int64 to [..., C] fp32."""
        raise TypeError(f"{type(self).__name__} defines no vectors")

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Quantized]:
        """Encode, quantise and draw [B, 3, H, W].

        Returns:
            The reconstruction [B, 3, H, W], and the codes with their vectors [B, h, w, ...].
        """
        quantized = self.quantise(self.latents(pixel_values))
        return self.draw(quantized.vectors), quantized

    def latents(self, pixel_values: Tensor) -> Tensor:
        """What is quantised, [B, 3, H, W] to [B, h, w, C].

        Raises:
            ConfigError: Not images, or sides that are no multiples of ``patch_size``.
        """
        patch = self.config.patch_size
        shape = tuple(pixel_values.shape)
        if len(shape) != 4 or shape[1] != 3 or shape[2] % patch or shape[3] % patch or not all(shape[2:]):
            raise ConfigError(
                f"pixel values have shape {shape}, the image tokenizer reads [batch, 3, H, W] with H and W multiples of"
                f" {patch}: resize the images or set image_tokenizer.image_size"
            )
        x = self.encoder(F.pixel_unshuffle(pixel_values, self.fold))  # [B, latent, h, w]
        if self.to_code is not None:
            with full_precision(x):
                x = self.to_code(x.to(self.to_code.weight.dtype))
        return x.permute(0, 2, 3, 1)  # type: ignore[no-any-return]

    def draw(self, vectors: Tensor) -> Tensor:
        """The images of codes' vectors: [B, h, w, C] to [B, 3, H, W]."""
        codes = vectors.permute(0, 3, 1, 2).to(self.decoder.stem.weight.dtype).contiguous()  # equal codes, equal pixels
        x = codes if self.from_code is None else self.from_code(codes)
        return F.pixel_shuffle(self.decoder(x, codes if self.adaptive else None), self.fold)

    @torch.no_grad()
    def encode(self, pixel_values: Tensor) -> Tensor:
        """The codes of [B, 3, H, W] in row order, [B, h*w] int64, computed in fp32 under autocast too: in 16 bits, what
        lies near a border between codes falls on either side."""
        with full_precision(pixel_values):
            return self.nearest(self.latents(pixel_values.to(self.encoder.stem.weight.dtype)).float()).flatten(1)

    def decode(self, codes: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """The images of codes [B, h*w]: [B, 3, H, W] in the input's normalisation, not clamped.

        Args:
            grid: Height and width of the code grid; None = the configured one, or a square of as many codes.

        Raises:
            ConfigError: Codes that no grid fits, or that the codebook has not.
        """
        return self.draw(self.vectors(as_grid(codes, grid or self.grid, self.codes, square=grid is None)))


def as_grid(codes: Tensor, grid: tuple[int, int], size: int, *, square: bool = False) -> Tensor:
    """Codes [B, h*w] as [B, h, w].

    Args:
        grid: Height and width.
        size: Number of codes of the codebook.
        square: Where ``grid`` does not fit, take a square of as many codes.

    Raises:
        ConfigError: Another number of codes, or codes outside the codebook.
    """
    count = codes.shape[-1]
    if square and count != grid[0] * grid[1]:
        grid = (math.isqrt(count), math.isqrt(count))
    if codes.ndim != 2 or count != grid[0] * grid[1]:
        raise ConfigError(
            f"codes of shape {tuple(codes.shape)} do not fill a grid of {grid[0]} x {grid[1]}: give [batch, h * w]"
            " codes, and grid=(h, w) where it is not the configured one"
        )
    if codes.numel() and not codes.is_meta and not 0 <= int(codes.min()) <= int(codes.max()) < size:
        raise ConfigError(
            f"codes reach from {int(codes.min())} to {int(codes.max())}, outside a codebook of {size}: they are of"
            " another tokenizer"
        )
    return codes.reshape(-1, *grid)
