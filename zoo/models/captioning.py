"""Writing and scoring captions with a text decoder in two halves, of which only the upper one reads the image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from zoo.decoders.base import Decoder
from zoo.encoders.causal_text import CausalText
from zoo.errors import ConfigError
from zoo.layout import Segment, TokenBatch, lay_out
from zoo.models.writing import CANDIDATES, WritesText, _chunks, _same_length
from zoo.nn import KVCache
from zoo.part import Features
from zoo.sampling.text import Decoding, write

if TYPE_CHECKING:
    from zoo.capabilities import ImageLike

IMAGES = 8
"""Images whose candidates are read together."""


class Caches(NamedTuple):
    """Keys and values of both halves."""

    lower: KVCache
    upper: Any


class Halves(Decoder):
    """Both halves as one decoder, for writing: token ids in, hidden states of the upper half out.

    It holds the model's own parts and is no part itself.
    """

    def __init__(self, text_encoder: CausalText, decoder: Decoder) -> None:
        super().__init__()
        self.lower, self.upper = text_encoder, decoder
        self.width, self.vocab_size = decoder.width, decoder.vocab_size
        self.context_width, self.context_length = decoder.context_width, text_encoder.context_length

    def embed(self, ids: Tensor) -> Tensor:
        return self.lower.embed(ids)

    def forward(
        self, batch: TokenBatch, cache: Any = None, *, context: Tensor | None = None, context_mask: Tensor | None = None
    ) -> Tensor:
        states = self.lower.states(batch.embeds, batch.layout, cache and cache.lower)
        hidden: Tensor = self.upper(
            TokenBatch(states, batch.layout), cache and cache.upper, context=context, context_mask=context_mask
        )
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        return self.upper.logits(hidden)

    def new_cache(self) -> Caches:
        return Caches(KVCache(), self.upper.new_cache())

    def select_cache(self, cache: Any, index: Tensor) -> Caches:
        cache.lower.reorder(index)
        return Caches(cache.lower, self.upper.select_cache(cache.upper, index))


class WritesCaptions(WritesText):
    """``generate_text``, ``score_text`` and ``score_candidates`` of a ``Captioner``."""

    text_encoder: CausalText

    if TYPE_CHECKING:

        def read_image(self, pixel_values: Tensor) -> Features: ...
        def read_on(self, states: Tensor, image_tokens: Tensor, context_mask: Tensor | None = None) -> Tensor: ...
        def _states(self, ids: Tensor) -> Tensor: ...

    @torch.inference_mode()
    def generate_ids(  # type: ignore[override]  # it reads no instruction and shows no column
        self,
        pixel_values: Tensor | None,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoding: Decoding | None = None,
        *,
        stop_ids: Sequence[int] | None = None,
        pad_id: int | None = None,
        generators: Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """New token ids [B, n] behind prompts [B, T] that begin with BOS, pads in front; see ``write``.

        By default a row stops at EOS and is filled up with the tokenizer's pad id. The model should be in eval mode.

        Args:
            pixel_values: [B, 3, H, W], one image a row.

        Raises:
            ConfigError: No images.
        """
        if pixel_values is None:
            raise ConfigError("this model writes about images: give pixel_values, one image a row")
        halves = Halves(self.text_encoder, self.decoder)
        image = self.read_image(pixel_values)
        real = None if attention_mask is None else attention_mask.bool()
        if real is not None and bool(real.all()):
            real = None
        segment = Segment("text", input_ids.shape[1], predicted=True)
        layout = (
            lay_out([segment], len(input_ids), device=input_ids.device)
            if real is None
            else lay_out([segment], real=real, position="real")
        )
        return write(
            halves,
            halves.embed(input_ids),
            layout,
            decoding or Decoding(),
            stop_ids=sorted(self.processor.stop_ids) if stop_ids is None else stop_ids,
            pad_id=self.tokenizer.pad_id if pad_id is None else pad_id,
            generators=generators,
            context=image.tokens,
            context_mask=image.mask,
            prompt_ids=input_ids,
        )

    def score_text(
        self, images: Sequence[ImageLike], texts: Sequence[str], prompts: Sequence[str] | None = None
    ) -> Tensor:
        """log p(text | image, prompt) [N] in nats, over the text's tokens and its end; float32 on the model's
        device."""
        _same_length(images, texts, "texts")
        _same_length(images, prompts, "prompts")
        scores = [torch.empty(0, device=self.device)]
        with self._evaluating():
            for part in _chunks(len(images)):
                ids, targets = self._texts(texts[part], None if prompts is None else prompts[part])
                image = self.read_image(self._pixels(images[part]))
                scores.append(self._nats(self.read_on(self._states(ids), image.tokens, image.mask), targets))
        return torch.cat(scores)

    def score_candidates(
        self,
        images: Sequence[ImageLike],
        candidates: Sequence[Sequence[str]],
        prompts: Sequence[str] | None = None,
    ) -> Tensor:
        """log p(candidate | image, prompt) [N, C] in nats, equal to ``score_text`` of every pair.

        The lower half reads each different text once, whatever images it is a candidate of; an image is read once for
        all of its candidates.
        """
        _same_length(images, candidates, "candidates")
        _same_length(images, prompts, "prompts")
        counts = {len(c) for c in candidates}
        if len(counts) > 1:
            raise ConfigError(f"every image needs the same number of candidates, got {min(counts)} to {max(counts)}")
        scores = [torch.empty(0, max(counts, default=0), device=self.device)]
        with self._evaluating():
            for start in range(0, len(images), IMAGES):
                part = slice(start, start + IMAGES)
                prompt = [self.processor.prompt] * len(images[part]) if prompts is None else prompts[part]
                wanted = [[(p, c) for c in own] for p, own in zip(prompt, candidates[part], strict=True)]
                row_of = {pair: n for n, pair in enumerate(dict.fromkeys(pair for own in wanted for pair in own))}
                if not row_of:
                    scores.append(scores[0].new_empty(len(wanted), 0))
                    continue
                ids, targets = self._texts([c for _, c in row_of], [p for p, _ in row_of])
                read = [self._states(ids[at : at + CANDIDATES]) for at in range(0, len(ids), CANDIDATES)]
                states = torch.cat(read)  # [U, t, width]
                image = self.read_image(self._pixels(images[part]))
                for n, own in enumerate(wanted):
                    rows = torch.tensor([row_of[pair] for pair in own], device=self.device)
                    mask = None if image.mask is None else image.mask[n : n + 1]
                    scores.append(self._rank_texts(states[rows], targets[rows], image.tokens[n : n + 1], mask)[None])
        return torch.cat(scores)

    def _rank_texts(self, states: Tensor, targets: Tensor, image: Tensor, mask: Tensor | None) -> Tensor:
        """Scores [C] of texts with states [C, t, width] for one image [1, n, width], whose keys and values are computed
        with the start of the text, which all share."""
        whole = lay_out([Segment("text", states.shape[1])], device=states.device)
        cache = self.decoder.new_cache()
        first = self.decoder(
            TokenBatch(states[:1, :1], whole.truncate(1)), cache, context=image, context_mask=mask
        )  # [1, 1, width]
        cache = self.decoder.select_cache(cache, torch.zeros(len(states), dtype=torch.long, device=states.device))
        hidden = first.expand(len(states), -1, -1)
        if states.shape[1] > 1:
            hidden = torch.cat([hidden, self.decoder(TokenBatch(states[:, 1:], whole), cache)], 1)
        return self._nats(hidden, targets)

    def _texts(self, texts: Sequence[str], prompts: Sequence[str] | None) -> tuple[Tensor, Tensor]:
        """Ids [B, t] that are read and the targets [B, t] they predict, cut to the longest text."""
        rows = self.processor.encode_texts(texts, prompts)
        longest = int(rows["attention_mask"].sum(1).max())
        ids, labels = rows["input_ids"][:, : longest - 1], rows["labels"][:, 1:longest]
        return ids.to(self.device), labels.to(self.device)
