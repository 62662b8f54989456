"""Writing and drawing with a language model whose states are a diffusion model's condition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from zoo.data.sequences import MOST_IMAGES
from zoo.decoders.base import Decoder
from zoo.decoders.extended import TextOnly
from zoo.errors import ConfigError, DataError
from zoo.layout import TokenBatch
from zoo.models.base import evaluating
from zoo.part import Features
from zoo.sampling.block import Prefix
from zoo.sampling.text import Decoding, choose, ids_seen, penalised, streams

if TYPE_CHECKING:
    from zoo.capabilities import ImageLike
    from zoo.layout import Layout
    from zoo.layout_facts import Padding


class WritesAndDraws:
    """What ``generate_images`` and its like read of a text, and the capability ``generate_interleaved``.

    The tokens of an image are forced behind its first one, all in one pass: they are the same whatever is drawn.
    """

    if TYPE_CHECKING:
        config: Any
        decoder: Any
        decoder_config: Any
        output_connector: Any
        image_config: Any
        image_tokenizer: Any
        voken_ids: tuple[int, ...]

        @property
        def device(self) -> torch.device: ...
        @property
        def processor(self) -> Any: ...
        def _splice(
            self,
            ids: Tensor,
            pixel_values: Tensor | None,
            features: Tensor | None = None,
            text: Features | None = None,
            image_tokens: Tensor | None = None,
            order: Tensor | None = None,
        ) -> Tensor: ...
        def _layout(
            self,
            ids: Tensor,
            attention_mask: Tensor | None,
            padding: Padding | None = None,
            document: Tensor | None = None,
        ) -> Layout: ...
        def _caption_states(self, ids: Tensor, mask: Tensor) -> Tensor: ...
        def condition_of(self, texts: Sequence[str]) -> Features: ...
        def _states(self, ids: Tensor, hidden: Tensor, count: int) -> Tensor: ...
        def _pixels(self, images: Sequence[ImageLike]) -> Tensor: ...
        def _latents(
            self,
            condition: Features,
            unconditional: Features | None,
            way: Any,
            generators: Sequence[torch.Generator],
            **more: Any,
        ) -> Tensor: ...
        def _pictures(self, latents: Tensor) -> Tensor: ...
        def _way(self, sampler: Any, steps: Any, guidance: Any, rescale: Any, tell: Any) -> Any: ...

    @property
    def text_decoder(self) -> Decoder:
        """The decoder, without the tokens of images."""
        return cast("Decoder", TextOnly(self.decoder, self.voken_ids[0]))

    # -- images of texts -------------------------------------------------------------------------------------------

    def prompt_rows(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Rows of the texts with an image's tokens behind each, ``input_ids`` and ``attention_mask`` [N, T]; where
        texts are the condition, ``caption_ids`` and ``caption_mask`` [N, L] too.

        Raises:
            ConfigError: A text that leaves no room for the image.
        """
        try:
            rows: dict[str, Tensor] = self.processor.encode_drawing(texts)
        except DataError as error:
            raise ConfigError(str(error)) from None
        if self.config.condition_from == "text":
            rows |= self.processor.encode_captions(texts)
        return rows

    def condition(self, batch: Mapping[str, Tensor]) -> Features:
        """What the denoiser reads for rows [N, T] that end with an image's tokens."""
        ids, mask = batch["input_ids"], batch["attention_mask"].bool()
        if not len(ids):
            width = self.output_connector.width
            return Features(torch.zeros(0, self.output_connector.outputs, width, device=self.device))
        if self.config.condition_from == "text":
            return Features(self._caption_states(batch["caption_ids"], batch["caption_mask"]))
        used = int(mask.any(0).int().argmax())  # columns of pads alone change nothing
        ids, mask = ids[:, used:], mask[:, used:]
        layout = self._layout(ids, None if bool(mask.all()) else mask)
        hidden = self.decoder(TokenBatch(self._splice(ids, None), layout))  # [N, T, D]
        condition: Features = self.output_connector(self._states(ids, hidden, len(ids)))
        return condition

    # -- texts and images ------------------------------------------------------------------------------------------

    def generate_interleaved(
        self,
        prompts: Sequence[Sequence[str | ImageLike]],
        *,
        max_images: int = 4,
        max_new_tokens: int = 64,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        force: bool = False,
    ) -> list[list[str | Tensor]]:
        """Answer each prompt, a list of texts and images (PIL or paths; a path is a ``Path``), in texts and images.

        The model writes; where it writes the first token of an image, the others follow at once, the image is drawn
        from its states there, and the text goes on behind them. The wiring's ``ask`` stands behind the prompt.

        Args:
            max_images: Images of an answer at most; none begins where the decoder's context has no room for it.
            max_new_tokens: Tokens of text at most.
            seed: Prompt n draws from ``streams(seed, n, 1)``.
            steps, guidance, sampler: As of ``generate_images``.
            temperature, top_k, top_p, repetition_penalty: Of the text, see ``zoo.sampling.text.Decoding``; released
                MiniGPT-5 samples at 1 with top_p 0.9 and penalty 2.
            force: An answer that would end without an image draws one.

        Returns:
            A list a prompt of new texts and images [3, H, W] float32 in [0, 1], in order.

        Raises:
            ConfigError: A prompt that does not fit, or values out of range.
        """
        if isinstance(prompts, str) or any(isinstance(prompt, str) for prompt in prompts):
            raise ConfigError("expected a list of prompts, each a list of texts and images: wrap it in a list")
        if not 0 <= max_images <= MOST_IMAGES:
            raise ConfigError(f"max_images = {max_images}: expected 0 to {MOST_IMAGES}")
        decoding = Decoding(
            max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
            repetition_penalty=repetition_penalty,
        )  # fmt: skip
        way = self._way(sampler, steps, guidance, None, None)
        try:
            rows = [self.processor.encode_turn(prompt) for prompt in prompts]
        except DataError as error:
            raise ConfigError(str(error)) from None
        with evaluating(cast("Any", self)):
            return [
                self._answer(row.to(self.device), prompt, decoding, max_images, force, way, streams(seed, n, 1))
                for n, (row, prompt) in enumerate(zip(rows, prompts, strict=True))
            ]

    def _answer(
        self,
        ids: Tensor,
        prompt: Sequence[Any],
        decoding: Decoding,
        most: int,
        force: bool,
        way: Any,
        generators: Sequence[torch.Generator],
    ) -> list[str | Tensor]:
        """Texts and images behind a row ``ids`` [1, T]."""
        shown = [part for part in prompt if not isinstance(part, str)]
        embeds = self._splice(ids, self._pixels(shown) if shown else None)
        prefix = Prefix(self.decoder, embeds, self._layout(ids, None))
        vokens = ids.new_tensor([self.voken_ids])  # [1, n]
        out: list[str | Tensor] = []
        words: list[int] = []
        written = drawn = 0
        while True:
            room = self.decoder_config.context_length - prefix.length
            opens = drawn < most and room > vokens.shape[1]
            token = self._next(prefix.hidden, ids, opens, decoding, generators)
            ends = token in self.processor.stop_ids or written >= decoding.max_new_tokens or room < 1
            ends = ends or self._stopped([*words, token])
            if ends and force and opens and not drawn and token != self.voken_ids[0]:
                words += [token] * self._stopped([*words, token])  # ``decode`` takes the whole stop off
                token = self.voken_ids[0]
            if token == self.voken_ids[0] and opens:
                drawn += 1
                said = self._said(words)
                out += [*said, self._image(prefix, ids, vokens, " ".join(map(str, said)), way, generators)]
                words = []
                ids = torch.cat([ids, vokens], 1)
                continue
            if ends:
                if token not in self.processor.stop_ids and written < decoding.max_new_tokens and room >= 1:
                    words.append(token)  # the rest of a stop of several tokens, which ``decode`` takes off
                return out + self._said(words)
            words.append(token)
            written += 1
            ids = torch.cat([ids, ids.new_tensor([[token]])], 1)
            if room < 2:
                return out + self._said(words)
            prefix.block(self.decoder.embed(ids[:, -1:]), prefix.layout.names[-1], keep=True, modality=0)

    def _next(
        self, hidden: Tensor, ids: Tensor, opens: bool, decoding: Decoding, generators: Sequence[torch.Generator]
    ) -> int:
        """What follows ``hidden`` [1, D]: a text id, or where an image may begin its first token."""
        first = self.voken_ids[0]
        logits = self.decoder.logits(hidden)[:, : first + 1].float()  # [1, V + 1]
        logits[:, self.processor.tokenizer.vocab_size : first] = -torch.inf
        if not opens:
            logits[:, first] = -torch.inf
        if decoding.repetition_penalty != 1:
            seen = ids_seen(ids, first + 1)
            seen[:, first] = False
            logits = penalised(logits, seen, decoding.repetition_penalty)
        draw = None
        if decoding.temperature:
            draw = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in generators]).to(hidden.device)
        return int(choose(logits, decoding, draw))

    def _image(
        self,
        prefix: Prefix,
        ids: Tensor,
        vokens: Tensor,
        said: str,
        way: Any,
        generators: Sequence[torch.Generator],
    ) -> Tensor:
        """Write an image's tokens behind what was ``said`` and draw it: [3, H, W]."""
        before = prefix.hidden[:, None]  # [1, 1, D], what predicted the first of them
        hidden = prefix.block(self.decoder.embed(vokens), prefix.layout.names[-1], keep=True, modality=0)
        row = torch.cat([ids[:, -1:], vokens], 1)
        if self.config.condition_from == "text":
            condition = self.condition_of([said])
        else:
            states = self._states(row, torch.cat([before, hidden], 1), 1)  # [1, n, D]
            condition = self.output_connector(states)
        return self._pictures(self._latents(condition, None, way, generators))[0]

    def _stopped(self, words: Sequence[int]) -> bool:
        """A stop of several tokens stands at the end."""
        return any(tuple(words[-len(stop) :]) == tuple(stop) for stop in self.processor.stop_sequences)

    def _said(self, words: Sequence[int]) -> list[str | Tensor]:
        text = self.processor.decode(words)
        return [text] if text else []
