"""The processor of models that compare images and texts and caption them, in one pass over the same ids."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zoo.data.images import ImageTransform
from zoo.data.processor import PairProcessor
from zoo.data.templates import IGNORE
from zoo.data.text import TextTokenizer
from zoo.errors import ConfigError, DataError


class CaptionProcessor(PairProcessor):
    """Pairs whose texts are targets too: every id but the start and the prompt is one.

    Args:
        prompt: Text before a caption where a call gives none; it is read and not trained.
    """

    def __init__(
        self,
        transform: ImageTransform,
        tokenizer: TextTokenizer,
        context_length: int,
        truncate: bool = True,
        prompt: str = "",
        seed: int = 0,
    ) -> None:
        super().__init__(transform, tokenizer, context_length, truncate, seed)
        self.prompt = prompt

    def encode_texts(self, texts: Sequence[str], prompts: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Return what ``PairProcessor`` does (BOS, prompt, text, EOS, pads), and what captioning needs.

        Args:
            prompts: One a text; the processor's own by default.

        Returns:
            ``input_ids`` [B, L] int64, ``attention_mask`` [B, L] bool, ``labels`` [B, L] int64 (in the places of the
            tokens, -100 on BOS, prompt and pads), and ``text_bytes`` [B], the UTF-8 bytes of the texts.

        Raises:
            DataError: A text is too long and ``truncate`` is False.
        """
        questions = prompts if prompts is not None else [self.prompt] * len(texts)
        starts = [self._start(question) for question in questions]
        # after a prompt a text starts with a blank, as it would within one text
        rows = [
            self._cut([*start, *self._words(" " + text if question else text), self.tokenizer.eos_id], text)
            for start, question, text in zip(starts, questions, texts, strict=True)
        ]
        place = torch.arange(self.context_length)
        ids = torch.full((len(rows), self.context_length), self.tokenizer.pad_id)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        mask = place < torch.tensor([len(row) for row in rows]).view(-1, 1)
        behind = place >= torch.tensor([len(start) for start in starts]).view(-1, 1)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": ids.masked_fill(~(mask & behind), IGNORE),
            "text_bytes": torch.tensor([len(text.encode()) for text in texts]),
        }

    def encode_prompts(
        self, prompts: Sequence[str] | None, count: int, images: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """Return ``input_ids`` [B, T] and ``attention_mask`` [B, T] of ``count`` rows that end where captions begin;
        pads stand in front.

        Args:
            images: How many images a row shows; there must be one.

        Raises:
            ConfigError: Several images, or none, for one caption.
        """
        wrong = next((n for n in images or () if n != 1), None)
        if wrong is not None:
            raise ConfigError(f"a caption is written about one image, and {wrong} were given for one row")
        rows = [self._start(question) for question in prompts] if prompts is not None else []
        rows = rows or [self._start(self.prompt)] * count
        width = max(map(len, rows))
        ids = torch.tensor([[self.tokenizer.pad_id] * (width - len(row)) + row for row in rows])
        mask = torch.arange(width) >= torch.tensor([width - len(row) for row in rows])[:, None]
        return {"input_ids": ids, "attention_mask": mask}

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end a caption."""
        return frozenset({self.tokenizer.eos_id})

    def decode(self, ids: Sequence[int]) -> str:
        """Return a written caption as text: up to the first stop, without special tokens and outer blanks."""
        kept = list(ids)
        end = next((i for i, token in enumerate(kept) if token == self.tokenizer.eos_id), len(kept))
        return self.tokenizer.decode(kept[:end]).strip()

    def _cut(self, row: list[int], text: str) -> list[int]:
        if len(row) <= self.context_length:
            return row
        if not self.truncate:
            raise DataError(
                f"the text {text[:40]!r}... has {len(row)} tokens, more than context_length={self.context_length}; "
                "shorten it or set truncate"
            )
        return [*row[: self.context_length - 1], self.tokenizer.eos_id]

    def _start(self, prompt: str) -> list[int]:
        return [self.tokenizer.bos_id, *(self._words(prompt) if prompt else [])]

    def _words(self, text: str) -> list[int]:
        words: list[int] = self._cached(text)
        return words

    def _encode_one(self, *key: object) -> list[int]:
        (text,) = key
        return self.tokenizer.encode([str(text)])[0]
