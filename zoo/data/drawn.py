"""Rows for a language model that draws: dialogues whose answers hold images, written as tokens of its vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zoo.data.images import ImageTransform, uniforms
from zoo.data.processor import PromptProcessor, images_of
from zoo.data.sample import Sample, parts_of
from zoo.data.templates import DRAWN, IGNORE, IMAGE, Turn
from zoo.data.text import TextTokenizer
from zoo.data.unified_processor import shown_images
from zoo.errors import ConfigError, DataError, near

ANSWERS = ("image", "both", "text")
"""What an answer may hold: the image of a text; a text and its image; the text of an image."""

VOKEN_TARGETS = ("official", "first", "all")
"""Which of an image's tokens are learned: the first and, as the release's range ends one early, the last; the first, as
the others follow by rule; all."""


@dataclass(frozen=True)
class Told:
    """A sample as a dialogue.

    Attributes:
        turns: Questions and answers; ``<draw>`` in an answer stands for an image.
        given: Which of the sample's images the questions show.
        drawn: Which the answers draw.
        captions: A caption of each drawn image; empty where there is none.
    """

    turns: tuple[Turn, ...]
    given: tuple[int, ...] = ()
    drawn: tuple[int, ...] = ()
    captions: tuple[str, ...] = ()


class DrawnProcessor(PromptProcessor):
    """A prompt processor whose answers draw.

    A sample with one image and a text becomes one of ``ANSWERS``: the text asks for the image, or for itself and the
    image, or the image for the text. One of several images (``zoo.data.sample.parts_of``) is a story: the scenes before
    one drawn by (seed, id, draw) are shown, and the next are answered in the same three ways; where its first parts are
    ``given`` (an edit), these ask for the rest. Dialogues and texts without an image stay what they are.

    Args:
        transform: Of the images that the language model reads.
        canvas: Of those that are drawn, as the image tokenizer reads them.
        captions: Tokenizer of the text encoder.
        caption_length: Ids of a caption, its start and end included; longer ones are cut.
        drawn: Ids that stand for an image.
        drawn_targets: One of ``VOKEN_TARGETS``.
        answers: What answers hold -> share of the samples; all alike by default.
        ask: What asks for a text and its image.
        scenes: Scenes that an answer tells at most; 0 = all that follow.
        caption_bos: Captions start with the tokenizer's BOS.
        show_drawn: Drawn images also come as the language model's eye sees them.
        others: As of ``PromptProcessor``.
    """

    def __init__(
        self,
        transform: ImageTransform,
        tokenizer: TextTokenizer,
        layout: Any,
        image_tokens: int,
        *,
        canvas: ImageTransform,
        captions: TextTokenizer,
        caption_length: int,
        drawn: Sequence[int],
        drawn_targets: str = "official",
        answers: Mapping[str, float] | None = None,
        ask: str = "",
        scenes: int = 1,
        caption_bos: bool = True,
        show_drawn: bool = False,
        **others: Any,
    ) -> None:
        super().__init__(transform, tokenizer, layout, image_tokens, **others)
        self.canvas, self.captions, self.caption_length = canvas, captions, caption_length
        self.drawn, self.answers = tuple(drawn), check_answers(answers or dict.fromkeys(ANSWERS, 1.0))
        self.ask, self.scenes, self.caption_bos, self.show_drawn = ask, scenes, caption_bos, show_drawn
        kept = {"official": (*self.drawn[:1], *self.drawn[-1:]), "first": self.drawn[:1], "all": self.drawn}
        self._unlearned = frozenset(self.drawn) - frozenset(kept[drawn_targets])

    # -- training rows ---------------------------------------------------------------------------------------------

    def __call__(
        self,
        samples: Sequence[Sample],
        train: bool = False,
        draws: Sequence[int] | None = None,
        pixels: NDArray[np.uint8] | None = None,
    ) -> dict[str, Tensor]:
        """Return ``encode_rows`` of the dialogues, ``pixel_values`` [N, 3, S, S], the images that rows show in order,
        and of the M images that are drawn, in order: ``drawn_values`` [M, 3, S', S'], ``caption_ids`` [M, L] int64 with
        ``caption_mask`` [M, L] bool, ``has_caption`` [M] bool, and ``drawn_shown`` [M, 3, S, S] with ``show_drawn``."""
        draws = draws if draws is not None else [0] * len(samples)
        told = [self._told(s, train, d, pixels is not None) for s, d in zip(samples, draws, strict=True)]
        given = [(n, k) for n, one in enumerate(told) for k in one.given]
        drawn = [(n, k) for n, one in enumerate(told) for k in one.drawn]
        numbers = draws if train else None
        rows = self.encode_rows([one.turns for one in told], [len(one.given) for one in told])
        batch = {
            "pixel_values": self._shown(self.transform, samples, numbers, pixels, given),
            **rows,
            "drawn_values": self._shown(self.canvas, samples, numbers, pixels, drawn),
            **self.encode_captions([caption for one in told for caption in one.captions]),
        }
        if self.show_drawn:
            batch["drawn_shown"] = self._shown(self.transform, samples, None, pixels, drawn)
        return batch

    def _shown(
        self,
        transform: ImageTransform,
        samples: Sequence[Sample],
        draws: Sequence[int] | None,
        pixels: NDArray[np.uint8] | None,
        shown: Sequence[tuple[int, int]],
    ) -> Tensor:
        if not shown:
            return torch.zeros(0, 3, transform.size, transform.size)
        return shown_images(transform, samples, draws, pixels, shown, self.seed)

    def _told(self, sample: Sample, train: bool, draw: int, has_pixels: bool) -> Told:
        several = bool(sample.meta.get("images"))
        count = 1 if has_pixels and not several else len(images_of(sample))
        if sample.meta.get("turns") or not count:
            return _dialogue(self._turns(sample, train, draw), count)
        kind = self._kind(sample, draw)
        if several or sample.meta.get("parts") is not None:
            return self._story(sample, kind, draw)
        text = self._text(sample, train, draw)
        if kind == "text":
            return Told(((self.default_question, text),), given=(0,))
        question, answer = (text, DRAWN) if kind == "image" else (self.asking(text), f"{text}{DRAWN}")
        return Told(((question, answer),), drawn=(0,), captions=(text,))

    def _kind(self, sample: Sample, draw: int) -> str:
        place = uniforms(1, "answer", self.seed, sample.id, draw)[0] * sum(self.answers.values())
        for kind, share in self.answers.items():
            place -= share
            if place < 0:
                return kind
        return next(reversed(self.answers))

    def _story(self, sample: Sample, kind: str, draw: int) -> Told:
        """The scenes before one of a story, and an answer that goes on; the oldest are left out where not all fit."""
        parts = parts_of(sample)
        captions = sample.meta.get("captions") or self._said(parts)
        start = sample.meta.get("given", 0)
        if start:  # what is given asks for the rest
            return self._going_on(parts[:start], parts[start:], captions)
        scenes = _scenes(parts)
        chosen = int(uniforms(1, "scene", self.seed, sample.id, draw)[0] * len(scenes))
        most = (self.scenes or len(scenes)) if kind == "both" else 1
        found = Told(())
        for stop in range(min(len(scenes), chosen + most), chosen, -1):
            for oldest in range(chosen + 1):
                before = [part for scene in scenes[oldest:chosen] for part in scene]
                now = [part for scene in scenes[chosen:stop] for part in scene]
                found = self._answered(before, now, captions, kind)
                if self._fits(found):
                    return found
        return found  # not even a scene alone fits, which its row will say

    def _answered(
        self, before: Sequence[str | int], now: Sequence[str | int], captions: Sequence[str], kind: str
    ) -> Told:
        if kind == "both":
            return self._going_on(before, now, captions, ask=self.ask)
        images = [part for part in now if isinstance(part, int)]
        texts = [part for part in now if isinstance(part, str)]
        first, second = (texts, images) if kind == "image" else (images, texts)
        return self._going_on([*before, *first], second, captions)

    def _going_on(
        self, before: Sequence[str | int], now: Sequence[str | int], captions: Sequence[str], ask: str = ""
    ) -> Told:
        question = " ".join([*(IMAGE if isinstance(part, int) else part for part in before), *([ask] if ask else [])])
        drawn = tuple(part for part in now if isinstance(part, int))
        answer = "".join(DRAWN if isinstance(part, int) else part for part in now)
        given = tuple(part for part in before if isinstance(part, int))
        return Told(((question, answer),), given, drawn, tuple(captions[k] for k in drawn))

    def _said(self, parts: Sequence[str | int]) -> list[str]:
        """The text before each image of the parts, or none."""
        texts = ["", *(part if isinstance(part, str) else "" for part in parts)]
        return [texts[place] for place, part in enumerate(parts) if isinstance(part, int)]

    def _fits(self, told: Told) -> bool:
        try:
            self._cached(told.turns, len(told.given))
        except DataError:
            return False
        return True

    def asking(self, text: str) -> str:
        """What asks for a text and an image."""
        return f"{text} {self.ask}".strip()

    def _encode_one(self, *key: Any) -> Any:
        turns, _ = key
        ids, labels = super()._encode_one(*key)
        wanted = sum((answer or "").count(DRAWN) for _, answer in turns) * len(self.drawn)
        if sum(id in self.drawn for id in ids) != wanted:
            raise DataError(
                f"max_length={self.max_length} cuts into the {wanted} tokens of images that an answer draws: shorten"
                " the texts, or raise the decoder's context_length"
            )
        return ids, [IGNORE if id in self._unlearned else id for id in labels]

    # -- captions and prompts --------------------------------------------------------------------------------------

    def encode_captions(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """``caption_ids`` [M, L] int64: BOS, text, EOS, pads; ``caption_mask`` [M, L], ``has_caption`` [M] bool."""
        ids = torch.full((len(texts), self.caption_length), self.captions.pad_id)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for row, text in enumerate(texts):
            written = self.captions.encode([text])[0]
            start = [self.captions.bos_id] if self.caption_bos else []
            whole = [*start, *written, self.captions.eos_id]
            if len(whole) > self.caption_length:
                whole = [*whole[: self.caption_length - 1], self.captions.eos_id]
            ids[row, : len(whole)] = torch.tensor(whole)
            mask[row, : len(whole)] = True
        given = torch.tensor([bool(text) for text in texts], dtype=torch.bool)
        return {"caption_ids": ids, "caption_mask": mask, "has_caption": given}

    def encode_drawing(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Rows that ask for the image of a text and end with its tokens, padded on the left: ``input_ids`` [N, T],
        ``attention_mask`` [N, T].

        Raises:
            DataError: A text that does not fit.
        """
        rows = [[*self._cached(((text, None),), 0)[0], *self.drawn] for text in texts]
        for text, row in zip(texts, rows, strict=True):
            if self.max_length is not None and len(row) > self.max_length:
                raise DataError(
                    f"the text {text[:40]!r}... and an image have {len(row)} tokens, and the model reads"
                    f" {self.max_length}: shorten it, or raise the decoder's context_length"
                )
        padded = self._pad(rows, rows, "left")
        del padded["labels"]
        return padded

    def encode_turn(self, parts: Sequence[Any]) -> Tensor:
        """The row [1, T] of a prompt of texts and images that asks for a text and an image.

        Raises:
            DataError: It does not fit.
        """
        texts = [part if isinstance(part, str) else IMAGE for part in parts]
        question = self.asking(" ".join(texts))
        shown = sum(not isinstance(part, str) for part in parts)
        if question.count(IMAGE) != shown:
            raise DataError(f"{IMAGE!r} in a text of the prompt: give images themselves, in their places")
        return torch.tensor([self._cached(((question, None),), shown)[0]])

    def decode(self, ids: Sequence[int]) -> str:
        return super().decode([id for id in ids if id not in self.drawn])


def _dialogue(turns: tuple[Turn, ...], images: int) -> Told:
    """A dialogue that is stored: its images in the order of their marks, all shown where no answer draws."""
    if not any(DRAWN in (answer or "") for _, answer in turns):
        return Told(turns, tuple(range(images)))
    given: list[int] = []
    drawn: list[int] = []
    for question, answer in turns:
        for marks, places in ((question.count(IMAGE), given), ((answer or "").count(DRAWN), drawn)):
            at = len(given) + len(drawn)
            places += range(at, at + marks)
    if len(given) + len(drawn) != images:
        raise DataError(f"a dialogue marks {len(given)} images and draws {len(drawn)}, and there are {images}")
    return Told(turns, tuple(given), tuple(drawn), ("",) * len(drawn))


def _scenes(parts: Sequence[str | int]) -> list[list[str | int]]:
    """Parts cut behind every image; a text behind the last one belongs to it."""
    scenes: list[list[str | int]] = [[]]
    for part in parts:
        if scenes[-1] and isinstance(scenes[-1][-1], int):
            scenes.append([])
        scenes[-1].append(part)
    if len(scenes) > 1 and not any(isinstance(part, int) for part in scenes[-1]):
        scenes[-2] += scenes.pop()
    return scenes


def check_answers(answers: Mapping[str, float]) -> dict[str, float]:
    """Shares of what answers hold, checked.

    Raises:
        ConfigError: An unknown kind, a negative share, or nothing but zeros.
    """
    for kind in answers:
        if kind not in ANSWERS:
            raise ConfigError(f"answers: unknown kind {kind!r}{near(kind, ANSWERS)}")
    if any(share < 0 for share in answers.values()) or not sum(answers.values()):
        raise ConfigError(f"answers = {dict(answers)}: expected shares of 0 or more, of which one is above 0")
    return {kind: float(share) for kind, share in answers.items() if share}
