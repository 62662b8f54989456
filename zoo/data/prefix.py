"""The processor of models whose language model has an encoder: it reads image and prefix, its decoder writes the rest.

BLIP-2 trains FlanT5 as a prefix language model (arXiv 2301.12597, section 3.2): a caption is cut in two, the encoder
reads the image and the first piece, the decoder writes the second. The released code takes pieces already cut, so where
to cut is the zoo's choice: with equal chance before any of the caption's words, also before the first, which leaves the
encoder the image alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zoo.data.images import ImageTransform, uniforms
from zoo.data.processor import PromptProcessor, Side
from zoo.data.sample import Sample
from zoo.data.templates import IGNORE, IMAGE, Template, Turn
from zoo.data.text import TextTokenizer
from zoo.errors import DataError


def cut(text: str, draw: float) -> tuple[str, str]:
    """A text in two, cut before one of its words (runs without white space); the second piece is never empty.

    Args:
        draw: In [0, 1); the interval is shared evenly by the words, the first word's share giving an empty prefix.

    Returns:
        Prefix and rest, without the white space between them.
    """
    starts = [match.start() for match in re.finditer(r"\S+", text)]
    if not starts:
        return "", text
    at = starts[int(draw * len(starts))]
    return text[:at].rstrip(), text[at:]


class PrefixProcessor(PromptProcessor):
    """Rows of an encoder and rows of a decoder: each has its own ids, and each ends in EOS.

    A caption in training is cut by (seed, id, draw) unless there is a prompt or the template has instructions; in
    evaluation it is written whole. With a prompt the encoder reads it and the decoder writes the whole text, as LAVIS
    fine-tunes. Of a dialogue one turn is drawn in training and the first taken in evaluation; the encoder reads the
    turns before it and its question.

    Args:
        split: Cut captions in training; False leaves them to the decoder whole.
        others: As ``PromptProcessor``; of the template the system text, the question and the answer are used.
            ``max_length`` bounds both rows; what is cut off is the end of the text, EOS stays.
    """

    def __init__(
        self,
        transform: ImageTransform,
        tokenizer: TextTokenizer,
        layout: Template | str,
        image_tokens: int,
        image_token_id: int | None = None,
        max_length: int | None = None,
        prompt: str = "",
        split: bool = True,
        seed: int = 0,
        **others: Any,
    ) -> None:
        super().__init__(
            transform,
            tokenizer,
            layout,
            image_tokens=image_tokens,
            image_token_id=image_token_id,
            max_length=max_length,
            prompt=prompt,
            seed=seed,
            **others,
        )
        self.split = split

    def _turns(self, sample: Sample, train: bool, draw: int) -> tuple[Turn, ...]:
        turns = super()._turns(sample, train, draw)
        if sample.meta.get("turns"):
            place = uniforms(1, "turn", self.seed, sample.id, draw)[0] if train else 0.0
            return turns[: int(place * len(turns)) + 1]
        if train and self.split and not self.default_question:
            return (cut(str(turns[0][1]), uniforms(1, "cut", self.seed, sample.id, draw)[0]),)
        return turns

    def _read(self, turns: Sequence[Turn]) -> str:
        """What the encoder reads of a dialogue: the turns before the last, and its question."""
        *before, (question, _) = turns
        said = [part for q, a in before for part in (q, a or "")]
        said.append(self.layout.question.replace("{question}", question) if question else "")
        system = self.layout.system if self.preamble else ""
        text = " ".join(part for part in (system.strip(), *said) if part)
        return " ".join(text.replace(IMAGE, " ").split()) if IMAGE in text else text

    def _encode_one(self, *key: Any) -> Any:
        """Ids of the encoder's row and of the decoder's; the last turn's answer is what is written."""
        turns, images = key
        answer, eos = turns[-1][1], self.tokenizer.eos_id
        if any(a is None for _, a in turns[:-1]):
            raise DataError("only the last turn of a dialogue may lack its answer")
        placed = sum(question.count(IMAGE) for question, _ in turns)
        if placed not in (0, images):
            raise DataError(f"the questions place {placed} images with {IMAGE} and the row shows {images}")
        slots = [self.image_token_id] * (self.image_tokens * images)
        words = self._words(self._read(turns))[-self.layout.question_tokens :]
        limit = self.max_length if self.max_length is not None else len(slots) + len(words) + 1
        if len(slots) >= limit:
            raise DataError(
                f"{images} images take {len(slots)} slots of max_length={limit}, which leaves no room for text: raise"
                " decoder.context_length, or show fewer images"
            )
        if answer is None and len(slots) + len(words) >= limit:
            raise DataError(
                f"the prompt has {len(slots) + len(words) + 1} tokens, image tokens and the end included, and the model"
                f" reads {limit}: shorten the prompt, or raise decoder.context_length"
            )
        ids = [*slots, *words[: limit - len(slots) - 1], eos]
        if answer is None:
            return ids, []
        written = self._words(self.layout.answer.replace("{answer}", answer).strip())
        most = min(self.layout.answer_tokens or len(written) + 1, self.max_length or len(written) + 1)
        return ids, [*written[: most - 1], eos]

    def _words(self, text: str) -> list[int]:
        return self.tokenizer.encode([text])[0] if text else []

    def _instructions(self, dialogues: Sequence[Sequence[Turn]]) -> dict[str, Tensor]:
        """The connector reads what the language model's encoder reads, as LAVIS gives both one prompt."""
        return super()._instructions([((self._read(dialogue), None),) for dialogue in dialogues])

    def _pad(self, ids: list[list[int]], labels: list[list[int]], side: Side) -> dict[str, Tensor]:
        """Both rows with their pads behind, whatever the side: a T5 counts distances by place."""
        read, written = max(map(len, ids), default=0), max(map(len, labels), default=0)
        pad = self.tokenizer.pad_id
        return {
            "input_ids": torch.tensor([[*row, *[pad] * (read - len(row))] for row in ids], dtype=torch.long),
            "attention_mask": torch.arange(read) < torch.tensor([len(row) for row in ids]).view(-1, 1),
            "labels": torch.tensor([[*row, *[IGNORE] * (written - len(row))] for row in labels], dtype=torch.long),
        }

    def encode_rows(
        self, dialogues: Sequence[Sequence[Turn]], images: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """As ``PromptProcessor.encode_rows``, but the encoder's row and the decoder's differ.

        Returns:
            ``input_ids`` [B, T] int64 and ``attention_mask`` [B, T] bool of the encoder (image slots, prefix or
            question, EOS, pads), ``labels`` [B, L] int64 (the text to write, EOS, then -100), ``text_bytes`` [B], the
            UTF-8 bytes of what is written, and instructions where a connector reads them.
        """
        rows = super().encode_rows(dialogues, images)
        written = [(dialogue[-1][1] or "") for dialogue in dialogues]
        rows["text_bytes"] = torch.tensor([len(text.encode()) for text in written])
        return rows

    def encode_texts(
        self,
        texts: Sequence[str],
        prompts: Sequence[str | Sequence[Turn]] | None = None,
        images: Sequence[int] | None = None,
    ) -> dict[str, Tensor]:
        """Return ``encode_rows`` of one answer each, whole.

        Args:
            prompts: questions, or dialogues whose last turn lacks its answer.
        """
        asked = [self._dialogue(p) for p in prompts] if prompts is not None else [self._dialogue(None)] * len(texts)
        return self.encode_rows([(*d[:-1], (d[-1][0], t)) for d, t in zip(asked, texts, strict=True)], images)
