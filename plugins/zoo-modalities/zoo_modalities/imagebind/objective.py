"""InfoNCE of (image, x) pairs, a sum over modalities x (arXiv 2305.05665, equation 1); no other pair is compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import ConfigError
from zoo.objectives.base import Objective, full_precision
from zoo.objectives.contrastive import MAX_LOGIT_SCALE, gather_rows
from zoo.recipe import ObjectiveConfig

SUFFIX = "_embeds"


@dataclass(frozen=True, kw_only=True)
class BindContrastiveConfig(ObjectiveConfig):
    """The objective ``bind-contrastive``.

    Attributes:
        weights: Modality -> factor of its pair's loss; 1 where nothing is said, 0 leaves the pair out.
        clamp: Keep text's learned temperature within what the model uses, scales of 1 to 100.
    """

    weights: dict[str, float] = field(default_factory=dict)
    clamp: bool = True

    def __post_init__(self) -> None:
        if any(w < 0 for w in self.weights.values()):
            raise ValueError(f"weights = {dict(self.weights)} must be 0 or more")

    def build(self) -> BindContrastive:
        return BindContrastive(self)


class BindContrastive(Objective):
    """For every modality x of the batch L(image, x) + L(x, image), with the other images and items of the same pairs,
    on every rank, as negatives. A pair of which nothing learns in this stage is left out."""

    learns: ClassVar[str] = "contrastive"
    needs: ClassVar[frozenset[str]] = frozenset({"image_embeds", "text_embeds", "logit_scale"})

    def __init__(self, config: BindContrastiveConfig) -> None:
        super().__init__()
        self.weights = dict(config.weights)
        self.clamp = config.clamp

    def pairs(self, model: Any, outputs: Mapping[str, Tensor]) -> list[str]:
        """The modalities that are compared with images."""
        learns = getattr(model, "learns", lambda _: True)
        found = [name.removesuffix(SUFFIX) for name in outputs if name.endswith(SUFFIX)]
        return [name for name in found if name != "image" and self.weights.get(name, 1.0) > 0 and learns(name)]

    def forward(
        self, model: Any, batch: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Read ``image_embeds`` [B, D], and of each modality ``NAME_embeds`` [n, D] of unit length and the logarithm
        ``NAME_logit_scale`` (of text ``logit_scale``); from the batch ``NAME_rows`` [n], the images these belong to
        (all, in order, where there is none).

        Returns:
            The sum over modalities, in nats; of each its ``NAME_loss`` and ``NAME_accuracy`` from image to item.

        Raises:
            ConfigError: No pair is left.
        """
        names = self.pairs(model, outputs)
        if not names:
            raise ConfigError(
                "bind-contrastive has no pair to learn from: no modality of the batch learns in this stage"
            )
        images = outputs["image_embeds"]
        total = torch.zeros((), device=images.device)
        report: dict[str, Tensor] = {}
        with full_precision(images):
            for name in names:
                scale = outputs["logit_scale" if name == "text" else f"{name}_logit_scale"].float().exp()
                items, rows = outputs[f"{name}{SUFFIX}"].float(), batch.get(f"{name}_rows")
                loss, accuracy = pair_loss(images.float(), items, scale, rows)
                total = total + self.weights.get(name, 1.0) * loss
                report |= {f"{name}_loss": loss.detach(), f"{name}_accuracy": accuracy}
        return total, report

    @torch.no_grad()
    def after_step(self, model: Any) -> None:
        if self.clamp:
            model.logit_scale.clamp_(0.0, MAX_LOGIT_SCALE)


def pair_loss(images: Tensor, items: Tensor, scale: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """L(image, x) + L(x, image) over all ranks' pairs.

    Args:
        images: [B, D], unit length, of this rank.
        items: [n, D], unit length.
        scale: The factor of the products, one over the temperature.
        rows: [n], the image of each item; None = B of them in order.

    Returns:
        The loss, such that its mean over ranks is that of one process, and the share of images that find their item.
    """
    queries = images if rows is None else images[rows]  # [n, D]
    count, first = len(items), 0
    all_queries, all_items, everything = queries, items, float(count)
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if several:  # ranks may have other numbers of pairs, and rows are gathered in equal ones
        present = (torch.arange(len(images), device=images.device) < count).float()
        spare = (0, 0, 0, len(images) - count)
        kept = gather_rows(present) > 0
        all_queries, all_items = (gather_rows(F.pad(t, spare))[kept] for t in (queries, items))
        first = int(kept[: dist.get_rank() * len(images)].sum())
        everything = float(len(all_items)) / dist.get_world_size()
    targets = torch.arange(first, first + count, device=images.device)
    per_image, per_item = scale * queries @ all_items.T, scale * items @ all_queries.T  # [n, N]
    loss = F.cross_entropy(per_image, targets, reduction="sum") + F.cross_entropy(per_item, targets, reduction="sum")
    hits = (per_image.detach().argmax(1) == targets).float().sum() if len(all_items) else loss.detach()
    return loss / max(everything, 1.0), hits / max(count, 1)
