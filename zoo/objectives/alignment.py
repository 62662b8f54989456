"""What a language model's states become, pulled to what an image decoder was trained on: the states of its text encoder
(MiniGPT-5, NExT-GPT) or an image's features (SEED-X)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import near
from zoo.objectives.base import Objective, full_precision, over_ranks
from zoo.recipe import ObjectiveConfig

FORMS = ("mse", "euclidean", "cosine")


@dataclass(frozen=True, kw_only=True)
class AlignmentConfig(ObjectiveConfig):
    """The distance of an output connector's tokens from their targets.

    Attributes:
        weight: 0.1 in MiniGPT-5 (released model.py), 1 in NExT-GPT, 6 in SEED-X.
        form: ``mse``, the squared error's mean over numbers (MiniGPT-5, SEED-X); ``euclidean``, the norm of the
            difference of two tokens, not squared (NExT-GPT's ``l2_loss``); ``cosine``, one minus the cosine (SEED-X's
            other form).
    """

    weight: float = 0.1
    form: str = "mse"

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"form = {self.form!r} must be one of {', '.join(FORMS)}{near(self.form, FORMS)}")

    def build(self) -> Alignment:
        return Alignment(self)


class Alignment(Objective):
    """Mean over images of the mean distance over tokens.

    With several processes each divides by the mean number of images a process. A batch without any gives a zero that is
    connected to the graph.
    """

    learns: ClassVar[str] = "regression"
    needs: ClassVar[frozenset[str]] = frozenset({"aligned", "alignment_target", "has_target"})

    def __init__(self, config: AlignmentConfig) -> None:
        super().__init__()
        self.form = config.form

    def forward(
        self, model: Any, batch: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of ``aligned`` [N, m, D] against ``alignment_target`` [N, m, D], which is held fixed, over the images
        that have one, ``has_target`` [N]. Reports ``distance`` (before the weight)."""
        given = outputs["has_target"]
        with full_precision(outputs["aligned"]):
            each = distances(outputs["aligned"], outputs["alignment_target"].detach(), self.form)  # [N]
            _, share = over_ranks(given.sum())
            loss = torch.where(given, each, 0.0).sum() / share
        return loss, {"distance": loss.detach()}


def distances(a: Tensor, b: Tensor, form: str) -> Tensor:
    """Mean distance [N] of the tokens of ``a`` and ``b``, [N, m, D] both."""
    a, b = a.float(), b.float()
    if form == "mse":
        return (a - b).square().flatten(1).mean(1)
    if form == "cosine":
        return (1 - F.cosine_similarity(a, b, dim=-1)).mean(1)
    norms: Tensor = torch.linalg.vector_norm(a - b, dim=-1)  # [N, m]
    return norms.mean(1)
