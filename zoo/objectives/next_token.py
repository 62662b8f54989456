"""Next-token prediction: cross-entropy over the positions that have a target, and nothing computed elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from zoo.objectives.base import Objective
from zoo.recipe import ObjectiveConfig


@dataclass(frozen=True, kw_only=True)
class NextTokenConfig(ObjectiveConfig):
    """Cross-entropy of the next token.

    Attributes:
        label_smoothing: Mass spread evenly over the vocabulary.
        z_loss: Factor of the mean squared log-partition, which keeps logits from drifting (PaLM, arXiv 2204.02311,
            section 5).
        part: What writes, a part of the model: ``decoder``, or ``writer``, BLIP-2's Q-Former as a language model.
            The outputs of any but the decoder carry its name, as ``writer_hidden`` and ``writer_targets``.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    part: str = "decoder"

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1 or self.z_loss < 0:
            raise ValueError("label_smoothing must lie in [0, 1) and z_loss must not be negative")

    def build(self) -> NextToken:
        return NextToken(self)


class NextToken(Objective):
    """Mean cross-entropy, in nats, over the targets of the whole batch.

    With several processes each divides by the mean number of targets a process, so that the losses and gradients DDP
    averages weigh every token alike, as one process with the whole batch would. A batch without targets gives a zero
    that is connected to the graph.
    """

    def __init__(self, config: NextTokenConfig) -> None:
        super().__init__()
        self.part = config.part
        self.prefix = "" if config.part == "decoder" else f"{config.part}_"
        self.label_smoothing = config.label_smoothing
        self.z_loss = config.z_loss

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """``hidden`` and ``targets`` of the part that writes."""
        return frozenset({f"{self.prefix}hidden", f"{self.prefix}targets"})

    def forward(
        self, model: Any, batch: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of ``outputs["targets"]`` [B, T] (-100 = none), the ids that rows of ``outputs["hidden"]`` [B, T, D]
        predict.

        Reports ``next_token`` (nats a target, without the z term), ``tokens`` (targets), and ``bits_per_byte`` where
        the batch says how many bytes of text the targets stand for (``text_bytes`` [B]); all targets count, also a BOS
        that is one (BLIP-2), which ``score_text`` leaves out.
        """
        hidden, targets = outputs[f"{self.prefix}hidden"], outputs[f"{self.prefix}targets"]
        kept = targets != -100  # [B, T]
        if targets.is_meta:  # counting FLOPs, where values cannot be seen: as many targets as the model calls typical
            typical = getattr(model, f"{self.prefix}typical_targets", targets.shape[1])
            chosen, wanted = hidden[:, -typical:].flatten(0, 1), targets[:, -typical:].flatten()
        else:
            chosen, wanted = hidden[kept], targets[kept]  # [M, D], [M]
        logits = getattr(model, self.part).logits(chosen).float()  # [M, V]
        sizes = torch.stack([kept.sum(), batch["text_bytes"].sum() if "text_bytes" in batch else kept.sum()])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sizes, op=dist.ReduceOp.SUM)
            tokens, share = sizes[0], sizes / dist.get_world_size()
        else:
            tokens, share = sizes[0], sizes.float()
        count = share[0].clamp(min=1)
        total = F.cross_entropy(logits, wanted, reduction="sum", label_smoothing=self.label_smoothing)
        loss = total / count  # with no target: an empty sum, whose gradients are zeros
        report = {"next_token": loss.detach(), "tokens": tokens}
        if self.z_loss:
            loss = loss + self.z_loss * logits.logsumexp(-1).square().sum() / count
        if "text_bytes" in batch:
            report["bits_per_byte"] = total.detach() / math.log(2) / share[1].clamp(min=1)
        return loss, report
