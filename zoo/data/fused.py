"""The processor of models that fuse a text with an image: as long as the batch's longest text, with ids of images."""

from __future__ import annotations

import hashlib
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


class FusionProcessor(PairProcessor):
    """One image, one text.

    Args:
        context_length: texts are cut to this many ids.
        end: close a text with the tokenizer's EOS ([SEP]); ALBEF does not.
        image_ids: say which image a pair is of, for objectives that know two captions of one image as such.
    """

    def __init__(
        self,
        transform: ImageTransform,
        tokenizer: TextTokenizer,
        context_length: int,
        *,
        end: bool = True,
        image_ids: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(transform, tokenizer, context_length, seed=seed)
        self.end = end
        self.image_ids = image_ids

    def __call__(
        self,
        samples: Sequence[Sample],
        train: bool = False,
        draws: Sequence[int] | None = None,
        pixels: NDArray[np.uint8] | None = None,
    ) -> dict[str, Tensor]:
        """Return what ``PairProcessor`` does and, if asked for, ``image_ids`` [B] int64, a hash of the sample's id."""
        batch = super().__call__(samples, train, draws, pixels)
        if self.image_ids:
            digests = [hashlib.sha256(s.id.encode()).digest()[:8] for s in samples]
            batch["image_ids"] = torch.tensor([int.from_bytes(d, "big") >> 1 for d in digests])
        return batch

    def encode_texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Return ``input_ids`` [B, L] int64: BOS, text, EOS if wanted, pads up to the longest of these texts; and
        ``attention_mask`` [B, L] bool, False on pads."""
        rows = [self._cached(text) for text in texts]
        length = max(map(len, rows), default=0)
        ids = torch.full((len(rows), length), self.tokenizer.pad_id)
        mask = torch.zeros(len(rows), length, dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = True
        return {"input_ids": ids, "attention_mask": mask}

    def _encode_one(self, *key: Any) -> Any:
        (text,) = key
        row = [self.tokenizer.bos_id, *self.tokenizer.encode([text])[0]]
        if self.end:
            return [*row[: self.context_length - 1], self.tokenizer.eos_id]
        return row[: self.context_length]
