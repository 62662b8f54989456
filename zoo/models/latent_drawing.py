"""Drawing images by denoising among text: from a text, from an image and an instruction, and in a running sequence that
switches between writing and drawing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoo.data.sequences import Image, Text, layout_of, segments_of, write_row
from zoo.decoders.base import DecoderConfig
from zoo.diffusion.noising import Process
from zoo.errors import ConfigError, DataError
from zoo.layout import Layout
from zoo.models.unified_text import WritesUnified
from zoo.models.writing import _same_length
from zoo.patch_codecs.base import PatchCodec
from zoo.sampling.block import CHUNK, Prefix, distinct
from zoo.sampling.diffusion import Denoising, denoise, gaussian
from zoo.sampling.guidance import mixed, weights
from zoo.sampling.text import Decoding, streams

if TYPE_CHECKING:
    from zoo.capabilities import ImageLike
    from zoo.tokenizers.base import LatentTokenizer


class DrawsLatents(WritesUnified):
    """The capabilities ``generate_images``, ``edit_images`` and ``generate_interleaved``.

    What stands before an image is computed once for all steps and both branches of guidance; the branch without
    condition has the same images and no text. Noisy patches are overwritten, never appended; the finished image is
    read once more, clean, before anything follows it.
    """

    patch_codec: PatchCodec
    process: Process
    places: int
    config: Any
    decoder_config: DecoderConfig
    image_config: Any
    image_tokenizer: LatentTokenizer  # type: ignore[assignment]

    if TYPE_CHECKING:

        @property
        def processor(self) -> Any: ...
        def prompt_chunks(self, texts: Sequence[str]) -> list[tuple[Tensor, Tensor]]: ...

    # -- capabilities ----------------------------------------------------------------------------------------------

    def generate_images(
        self,
        texts: Sequence[str],
        *,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str | None = None,
    ) -> Tensor:
        """Draw one image a text: [N, 3, H, W] float32 in [0, 1].

        Args:
            seed: Image n's noise comes from a stream of (seed, n) alone.
            steps: Of the sampler; the wiring's by default.
            guidance: Scale of classifier-free guidance, 1 = none; the wiring's by default.
            sampler: One of those of the model's process; the wiring's by default.

        Raises:
            ConfigError: A sampler of the other process, steps outside 1 to 1,000, or a text that leaves no room for the
                image.
        """
        how, mix = self._how(sampler, steps, guidance)
        rows = self.prompt_chunks(texts)
        drawn = [torch.empty(0, 3, *self._size, device=self.device)]
        with self._evaluating():
            for number, (ids, segment) in enumerate(rows):
                generators = streams(seed, number * CHUNK, len(ids) // 2)
                if len(mix) == 1:
                    ids, segment = ids.chunk(2)[0], segment.chunk(2)[0]
                drawn.append(self._draw(ids, segment, None, how, mix, generators))
        return torch.cat(drawn)

    def edit_images(
        self,
        images: Sequence[ImageLike],
        instructions: Sequence[str],
        *,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str | None = None,
    ) -> Tensor:
        """Draw each image anew as its instruction says: [N, 3, H, W] float32 in [0, 1]; arguments as in
        ``generate_images``.

        The sequence is the image, clean, the instruction, and the image to be drawn (arXiv 2408.11039, section 4.4);
        the branch without condition has the image and no instruction.
        """
        _same_length(images, instructions, "instructions")
        how, mix = self._how(sampler, steps, guidance)
        shown, rows = Image(self.places, given=True), []
        for start in range(0, len(images), CHUNK):  # all are looked at before the first image is drawn
            told = [self.processor.text_ids(text) for text in instructions[start : start + CHUNK]]
            parts: list[list[Text | Image]] = [[shown, Text(ids)] for ids in told]
            if len(mix) == 2:
                parts += [[shown]] * len(told)
            rows.append(self._open_rows(parts))
        drawn = [torch.empty(0, 3, *self._size, device=self.device)]
        with self._evaluating():
            for number, (ids, segment) in enumerate(rows):
                part = images[number * CHUNK : (number + 1) * CHUNK]
                features = self._clean(self._encoded(part)).repeat(len(mix), 1, 1)
                generators = streams(seed, number * CHUNK, len(part))
                drawn.append(self._draw(ids, segment, features, how, mix, generators))
        return torch.cat(drawn)

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
        top_p: float = 1.0,
    ) -> list[list[str | Tensor]]:
        """Go on with each prompt, a list of texts and images (PIL or paths; a path is a ``Path``), in texts and images.

        The model writes until it opens an image, draws it, closes it by rule, and writes on, to its end, to
        ``max_new_tokens`` tokens of text in all, or to the end of its context. An image that no longer fits is not
        opened.

        Returns:
            A list a prompt of new texts and images [3, H, W] float32 in [0, 1], in order.

        Raises:
            ConfigError: A prompt that does not fit, or values out of range.
        """
        self._check_turns(prompts, max_images)
        decoding = Decoding(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
        how, mix = self._how(sampler, steps, guidance)
        for prompt in prompts:
            self._open_rows([self._told(prompt)], opened=False)
        with self._evaluating():
            return [
                self._go_on(prompt, max_images, decoding, how, mix, streams(seed, n, 1)[0])
                for n, prompt in enumerate(prompts)
            ]

    # -- sequences -------------------------------------------------------------------------------------------------

    def _draw(
        self,
        ids: Tensor,
        segment: Tensor,
        features: Tensor | None,
        how: Denoising,
        mix: tuple[float, ...],
        generators: Sequence[torch.Generator],
    ) -> Tensor:
        """Images [N, 3, H, W] behind the rows ``ids`` and ``segment`` [branches N, P], which end where an image begins.

        Args:
            features: [M, n, D] of the images in the rows, in order.
        """
        number = int(segment.max()) + 1
        ids, segment = ids.to(self.device), segment.to(self.device)
        layout = self._naming(segment, number)
        embeds = self._splice(ids, None, features)
        if features is None:
            first, rows = distinct(ids, segment)  # rows without a text are all one
            prefix = Prefix(self.decoder, embeds[first], layout.select(first), rows)
        else:
            prefix = Prefix(self.decoder, embeds, layout)
        return self._pictures(self._denoised([prefix], number, how, mix, generators))

    def _denoised(
        self,
        prefixes: Sequence[Prefix],
        number: int,
        how: Denoising,
        mix: tuple[float, ...],
        generators: Sequence[torch.Generator],
    ) -> Tensor:
        """Latents [N, C, h, w] of the image ``number`` of its rows.

        Args:
            prefixes: One with the rows of all branches, or one a branch.
        """
        height, width = self.image_config.grid
        noise = gaussian(generators, (self.image_tokenizer.channels, height, width), self.device)
        inside = len(mix) // len(prefixes)  # branches of one prefix
        dtype = next(self.patch_codec.parameters()).dtype  # steps are taken in fp32 whatever the weights' precision

        def predict(x: Tensor, level: Tensor) -> Tensor:
            tokens, skips = self.patch_codec.encode(x.to(dtype), level)  # [N, n, D]
            tokens = tokens.repeat(inside, 1, 1)
            hidden = torch.cat([prefix.block(tokens, f"image {number}", modality=1) for prefix in prefixes])
            around = tuple(skip.repeat(len(mix), *(1,) * (skip.ndim - 1)) for skip in skips)
            out = self.patch_codec.decode(hidden, around, level.repeat(len(mix)), (height, width))
            return mixed(out.to(x.dtype), mix)

        return denoise(self.process, predict, noise, how, generators)

    def _go_on(
        self,
        prompt: Sequence[Any],
        max_images: int,
        decoding: Decoding,
        how: Denoising,
        mix: tuple[float, ...],
        generator: torch.Generator,
    ) -> list[str | Tensor]:
        """Write and draw behind one prompt; the branch without condition keeps up with the images alone."""
        shown = [part for part in prompt if not isinstance(part, str)]
        features = self._clean(self._encoded(shown)) if shown else None
        told = self._told(prompt)
        branches = [self._begun(told, features, len(shown) + max_images)]
        if len(mix) == 2 and max_images:
            images: list[Text | Image] = [part for part in told if isinstance(part, Image)]
            branches.append(self._begun(images, features, len(shown) + max_images))
        written = branches[0]
        start, end = (self.vocabulary.id(name) for name in (self.style.start, self.style.end))
        out: list[str | Tensor] = []
        words: list[int] = []
        drawn, left = 0, decoding.max_new_tokens
        while left:
            room = self._room(written)
            opens = drawn < max_images and room > self.places + 2  # what follows an image must fit as well
            token = self._next_token(written.hidden, opens, decoding, [generator])
            if token == start:
                drawn += 1
                _say(branches, self._word(start))
                latents = self._denoised(branches, len(shown) + drawn, how, mix, [generator])  # [1, C, h, w]
                clean = self._clean(latents)
                for prefix in branches:  # what follows reads the finished image, not its last noisy form
                    prefix.block(clean, f"image {len(shown) + drawn}", keep=True, modality=1)
                _say(branches, self._word(end))
                out += [*self._spoken(words), self._pictures(latents)[0]]
                words = []
                continue
            if token in self.processor.stop_ids:
                break
            words.append(token)
            left -= 1
            if room < 1:
                break
            if left:
                _say(branches[:1], self._word(token))
        return [*out, *self._spoken(words)]

    def _told(self, prompt: Sequence[Any]) -> list[Text | Image]:
        """A prompt as parts of a row."""
        return [
            Text(self.processor.text_ids(part)) if isinstance(part, str) else Image(self.places, given=True)
            for part in prompt
        ]

    def _begun(self, parts: Sequence[Text | Image], features: Tensor | None, images: int) -> Prefix:
        """The prefix of one prompt, which may go on to ``images`` images in all."""
        ids, segment = (x.to(self.device) for x in self._open_rows([parts], opened=False))
        return Prefix(self.decoder, self._splice(ids, None, features), self._naming(segment, images))

    def _open_rows(self, rows: Sequence[Sequence[Text | Image]], opened: bool = True) -> tuple[Tensor, Tensor]:
        """Rows of texts and images to be continued, padded on the left: ids and segment, [N, P] int64 both.

        Args:
            opened: They end where an image begins, and must leave room for it.

        Raises:
            ConfigError: A row that does not fit.
        """
        processor, start = self.processor, self.vocabulary.id(self.style.start)
        written: list[list[int]] = []
        for parts in rows:
            try:
                row = write_row(
                    self.style, self.vocabulary, processor.words, "interleaved", parts,
                    length=processor.length, closed=False,
                )  # fmt: skip
            except DataError as error:
                raise ConfigError(str(error)) from None
            need = len(row.ids) + (self.places + 2 if opened else 1)
            if need > processor.length:
                raise ConfigError(
                    f"the prompt has {len(row.ids)} tokens, image places included, needs {need - len(row.ids)} more,"
                    f" and {processor.length} fit: shorten the prompt, or raise the decoder's context_length"
                )
            written.append([*row.ids, start] if opened else list(row.ids))
        width = max(map(len, written), default=0)
        ids = torch.full((len(written), width), processor.words.pad)
        real = torch.zeros(ids.shape, dtype=torch.bool)
        for n, one in enumerate(written):
            ids[n, width - len(one) :] = torch.tensor(one)
            real[n, width - len(one) :] = True
        return ids, segments_of(ids, real, self.style, self.vocabulary)

    def _naming(self, segment: Tensor, images: int) -> Layout:
        """The layout of rows [N, P] in which segments of ``images`` images have names, also of those to come."""
        coming = torch.arange(1, images + 1, device=segment.device).expand(len(segment), -1)
        whole = torch.cat([segment, coming], dim=1)
        return layout_of(whole, self.style, slots=whole > 0).truncate(segment.shape[1])

    # -- images ----------------------------------------------------------------------------------------------------

    def image_features(self, pixel_values: Tensor, *others: Any, **more: Any) -> Tensor:
        """What clean images [N, 3, H, W] are in the sequence: [N, n, D]."""
        return self._clean(self.image_tokenizer.encode(pixel_values))

    def _clean(self, latents: Tensor) -> Tensor:
        """The patches [N, n, D] of clean latents [N, C, h, w]."""
        dtype = next(self.patch_codec.parameters()).dtype
        return self.patch_codec.encode(latents.to(dtype), latents.new_zeros(len(latents)))[0]

    def _encoded(self, images: Sequence[ImageLike]) -> Tensor:
        return self.image_tokenizer.encode(self._pixels(images))

    def _pictures(self, latents: Tensor) -> Tensor:
        """Latents [N, C, h, w] as images [N, 3, H, W] float32 in [0, 1]."""
        pixels = self.image_tokenizer.decode(latents.to(next(self.image_tokenizer.parameters()).dtype)).float()
        shown: Tensor = self.image_config.shown(pixels)
        return shown

    # -- small things ----------------------------------------------------------------------------------------------

    def _how(
        self, sampler: str | None, steps: int | None, guidance: float | None
    ) -> tuple[Denoising, tuple[float, ...]]:
        """How to draw, and the weights of the branches.

        Raises:
            ConfigError: A sampler that does not fit the process, steps or guidance out of range.
        """
        how: Denoising = self.config.drawing(sampler, steps)
        how.of(self.process)
        return how, weights(self.config.guidance if guidance is None else guidance, "scale")

    @property
    def _size(self) -> tuple[int, int]:
        return self.image_config.image_size, self.image_config.image_size

    def _room(self, prefix: Prefix) -> int:
        """Tokens that still fit behind a prefix."""
        room: int = self.decoder_config.context_length - prefix.length
        return room

    def _word(self, token: int) -> Tensor:
        """The embedding [1, 1, D] of a token."""
        return self.decoder.embed(torch.tensor([[token]], device=self.device))

    def _spoken(self, words: Sequence[int]) -> list[str]:
        """Written tokens as a text, if there are any."""
        text = self.processor.decode(words)
        return [text] if text else []


def _say(prefixes: Sequence[Prefix], word: Tensor) -> None:
    for prefix in prefixes:
        prefix.block(word, "text", keep=True, modality=0)
