"""The processor of models that answer questions: an image, a question, and its answer as a text of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zoo.data.captions import CaptionProcessor
from zoo.data.images import ImageTransform
from zoo.data.sample import Sample
from zoo.data.text import TextTokenizer


class QuestionProcessor(CaptionProcessor):
    """One image, one question, one answer.

    A sample's ``turns`` are its questions and answers, of which training draws one and evaluation takes the first; a
    sample without any is asked ``question``, and its text is the answer.

    Args:
        context_length: answers are cut to this many ids.
        question_length: and questions to this many.
        question: what is asked of a sample without turns.
        end: close questions with EOS.
    """

    def __init__(
        self,
        transform: ImageTransform,
        tokenizer: TextTokenizer,
        context_length: int,
        *,
        question_length: int,
        question: str,
        end: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(transform, tokenizer, context_length, seed=seed)
        self.question_length = question_length
        self.question = question
        self.end = end

    def __call__(
        self,
        samples: Sequence[Sample],
        train: bool = False,
        draws: Sequence[int] | None = None,
        pixels: NDArray[np.uint8] | None = None,
    ) -> dict[str, Tensor]:
        """Return ``pixel_values [B, 3, S, S]``, ``encode_questions``, and ``encode_texts`` of the answers."""
        draws = draws if draws is not None else [0] * len(samples)
        asked = [self._turn(s, train, d) for s, d in zip(samples, draws, strict=True)]
        return {
            "pixel_values": self._pixel_values(samples, train, draws, pixels),
            **self.encode_questions([question for question, _ in asked]),
            **self.encode_texts([answer for _, answer in asked]),
        }

    def _turn(self, sample: Sample, train: bool, draw: int) -> tuple[str, str]:
        turns: Any = sample.meta.get("turns")
        if not turns:
            return self.question, self._text(sample, train, draw)
        from zoo.data.images import uniforms

        place = uniforms(1, "turn", self.seed, sample.id, draw)[0] if train else 0.0
        question, answer = turns[int(place * len(turns))]
        return str(question).replace("<image>", "").strip(), str(answer)

    def encode_questions(self, questions: Sequence[str]) -> dict[str, Tensor]:
        """Return ``question_ids`` [B, Q] int64 (BOS, question, EOS, pads up to the longest) and ``question_mask``
        [B, Q] bool."""
        end = [self.tokenizer.eos_id] if self.end else []
        room = self.question_length - 1 - len(end)
        rows = [[self.tokenizer.bos_id, *self._words(q)[:room], *end] for q in questions]
        width = max(map(len, rows), default=0)
        ids = torch.tensor([[*row, *[self.tokenizer.pad_id] * (width - len(row))] for row in rows])
        mask = torch.arange(width) < torch.tensor([len(row) for row in rows]).view(-1, 1)
        return {"question_ids": ids, "question_mask": mask}
