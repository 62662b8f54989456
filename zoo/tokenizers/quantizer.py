"""Vector quantisation with a table of codes: on the unit sphere or not, learned by moving averages or by gradient.

- Unit length and moving averages are BEiT v2's VQ-KD (arXiv 2208.06366, section 2.2; unilm,
  beit2/norm_ema_quantizer.py): both sides have unit length, the nearest code is the one of largest cosine, the
  codebook starts from k-means of the first batch and then moves by exponential averages of the vectors assigned to
  each code, and no gradient reaches it.
- Unit length and gradient are LlamaGen's (arXiv 2406.06525; tokenizer/tokenizer_image/vq_model.py): codes are
  normalised when they are read, not where they are stored.
- Free length and gradient are VQ-VAE's (arXiv 1711.00937) and Chameleon's: the nearest code is that of the least
  squared distance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import draws
from zoo.errors import ConfigError
from zoo.objectives.base import full_precision
from zoo.tokenizers.entropy import Entropies, softmax_entropies


@dataclass
class Quantized:
    """What a quantizer returns.

    Attributes:
        vectors: [..., C] the codes' vectors, with the gradient of the input (straight-through).
        codes: [...] int64.
        commitment: Mean squared distance of the inputs, at unit length where the codes have it, to their codes; its
            gradient reaches the inputs only.
        codebook_loss: The same number; its gradient reaches the codes only. Without a gradient where the codes are not
            learned by it; without a codebook (lookup-free) see ``LookupFree``.
        latents: [..., C] fp32, the inputs as their distance was taken (at unit length where the codes have it).
    """

    vectors: Tensor
    codes: Tensor
    commitment: Tensor
    codebook_loss: Tensor
    latents: Tensor


class Quantizer(nn.Module):
    """A codebook [K, C].

    Args:
        codes: K.
        width: C.
        unit: Inputs and codes have unit length.
        learned: ``average``: a buffer that follows its vectors; ``gradient``: a parameter, see ``codebook_loss``.
        decay: Of the moving averages.
        restart: A code used less than this share of an even use starts again at a random vector of the batch; 0 = never
            (VQ-KD); only with moving averages.
        rounds: Of k-means on the first training batch; only with moving averages.
    """

    codebook: Tensor
    usage: Tensor
    started: Tensor

    def __init__(
        self,
        codes: int,
        width: int,
        *,
        unit: bool = True,
        learned: str = "average",
        decay: float = 0.99,
        restart: float = 0.0,
        rounds: int = 10,
    ) -> None:
        super().__init__()
        self.unit, self.follows = unit, learned == "average"
        self.decay, self.restart, self.rounds = decay, restart, rounds
        self._begun = False
        if not self.follows:
            start = torch.empty(codes, width).uniform_(-1 / codes, 1 / codes)  # as in the releases
            self.codebook = nn.Parameter(self._sized(start))
            return
        self.register_buffer("codebook", self._sized(torch.randn(codes, width)))
        self.register_buffer("usage", torch.zeros(codes))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))

    def _sized(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) if self.unit else x

    def table(self) -> Tensor:
        """The codes as they are compared and drawn, [K, C] fp32: at unit length where ``unit``."""
        return self.codebook if self.follows else self._sized(self.codebook.float())

    def forward(self, x: Tensor) -> Quantized:
        """Quantise [..., C]; in training mode a codebook of moving averages then follows."""
        learns = self.follows and self.training and torch.is_grad_enabled() and not x.is_meta
        with full_precision(x):
            z = self._sized(x.float())
            if learns and not self._begun:
                if not bool(self.started):
                    self._start(z.detach().flatten(0, -2))
                self._begun = True  # asked once a process: reading the flag waits for an accelerator
            codes, table = self.nearest(z), self.table()
            vectors = F.embedding(codes, table)
            commitment = F.mse_loss(z, vectors.detach())
            codebook_loss = F.mse_loss(vectors, z.detach())
            if learns:
                self._follow(z.detach().flatten(0, -2), codes.flatten())
            return Quantized(z + (vectors - z).detach(), codes, commitment, codebook_loss, z)

    @torch.no_grad()
    def nearest(self, x: Tensor) -> Tensor:
        """The code of largest cosine, or of least squared distance: [..., C] to [...] int64."""
        table = self.table()
        if self.unit:
            return (x.float() @ table.T).argmax(-1)
        return (x.float() @ table.T - table.square().sum(-1) / 2).argmax(-1)

    def entropies(self, latents: Tensor, temperature: float, chunk: int | None = None) -> Entropies:
        """Entropies of softmax(-d / temperature), d the squared distances of [..., C] to all codes (LlamaGen).

        Args:
            latents: As ``Quantized.latents``.
            temperature: tau.
            chunk: Vectors whose distances stand in memory at once; None = about 4 million distances.
        """
        return softmax_entropies(latents.flatten(0, -2), self.table(), temperature, chunk)

    @torch.no_grad()
    def _follow(self, z: Tensor, codes: Tensor) -> None:
        """Move every used code towards the mean of its vectors [N, C], or their mean direction; unused ones stay."""
        counts, sums = self._assigned(z, codes)
        self.usage.mul_(self.decay).add_(counts, alpha=1 - self.decay)
        moved = self._sized(self.decay * self.codebook + (1 - self.decay) * self._means(counts, sums))
        self.codebook.copy_(torch.where(counts[:, None] > 0, moved, self.codebook))
        if self.restart:
            even = counts.sum() / len(counts)
            dead = self.usage < self.restart * even
            again = self._drawn(z, lambda n, g: torch.randint(n, (len(self.codebook),), device=z.device, generator=g))
            self.codebook.copy_(torch.where(dead[:, None], again, self.codebook))
            self.usage.copy_(torch.where(dead, even, self.usage))

    def _drawn(self, z: Tensor, draw: Callable[[int, torch.Generator | None], Tensor]) -> Tensor:
        """The vectors whose numbers ``draw`` gives, of those of all ranks: z [N, C] of the first, of the second, ..."""
        first, count = draws.place(len(z), z.device)
        number = draw(count, draws.stream(z.device)) - first
        if count == len(z):
            return z[number]
        own = (number >= 0) & (number < len(z))
        vectors = torch.where(own[:, None], z[number.clamp(0, len(z) - 1)], 0.0)
        dist.all_reduce(vectors)
        return vectors

    def _means(self, counts: Tensor, sums: Tensor) -> Tensor:
        return F.normalize(sums, dim=-1) if self.unit else sums / counts.clamp(min=1)[:, None]

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
        """K-means of the first batch's vectors [N, C]; codes without vectors keep their random start."""
        codes = len(self.codebook)
        chosen = self._drawn(z, lambda n, g: torch.randperm(n, device=z.device, generator=g)[:codes])
        drawn, start = self.codebook.clone(), self.codebook.clone()
        start[: len(chosen)] = chosen
        self.codebook.copy_(start)
        counts = torch.ones_like(self.usage)
        self.usage.fill_(len(z) / codes)  # nothing is dead yet
        for _ in range(self.rounds):
            counts, sums = self._assigned(z, self.nearest(z))
            self.codebook.copy_(torch.where(counts[:, None] > 0, self._means(counts, sums), self.codebook))
        # equal vectors give equal codes, of which only one is ever nearest
        self.codebook.copy_(torch.where(counts[:, None] > 0, self.codebook, drawn))
        self.started.fill_(True)


def table_entropies(quantizer: Quantizer, latents: Tensor, temperature: float, over: str, floor: str) -> Entropies:
    """The entropies over a table of codes.

    Raises:
        ConfigError: ``over`` bits, or another ``floor`` than ``add``.
    """
    if over != "codes" or floor != "add":
        raise ConfigError(
            f"entropy_over = {over!r} with floor = {floor!r} is of lookup-free tokenizers: a table of codes has"
            " entropy_over=codes and floor=add"
        )
    return quantizer.entropies(latents, temperature)
