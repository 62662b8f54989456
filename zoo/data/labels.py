"""The processor of models that choose among labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zoo.data.fused import FusionProcessor
from zoo.data.images import ImageTransform, uniforms
from zoo.data.sample import Sample
from zoo.data.text import TextTokenizer
from zoo.errors import ConfigError


class LabelProcessor(FusionProcessor):
    """One image, a question, and which of the labels it has.

    Args:
        labels: their names.
        label_key: where a sample's ``meta`` has its label; "" = the answer of its turn (training draws one, evaluation
            takes the first), or its text.
        question: what is asked of a sample without turns.
        reads: ``image`` makes no text, ``pair`` does.
    """

    def __init__(
        self,
        transform: ImageTransform,
        tokenizer: TextTokenizer,
        context_length: int,
        *,
        labels: Sequence[str],
        label_key: str = "",
        question: str = "",
        reads: str = "pair",
        seed: int = 0,
    ) -> None:
        super().__init__(transform, tokenizer, context_length, seed=seed)
        self.place = {name: place for place, name in enumerate(labels)}
        self.label_key, self.question, self.reads = label_key, question, reads

    def __call__(
        self,
        samples: Sequence[Sample],
        train: bool = False,
        draws: Sequence[int] | None = None,
        pixels: NDArray[np.uint8] | None = None,
    ) -> dict[str, Tensor]:
        """Return ``pixel_values [B, 3, S, S]``, ``label_targets [B, C]`` float, 1 at the label, all 0 where the sample
        has none, and unless only images are read ``input_ids`` and ``attention_mask`` of the questions.

        Raises:
            ConfigError: no labels, or a model that reads two images, which a sample does not have.
        """
        if not self.place:
            raise ConfigError("a sample's label needs the labels' names: set wiring.labels=[...]")
        if self.reads == "images":
            raise ConfigError("samples hold one image, and this model reads two: call classify or label_logits")
        draws = draws if draws is not None else [0] * len(samples)
        asked = [self._asked(s, train, d) for s, d in zip(samples, draws, strict=True)]
        targets = torch.zeros(len(samples), len(self.place))
        for row, (_, label) in enumerate(asked):
            if label in self.place:
                targets[row, self.place[label]] = 1.0
        batch = {"pixel_values": self._pixel_values(samples, train, draws, pixels), "label_targets": targets}
        if self.reads == "pair":
            batch |= self.encode_texts([question for question, _ in asked])
        return batch

    def _asked(self, sample: Sample, train: bool, draw: int) -> tuple[str, str]:
        turns: Any = sample.meta.get("turns")
        question, answer = self.question, sample.texts[0] if sample.texts else ""
        if turns:
            place = uniforms(1, "turn", self.seed, sample.id, draw)[0] if train else 0.0
            question, answer = (str(t) for t in turns[int(place * len(turns))])
        if self.label_key:
            answer = str(sample.meta.get(self.label_key, ""))
        return question.replace("<image>", "").strip(), answer
