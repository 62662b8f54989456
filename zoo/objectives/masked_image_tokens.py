"""Masked image tokens: hidden codes are predicted in their own place, from a share that is drawn anew for each image
(MaskGIT, arXiv 2202.04200, section 3.1; Show-o, arXiv 2408.12528, section 3.3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.objectives.base import Objective, full_precision, over_ranks
from zoo.recipe import ObjectiveConfig
from zoo.sampling.masked import mask_ratio

IGNORE = -100


@dataclass(frozen=True, kw_only=True)
class MaskedImageTokensConfig(ObjectiveConfig):
    """Cross-entropy of hidden codes.

    Attributes:
        label_smoothing: Mass spread evenly over the vocabulary.
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing = {self.label_smoothing} must lie in [0, 1)")

    def build(self) -> MaskedImageTokens:
        return MaskedImageTokens(self)


def draw_masks(ratio: Tensor, order: Tensor, schedule: str = "cosine", least: float = 0.0) -> Tensor:
    """Which codes are hidden, out of uniform numbers (Show-o, released ``mask_or_random_replace_tokens``).

    The share is p = schedule(ratio), ``least`` or more; n = max(1, round(p * codes)) codes are hidden: those of the n
    smallest places in the permutation that ``order``'s argsort is.

    Args:
        ratio: [N], of each image.
        order: [N, n], of each code.

    Returns:
        [N, n] bool.
    """
    share = mask_ratio(schedule, ratio).clamp(min=least)  # [N]
    count = (order.shape[1] * share).round().clamp(min=1)
    return order.argsort(dim=1) < count[:, None]


class MaskedImageTokens(Objective):
    """Mean cross-entropy, in nats, of ``outputs["code_targets"]`` [B, T] under the rows of ``outputs["hidden"]``
    [B, T, D] in their own places, over the whole vocabulary. Logits are computed at these places alone.

    The targets of Show-o's ``t2i`` rows hold the ids around the image too, two trivial terms an image. With several
    processes each divides by the mean number of targets a process. No targets give a zero connected to the graph.
    """

    learns: ClassVar[str] = "masked"
    needs: ClassVar[frozenset[str]] = frozenset({"hidden", "code_targets"})
    parts = 3  # a typical batch holds rows of three tasks, of which this is one's loss

    def __init__(self, config: MaskedImageTokensConfig) -> None:
        super().__init__()
        self.config = config

    def forward(
        self, model: Any, batch: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Reports ``masked_image_token`` (nats a target), ``codes`` (targets) and ``accuracy`` in [0, 1]."""
        hidden, targets = outputs["hidden"], outputs["code_targets"]
        if targets.is_meta:  # counting FLOPs: 64 % of the codes are hidden on average (mean cosine)
            places = (2 + round(0.64 * model.places)) * max(1, batch["image_drawn"].shape[0])
            chosen, wanted = hidden.flatten(0, 1)[:places], targets.flatten()[:places]
        else:
            kept = targets != IGNORE  # [B, T]
            chosen, wanted = hidden[kept], targets[kept]  # [M, D], [M]
        total, count = over_ranks(torch.tensor(float(len(wanted)), device=hidden.device))
        logits = model.decoder.logits(chosen)  # [M, V]
        with full_precision(logits):
            loss = (
                F.cross_entropy(logits.float(), wanted, reduction="sum", label_smoothing=self.config.label_smoothing)
                / count
            )
        hits = (logits.detach().argmax(-1) == wanted).sum() / max(1, len(wanted))
        return loss, {"masked_image_token": loss.detach(), "codes": total, "accuracy": hits}
