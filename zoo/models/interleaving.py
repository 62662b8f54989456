"""Texts and images in turns: the text state writes until an image begins, the image state draws it, and so on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zoo.data.sequences import Image as Places
from zoo.data.sequences import SequenceStyle, Text, segments_of, write_row
from zoo.data.vocabulary import Vocabulary
from zoo.errors import ConfigError, DataError
from zoo.layout import Layout
from zoo.sampling.block import Branches, Prefix
from zoo.sampling.codes import CodeDecoding, CodeStreams, decode_codes
from zoo.sampling.guidance import image_text_weights
from zoo.sampling.masked import MaskedDecoding, Predict, Streams, decode
from zoo.sampling.text import Decoding, streams

if TYPE_CHECKING:
    from zoo.capabilities import ImageLike


class WritesInterleaved(nn.Module):
    """The capability ``generate_interleaved``. A finished image is forwarded once more as it is, and everything behind
    it reads these keys and values: nothing before is computed again."""

    if TYPE_CHECKING:
        config: Any  # with the fields of DrawingFields
        decoder: Any
        image_tokenizer: Any
        image_config: Any
        style: SequenceStyle
        vocabulary: Vocabulary
        places: int

        @property
        def device(self) -> torch.device: ...
        @property
        def processor(self) -> Any: ...
        def _evaluating(self) -> Any: ...
        def _check_turns(self, prompts: Sequence[Sequence[ImageLike]], max_images: int) -> None: ...
        def _next_token(
            self, hidden: Tensor, begins: bool, text: Decoding, generators: Sequence[torch.Generator]
        ) -> int: ...
        def _encode(self, pixels: Tensor) -> Tensor: ...
        def _tokenizer_pixels(self, images: Sequence[ImageLike]) -> Tensor: ...
        def _decoding(self, steps: int | None, guidance: float | None) -> MaskedDecoding | CodeDecoding: ...
        def prompt_chunks(self, texts: Sequence[str]) -> list[tuple[Tensor, Tensor]]: ...
        def prompt_rows(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]: ...
        def code_embeds(self, codes: Tensor) -> Tensor: ...
        def code_logits(self, hidden: Tensor) -> Tensor: ...
        def image_block(self, codes: Tensor) -> Tensor: ...
        def block_segment(self, number: int) -> str: ...
        def masked_predict(self, prefix: Any, weights: Sequence[float], number: int = 1) -> Predict: ...
        def layout_with(self, segment: Tensor, images: Sequence[int]) -> Layout: ...
        def shown(self, codes: Tensor, grid: tuple[int, int]) -> Tensor: ...

    def generate_interleaved(
        self,
        prompts: Sequence[Sequence[ImageLike]],
        *,
        max_images: int = 4,
        max_new_tokens: int = 64,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> list[list[str | Tensor]]:
        """Continue texts and images with texts and images.

        Prompts are continued one by one, so that each may change from text to image where it wants to.

        Args:
            prompts: Each a sequence of texts (``str``) and images (PIL, or ``Path``).
            max_images: Images drawn for a prompt, at most; none begins where the decoder's context has no room for it.
            max_new_tokens: Of text for a prompt, at most, over all its texts.
            seed: Prompt n draws from ``streams(seed, n, 1)``.
            steps, guidance: As in ``generate_images``. Without its text an image is drawn as in a ``t2i`` row without
                one; codes drawn one after the other also have a branch with the images alone (Chameleon).
            temperature, top_k, top_p: Of the text, see ``zoo.sampling.text.Decoding``.

        Raises:
            ConfigError: A prompt that does not fit, or values out of range.
        """
        self._check_turns(prompts, max_images)
        text = Decoding(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        how = self._decoding(steps, guidance)
        for prompt in prompts:
            self._row(prompt)
        out = []
        with self._evaluating():
            for n, prompt in enumerate(prompts):
                out.append(self._continue(prompt, text, how, max_images, streams(seed, n, 1)))
        return out

    # -- one prompt ------------------------------------------------------------------------------------------------

    def _continue(
        self,
        prompt: Sequence[ImageLike],
        text: Decoding,
        how: MaskedDecoding | CodeDecoding,
        most: int,
        generators: Sequence[torch.Generator],
    ) -> list[str | Tensor]:
        images = [part for part in prompt if not isinstance(part, str)]
        history = (
            list(torch.split(self._encode(self._tokenizer_pixels(images)).to(self.device), 1)) if images else []
        )  # [1, n] each
        ids = torch.tensor([self._row(prompt)], device=self.device)
        if history:
            codes = torch.cat(history) + self.vocabulary.first_code
            ids = ids.masked_scatter(ids == self.vocabulary.slot_id, codes)
        segment = segments_of(ids, None, self.style, self.vocabulary)
        layout = self.layout_with(segment, [1] * most).truncate(ids.shape[1])
        prefix = Prefix(self.decoder, self.decoder.embed(ids), layout)
        start, room = self.vocabulary.id(self.style.start), self.decoder.context_length
        out: list[str | Tensor] = []
        words: list[int] = []
        written = drawn = 0
        while True:
            begins = drawn < most and prefix.length + self.places + 2 <= room
            token = self._next_token(prefix.hidden, begins, text, generators)
            if token == start:
                drawn += 1
                codes = self._next_image(prefix, history, how, generators)
                history.append(codes)
                out += [*self._said(words), self.shown(codes, self.image_tokenizer.grid)[0]]
                words = []
                continue
            if token == self.processor.words.eos or written == text.max_new_tokens or prefix.length >= room:
                return out + self._said(words)
            words.append(token)
            written += 1
            prefix.block(self.decoder.embed(ids.new_tensor([[token]])), "text", keep=True)

    def _row(self, prompt: Sequence[ImageLike]) -> tuple[int, ...]:
        """Ids of a prompt that is to be continued, ``slot_id`` where codes go."""
        parts = [
            Text(self.processor.text_ids(part)) if isinstance(part, str) else Places(self.places, given=True)
            for part in prompt
        ]
        try:
            return write_row(
                self.style, self.vocabulary, self.processor.words, "interleaved", parts,
                length=self.decoder.context_length, closed=False,
            ).ids  # fmt: skip
        except DataError as error:
            raise ConfigError(str(error)) from None

    def _said(self, words: Sequence[int]) -> list[str | Tensor]:
        text = self.processor.tokenizer.decode(list(words)).strip()
        return [text] if text else []

    def _next_image(
        self,
        prefix: Prefix,
        history: Sequence[Tensor],
        how: MaskedDecoding | CodeDecoding,
        generators: Sequence[torch.Generator],
    ) -> Tensor:
        """Codes [1, n] of the next image; the prefix holds it, with its end, afterwards."""
        number = len(history) + 1
        segment = self.block_segment(number)
        if isinstance(how, MaskedDecoding):
            branches = [(prefix, segment)]
            if len(how.weights) > 1:
                branches.append(self._alone(self.prompt_rows([""])[0][1:]))
            empty = torch.zeros(1, self.places, dtype=torch.long, device=self.device)
            predict = self.masked_predict(Branches(branches), how.weights)
            codes = decode(empty, torch.ones_like(empty, dtype=torch.bool), predict, how, Streams(generators))
            prefix.block(self.decoder.embed(self.image_block(codes)), segment, keep=True)
            return codes
        block = self.image_block(torch.zeros(1, 0, dtype=torch.long, device=self.device))
        prefix.block(self.decoder.embed(block[:, :1]), "text", keep=True)  # the image's start
        rows, weights = self._branches(history, how)
        first = [(prefix, segment)] if weights[0] else []
        joined = Branches([*first, *(self._alone(row) for row in rows)])
        codes = decode_codes(
            joined, self.places, self.code_embeds, self.code_logits, how, CodeStreams(generators), segment,
            mix=[weight for weight in weights if weight],
        )  # fmt: skip
        behind = codes[:, -1:] if weights[0] else codes  # the prefix holds all codes but the last
        embeds = torch.cat([self.code_embeds(behind), self.decoder.embed(block[:, 1:])], 1)
        prefix.block(embeds, segment, keep=True)
        return codes

    def _branches(self, history: Sequence[Tensor], how: CodeDecoding) -> tuple[list[Tensor], tuple[float, ...]]:
        """The prompts of guidance beside the full one, and the weights of all; prompts of no weight are left out."""
        none = self.prompt_rows([""])[0][1:]  # [1, P] up to an image's start
        scale = sum(how.weights[:1])
        if not history:
            return ([none] if scale != 1 else []), (scale, 1 - scale)
        start, bare = none[:, -1:], none[:, :-1]
        images = torch.cat([bare, *(self.image_block(codes) for codes in history), start], 1)
        weights = image_text_weights(scale, self.config.image_guidance)
        return [row for row, weight in zip((images, none), weights[1:], strict=True) if weight], weights

    def _alone(self, ids: Tensor) -> tuple[Prefix, str]:
        """A prefix of its own of ids [1, P], and the segment of the image behind it."""
        segment = segments_of(ids, None, self.style, self.vocabulary)
        layout = self.layout_with(segment, [1]).truncate(ids.shape[1])
        number = len(layout.names) - 1 if self.style.full != "none" else 0
        return Prefix(self.decoder, self.decoder.embed(ids), layout), layout.names[number]
