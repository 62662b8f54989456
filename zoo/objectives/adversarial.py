"""A discriminator that judges patches, against which a tokenizer learns to draw sharp images.

VQGAN's adversarial loss (arXiv 2012.09841, section 3.1) with the variants that followed: a fixed or an adaptive weight,
hinge or non-saturating for the tokenizer, LeCam regularisation (arXiv 2104.03310), a late start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.objectives.base import Objective, full_precision
from zoo.recipe import ObjectiveConfig

LARGEST = 1e4
"""Of the adaptive weight (VQGAN)."""


@dataclass(frozen=True, kw_only=True)
class AdversarialConfig(ObjectiveConfig):
    """``weight`` is the tokenizer's factor: 0.5 in latent diffusion and LlamaGen, 0.1 in Open-MAGVIT2.

    Attributes:
        start: Optimizer steps before it begins: 50,001 in latent diffusion, 20,000 in LlamaGen, 0 in Open-MAGVIT2.
        generator: What the tokenizer minimises: ``hinge``, -D, or ``non-saturating``, -log sigmoid(D) (Open-MAGVIT2).
        adaptive: Multiply the weight by the ratio of the other losses' gradient to this one's at the last layer
            (VQGAN, equation 7).
        lecam: Factor of LeCam in the discriminator's loss; 0.05 in Open-MAGVIT2.
        decay: Of LeCam's moving averages of the discriminator's answers.
        base: Channels of the discriminator's first layer.
        layers: Its layers that halve the image; 3 judge patches of 70 pixels.
        norm: ``batch`` (pix2pix, VQGAN) or ``group``, which depends on no other image.
        lr: The discriminator's learning rate, constant.
        betas: Of its Adam.
    """

    start: int = 0
    generator: str = "hinge"
    adaptive: bool = False
    lecam: float = 0.0
    decay: float = 0.999
    base: int = 64
    layers: int = 3
    norm: str = "batch"
    lr: float = 1e-4
    betas: list[float] = field(default_factory=lambda: [0.5, 0.9])

    def __post_init__(self) -> None:
        if self.generator not in ("hinge", "non-saturating") or self.norm not in ("batch", "group"):
            raise ValueError("generator must be hinge or non-saturating, and norm batch or group")
        if self.start < 0 or self.lecam < 0 or not 0 <= self.decay < 1:
            raise ValueError("start and lecam must not be negative, and decay must lie in [0, 1)")
        if self.base < 1 or self.layers < 1 or self.lr <= 0:
            raise ValueError("base and layers must be 1 or more and lr above 0")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas = {list(self.betas)} must be two numbers in [0, 1)")

    def build(self) -> Adversarial:
        return Adversarial(self)


class PatchDiscriminator(nn.Sequential):
    """pix2pix's PatchGAN (arXiv 1611.07004, appendix 6.1.2): one logit a patch, [B, 3, H, W] to [B, 1, h, w]."""

    def __init__(self, base: int = 64, layers: int = 3, norm: str = "batch") -> None:
        widths = [min(2**i, 8) * base for i in range(layers + 1)]
        made: list[nn.Module] = [nn.Conv2d(3, base, 4, 2, 1), nn.LeakyReLU(0.2)]
        for i in range(1, layers + 1):
            stride = 2 if i < layers else 1
            made += [
                nn.Conv2d(widths[i - 1], widths[i], 4, stride, 1, bias=norm == "group"),
                # in training its answers are of the batch at hand; running averages would never be read
                nn.BatchNorm2d(widths[i], track_running_stats=False) if norm == "batch" else _groups(widths[i]),
                nn.LeakyReLU(0.2),
            ]
        super().__init__(*made, nn.Conv2d(widths[-1], 1, 4, 1, 1))
        for module in self:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)


def _groups(width: int) -> nn.GroupNorm:
    groups = next(g for g in (32, 16, 8, 4, 2, 1) if width % g == 0 and width // g >= min(4, width))
    return nn.GroupNorm(groups, width)


class Adversarial(Objective):
    """Draw what ``discriminator`` takes for real; it learns, by an optimizer of its own, to tell the difference.

    Attributes:
        discriminator: Its parameters have gradients in ``own_loss`` only.
        steps: Scalar, optimizer steps so far.
        answers: [2] moving averages of its answers to real and to drawn images, from 0.
    """

    learns: ClassVar[str] = "adversarial"
    needs: ClassVar[frozenset[str]] = frozenset({"reconstruction"})
    reads_losses = True
    steps: Tensor
    answers: Tensor

    def __init__(self, config: AdversarialConfig) -> None:
        super().__init__()
        self.config = config
        self.discriminator = PatchDiscriminator(config.base, config.layers, config.norm).requires_grad_(False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("answers", torch.zeros(2))
        self._pair: tuple[Tensor, Tensor] | None = None

    @property
    def begun(self) -> bool:
        """Whether ``start`` steps have passed; on the meta device, where costs are counted, they have."""
        return self.steps.is_meta or self.config.start == 0 or int(self.steps) >= self.config.start

    def forward(
        self, model: Any, batch: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The tokenizer's loss; 0 before ``start``.

        Reports ``generator``, the loss without the adaptive weight, and ``adaptive``, that weight.
        """
        drawn = outputs["reconstruction"]
        if not self.begun:
            zero = drawn.new_zeros(())
            return 0.0 * drawn.float().mean(), {"generator": zero, "adaptive": zero}
        with full_precision(drawn):
            logits = self.discriminator(drawn.float())
            loss = -logits.mean() if self.config.generator == "hinge" else F.softplus(-logits).mean()
            factor = loss.new_ones(())
            if self.config.adaptive and "loss" in outputs and torch.is_grad_enabled():
                factor = adaptive_weight(outputs["loss"], loss, model.image_tokenizer.last_layer)
        if self.training and torch.is_grad_enabled():
            self._pair = batch["pixel_values"].detach(), drawn.detach()
        return factor * loss, {"generator": loss.detach(), "adaptive": factor}

    def own_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(
            self.discriminator.parameters(), lr=self.config.lr, betas=(self.config.betas[0], self.config.betas[1])
        )

    def own_loss(self) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Hinge: (relu(1 - D(real)) + relu(1 + D(drawn))) / 2, and LeCam.

        Reports ``discriminator`` (without LeCam), ``real`` and ``drawn``, its mean answers, and ``lecam``.
        """
        if self._pair is None:
            zero = torch.zeros((), device=self.answers.device)
            return None, dict.fromkeys(("discriminator", "real", "drawn", "lecam"), zero)
        (wanted, drawn), self._pair = self._pair, None
        with full_precision(drawn):
            real, fake = self.discriminator(wanted.float()), self.discriminator(drawn.float())
            hinge = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
            self._follow(real.detach().mean(), fake.detach().mean())
            lecam = F.relu(real - self.answers[1]).square().mean() + F.relu(self.answers[0] - fake).square().mean()
            loss = hinge + self.config.lecam * lecam if self.config.lecam else hinge
        report = {"discriminator": hinge, "real": real.mean(), "drawn": fake.mean(), "lecam": lecam}
        return loss, {key: value.detach() for key, value in report.items()}

    @torch.no_grad()
    def _follow(self, real: Tensor, fake: Tensor) -> None:
        now = torch.stack([real, fake])
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(now)
            now /= dist.get_world_size()
        self.answers.mul_(self.config.decay).add_(now, alpha=1 - self.config.decay)

    def own_step(self, optimizer: torch.optim.Optimizer) -> None:
        super().own_step(optimizer)
        self.steps += 1


def adaptive_weight(others: Tensor, loss: Tensor, last_layer: Tensor) -> Tensor:
    """Norm of the others' gradient at the last layer over that of ``loss`` plus 1e-4, in [0, 1e4]; without a graph.

    VQGAN's equation 7; as in its code the norms are of the layer's weight alone.
    """
    (theirs,) = torch.autograd.grad(others, last_layer, retain_graph=True)
    (ours,) = torch.autograd.grad(loss, last_layer, retain_graph=True)
    ratio: Tensor = theirs.norm() / (ours.norm() + 1e-4)
    return ratio.clamp(0, LARGEST).detach()
