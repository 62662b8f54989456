"""Losses of masks, one value a mask, as LISA computes them (``dice_loss`` and ``sigmoid_ce_loss`` of model/LISA.py)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

SCALE = 1000.0
"""What dice divides its sums by. It was to guard half precision, but as it does not divide ``EPS`` it is part of the
formula where masks are small."""

EPS = 1e-6


def bce_of(logits: Tensor, targets: Tensor, shown: Tensor) -> Tensor:
    """Binary cross-entropy, the mean over the pixels of each image: [M].

    Args:
        logits: [M, H, W].
        targets: [M, H, W] float, 1 inside a mask.
        shown: [M, H, W] bool, False where an image has no pixels.
    """
    each = F.binary_cross_entropy_with_logits(logits, targets, reduction="none") * shown
    return each.flatten(1).sum(1) / shown.flatten(1).sum(1).clamp(min=1)


def dice_of(logits: Tensor, targets: Tensor, shown: Tensor) -> Tensor:
    """``1 - (2 sum(p/s t) + eps) / (sum(p/s) + sum(t/s) + eps)`` with p = sigmoid(logit), s = 1000, eps = 1e-6: [M].

    An empty mask that is found empty costs nothing, since eps stands above and below.
    """
    found = (logits.sigmoid() * shown).flatten(1)
    wanted = (targets * shown).flatten(1)
    both = 2 * (found / SCALE * wanted).sum(1)
    either = (found / SCALE).sum(1) + (wanted / SCALE).sum(1)
    return 1 - (both + EPS) / (either + EPS)
