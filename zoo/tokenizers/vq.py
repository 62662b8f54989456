"""A small VQ tokenizer: a convolutional encoder and decoder around a codebook on the unit sphere.

It stands where BEiT-3 has VQ-KD: the same quantizer (32 dimensions, unit length, moving averages), but it learns to
draw the pixels and needs no CLIP teacher, so that it can be trained on any images at hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.objectives.base import full_precision
from zoo.tokenizers.base import ImageTokenizer, ImageTokenizerConfig
from zoo.tokenizers.convolutional import as_grid
from zoo.tokenizers.entropy import Entropies
from zoo.tokenizers.quantizer import Quantized, Quantizer, table_entropies

FOLD = 4
"""Least side of the squares of pixels that are folded into channels before the first convolution."""


@dataclass(frozen=True, kw_only=True)
class VQConfig(ImageTokenizerConfig):
    """The VQ tokenizer; defaults: 8,192 codes of a 14 x 14 grid at 224 px, the sizes of VQ-KD.

    Attributes:
        width: Channels at the code grid; every step to a finer grid has half of them, 32 at least.
        blocks: Residual blocks at the code grid, in the encoder and in the decoder.
        code_width: Width of a code's vector.
        decay: Of the codebook's moving averages; VQ-KD, with larger batches and longer training, 0.99.
        restart: A code used less than this share of an even use starts again at a vector of the batch; 0 = never.
    """

    width: int = 512
    blocks: int = 2
    code_width: int = 32
    decay: float = 0.9
    restart: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width < 32 or self.width % 32:
            raise ValueError(f"width = {self.width} must be a multiple of 32")
        if self.blocks < 0 or self.code_width < 2 or not 0 <= self.decay < 1 or self.restart < 0:
            raise ValueError(
                "blocks must not be negative, code_width at least 2, decay in [0, 1) and restart 0 or more"
            )

    def build(self) -> VQTokenizer:
        return VQTokenizer(self)


class VQTokenizer(ImageTokenizer):
    """``encoder``, ``quantizer``, ``decoder``."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        self.codes, self.grid = config.vocab_size, config.grid
        self.fold, steps = config.patch_size, 0
        while self.fold % 2 == 0 and self.fold // 2 >= FOLD:  # 16 = 4 x 2 x 2, 14 = 7 x 2
            self.fold, steps = self.fold // 2, steps + 1
        widths = [max(32, config.width >> (steps - i)) for i in range(steps + 1)]
        folded = 3 * self.fold**2
        down: list[nn.Module] = [nn.Conv2d(folded, widths[0], 3, padding=1)]
        up: list[nn.Module] = []
        for fine, coarse in pairwise(widths):
            down += [_norm(fine), nn.SiLU(), nn.Conv2d(fine, coarse, 4, 2, 1)]
            up = [nn.ConvTranspose2d(coarse, fine, 4, 2, 1), _norm(fine), nn.SiLU(), *up]
        self.encoder = nn.Sequential(
            *down,
            *(Residual(config.width) for _ in range(config.blocks)),
            _norm(config.width),
            nn.SiLU(),
            nn.Conv2d(config.width, config.code_width, 1),
        )
        self.quantizer = Quantizer(config.vocab_size, config.code_width, decay=config.decay, restart=config.restart)
        self.decoder = nn.Sequential(
            nn.Conv2d(config.code_width, config.width, 3, padding=1),
            *(Residual(config.width) for _ in range(config.blocks)),
            _norm(config.width),
            nn.SiLU(),
            *up,
            nn.Conv2d(widths[0], folded, 3, padding=1),
        )

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Quantized]:
        """Encode, quantise and draw [B, 3, H, W] of the configured size.

        Returns:
            The reconstruction [B, 3, H, W], and the codes with their vectors [B, h, w, ...].
        """
        quantized = self.quantizer(self._vectors(pixel_values))
        return self._draw(quantized.vectors), quantized

    def _vectors(self, pixel_values: Tensor) -> Tensor:
        size = self.config.image_size
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != (3, size, size):
            raise ConfigError(
                f"pixel values have shape {tuple(pixel_values.shape)}, the image tokenizer reads"
                f" [batch, 3, {size}, {size}]: resize the images or set image_tokenizer.image_size"
            )
        x: Tensor = self.encoder(F.pixel_unshuffle(pixel_values, self.fold))  # [B, C, h, w]
        return x.permute(0, 2, 3, 1)

    def _draw(self, vectors: Tensor) -> Tensor:
        x: Tensor = self.decoder(vectors.permute(0, 3, 1, 2))
        return F.pixel_shuffle(x, self.fold)

    @torch.no_grad()
    def encode(self, pixel_values: Tensor) -> Tensor:
        """The codes of [B, 3, H, W] in row order, [B, h*w] int64, computed in fp32 under autocast too (as
        ``ConvTokenizer``'s); the codebook stays as it is."""
        with full_precision(pixel_values):
            codes: Tensor = self.quantizer.nearest(F.normalize(self._vectors(pixel_values).float(), dim=-1))
        return codes.flatten(1)

    def decode(self, codes: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """The images of codes [B, h*w]: [B, 3, H, W] in the input's normalisation.

        Args:
            grid: Height and width of the code grid; None = the configured one, or a square of as many codes.
        """
        placed = as_grid(codes, grid or self.grid, self.codes, square=grid is None)
        vectors = F.embedding(placed, self.quantizer.codebook)  # [B, h, w, C]
        return self._draw(vectors.to(next(self.decoder.parameters()).dtype))

    def entropies(self, latents: Tensor, temperature: float, over: str = "codes", floor: str = "add") -> Entropies:
        """See ``Quantizer.entropies``."""
        return table_entropies(self.quantizer, latents, temperature, over, floor)


class Residual(nn.Module):
    """x + two 3 x 3 convolutions behind norms."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _norm(width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            _norm(width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)  # type: ignore[no-any-return]


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(max(1, width // 32), width)  # 32 channels a group: no statistic reaches across the batch
