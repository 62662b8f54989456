"""Masked language modelling with the image in sight, distilled from a momentum copy (ALBEF, arXiv 2107.07651)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.draws import rand, randint
from zoo.objectives.base import Objective, full_precision, over_ranks
from zoo.objectives.momentum import DistilledConfig
from zoo.part import Features

IGNORE = -100
KEEP, REPLACE = 0.1, 0.1


@dataclass(frozen=True, kw_only=True)
class MaskedLMConfig(DistilledConfig):
    """The masked-LM objective; with ``alpha`` = 0 it needs no momentum copy.

    Attributes:
        probability: Of a word to be masked, each by itself; ALBEF 0.15.
    """

    probability: float = 0.15

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.probability < 1:
            raise ValueError(f"probability = {self.probability} must lie between 0 and 1")

    def build(self) -> MaskedLM:
        return MaskedLM(self)


def mask_words(
    ids: Tensor, words: Tensor, *, mask_id: int, vocab_size: int, probability: float
) -> tuple[Tensor, Tensor]:
    """BERT's masking, drawn from torch's global stream: of the chosen words 80 % become [MASK], 10 % any id of the
    vocabulary, 10 % stay.

    Args:
        ids: [B, L] int64.
        words: [B, L] bool, what may be chosen: neither pads nor [CLS].

    Returns:
        The ids [B, L] to be read, and labels [B, L]: the true id where a word was chosen, -100 elsewhere.
    """
    draw = rand((2, *ids.shape), ids.device, dim=1)
    chosen = (draw[0] < probability) & words
    masked = torch.where(chosen & (draw[1] >= KEEP + REPLACE), mask_id, ids)
    other = randint(vocab_size, ids.shape, ids.device)
    masked = torch.where(chosen & (draw[1] < REPLACE), other, masked)
    return masked, torch.where(chosen, ids, IGNORE)


class MaskedLM(Objective):
    """(1 - alpha) cross-entropy + alpha soft cross-entropy against the momentum copy's words, mean over masked words.

    It calls ``model.fuse(Features(image tokens), masked ids, attention_mask)``, and ``model.word_logits(hidden rows)``
    at the masked places alone. Special ids come from ``model.special_ids``, a mapping of ``cls``, ``pad`` and ``mask``,
    and ``model.vocab_size`` counts the words. The batch may bring the draw: ``masked_ids`` and ``masked_labels``.
    """

    learns: ClassVar[str] = "masked"
    needs: ClassVar[frozenset[str]] = frozenset({"image_embeds", "image_tokens"})

    def __init__(self, config: MaskedLMConfig) -> None:
        super().__init__()
        self.config = config
        self.momentum_rate = config.momentum if config.alpha else None

    def forward(
        self, model: Any, batch: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss in nats a masked word of the whole batch (all ranks), and report ``masked_lm``, the plain
        cross-entropy, ``accuracy`` in [0, 1], ``words`` (masked) and, when distilling, ``alpha``.
        """
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        masked, labels = self._draw(model, batch)
        hidden = self._read(model, outputs, masked, mask)  # [B, L, D]
        if ids.is_meta:  # counting FLOPs, where values cannot be seen: as many words as are masked on average
            typical = max(1, round(ids.numel() * self.config.probability))
            place = torch.arange(typical, device=ids.device)
        else:
            place = (labels != IGNORE).flatten().nonzero()[:, 0]  # [M]
        wanted = labels.flatten()[place]
        logits = model.word_logits(hidden.flatten(0, 1)[place])  # [M, V]
        total, count = over_ranks(torch.tensor(float(len(place)), device=ids.device))  # each word weighs alike
        with full_precision(logits):
            log = logits.float().log_softmax(-1)
            hard = F.nll_loss(log, wanted.clamp(min=0), reduction="sum") / count
        hits = (log.detach().argmax(-1) == wanted).sum() / max(1, len(place))
        report = {"masked_lm": hard.detach(), "accuracy": hits, "words": total}
        if self.momentum_rate is None or self.momentum is None:
            return hard, report
        alpha = self.momentum.share(self.config)
        with torch.no_grad():
            teacher, slow = self.momentum.teacher, self.momentum.features(batch, outputs)
            states = teacher.fuse(Features(slow["image_tokens"]), masked, mask).tokens
            soft = teacher.word_logits(states.flatten(0, 1)[place]).float().softmax(-1)
        distilled = -(soft * log).sum() / count
        return (1 - alpha) * hard + alpha * distilled, {**report, "alpha": alpha}

    def _read(self, model: Any, outputs: Mapping[str, Tensor], masked: Tensor, mask: Tensor | None) -> Tensor:
        """States [B, L, D] of the masked text, the image in sight."""
        states: Tensor = model.fuse(Features(outputs["image_tokens"]), masked, mask).tokens
        return states

    def _draw(self, model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        if "masked_ids" in batch:
            return batch["masked_ids"], batch["masked_labels"]
        if ids.is_meta:
            return ids, ids
        special = model.special_ids
        words = (ids != special["cls"]) & (ids != special["pad"])
        if mask is not None:
            words = words & mask.bool()
        return mask_words(
            ids,
            words,
            mask_id=special["mask"],
            vocab_size=model.vocab_size,
            probability=self.config.probability,
        )
