"""The processors of models that write an image behind a condition: a caption, or a class."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zoo.data.images import ImageTransform
from zoo.data.processor import PairProcessor
from zoo.data.sample import Sample
from zoo.data.text import TextTokenizer
from zoo.errors import ConfigError, DataError, near
from zoo.tokenizers.processor import ImageProcessor
from zoo.tokenizers.stored import StoredCodes

OTHER = "*"
"""The label of what no other label names."""


class CaptionedProcessor(PairProcessor):
    """An image and the caption it is drawn from.

    Args:
        context_length: Ids a caption has at most.
        bos: Captions start with the tokenizer's BOS, which T5's do not.
        codes: Stored codes of the images, where the image tokenizer has such.
    """

    def __init__(
        self,
        transform: ImageTransform,
        tokenizer: TextTokenizer,
        context_length: int,
        *,
        bos: bool = True,
        codes: StoredCodes | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(transform, tokenizer, context_length, seed=seed)
        self.bos, self.codes = bos, codes

    def __call__(
        self,
        samples: Sequence[Sample],
        train: bool = False,
        draws: Sequence[int] | None = None,
        pixels: NDArray[np.uint8] | None = None,
    ) -> dict[str, Tensor]:
        """Return ``pixel_values`` [B, 3, S, S], what ``encode_texts`` returns of one caption each, and ``valid`` [B]
        bool, False where a sample has no image: nothing is then learned from it. Stored ``image_codes`` [B, h*w] come
        with them where there are such."""
        draws = draws if draws is not None else [0] * len(samples)
        texts = [self._text(s, train, d) for s, d in zip(samples, draws, strict=True)]
        there = [pixels is not None or s.image is not None for s in samples]
        batch = {
            "pixel_values": self._pixel_values(samples, train, draws, pixels),
            **self.encode_texts(texts),
            "valid": torch.tensor(there),
        }
        if self.codes is not None:
            batch["image_codes"] = self.codes.lookup([s.id for s in samples])
        return batch

    def encode_texts(self, texts: Sequence[str], *, whole: bool = False) -> dict[str, Tensor]:
        """Return ``input_ids`` [B, L] int64, a text and its EOS, pads behind; ``attention_mask`` [B, L] bool. L is the
        longest of these texts: pads are read by nobody, and their number changes nothing.

        Args:
            whole: Refuse a text that would be cut.

        Raises:
            ConfigError: A text that does not fit.
        """
        rows: list[list[int]] = [self._cached(text) for text in texts]
        longest = max(map(len, rows), default=1)
        if whole and longest > self.context_length:
            place = next(i for i, row in enumerate(rows) if len(row) > self.context_length)
            raise ConfigError(
                f"the text {texts[place][:40]!r}... has {len(rows[place])} tokens, the model is conditioned on"
                f" {self.context_length} at most: shorten it"
            )
        width = min(longest, self.context_length)
        ids = torch.full((len(rows), width), self.tokenizer.pad_id)
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        for i, row in enumerate(rows):
            kept = row if len(row) <= width else [*row[: width - 1], self.tokenizer.eos_id]
            ids[i, : len(kept)] = torch.tensor(kept)
            mask[i, : len(kept)] = True
        return {"input_ids": ids, "attention_mask": mask}

    def _encode_one(self, *key: Any) -> list[int]:
        (text,) = key
        start = [self.tokenizer.bos_id] if self.bos else []
        return [*start, *self.tokenizer.encode([str(text)])[0], self.tokenizer.eos_id]


class ClassProcessor(ImageProcessor):
    """An image and its class.

    The class of a sample is ``meta[label_key]``, a label or a number; else what ``class_of`` finds in its first text.

    Args:
        classes: How many there are.
        labels: Their names, or none: classes are then numbers.
        codes: Stored codes of the images, where the image tokenizer has such.
    """

    def __init__(
        self,
        transform: ImageTransform,
        classes: int,
        labels: Sequence[str],
        label_key: str = "label",
        *,
        codes: StoredCodes | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(transform, seed)
        self.classes, self.label_key, self.codes = classes, label_key, codes
        self.place = {_plain(name): number for number, name in enumerate(labels)}

    def __call__(
        self,
        samples: Sequence[Sample],
        train: bool = False,
        draws: Sequence[int] | None = None,
        pixels: NDArray[np.uint8] | None = None,
    ) -> dict[str, Tensor]:
        """Return ``pixel_values`` [B, 3, S, S] and ``classes`` [B] int64, and stored ``image_codes`` [B, h*w] where
        there are such.

        Raises:
            DataError: A sample without an image or without a class.
        """
        batch = super().__call__(samples, train, draws, pixels)
        batch["classes"] = torch.tensor([self._class(sample) for sample in samples])
        if self.codes is not None:
            batch["image_codes"] = self.codes.lookup([s.id for s in samples])
        return batch

    def _class(self, sample: Sample) -> int:
        given = sample.meta.get(self.label_key)
        if given is None:
            given = sample.texts[0] if sample.texts else ""
        try:
            return self.class_of(str(given))
        except ConfigError as error:
            raise DataError(f"sample {sample.id!r}: {error}") from None

    def class_of(self, text: str) -> int:
        """The number of the class a text names: a label itself, a number below ``classes``, the first of the labels
        whose words stand in the text, or ``*`` where that is a label.

        Raises:
            ConfigError: It names none.
        """
        plain = _plain(text)
        if plain in self.place and plain != OTHER:
            return self.place[plain]
        if plain.isdecimal() and int(plain) < self.classes:
            return int(plain)
        words = f" {plain} "
        for name, number in self.place.items():
            if name and f" {name} " in words:
                return number
        if OTHER in self.place:
            return self.place[OTHER]
        known = f"one of {', '.join(list(self.place)[:8])}, ..." if self.place else "wiring.labels names none"
        raise ConfigError(
            f"{text[:40]!r} names no class: expected a number below {self.classes} or a label"
            f" ({known}){near(plain, self.place)}"
        )


def _plain(text: str) -> str:
    return text if text == OTHER else " ".join(re.findall(r"\w+", text.lower()))
