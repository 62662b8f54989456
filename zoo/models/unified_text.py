"""Writing and scoring text with a decoder whose vocabulary also holds image codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.data.sequences import MOST_IMAGES, SequenceStyle, layout_of, segments_of
from zoo.data.vocabulary import Vocabulary
from zoo.decoders.base import Decoder
from zoo.errors import ConfigError
from zoo.layout import Layout, TokenBatch
from zoo.layout_facts import Padding
from zoo.models.bridge import _check_slots
from zoo.models.plain_text import ScoresPlainText
from zoo.models.writing import WritesText
from zoo.part import Features
from zoo.sampling.text import Decoding, align_right, choose, write

if TYPE_CHECKING:
    from zoo.capabilities import ImageLike
    from zoo.tokenizers.base import ImageTokenizer


class TextState:
    """A decoder that writes text: columns of special tokens, codes and the mask are left out, and not computed where
    they follow the text vocabulary. New tokens belong to the segment ``text``.

    Args:
        allowed: [text] bool, the ids that may be written; None = every column of the decoder (the released loops).
    """

    def __init__(self, decoder: Decoder, allowed: Tensor | None) -> None:
        self.decoder, self.allowed = decoder, allowed
        self.width = decoder.width
        self.vocab_size = decoder.vocab_size if allowed is None else len(allowed)
        self.context_length = getattr(decoder, "context_length", 0)
        self.embed, self.new_cache, self.select_cache = decoder.embed, decoder.new_cache, decoder.select_cache

    def __call__(self, batch: TokenBatch, cache: Any = None) -> Tensor:
        hidden: Tensor = self.decoder(batch, cache)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        if self.allowed is None:
            return self.decoder.logits(hidden)
        logits = self.decoder.logits_of(hidden, slice(0, len(self.allowed)))
        return logits.masked_fill(~self.allowed, -torch.inf)

    def grow(self, layout: Layout) -> Layout:
        return layout.append("text", modality=0)


class WritesUnified(ScoresPlainText, WritesText):
    """``generate_text``, ``score_text``, ``score_candidates`` and ``score_plain_text`` of the unified wirings.

    Rows are those of the task ``mmu``: the image first, so that candidates share its keys and values.
    """

    style: SequenceStyle
    vocabulary: Vocabulary
    image_tokenizer: ImageTokenizer

    if TYPE_CHECKING:

        def code_embeds(self, codes: Tensor) -> Tensor: ...
        def _encode(self, pixels: Tensor) -> Tensor: ...

    @property
    def image_token_id(self) -> int:
        """The placeholder of a code in ``input_ids``: the first id outside the vocabulary."""
        return self.vocabulary.slot_id

    @property
    def text_columns(self) -> Tensor:
        """[text] bool, the ids a text may be written with: neither special tokens nor codes, but for the end."""
        allowed = torch.ones(self.vocabulary.text, dtype=torch.bool, device=self.device)
        allowed[self.tokenizer.vocab_size :] = False
        allowed[[id for id in self.tokenizer.special_ids if id < self.vocabulary.text]] = False
        if self.vocabulary.code_place >= 0:
            allowed[self.vocabulary.code_ids] = False
        allowed[[*self.vocabulary.places.values()]] = False
        allowed[self.tokenizer.eos_id] = True
        return allowed

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
        any_id: bool = False,
    ) -> Tensor:
        """As ``WritesText.generate_ids``; text ids alone are written, unless ``any_id`` (as Show-o's released loop).

        Slots of ``input_ids`` hold ``image_token_id``, or the codes' ids themselves.
        """
        embeds = self._splice(input_ids, pixel_values)
        real = None if attention_mask is None else attention_mask.bool()
        if real is not None and not bool(real.all()):
            embeds, _ = align_right(embeds, real)
            input_ids, real = align_right(input_ids, real)
        if real is not None and bool(real.all()):
            real = None
        view: Any = TextState(self.decoder, None if any_id else self.text_columns)
        return write(
            view,
            embeds,
            self._layout(input_ids, real),
            decoding or Decoding(),
            stop_ids=sorted(self.processor.stop_ids) if stop_ids is None else stop_ids,
            pad_id=self.tokenizer.pad_id if pad_id is None else pad_id,
            generators=generators,
            prompt_ids=input_ids,
            tell=tell,
        )

    # -- texts and images in turns ---------------------------------------------------------------------------------

    def _check_turns(self, prompts: Sequence[Sequence[ImageLike]], max_images: int) -> None:
        """Refuse what ``generate_interleaved`` cannot continue, before anything is computed.

        Raises:
            ConfigError: A prompt that is no list, or more images than a row may hold.
        """
        if isinstance(prompts, str) or any(isinstance(prompt, str) for prompt in prompts):
            raise ConfigError("expected a list of prompts, each a list of texts and images: wrap it in a list")
        if not 0 <= max_images <= MOST_IMAGES:
            raise ConfigError(f"max_images = {max_images}: expected 0 to {MOST_IMAGES}")
        for prompt in prompts:
            given = sum(not isinstance(part, str) for part in prompt)
            if given + max_images > MOST_IMAGES:
                raise ConfigError(f"{given} images and {max_images} to come: at most {MOST_IMAGES} fit a row")

    def _next_token(self, hidden: Tensor, begins: bool, text: Decoding, generators: Sequence[torch.Generator]) -> int:
        """What follows ``hidden`` [1, D]: a text id, the end, or where an image may begin its start; never a code."""
        start, columns = self.vocabulary.id(self.style.start), self.text_columns
        allowed = F.pad(columns, (0, max(0, start + 1 - len(columns))), value=False)
        allowed[start] = begins
        logits = self.decoder.logits_of(hidden, slice(0, len(allowed))).float().masked_fill(~allowed, -torch.inf)
        draw = None
        if text.temperature:
            draw = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in generators]).to(hidden.device)
        return int(choose(logits, text, draw))

    # -- tensors ---------------------------------------------------------------------------------------------------

    def text_logits(
        self,
        pixel_values: Tensor | None,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, T, V] of every position.

        Args:
            pixel_values: [N, 3, H, W], the images in the order of their slots; None where no row shows one.
            input_ids: [B, T] with ``image_token_id`` at each of an image's slots.
            attention_mask: [B, T], 1 = real; pads may stand on either side.
            decoder_input_ids: Not used: the decoder reads ``input_ids``.
        """
        layout = self._layout(input_ids, None if attention_mask is None else attention_mask.bool())
        return self.decoder.logits(self.decoder(TokenBatch(self._splice(input_ids, pixel_values), layout)))

    def image_features(self, pixel_values: Tensor, *others: Any, **more: Any) -> Tensor:
        """Embeddings [N, n, D] of what the images become in ``mmu`` rows: their codes."""
        embeds: Tensor = self.code_embeds(self._encode(pixel_values))
        return embeds

    def _splice(
        self,
        ids: Tensor,
        pixel_values: Tensor | None,
        features: Tensor | None = None,
        text: Features | None = None,
        image_tokens: Tensor | None = None,
    ) -> Tensor:
        slots = ids == self.vocabulary.slot_id
        embeds = self.decoder.embed(ids.masked_fill(slots, 0))  # [B, T, D]
        if features is None and pixel_values is not None and len(pixel_values):
            features = self.image_features(pixel_values)
        if features is None:
            _check_slots(slots, 0, 1)
            return embeds
        _check_slots(slots, features.shape[0], features.shape[1])
        return embeds.masked_scatter(slots[..., None], features.to(embeds.dtype))

    def _layout(self, ids: Tensor, attention_mask: Tensor | None, padding: Padding | None = None) -> Layout:
        real = None if attention_mask is None else attention_mask.bool()
        segment = segments_of(ids, real, self.style, self.vocabulary)
        promised: Any = padding if padding in ("none", "right") else None
        return layout_of(segment, self.style, slots=ids == self.vocabulary.slot_id, padding=promised)

    def _instruction(self, batch: Mapping[str, Tensor]) -> Features | None:
        return None

    def _pixels(self, images: Sequence[ImageLike]) -> Tensor:
        """Images as they are read where they are understood: here by the image tokenizer."""
        return self._tokenizer_pixels(images)

    def _tokenizer_pixels(self, images: Sequence[ImageLike]) -> Tensor:
        """Images [N, 3, H, W] as the image tokenizer reads them."""
        dtype = next(self.image_tokenizer.parameters(), torch.empty(0)).dtype
        return self.processor.encode_images(images).to(self.device, dtype)
