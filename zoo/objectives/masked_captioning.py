"""Captioning as masked prediction with causal text (BEiT-3, arXiv 2208.10442, section 3.1; unilm, beit3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from zoo.draws import rand
from zoo.objectives.base import Objective, full_precision, over_ranks
from zoo.objectives.masked_data import _places
from zoo.objectives.masked_lm import IGNORE, mask_words
from zoo.recipe import ObjectiveConfig


@dataclass(frozen=True, kw_only=True)
class MaskedCaptioningConfig(ObjectiveConfig):
    """Masked captioning; defaults: the released fine-tuning.

    Attributes:
        rate: Share of a caption's tokens to mask, its end included, so that the end is learned too.
        label_smoothing: Mass spread evenly over the wrong words.
        drop: Share of the masked words, those of the largest loss, that are left out after ``drop_after`` steps.
        drop_after: Steps.
    """

    rate: float = 0.7
    label_smoothing: float = 0.1
    drop: float = 0.2
    drop_after: int = 12000

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1 or not 0 <= self.label_smoothing < 1 or not 0 <= self.drop < 1:
            raise ValueError("rate must lie between 0 and 1, label_smoothing and drop in [0, 1)")

    def build(self) -> MaskedCaptioning:
        return MaskedCaptioning(self)


class MaskedCaptioning(Objective):
    """Divergence of the smoothed true word from the prediction, at masked places of a caption that reads the image and
    its own past; the image reads no text."""

    learns: ClassVar[str] = "masked"
    needs: ClassVar[frozenset[str]] = frozenset({"image_tokens", "text_states"})
    steps: Tensor

    def __init__(self, config: MaskedCaptioningConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(
        self, model: Any, batch: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss in nats a masked word; reports ``accuracy`` in [0, 1] and ``words``.

        The batch may bring the draw: ``masked_ids`` and ``masked_labels`` [B, T], -100 where nothing is predicted.
        """
        ids, labels = self.draw(model, batch)
        text = model.trunk.embed_text(ids)
        _, read = model.read_pair(outputs["image_tokens"], text, batch.get("attention_mask"), causal=True)
        place = _places(labels != IGNORE, self.config.rate)
        logits = model.word_logits(read.tokens.flatten(0, 1)[place])  # [M, V]
        wanted = labels.flatten()[place]
        dropping = not ids.is_meta and self.config.drop > 0 and int(self.steps) > self.config.drop_after
        loss = smoothed_divergence(logits, wanted, self.config.label_smoothing, self.config.drop if dropping else 0.0)
        hits = (logits.detach().argmax(-1) == wanted).float().mean()
        return loss, {"accuracy": hits, "words": (labels != IGNORE).sum()}

    def draw(self, model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Mask round(rate * n) of a caption's n tokens, one at least and never the first; 80 % become [MASK], 10 % any
        word, 10 % stay. Returns the ids to read and the labels, [B, T] each."""
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        if "masked_ids" in batch:
            return batch["masked_ids"], batch["masked_labels"]
        if ids.is_meta:
            return ids, ids
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        length = real.sum(1)
        count = torch.minimum((length * self.config.rate + 0.5).long(), length - 1).clamp(min=1)
        order = rand(ids.shape, ids.device).masked_fill(~real, 2.0)
        order[:, 0] = 2.0
        chosen = order.argsort(1).argsort(1) < count[:, None]
        return mask_words(
            ids, chosen & real, mask_id=model.special_ids["mask"], vocab_size=model.vocab_size, probability=1.0
        )

    def after_step(self, model: Any) -> None:
        """Count the step."""
        self.steps += 1


def smoothed_divergence(logits: Tensor, targets: Tensor, smoothing: float, drop: float = 0.0) -> Tensor:
    """Mean KL(smoothed target || prediction) of targets [M] under logits [M, V] (unilm, beit3/utils.py).

    The smoothed target has 1 - ``smoothing`` on the true word and the rest evenly on the others; the ``drop`` share of
    largest values is left out. It is the smoothed cross-entropy less the target's entropy, a constant.
    """
    with full_precision(logits):
        log = logits.float().log_softmax(-1)
        classes = logits.shape[-1]
        rest = smoothing / (classes - 1)
        true = log.gather(1, targets[:, None])[:, 0]
        entropy = _plogp(1 - smoothing) + (classes - 1) * _plogp(rest)
        values = entropy - (1 - smoothing - rest) * true - rest * log.sum(-1)  # [M]
        if drop:
            values = values.topk(int(len(values) * (1 - drop)), largest=False).values
        _, count = over_ranks(torch.tensor(len(values), device=values.device))
        return values.sum() / count


def _plogp(p: float) -> float:
    from math import log

    return p * log(p) if p > 0 else 0.0
