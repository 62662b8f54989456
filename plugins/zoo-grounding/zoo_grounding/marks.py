"""Tokens that stand for masks, in the text of an answer and among a tokenizer's ids."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from zoo.data.text import TextTokenizer

TARGET = "{seg}"
"""What the answers of a source write for one target; the processor writes the model's own tokens there."""

IMAGE_MARKS = ("<im_start>", "<im_end>")
"""Tokens around an image's slots (LLaVA's ``mm_use_im_start_end``)."""


def mark_names(prompts: int) -> tuple[str, ...]:
    """The tokens of one target: LISA's ``[SEG]``, or PixelLM's ``[SEG0]``, ``[SEG1]``, ..."""
    return ("[SEG]",) if prompts == 1 else tuple(f"[SEG{place}]" for place in range(prompts))


def groups_of(places: Sequence[int], prompts: int) -> list[tuple[int, ...]]:
    """The places of an answer's mask tokens, target by target; an answer that breaks a target off has no target at all
    (``PixelLM.evaluate``: a number of tokens that is no multiple of a target's gives no mask)."""
    if len(places) % prompts:
        return []
    return [tuple(places[start : start + prompts]) for start in range(0, len(places), prompts)]


class MarkedTokenizer(TextTokenizer):
    """A tokenizer for which some words are ids of their own: what an answer writes of ``marks`` becomes one id each.

    Text between marks is tokenised by itself, as an added token of transformers has it.

    Args:
        base: What reads the rest.
        marks: Word -> id, outside the vocabulary of ``base``.
    """

    def __init__(self, base: TextTokenizer, marks: Mapping[str, int]) -> None:
        super().__init__(base.config)
        self.base = base
        self.marks = dict(marks)
        self._names = {id: name for name, id in marks.items()}
        self._pattern = re.compile("|".join(re.escape(name) for name in sorted(marks, key=len, reverse=True)))
        self.vocab_size = max(base.vocab_size, *(id + 1 for id in marks.values()))
        self.pad_id, self.bos_id, self.eos_id = base.pad_id, base.bos_id, base.eos_id
        self.image_token_id, self.mask_id = base.image_token_id, base.mask_id

    def special_id(self, name: str) -> int | None:
        return self.marks[name] if name in self.marks else self.base.special_id(name)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode_with_offsets(text)[0] for text in texts]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        ids: list[int] = []
        spans: list[tuple[int, int]] = []

        def between(start: int, stop: int) -> None:
            if start < stop:
                own, offsets = self.base.encode_with_offsets(text[start:stop])
                ids.extend(own)
                spans.extend((start + a, start + b) for a, b in offsets)

        at = 0
        for found in self._pattern.finditer(text):
            between(at, found.start())
            ids.append(self.marks[found[0]])
            spans.append(found.span())
            at = found.end()
        between(at, len(text))
        return ids, spans

    def decode(self, ids: Sequence[int]) -> str:
        """The text with every mark spelled; one blank before a mark, and one behind it before a word."""
        pieces: list[str] = []
        run: list[int] = []

        def flush() -> None:
            if run:
                text = self.base.decode(run)
                pieces.append(f" {text}" if pieces and text[:1].isalnum() else text)
                run.clear()

        for id in ids:
            name = self._names.get(int(id))
            if name is None:
                run.append(int(id))
                continue
            flush()
            pieces.append(f" {name}" if pieces and not pieces[-1].endswith(" ") else name)
        flush()
        return "".join(pieces)

    def _definition(self) -> str:
        return json.dumps([self.base.fingerprint(), sorted(self.marks.items())])

    def _save(self, folder: Path) -> None:
        self.base.save(folder)
