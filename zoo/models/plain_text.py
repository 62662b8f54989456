"""The likelihood of text alone, for models whose decoder reads text without an image."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoo.decoders.base import Decoder
from zoo.errors import ConfigError, DataError
from zoo.layout import Layout, TokenBatch
from zoo.layout_facts import Padding
from zoo.models.writing import IGNORE, _chunks

if TYPE_CHECKING:
    from zoo.data.text import TextTokenizer


class ScoresPlainText:
    """The capability ``score_plain_text``: rows of BOS, text, EOS, without an image, a prompt or a template.

    The model offers ``_splice``, ``_layout`` and ``_nats`` (see ``WritesText``).
    """

    decoder: Decoder

    if TYPE_CHECKING:

        @property
        def tokenizer(self) -> TextTokenizer: ...
        @property
        def device(self) -> torch.device: ...
        def _evaluating(self) -> AbstractContextManager[None]: ...
        def _splice(self, ids: Tensor, pixel_values: Tensor | None) -> Tensor: ...
        def _layout(self, ids: Tensor, attention_mask: Tensor | None, padding: Padding | None = None) -> Layout: ...
        def _nats(self, hidden: Tensor, targets: Tensor) -> Tensor: ...

    def score_plain_text(self, texts: Sequence[str]) -> Tensor:
        """log p(text) [N] in nats, over the text's tokens and its end; float32 on the model's device.

        Raises:
            ConfigError: One string in place of a list.
            DataError: A text is longer than the decoder reads; nothing was computed by then.
        """
        if isinstance(texts, str):
            raise ConfigError("expected a list of texts, got one string: wrap it in a list")
        words = self.tokenizer
        rows = [[words.bos_id, *ids, words.eos_id] for ids in words.encode(list(texts))]
        most = getattr(self.decoder, "context_length", 0)
        for text, row in zip(texts, rows, strict=True):
            if most and len(row) > most:
                raise DataError(
                    f"the text {text[:40]!r}... has {len(row)} tokens with its start and end, and the decoder reads"
                    f" {most}: shorten it, or raise decoder.context_length"
                )
        scores = [torch.empty(0, device=self.device)]
        with self._evaluating():
            for part in _chunks(len(rows)):
                scores.append(self._score_rows(rows[part]))
        return torch.cat(scores)

    def _score_rows(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Scores [B] of rows of ids."""
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.full((len(rows), int(lengths.max())), self.tokenizer.pad_id)
        for n, row in enumerate(rows):
            ids[n, : len(row)] = torch.tensor(row)
        real = torch.arange(ids.shape[1]) < lengths[:, None]  # [B, T]
        ids, real = ids.to(self.device), real.to(self.device)
        layout = self._layout(ids, real, "right")
        hidden: Any = self.decoder(TokenBatch(self._splice(ids, None), layout))  # [B, T, D]
        return self._nats(hidden[:, :-1], ids.masked_fill(~real, IGNORE)[:, 1:])
