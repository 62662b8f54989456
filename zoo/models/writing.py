"""Writing and scoring text about images, for every model whose decoder reads image tokens spliced into its input."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.decoders.base import Decoder
from zoo.errors import ConfigError
from zoo.layout import Layout, TokenBatch
from zoo.layout_facts import Padding
from zoo.sampling.text import Decoding, align_right, streams, write

if TYPE_CHECKING:
    from zoo.capabilities import ImageLike
    from zoo.data.processor import PromptProcessor
    from zoo.data.text import TextTokenizer
    from zoo.part import Features

IGNORE = -100
"""Label of a position without a target."""

CHUNK = 64
"""Images a forward pass."""

CANDIDATES = 256
"""Candidates of one image a forward pass."""


class WritesText(nn.Module):
    """The capabilities ``generate_text``, ``score_text`` and ``score_candidates``.

    The model offers ``image_features``, ``_splice`` and ``_layout`` (see ``Bridge``), a decoder and a prompt processor.
    """

    decoder: Decoder
    encoder: nn.Module

    if TYPE_CHECKING:

        @property
        def image_token_id(self) -> int: ...
        @property
        def tokenizer(self) -> TextTokenizer: ...
        @property
        def processor(self) -> PromptProcessor: ...
        @property
        def device(self) -> torch.device: ...
        def image_features(
            self, pixel_values: Tensor | None, text: Features | None = None, image_tokens: Tensor | None = None
        ) -> Tensor: ...
        def _splice(
            self,
            ids: Tensor,
            pixel_values: Tensor | None,
            features: Tensor | None = None,
            text: Features | None = None,
            image_tokens: Tensor | None = None,
        ) -> Tensor: ...
        def _layout(self, ids: Tensor, attention_mask: Tensor | None, padding: Padding | None = None) -> Layout: ...

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
        length_penalty: float = 1.0,
        repetition_penalty: float = 1.0,
    ) -> list[str]:
        """Write one text an image, greedily by default.

        Args:
            prompts: One question an image; the wiring's own by default.
            max_new_tokens: Most tokens to write; fewer where the decoder's context is full.
            temperature: 0 = greedy or beams, else see ``zoo.sampling.text.Decoding``, also for the rest.
        """
        decoding = Decoding(
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            beams=beams,
            length_penalty=length_penalty,
            repetition_penalty=repetition_penalty,
        )
        _same_length(images, prompts, "prompts")
        out: list[str] = []
        with self._evaluating():
            for part in _chunks(len(images)):
                pixels = self._pixels(images[part])
                rows = self.processor.encode_prompts(None if prompts is None else prompts[part], len(pixels))
                ids = self.generate_ids(
                    pixels,
                    rows["input_ids"].to(self.device),
                    rows["attention_mask"].to(self.device),
                    decoding,
                    generators=streams(seed, part.start, len(pixels)) if temperature else None,
                )
                out += [self.processor.decode(row) for row in ids.tolist()]
        return out

    @torch.inference_mode()
    def generate_ids(
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
        """New token ids [B, n] behind prompts [B, T] with image placeholders, pads on either side; see ``write``.

        By default a row stops at the processor's stop ids and is filled up with its pad id. The model should be in
        eval mode.
        """
        embeds = self._splice(input_ids, pixel_values)
        real = None if attention_mask is None else attention_mask.bool()
        if real is not None and not bool(real.all()):
            embeds, _ = align_right(embeds, real)
            input_ids, real = align_right(input_ids, real)
        if real is not None and bool(real.all()):
            real = None
        return write(
            self.decoder,
            embeds,
            self._layout(input_ids, real),
            decoding or Decoding(),
            stop_ids=sorted(self.processor.stop_ids) if stop_ids is None else stop_ids,
            pad_id=self.tokenizer.pad_id if pad_id is None else pad_id,
            generators=generators,
            prompt_ids=input_ids,
        )

    def score_text(
        self, images: Sequence[ImageLike], texts: Sequence[str], prompts: Sequence[str] | None = None
    ) -> Tensor:
        """log p(text | image, prompt) [N] in nats, over the text's tokens and its end; float32 on the model's device.

        A BOS that is trained as a target (BLIP-2) is not part of the text and is not counted.
        """
        _same_length(images, texts, "texts")
        _same_length(images, prompts, "prompts")
        scores = [torch.empty(0, device=self.device)]
        with self._evaluating():
            for part in _chunks(len(images)):
                rows = self._rows(texts[part], None if prompts is None else prompts[part])
                scores.append(self._score(self.image_features(self._pixels(images[part])), rows))
        return torch.cat(scores)

    def score_candidates(
        self,
        images: Sequence[ImageLike],
        candidates: Sequence[Sequence[str]],
        prompts: Sequence[str] | None = None,
    ) -> Tensor:
        """log p(candidate | image, prompt) [N, C] in nats, equal to ``score_text`` of every pair.

        An image and its prompt are read once; the candidates continue from their keys and values.
        """
        _same_length(images, candidates, "candidates")
        _same_length(images, prompts, "prompts")
        counts = {len(c) for c in candidates}
        if len(counts) > 1:
            raise ConfigError(f"every image needs the same number of candidates, got {min(counts)} to {max(counts)}")
        scores = [torch.empty(0, max(counts, default=0), device=self.device)]
        with self._evaluating():
            for part in _chunks(len(images)):
                features = self.image_features(self._pixels(images[part]))  # [b, n, D]
                for n, texts in enumerate(candidates[part]):
                    prompt = None if prompts is None else prompts[part.start + n]
                    scores.append(self._rank(features[n : n + 1], texts, prompt)[None])
        return torch.cat(scores)

    def _rank(self, features: Tensor, texts: Sequence[str], prompt: str | None) -> Tensor:
        """Scores [C] of texts that share one image [1, n, D] and one prompt."""
        rows = self._rows(texts, None if prompt is None else [prompt] * len(texts))
        ids, labels = rows["input_ids"], rows["labels"]
        # the columns that are equal in all rows and hold no target are read once
        same = (ids == ids[:1]).all(0) & (labels == IGNORE).all(0) if len(texts) else ids.new_zeros(0).bool()
        shared = min(int(same.long().cumprod(0).sum()), ids.shape[1] - 1)
        if len(texts) < 2 or shared < 1 or bool((ids[:, shared:] == self.image_token_id).any()):
            return self._score(features.expand(len(texts), -1, -1), rows)
        cache = self.decoder.new_cache()
        prefix = TokenBatch(self._splice(ids[:1, :shared], None, features), self._layout(ids[:1, :shared], None))
        first = self.decoder(prefix, cache)[:, -1:]  # [1, 1, D]
        scores: list[Tensor] = []
        for start in range(0, len(texts), CANDIDATES):
            part = slice(start, start + CANDIDATES)
            count = len(ids[part])
            index = torch.zeros(count, dtype=torch.long, device=ids.device)
            copied = self.decoder.select_cache(copy.deepcopy(cache), index)
            layout = self._layout(ids[part], rows["attention_mask"][part], "right")
            tail = self.decoder(
                TokenBatch(self.decoder.embed(ids[part, shared:]), layout), copied
            )  # [c, T - shared, D]
            hidden = torch.cat([first.expand(count, -1, -1), tail[:, :-1]], dim=1)  # row i predicts token shared + i
            scores.append(self._nats(hidden, labels[part, shared:]))
        return torch.cat(scores)

    def _rows(self, texts: Sequence[str], prompts: Sequence[str] | None) -> dict[str, Tensor]:
        """The processor's rows of texts, on the device, without the target that a leading BOS may be."""
        rows = self.processor.encode_texts(texts, prompts)
        labels = rows["labels"]
        kept = labels != IGNORE
        bos = kept & (kept.long().cumsum(1) == 1) & (labels == self.tokenizer.bos_id)
        rows["labels"] = labels.masked_fill(bos, IGNORE)
        return {key: value.to(self.device) for key, value in rows.items()}

    def _score(self, features: Tensor, rows: dict[str, Tensor]) -> Tensor:
        embeds = self._splice(rows["input_ids"], None, features)
        layout = self._layout(rows["input_ids"], rows["attention_mask"], "right")
        hidden = self.decoder(TokenBatch(embeds, layout))  # [B, T, D]
        return self._nats(hidden[:, :-1], rows["labels"][:, 1:])

    def _nats(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Sum [B] of log p of the targets [B, t], which the rows of ``hidden`` [B, t, D] predict."""
        kept = targets != IGNORE
        logits = self.decoder.logits(hidden[kept]).float()  # [M, V]
        scores = torch.zeros(targets.shape, device=hidden.device)
        scores[kept] = -F.cross_entropy(logits, targets[kept], reduction="none")
        return scores.sum(dim=1)

    def _pixels(self, images: Sequence[ImageLike]) -> Tensor:
        dtype = next(self.encoder.parameters()).dtype
        return self.processor.encode_images(images).to(self.device, dtype)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Eval mode without gradients; afterwards every module is in the mode it was in."""
        training = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            with torch.inference_mode():
                yield
        finally:
            for module, mode in training:
                module.training = mode


def _chunks(count: int) -> list[slice]:
    return [slice(start, start + CHUNK) for start in range(0, count, CHUNK)]


def _same_length(images: Sequence[Any], others: Sequence[Any] | None, name: str) -> None:
    if isinstance(images, str) or isinstance(others, str):
        raise ConfigError(f"expected lists of images and {name}, got one string: wrap it in a list")
    if others is not None and len(others) != len(images):
        raise ConfigError(f"{len(images)} images and {len(others)} {name}: expected one each")
