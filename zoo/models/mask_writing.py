"""Writing captions with a model that predicts [MASK]: put one behind what is written, predict it, replace it, repeat
(BEiT-3, arXiv 2208.10442, section 3.1; unilm, beit3/engine_for_finetuning.py)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.decoders.base import Decoder
from zoo.errors import ConfigError
from zoo.layout import ALL, NEVER, PAST, Layout, TokenBatch
from zoo.models.base import evaluating
from zoo.models.experts import WordHead
from zoo.models.pairs import EmbedsPairs
from zoo.nn import KVCache
from zoo.sampling.mask_beam import search_as_released
from zoo.sampling.text import Decoding, streams, until_stop, write
from zoo.trunks.multiway import IMAGE_IN_PAIR, TEXT_IN_PAIR, Multiway

if TYPE_CHECKING:
    from zoo.capabilities import ImageLike

CHUNK = 64
"""Images a forward pass."""

CANDIDATES = 256
"""Candidates of one image a forward pass."""


class MaskDecoder(Decoder):
    """A multiway trunk as a decoder: behind every prefix it reads one [MASK], whose row predicts the next word.

    The cache holds what is written and never a [MASK]: its keys and values are dropped again after each pass. It holds
    the model's own modules and is no part itself.
    """

    def __init__(self, trunk: Multiway, words: nn.Module, mask_id: int) -> None:
        super().__init__()
        if trunk.text.norm is not None or trunk.text.positions is None:
            raise ConfigError(
                "captions are written with learned positions and no norm on embedded text: choose a BEiT-3 trunk"
            )
        self.trunk, self.words, self.mask_id = trunk, words, mask_id
        self.width, self.vocab_size = trunk.width, trunk.vocab_size
        self.context_length = trunk.tokens + trunk.config.context_length - 1  # the last place is [MASK]'s

    def embed(self, ids: Tensor) -> Tensor:
        rows: Tensor = self.trunk.text.tokens(ids)
        return rows

    def placed(self, embeds: Tensor, position: Tensor) -> Tensor:
        """Add the positions [B | 1, T] of text to embeddings [B, T, D]; rows of an image have -1 and stay."""
        table = cast(nn.Embedding, self.trunk.text.positions)
        rows = table(position.clamp(min=0) + self.trunk.text.first)
        kinds = self.trunk.kinds
        if kinds is not None:
            rows = rows + kinds.weight[0]
        placed: Tensor = embeds + rows * (position >= 0)[..., None]
        return placed

    def forward(self, batch: TokenBatch, cache: Any = None) -> Tensor:
        """Hidden states [B, T, D], the last one at a [MASK] behind the rows."""
        layout, count = batch.layout, batch.embeds.shape[1]
        longer = layout.append(layout.names[-1])
        mask = self.embed(torch.full((batch.embeds.shape[0], 1), self.mask_id, device=batch.embeds.device))
        rows = torch.cat([batch.embeds, mask.to(batch.embeds.dtype)], 1)
        rows = self.placed(rows, longer.position[:, longer.length - count - 1 :])
        hidden = cast(Tensor, self.trunk.trunk(rows, longer, cache=cache))
        if cache is not None:
            cache.truncate(layout.length)
        return hidden[:, 1:]

    def logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.words(hidden)
        return logits

    def new_cache(self) -> KVCache:
        return KVCache()

    def select_cache(self, cache: Any, index: Tensor) -> KVCache:
        cache.reorder(index)
        kept: KVCache = cache
        return kept


class WritesByMask(EmbedsPairs):
    """``generate_text``, ``score_text`` and ``score_candidates`` of a model with a multiway ``trunk`` and ``words``."""

    trunk: Multiway
    words: WordHead | None

    def _evaluating(self) -> AbstractContextManager[None]:
        return evaluating(self)

    def mask_decoder(self) -> MaskDecoder:
        """The trunk as a decoder of captions.

        Raises:
            ConfigError: No head over words, or a trunk it cannot be.
        """
        if self.words is None:
            raise ConfigError("this model has no head over words: set wiring.words=linear")
        return MaskDecoder(self.trunk, self.words, self.special_ids["mask"])

    @torch.inference_mode()
    def generate_ids(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        decoding: Decoding | None = None,
        *,
        generators: Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """New ids [B, n] behind prompts [B, T] that begin with BOS, all of one length; a row stops at EOS and is filled
        up with pads. The model should be in eval mode."""
        decoder = self.mask_decoder()
        image = self.trunk.embed_image(pixel_values)  # [B, N, D]
        embeds = torch.cat([image, decoder.embed(input_ids)], 1)
        layout = self._caption_layout(input_ids.shape[1], input_ids.device)
        special = self.special_ids
        return write(
            decoder,
            embeds,
            layout,
            decoding or Decoding(),
            stop_ids=[special["eos"]],
            pad_id=special["pad"],
            generators=generators,
            prompt_ids=F.pad(input_ids, (image.shape[1], 0), value=special["pad"]),
        )

    @torch.inference_mode()
    def captions_as_released(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        *,
        beams: int = 3,
        length_penalty: float = 0.6,
        max_length: int = 32,
    ) -> tuple[list[list[int]], Tensor]:
        """Captions and scores of the released evaluation, its counting of lengths included; see
        ``zoo.sampling.mask_beam``. ``generate_text(beams=3)`` searches by the zoo's own rules."""
        decoder = self.mask_decoder()
        image = self.trunk.embed_image(pixel_values)
        return search_as_released(
            decoder,
            torch.cat([image, decoder.embed(input_ids)], 1),
            self._caption_layout(input_ids.shape[1], input_ids.device),
            beams=beams,
            length_penalty=length_penalty,
            max_length=max_length,
            eos_id=self.special_ids["eos"],
        )

    def _caption_layout(self, text: int, device: torch.device) -> Layout:
        layout = self.trunk.layout(image=self.trunk.tokens, text=text, causal=True).to(device)
        place = torch.arange(-self.trunk.tokens, text, device=device).clamp(min=-1)
        place[: self.trunk.tokens] = -1
        return replace(layout, position=place[None])

    def generate_text(
        self,
        images: Sequence[ImageLike],
        prompts: Sequence[str] | None = None,
        max_new_tokens: int = 32,
        *,
        min_new_tokens: int = 0,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        beams: int = 1,
        length_penalty: float = 0.6,
    ) -> list[str]:
        """Write one caption an image, greedily by default; the released evaluation has ``beams=3``.

        Args:
            prompts: Beginnings to go on from, which are not part of what is returned.
        """
        _same_length(images, prompts, "prompts")
        decoding = Decoding(
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            beams=beams,
            length_penalty=length_penalty if beams > 1 else 1.0,
        )
        begins = [[self.tokenizer.bos_id, *row] for row in self.tokenizer.encode(list(prompts or [""] * len(images)))]
        out = [""] * len(images)
        with self._evaluating():
            for length in sorted(set(map(len, begins))):  # rows of one length need no pads
                rows = [n for n, begin in enumerate(begins) if len(begin) == length]
                for start in range(0, len(rows), CHUNK):
                    chunk = rows[start : start + CHUNK]
                    pixels = self._pixels([images[n] for n in chunk])
                    ids = self.generate_ids(
                        pixels,
                        torch.tensor([begins[n] for n in chunk], device=pixels.device),
                        decoding,
                        generators=[streams(seed, n, 1)[0] for n in chunk] if temperature else None,
                    )
                    for n, row in zip(chunk, ids.tolist(), strict=True):
                        out[n] = self.tokenizer.decode(until_stop(row, [self.special_ids["eos"]])).strip()
        return out

    # -- scoring ---------------------------------------------------------------------------------------------------

    def score_text(
        self, images: Sequence[ImageLike], texts: Sequence[str], prompts: Sequence[str] | None = None
    ) -> Tensor:
        """log p(text | image, prompt) [N] in nats, over the text's tokens and its end; float32 on the model's device.

        A token's probability is that of the [MASK] that stood in its place when it was written.
        """
        _same_length(images, texts, "texts")
        _same_length(images, prompts, "prompts")
        scores = [torch.empty(0, device=next(self.parameters()).device)]
        with self._evaluating():
            for start in range(0, len(images), CHUNK):
                part = slice(start, start + CHUNK)
                cache = self._seen(self._pixels(images[part]))
                scores.append(self._score(cache, texts[part], None if prompts is None else prompts[part]))
        return torch.cat(scores)

    def score_candidates(
        self,
        images: Sequence[ImageLike],
        candidates: Sequence[Sequence[str]],
        prompts: Sequence[str] | None = None,
    ) -> Tensor:
        """log p(candidate | image, prompt) [N, C] in nats, equal to ``score_text`` of every pair.

        The image reads no text, so that its keys and values are computed once and shared by the candidates.
        """
        _same_length(images, candidates, "candidates")
        _same_length(images, prompts, "prompts")
        counts = {len(c) for c in candidates}
        if len(counts) > 1:
            raise ConfigError(f"every image needs the same number of candidates, got {min(counts)} to {max(counts)}")
        device = next(self.parameters()).device
        scores = [torch.empty(0, max(counts, default=0), device=device)]
        with self._evaluating():
            for n, texts in enumerate(candidates):
                cache = self._seen(self._pixels(images[n : n + 1]))
                parts = [torch.empty(0, device=device)]
                for start in range(0, len(texts), CANDIDATES):
                    some = texts[start : start + CANDIDATES]
                    own = copy.deepcopy(cache)
                    own.reorder(torch.zeros(len(some), dtype=torch.long, device=device))
                    parts.append(self._score(own, some, None if prompts is None else [prompts[n]] * len(some)))
                scores.append(torch.cat(parts)[None])
        return torch.cat(scores)

    def _seen(self, pixel_values: Tensor) -> KVCache:
        """Keys and values of images [B, 3, S, S] read without text."""
        cache = KVCache()
        image = self.trunk.embed_image(pixel_values)
        self.trunk.trunk(image, self.trunk.layout(image=image.shape[1], pair=True).to(image.device), cache=cache)
        return cache

    def _score(self, cache: KVCache, texts: Sequence[str], prompts: Sequence[str] | None) -> Tensor:
        """Sum [B] of the log probabilities of text b behind the cached image b.

        Words and masks stand in turn, w0 m1 w1 m2 ...: every mask reads the words before it and no other mask.
        """
        decoder, special = self.mask_decoder(), self.special_ids
        device = next(self.parameters()).device
        begins = self.tokenizer.encode(list(prompts)) if prompts is not None else [[]] * len(texts)
        rows = [
            [self.tokenizer.bos_id, *begin, *text, special["eos"]]
            for begin, text in zip(begins, self.tokenizer.encode(list(texts)), strict=True)
        ]
        longest, images = max(map(len, rows)) - 1, self.trunk.tokens  # the end is only predicted
        if longest + 1 > self.trunk.config.context_length:
            raise ConfigError(
                f"a text of {longest + 1} tokens, the trunk reads {self.trunk.config.context_length}: shorten it or"
                " raise trunk.context_length"
            )
        ids = torch.full((len(rows), longest + 1), special["pad"])
        real = torch.zeros(len(rows), longest, dtype=torch.bool)
        counted = torch.zeros(len(rows), longest, dtype=torch.bool)
        for n, (row, begin) in enumerate(zip(rows, begins, strict=True)):
            ids[n, : len(row)] = torch.tensor(row)
            real[n, : len(row) - 1] = True
            counted[n, len(begin) : len(row) - 1] = True
        layout = _interleaved(images, real).to(device)
        pairs = torch.stack([ids[:, :-1], torch.full_like(ids[:, 1:], special["mask"])], -1).flatten(1).to(device)
        place = torch.stack([torch.arange(longest), torch.arange(1, longest + 1)], -1).flatten()[None].to(device)
        embeds = decoder.placed(decoder.embed(pairs), place)  # [B, 2n, D]
        hidden = cast(Tensor, self.trunk.trunk(embeds, layout, cache=cache))[:, 1::2]  # [B, n, D] at the masks
        counted, targets = counted.to(device), ids[:, 1:].to(device)
        log = decoder.logits(hidden[counted]).float().log_softmax(-1)
        values = torch.zeros(counted.shape, device=device)
        values[counted] = log.gather(1, targets[counted][:, None])[:, 0]
        return values.sum(1)


def _interleaved(images: int, real: Tensor) -> Layout:
    """The layout of an image and n words with a mask behind each; ``real`` [B, n] says which words there are."""
    batch, count = real.shape
    own = torch.stack([torch.ones(count, dtype=torch.long), torch.arange(2, count + 2)], -1).flatten()  # [2n]
    text = torch.where(real.repeat_interleave(2, 1), own, -1)
    segment = torch.cat([torch.zeros(batch, images, dtype=torch.long), text], 1)
    relation = torch.full((count + 2, count + 2), NEVER, dtype=torch.uint8)
    relation.fill_diagonal_(ALL)
    relation[1:, 0], relation[1:, 1] = ALL, PAST
    modality = torch.full_like(segment, TEXT_IN_PAIR)
    modality[:, :images] = IMAGE_IN_PAIR
    spans = ((0, images, IMAGE_IN_PAIR), (images, images + 2 * count, TEXT_IN_PAIR))
    return Layout.from_ids(segment, relation, modality=modality, spans=spans)


def _same_length(images: Sequence[Any], others: Sequence[Any] | None, name: str) -> None:
    if isinstance(images, str) or isinstance(others, str):
        raise ConfigError(f"expected lists of images and {name}, got one string: wrap it in a list")
    if others is not None and len(others) != len(images):
        raise ConfigError(f"{len(images)} images and {len(others)} {name}: expected one each")
