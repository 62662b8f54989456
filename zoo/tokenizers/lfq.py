"""Lookup-free quantisation: a code is the signs of K channels, and there is no codebook to learn.

MAGVIT-v2 (arXiv 2310.05737, section 3.1), as Show-o (models/modeling_magvitv2.py) and Open-MAGVIT2 (arXiv 2409.04410,
modules/vqvae/lookup_free_quantize.py) released it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.objectives.base import full_precision
from zoo.tokenizers.convolutional import ConvTokenizer, ConvTokenizerConfig
from zoo.tokenizers.entropy import Entropies, bit_entropies, code_entropies
from zoo.tokenizers.quantizer import Quantized


class LookupFree(nn.Module):
    """Signs of K channels as codes in [0, 2^K); no parameters, nothing in the state.

    Args:
        bits: K.
        first: The first channel is the most significant bit (``msb``: Show-o, vector_quantize_pytorch) or the least
            (``lsb``: Open-MAGVIT2).
    """

    powers: Tensor

    def __init__(self, bits: int, first: str = "msb") -> None:
        super().__init__()
        places = torch.arange(bits)
        powers = 2 ** (places.flip(0) if first == "msb" else places)
        self.register_buffer("powers", powers, persistent=False)

    def forward(self, x: Tensor) -> Quantized:
        """Quantise [..., K] in fp32.

        ``commitment`` is mean (h - sg z)^2. Without a codebook, ``codebook_loss`` is what the second term of Show-o's
        class comes to, mean (z - sg h)^2 of the straight-through z: the same number, and the opposite gradient.
        """
        with full_precision(x):
            h = x.float()
            signs = self.signs(h)
            vectors = h + (signs - h).detach()
            return Quantized(vectors, self.codes(h), F.mse_loss(h, signs), F.mse_loss(vectors, h.detach()), h)

    @staticmethod
    @torch.no_grad()
    def signs(x: Tensor) -> Tensor:
        """+1 where x > 0 and -1 elsewhere, zero among it: [...] to the same, fp32."""
        return (x > 0).float() * 2 - 1

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """The code of the signs of [..., K]: [...] int64."""
        return ((x > 0) * self.powers).sum(-1)

    @torch.no_grad()
    def vectors(self, codes: Tensor) -> Tensor:
        """The signs of codes: [...] int64 to [..., K] of -1 and +1, fp32."""
        return ((codes[..., None] & self.powers) != 0).float() * 2 - 1

    @staticmethod
    def entropies(latents: Tensor, temperature: float, over: str = "codes", floor: str = "add") -> Entropies:
        """The two terms of the entropy loss over latents [..., K]; see ``zoo.tokenizers.entropy``.

        Args:
            temperature: tau.
            over: ``codes``, the 2^K of them, or ``bits``.
            floor: As ``code_entropies`` has it.
        """
        flat = latents.flatten(0, -2)
        return bit_entropies(flat, temperature) if over == "bits" else code_entropies(flat, temperature, floor)


def factorised(codes: Tensor, bits: Sequence[int], first: str = "lsb") -> tuple[Tensor, ...]:
    """Codes as several smaller ones, the channels' first bits first: what Open-MAGVIT2's generator predicts in turn.

    Args:
        codes: [...] int64 in [0, 2^K).
        bits: Bits of every part, of sum K: [6, 12] in the release.
        first: As ``LookupFree`` has it; the parts keep it.

    Returns:
        As many tensors [...] int64, each below 2^bits.
    """
    left, parts = sum(bits), list[Tensor]()
    if codes.numel() and int(codes.max()) >= 2**left:
        raise ConfigError(f"codes reach {int(codes.max())}, more than {left} bits ({list(bits)}) can say")
    at = 0
    for count in bits:
        shift = at if first == "lsb" else left - at - count
        parts.append((codes >> shift) & (2**count - 1))
        at += count
    return tuple(parts)


@dataclass(frozen=True, kw_only=True)
class LFQConfig(ConvTokenizerConfig):
    """A tokenizer of 2^K codes; the class's own defaults are a plain one that trains quickly.

    Attributes:
        bit_order: ``msb``: the first channel is a code's most significant bit; ``lsb``: the least.
        code_convs: There is a 1 x 1 convolution on the K channels on either side of the signs.
        kernel: Side of the encoder's last convolution.
        adaptive: The decoder's levels are normalised by the codes (Open-MAGVIT2).
    """

    encoder_mult: list[int] = field(default_factory=lambda: [1, 2, 4])
    decoder_mult: list[int] = field(default_factory=lambda: [1, 2, 4])
    encoder_blocks: list[int] = field(default_factory=lambda: [2, 2, 2])
    decoder_blocks: list[int] = field(default_factory=lambda: [2, 2, 2])
    middle_attention: bool = False
    fold: int = 4

    bit_order: str = "msb"
    code_convs: bool = False
    kernel: int = 3
    adaptive: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vocab_size & (self.vocab_size - 1):
            raise ValueError(
                f"vocab_size = {self.vocab_size} must be a power of two: a code is the signs of K channels"
            )
        if self.bit_order not in ("msb", "lsb"):
            raise ValueError(f"bit_order = {self.bit_order!r} must be msb or lsb")
        if self.kernel not in (1, 3):
            raise ValueError(f"kernel = {self.kernel} must be 1 or 3")

    @property
    def bits(self) -> int:
        """K."""
        return self.vocab_size.bit_length() - 1

    def build(self) -> LFQTokenizer:
        return LFQTokenizer(self)


class LFQTokenizer(ConvTokenizer):
    """A convolutional tokenizer around ``LookupFree``."""

    def __init__(self, config: LFQConfig) -> None:
        super().__init__(
            config,
            latent=config.bits,
            code_width=config.bits,
            project=config.code_convs,
            kernel=config.kernel,
            adaptive=config.adaptive,
        )
        self.quantizer = LookupFree(config.bits, config.bit_order)

    def quantise(self, latents: Tensor) -> Quantized:
        return self.quantizer(latents)  # type: ignore[no-any-return]

    def nearest(self, latents: Tensor) -> Tensor:
        return self.quantizer.codes(latents)

    def vectors(self, codes: Tensor) -> Tensor:
        return self.quantizer.vectors(codes)

    def entropies(self, latents: Tensor, temperature: float, over: str = "codes", floor: str = "add") -> Entropies:
        """See ``LookupFree.entropies``."""
        return self.quantizer.entropies(latents, temperature, over, floor)
