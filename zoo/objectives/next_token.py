"""Next-token prediction: cross-entropy over the positions that have a target, and nothing computed elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.data.sequences import TASKS, row_tasks
from zoo.errors import ConfigError, near
from zoo.objectives.base import Objective, over_ranks
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
        tasks: Task of a row (``zoo.data.sequences.TASKS``) -> factor of its own mean, where rows of several tasks share
            a batch (Show-o: lm 0.1, mmu 1); tasks that are not named have factor 1. Empty = one mean over all targets.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    part: str = "decoder"
    tasks: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1 or self.z_loss < 0:
            raise ValueError("label_smoothing must lie in [0, 1) and z_loss must not be negative")
        for task, factor in self.tasks.items():
            if task not in TASKS:
                raise ValueError(f"tasks: unknown task {task!r}{near(task, TASKS)}")
            if factor < 0:
                raise ValueError(f"tasks: the factor of {task} is {factor}, expected 0 or more")

    def build(self) -> NextToken:
        return NextToken(self)


class NextToken(Objective):
    """Mean cross-entropy, in nats, over the targets of the whole batch.

    With several processes each divides by the mean number of targets a process, so that the losses and gradients DDP
    averages weigh every token alike, as one process with the whole batch would. A batch without targets gives a zero
    that is connected to the graph.
    """

    learns: ClassVar[str] = "autoregressive"

    def __init__(self, config: NextTokenConfig) -> None:
        super().__init__()
        self.part = config.part
        self.prefix = "" if config.part == "decoder" else f"{config.part}_"
        self.label_smoothing = config.label_smoothing
        self.z_loss = config.z_loss
        self.tasks = {task: config.tasks.get(task, 1.0) for task in TASKS} if config.tasks else {}

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
        that is one (BLIP-2), which ``score_text`` leaves out. With ``tasks``, which needs ``batch["task"]`` [B], the
        mean of each is reported too; a task without targets adds nothing.
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
        (tokens, _), (count, octets) = over_ranks(sizes)
        total = F.cross_entropy(logits, wanted, reduction="sum", label_smoothing=self.label_smoothing)
        loss = total / count  # with no target: an empty sum, whose gradients are zeros
        report = {"next_token": loss.detach(), "tokens": tokens}
        if self.tasks and not targets.is_meta:
            loss, own = self._by_task(logits, wanted, kept, batch)
            report |= own
        if self.z_loss:
            loss = loss + self.z_loss * logits.logsumexp(-1).square().sum() / count
        if "text_bytes" in batch:
            report["bits_per_byte"] = total.detach() / math.log(2) / octets
        return loss, report

    def _by_task(
        self, logits: Tensor, wanted: Tensor, kept: Tensor, batch: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the tasks' means, and the means."""
        if "task" not in batch:
            raise ConfigError(
                "next-token weighs tasks, but the batch does not say whose rows are whose: leave tasks out"
            )
        task = row_tasks(batch).expand_as(kept)[kept]  # [M]
        numbers = torch.arange(len(TASKS), device=task.device)
        own = task == numbers[:, None]  # [tasks, M]
        nats = F.cross_entropy(logits, wanted, reduction="none", label_smoothing=self.label_smoothing)
        _, counts = over_ranks(own.sum(1))
        means = (own * nats).sum(1) / counts  # [tasks]; nothing of a task gives 0
        factors = torch.tensor([self.tasks[name] for name in TASKS], device=task.device)
        return (factors * means).sum(), {name: means[i].detach() for i, name in enumerate(TASKS)}
