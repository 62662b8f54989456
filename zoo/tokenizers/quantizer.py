"""Vector quantisation with a codebook on the unit sphere that follows its vectors by moving averages.

This is the quantizer of BEiT v2's VQ-KD (arXiv 2208.06366, section 2.2; unilm, beit2/norm_ema_quantizer.py): both sides
have unit length, the nearest code is the one of largest cosine, the codebook starts from k-means of the first batch and
then moves by exponential averages of the vectors assigned to each code, and no gradient reaches it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.objectives.base import full_precision


@dataclass
class Quantized:
    """What the quantizer returns.

    Attributes:
        vectors: [..., C] the codes' vectors, with the gradient of the input (straight-through).
        codes: [...] int64.
        commitment: Mean squared distance of the inputs, at unit length, to their codes; its gradient reaches the
            inputs only.
    """

    vectors: Tensor
    codes: Tensor
    commitment: Tensor


class Quantizer(nn.Module):
    """A codebook [K, C] of unit vectors.

    Args:
        codes: K.
        width: C.
        decay: Of the moving averages.
        restart: A code used less than this share of an even use starts again at a random vector of the batch; 0 = never
            (VQ-KD).
        rounds: Of k-means on the first training batch.
    """

    codebook: Tensor
    usage: Tensor
    started: Tensor

    def __init__(self, codes: int, width: int, *, decay: float = 0.99, restart: float = 0.0, rounds: int = 10) -> None:
        super().__init__()
        self.decay, self.restart, self.rounds = decay, restart, rounds
        self._begun = False
        self.register_buffer("codebook", F.normalize(torch.randn(codes, width), dim=-1))
        self.register_buffer("usage", torch.zeros(codes))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))

    def forward(self, x: Tensor) -> Quantized:
        """Quantise [..., C]; in training mode the codebook then follows."""
        learns = self.training and torch.is_grad_enabled() and not x.is_meta
        with full_precision(x):
            z = F.normalize(x.float(), dim=-1)
            if learns and not self._begun:
                if not bool(self.started):
                    self._start(z.detach().flatten(0, -2))
                self._begun = True  # asked once a process: reading the flag waits for an accelerator
            codes = self.nearest(z)
            vectors = F.embedding(codes, self.codebook)
            commitment = F.mse_loss(z, vectors)
            if learns:
                self._follow(z.detach().flatten(0, -2), codes.flatten())
            return Quantized(z + (vectors - z).detach(), codes, commitment)

    @torch.no_grad()
    def nearest(self, x: Tensor) -> Tensor:
        """The code of largest cosine: [..., C] to [...] int64."""
        return (x.float() @ self.codebook.T).argmax(-1)

    @torch.no_grad()
    def _follow(self, z: Tensor, codes: Tensor) -> None:
        """Move every used code towards the mean direction of its vectors [N, C]; unused ones stay."""
        counts, sums = self._assigned(z, codes)
        self.usage.mul_(self.decay).add_(counts, alpha=1 - self.decay)
        means = F.normalize(sums, dim=-1)
        moved = F.normalize(self.decay * self.codebook + (1 - self.decay) * means, dim=-1)
        self.codebook.copy_(torch.where(counts[:, None] > 0, moved, self.codebook))
        if self.restart:
            even = counts.sum() / len(counts)
            dead = self.usage < self.restart * even
            again = z[torch.randint(len(z), (len(self.codebook),), device=z.device)]
            if dist.is_available() and dist.is_initialized():
                dist.broadcast(again, 0)
            self.codebook.copy_(torch.where(dead[:, None], again, self.codebook))
            self.usage.copy_(torch.where(dead, even, self.usage))

    def _assigned(self, z: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """How many vectors each code has [K], and their sums [K, C], over all ranks."""
        counts = torch.zeros_like(self.usage).index_add_(0, codes, torch.ones_like(codes, dtype=self.usage.dtype))
        sums = torch.zeros_like(self.codebook).index_add_(0, codes, z)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts)
            dist.all_reduce(sums)
        return counts, sums

    @torch.no_grad()
    def _start(self, z: Tensor) -> None:
        """Spherical k-means of the first batch's vectors [N, C]; codes without vectors keep their random start."""
        chosen = torch.randperm(len(z), device=z.device)[: len(self.codebook)]
        drawn, start = self.codebook.clone(), self.codebook.clone()
        start[: len(chosen)] = z[chosen]
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(start, 0)
        self.codebook.copy_(start)
        counts = torch.ones_like(self.usage)
        self.usage.fill_(len(z) / len(self.codebook))  # nothing is dead yet
        for _ in range(self.rounds):
            counts, sums = self._assigned(z, self.nearest(z))
            self.codebook.copy_(torch.where(counts[:, None] > 0, F.normalize(sums, dim=-1), self.codebook))
        # equal vectors give equal codes, of which only one is ever nearest
        self.codebook.copy_(torch.where(counts[:, None] > 0, self.codebook, drawn))
        self.started.fill_(True)
