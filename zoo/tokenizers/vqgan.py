"""VQGAN tokenizers: LlamaGen's, of 16,384 codes of unit length, and Chameleon's, of 8,192 codes of free length."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from zoo.tokenizers.convolutional import ConvTokenizer, ConvTokenizerConfig
from zoo.tokenizers.entropy import Entropies
from zoo.tokenizers.quantizer import Quantized, Quantizer, table_entropies


@dataclass(frozen=True, kw_only=True)
class VQGANConfig(ConvTokenizerConfig):
    """The convolutional tokenizer around a table of codes; defaults: LlamaGen's VQ-16.

    Attributes:
        latent: Channels between the encoder and the code's vectors (z_channels).
        code_width: Width of a code's vector.
        unit: Latents and codes have unit length.
        learned: ``gradient``: codes are parameters, trained by the objective's ``codebook`` term; ``average``: they
            follow their vectors by moving averages.
        decay: Of the moving averages.
        restart: With moving averages, a code used less than this share of an even use starts again; 0 = never.
    """

    vocab_size: int = 16384
    latent: int = 256
    code_width: int = 8
    unit: bool = True
    learned: str = "gradient"
    decay: float = 0.99
    restart: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.learned not in ("gradient", "average"):
            raise ValueError(f"learned = {self.learned!r} must be gradient or average")
        if self.latent < 1 or self.code_width < 1 or not 0 <= self.decay < 1 or self.restart < 0:
            raise ValueError("latent and code_width must be 1 or more, decay in [0, 1) and restart 0 or more")
        if self.restart and self.learned == "gradient":
            raise ValueError("restart needs learned = average: codes that learn by gradient do not start again")

    def build(self) -> VQGANTokenizer:
        return VQGANTokenizer(self)


class VQGANTokenizer(ConvTokenizer):
    """A convolutional tokenizer around a ``Quantizer``."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__(config, latent=config.latent, code_width=config.code_width, project=True)
        self.quantizer = Quantizer(
            config.vocab_size,
            config.code_width,
            unit=config.unit,
            learned=config.learned,
            decay=config.decay,
            restart=config.restart,
        )

    def quantise(self, latents: Tensor) -> Quantized:
        return self.quantizer(latents)  # type: ignore[no-any-return]

    def nearest(self, latents: Tensor) -> Tensor:
        return self.quantizer.nearest(F.normalize(latents, dim=-1) if self.quantizer.unit else latents)

    def vectors(self, codes: Tensor) -> Tensor:
        return F.embedding(codes, self.quantizer.table())

    def entropies(self, latents: Tensor, temperature: float, over: str = "codes", floor: str = "add") -> Entropies:
        """See ``Quantizer.entropies``.

        Raises:
            ConfigError: What only codes of bits have.
        """
        return table_entropies(self.quantizer, latents, temperature, over, floor)
