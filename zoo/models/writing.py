"""Writing and scoring text about images, for every model whose decoder reads image tokens spliced into its input."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.decoders.base import Decoder
from zoo.errors import ConfigError
from zoo.layout import Layout, TokenBatch
from zoo.layout_facts import Padding
from zoo.models.base import evaluating
from zoo.part import Features
from zoo.sampling.text import Decoding, align_right, streams, write

if TYPE_CHECKING:
    from zoo.capabilities import ImageLike
    from zoo.data.processor import PromptProcessor
    from zoo.data.text import TextTokenizer

    Images = Any  # ImageLike | Sequence[ImageLike]; models of this base that read one image say so
    Prompt = Any  # str | Sequence[Turn], a dialogue

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
        def image_features(self, *inputs: Any, **others: Any) -> Tensor: ...
        def _instruction(self, batch: Mapping[str, Tensor]) -> Features | None: ...
        def _splice(
            self,
            ids: Tensor,
            pixel_values: Tensor | None,
            features: Tensor | None = None,
            text: Features | None = None,
            image_tokens: Tensor | None = None,
        ) -> Tensor: ...
        def _layout(self, ids: Tensor, attention_mask: Tensor | None, padding: Padding | None = None) -> Layout: ...

    @property
    def text_decoder(self) -> Decoder:
        """What writes texts: the decoder, or a view of it that leaves ids out."""
        return self.decoder

    def generate_text(
        self,
        images: Sequence[Images],
        prompts: Sequence[Prompt] | None = None,
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
            images: Images, or a list of several for one text; ``<image>`` in its prompt places each.
            prompts: One question an image, or a dialogue, a list of (question, answer) whose last answer is None; the
                wiring's own prompt by default.
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
                shown, counts = _flat(images[part])
                rows = self.processor.encode_prompts(
                    None if prompts is None else prompts[part], len(counts), images=counts
                )
                instruction: dict[str, Any] = {  # what a captioner neither makes nor takes
                    name: rows[name].to(self.device) for name in ("instruction_ids", "instruction_mask") if name in rows
                }
                ids = self.generate_ids(
                    self._pixels(shown),
                    rows["input_ids"].to(self.device),
                    rows["attention_mask"].to(self.device),
                    decoding,
                    generators=streams(seed, part.start, len(counts)) if temperature else None,
                    **instruction,
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
        instruction_ids: Tensor | None = None,
        instruction_mask: Tensor | None = None,
        tell: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """New token ids [B, n] behind prompts [B, T] with image placeholders, pads on either side; see ``write``.

        By default a row stops at the processor's stop ids and sequences and is filled up with its pad id.
        ``instruction_ids`` [B, Tq] and ``instruction_mask`` [B, Tq] go to a connector that reads them. The model should
        be in eval mode.
        """
        text = self._instruction(_given(instruction_ids, instruction_mask))
        embeds = self._splice(input_ids, pixel_values, text=text)
        real = None if attention_mask is None else attention_mask.bool()
        if real is not None and not bool(real.all()):
            embeds, _ = align_right(embeds, real)
            input_ids, real = align_right(input_ids, real)
        if real is not None and bool(real.all()):
            real = None
        return write(
            self.text_decoder,
            embeds,
            self._layout(input_ids, real),
            decoding or Decoding(),
            stop_ids=sorted(self.processor.stop_ids) if stop_ids is None else stop_ids,
            stop_sequences=self.processor.stop_sequences if stop_ids is None else (),
            pad_id=self.tokenizer.pad_id if pad_id is None else pad_id,
            generators=generators,
            prompt_ids=input_ids,
            tell=tell,
        )

    def score_text(
        self, images: Sequence[Images], texts: Sequence[str], prompts: Sequence[Prompt] | None = None
    ) -> Tensor:
        """log p(text | image, prompt) [N] in nats, over the text's tokens and its end; float32 on the model's device.

        A BOS that is trained as a target (BLIP-2) is not part of the text and is not counted.
        """
        _same_length(images, texts, "texts")
        _same_length(images, prompts, "prompts")
        scores = [torch.empty(0, device=self.device)]
        with self._evaluating():
            for part in _chunks(len(images)):
                shown, counts = _flat(images[part])
                rows = self._rows(texts[part], None if prompts is None else prompts[part], counts)
                scores.append(self._score(self._asked_features(shown, counts, rows), rows))
        return torch.cat(scores)

    def _asked_features(self, images: Sequence[ImageLike], counts: Sequence[int], rows: Mapping[str, Tensor]) -> Tensor:
        """The connector's tokens of all images, each given the instruction of its row, of which it is one of
        ``counts``."""
        text = self._instruction({key: value.to(self.device) for key, value in rows.items()})
        if text is not None:
            index = torch.tensor([row for row, n in enumerate(counts) for _ in range(n)], device=self.device)
            text = Features(text.tokens[index], None if text.mask is None else text.mask[index])
        return self.image_features(self._pixels(images), text)

    def score_candidates(
        self,
        images: Sequence[Images],
        candidates: Sequence[Sequence[str]],
        prompts: Sequence[Prompt] | None = None,
    ) -> Tensor:
        """log p(candidate | image, prompt) [N, C] in nats, equal to ``score_text`` of every pair.

        Images may have lists of their own and of other lengths; -inf where a row has fewer than C. An image and its
        prompt are read once; the candidates continue from their keys and values.
        """
        _same_length(images, candidates, "candidates")
        _same_length(images, prompts, "prompts")
        width = max((len(c) for c in candidates), default=0)
        scores = torch.full((len(images), width), -torch.inf, device=self.device)
        with self._evaluating():
            for part in _chunks(len(images)):
                shown, counts = _flat(images[part])
                asked = None if prompts is None else prompts[part]
                rows = self.processor.encode_prompts(asked, len(counts), images=counts)
                features = torch.split(self._asked_features(shown, counts, rows), counts)  # [k, n, D] each
                for n, texts in enumerate(candidates[part]):
                    own = self._rank(features[n], texts, None if asked is None else asked[n])
                    scores[part.start + n, : len(texts)] = own
        return scores

    def _rank(self, features: Tensor, texts: Sequence[str], prompt: Prompt | None) -> Tensor:
        """Scores [C] of texts that share their images [k, n, D] and one prompt."""
        if not len(texts):
            return torch.empty(0, device=features.device)
        rows = self._rows(texts, None if prompt is None else [prompt] * len(texts), [len(features)] * len(texts))
        ids, labels = rows["input_ids"], rows["labels"]
        # the columns that are equal in all rows and hold no target are read once
        same = (ids == ids[:1]).all(0) & (labels == IGNORE).all(0)
        shared = min(int(same.long().cumprod(0).sum()), ids.shape[1] - 1)
        if len(texts) < 2 or shared < 1 or bool((ids[:, shared:] == self.image_token_id).any()):
            return self._score(features.repeat(len(texts), 1, 1), rows)
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

    def _rows(
        self, texts: Sequence[str], prompts: Sequence[Prompt] | None, images: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """The processor's rows of texts about so many images each, on the device, without the target that a leading BOS
        may be."""
        rows = self.processor.encode_texts(texts, prompts, images)
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

    def _evaluating(self) -> AbstractContextManager[None]:
        return evaluating(self)


def _given(instruction_ids: Tensor | None, instruction_mask: Tensor | None) -> dict[str, Tensor]:
    """The part of a batch that is the instructions."""
    given = {} if instruction_ids is None else {"instruction_ids": instruction_ids}
    if instruction_mask is not None:
        given["instruction_mask"] = instruction_mask.bool()
    return given


def _flat(images: Sequence[Images]) -> tuple[list[ImageLike], list[int]]:
    """All images in order, and how many each text is about."""
    groups: list[list[Any]] = [list(image) if isinstance(image, list | tuple) else [image] for image in images]
    return [image for group in groups for image in group], [len(group) for group in groups]


def _chunks(count: int) -> list[slice]:
    return [slice(start, start + CHUNK) for start in range(0, count, CHUNK)]


def _same_length(images: Sequence[Any], others: Sequence[Any] | None, name: str) -> None:
    if isinstance(images, str) or isinstance(others, str):
        raise ConfigError(f"expected lists of images and {name}, got one string: wrap it in a list")
    if others is not None and len(others) != len(images):
        raise ConfigError(f"{len(images)} images and {len(others)} {name}: expected one each")
