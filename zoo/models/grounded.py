"""Writing and scoring text with a decoder that cross-attends: BLIP's captions, and answers of ALBEF and BLIP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import ConfigError
from zoo.layout import Layout, Segment, TokenBatch, lay_out
from zoo.layout_facts import Padding
from zoo.models.writing import IGNORE, WritesText, _chunks, _same_length
from zoo.sampling.text import Decoding, align_right, streams, until_stop, write

if TYPE_CHECKING:
    from zoo.capabilities import ImageLike


@dataclass(frozen=True, kw_only=True)
class GroundedFields:
    """Fields of the wirings whose decoder cross-attends.

    Attributes:
        prompt: What the decoder's text begins with where a call gives no prompt; it is no target.
        beams: Beams of ``generate_text`` where the call does not say; 1 = greedy.
        beam_length: Which length divides a hypothesis' score (``zoo.sampling.text.Decoding.length``).
    """

    prompt: str = ""
    beams: int = 3
    beam_length: str = "whole"


def text_layout(ids: Tensor, real: Tensor | None = None, padding: Padding | None = None) -> Layout:
    """Plain causal attention over token ids [B, T]; positions do not count pads in front.

    Args:
        real: [B, T] bool, False on pads.
        padding: A promise about where the pads stand, so that nobody has to look.
    """
    position = None
    if real is not None and padding != "right":
        position = (real.long().cumsum(1) - 1).clamp(min=0)
    segments = [Segment("text", ids.shape[1], "text", "causal", predicted=True)]
    return lay_out(segments, ids.shape[0], real=real, position=position, padding=padding, device=ids.device)


def shifted(ids: Tensor, real: Tensor | None) -> Tensor:
    """What each token should predict [B, T]: the next one, -100 where that is a pad or there is none."""
    targets = ids if real is None else ids.masked_fill(~real.bool(), IGNORE)
    return F.pad(targets[:, 1:], (0, 1), value=IGNORE)


class WritesGrounded(WritesText):
    """The capabilities ``generate_text``, ``score_text`` and ``score_candidates``, and ``text_logits``.

    The model has ``encoder``, ``decoder`` (with ``context_width``), a tokenizer and a processor with
    ``encode_images``. It says what the decoder reads (``read``) and what its text begins with
    (``begin``).
    """

    grounded: GroundedFields

    def read(self, pixel_values: Tensor, prompts: Sequence[str] | None = None) -> tuple[Tensor, Tensor | None]:
        """What the decoder cross-attends: states [B, N, C] and their mask [B, N] bool. Here the image's tokens."""
        tokens: Tensor = self.encoder(pixel_values).tokens
        return tokens, None

    def begin(self, prompts: Sequence[str] | None, count: int) -> list[list[int]]:
        """The ids that ``count`` texts begin with: the start token and the prompt's."""
        said = [self.grounded.prompt] * count if prompts is None else list(prompts)
        return [[self.start_id, *ids] for ids in self.tokenizer.encode(said)]

    @property
    def start_id(self) -> int:
        """[DEC], in slot 0 of what the decoder reads; the tokenizer's BOS where the vocabulary has none."""
        start = int(getattr(self.decoder, "start_id", -1))
        return start if start >= 0 else self.tokenizer.bos_id

    # -- tensors ---------------------------------------------------------------------------------------------------

    def decode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        context: Tensor,
        context_mask: Tensor | None = None,
        padding: Padding | None = "right",
    ) -> Tensor:
        """Hidden states [B, T, width] of texts [B, T] that read ``context`` [B, N, C], each token those before it."""
        real = None if attention_mask is None else attention_mask.bool()
        layout = text_layout(input_ids, real, padding if real is not None else None)
        batch = TokenBatch(self.decoder.embed(input_ids), layout)
        hidden: Tensor = self.decoder(batch, None, context=context, context_mask=context_mask)
        return hidden

    def text_logits(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, T, V] of every position of ``input_ids`` [B, T], which are read as they stand, start token
        included; pads behind the text."""
        context, mask = self.read(pixel_values)
        return self.decoder.logits(self.decode(input_ids, attention_mask, context, mask))

    @torch.inference_mode()
    def write_ids(
        self,
        context: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoding: Decoding | None = None,
        *,
        context_mask: Tensor | None = None,
        stop_ids: Sequence[int] | None = None,
        pad_id: int | None = None,
        generators: Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """New token ids [B, n] behind prompts [B, T], pads on either side; see ``zoo.sampling.text.write``. The model
        should be in eval mode.

        Args:
            context: [B, N, C] as ``read`` gives it.
        """
        real = None if attention_mask is None else attention_mask.bool()
        if real is not None:
            input_ids, real = align_right(input_ids, real)
            real = None if bool(real.all()) else real
        return write(
            self.decoder,
            self.decoder.embed(input_ids),
            text_layout(input_ids, real),
            decoding or Decoding(),
            stop_ids=[self.tokenizer.eos_id] if stop_ids is None else stop_ids,
            pad_id=self.tokenizer.pad_id if pad_id is None else pad_id,
            generators=generators,
            context=context,
            context_mask=context_mask,
            prompt_ids=input_ids,
        )

    # -- capabilities ----------------------------------------------------------------------------------------------

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
        beams: int | None = None,
        length_penalty: float = 1.0,
        repetition_penalty: float = 1.0,
    ) -> list[str]:
        """Write one text an image, by the wiring's number of beams (BLIP: 3), or sampled at a ``temperature``.

        BLIP's nucleus sampling is ``temperature=1.0, top_p=0.9, repetition_penalty=1.1``.

        Args:
            prompts: What a text begins with (captions), or the question (answers); the wiring's own by default.
            max_new_tokens: Most tokens to write; fewer where the decoder's context is full.
            beams, temperature: See ``zoo.sampling.text.Decoding``, also for the rest.
        """
        decoding = Decoding(
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            beams=beams if beams is not None else 1 if temperature else self.grounded.beams,
            length_penalty=length_penalty,
            length=self.grounded.beam_length,
            repetition_penalty=repetition_penalty,
        )
        _same_length(images, prompts, "prompts")
        out: list[str] = []
        with self._evaluating():
            for part in _chunks(len(images)):
                said = None if prompts is None else prompts[part]
                context, mask = self.read(self._pixels(images[part]), said)
                ids, real = self._padded(self.begin(said, len(context)))
                new = self.write_ids(
                    context,
                    ids,
                    real,
                    decoding,
                    context_mask=mask,
                    generators=streams(seed, part.start, len(context)) if temperature else None,
                )
                out += [self._text(row) for row in new.tolist()]
        return out

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
                said = None if prompts is None else prompts[part]
                context, mask = self.read(self._pixels(images[part]), said)
                begun = self.begin(said, len(context))
                ids, real, targets = self._answered(begun, texts[part])
                scores.append(self._nats(self.decode(ids, real, context, mask), targets))
        return torch.cat(scores)

    def score_candidates(
        self, images: Sequence[ImageLike], candidates: Sequence[Sequence[str]], prompts: Sequence[str] | None = None
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
                said = None if prompts is None else prompts[part]
                context, mask = self.read(self._pixels(images[part]), said)
                begun = self.begin(said, len(context))
                for n, texts in enumerate(candidates[part]):
                    one = None if mask is None else mask[n : n + 1]
                    scores.append(self._continue(context[n : n + 1], one, begun[n], texts)[None])
        return torch.cat(scores)

    def _continue(self, context: Tensor, mask: Tensor | None, begun: list[int], texts: Sequence[str]) -> Tensor:
        """Scores [C] of texts that share a context [1, N, C] and the ids they begin with."""
        if not len(texts):
            return torch.empty(0, device=context.device)
        ids, real, targets = self._answered([begun] * len(texts), texts)
        first = len(begun)
        start = ids[:1, :first]
        cache = self.decoder.new_cache()
        batch = TokenBatch(self.decoder.embed(start), text_layout(start))
        head = self.decoder(batch, cache, context=context, context_mask=mask)[:, -1:]  # [1, 1, D] predicts the first
        cache = self.decoder.select_cache(cache, torch.zeros(len(ids), dtype=torch.long, device=ids.device))
        rest = TokenBatch(self.decoder.embed(ids[:, first:]), text_layout(ids, real, "right"))
        tail = self.decoder(rest, cache)  # [C, T - first, D]
        hidden = torch.cat([head.expand(len(ids), -1, -1), tail[:, :-1]], 1)
        return self._nats(hidden, targets[:, first - 1 : -1])

    def _answered(self, begun: Sequence[Sequence[int]], texts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, mask and targets [N, T] of prompts followed by texts and the end; prompts are no targets."""
        # after a prompt a text starts with a blank, as in training (zoo.data.captions)
        said = self.tokenizer.encode([" " + t if len(b) > 1 else t for b, t in zip(begun, texts, strict=True)])
        rows = [[*b, *t, self.tokenizer.eos_id] for b, t in zip(begun, said, strict=True)]
        longest = max(map(len, rows))
        limit = getattr(self.decoder, "context_length", longest)
        if longest > limit:
            raise ConfigError(f"a text of {longest} tokens for a decoder of {limit}: shorten it")
        ids, real = self._padded(rows)
        targets = shifted(ids, real)
        before = torch.tensor([len(b) - 1 for b in begun], device=ids.device)  # positions whose next token is prompt
        place = torch.arange(ids.shape[1], device=ids.device)
        return ids, real, targets.masked_fill(place < before[:, None], IGNORE)

    def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Ids and mask [N, T], pads behind, on the model's device."""
        width = max(map(len, rows), default=0)
        pad = self.tokenizer.pad_id
        ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], dtype=torch.long)
        real = torch.tensor([[i < len(row) for i in range(width)] for row in rows], dtype=torch.bool)
        return ids.to(self.device), real.to(self.device)

    def _text(self, ids: Sequence[int]) -> str:
        """The words before the first stop; ids that are no words of the tokenizer are left out."""
        said = until_stop(ids, [self.tokenizer.eos_id])
        return self.tokenizer.decode([i for i in said if i < self.tokenizer.vocab_size]).strip()
