"""Answers with masks: what the wiring ``segmenter`` writes about images, and the mask of every target it names."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zoo.capabilities import MaskedText
from zoo.errors import ConfigError
from zoo.layout import Layout, TokenBatch
from zoo.models.base import evaluating
from zoo.part import Features
from zoo.sampling.text import Decoding, align_right, until_stop, write
from zoo_grounding.marks import groups_of
from zoo_grounding.masks import at_original_size

if TYPE_CHECKING:
    from zoo.decoders.base import Decoder
    from zoo_grounding.masks import ImageLike, Square
    from zoo_grounding.processor import GroundingProcessor
    from zoo_grounding.segmenter import SegmenterConfig

CHUNK = 32
"""Images a forward pass."""


class AnswersWithMasks(nn.Module):
    """The capabilities ``segment`` and ``segment_images``; the model offers ``_look``, ``_sequence`` and ``_draw`` (see
    ``Segmenter``)."""

    decoder: Decoder
    encoder: Any
    tokenizer: Any
    mask_decoder: Any
    config: SegmenterConfig
    mask_names: tuple[str, ...]

    if TYPE_CHECKING:

        @property
        def processor(self) -> GroundingProcessor: ...
        @property
        def square(self) -> Square: ...
        @property
        def device(self) -> torch.device: ...
        def _look(self, pixel_values: Tensor) -> tuple[Features, list[Features]]: ...
        def _sequence(self, ids: Tensor, attention_mask: Tensor | None, eye: Features) -> tuple[Tensor, Layout]: ...
        def _draw(
            self, hidden: Tensor, places: Tensor, row: Tensor, mask_pixels: Tensor | None, levels: Sequence[Features]
        ) -> Tensor: ...

    def segment(self, images: Any, prompts: Any, max_new_tokens: int = 64) -> Any:
        """Answer a question about each image greedily; every target that the answer names comes with its mask.

        Args:
            images: N images or paths, or one where ``prompts`` is one str.
            prompts: N questions, or one.
            max_new_tokens: Most tokens of an answer.

        Returns:
            A list of N ``MaskedText``, or one for one prompt. An answer without a target has masks [0, H, W].

        Raises:
            ConfigError: Images and prompts that differ in number.
            DataError: A path that is no readable image, or a prompt that is too long.
        """
        if isinstance(prompts, str):
            return self.segment([images], [prompts], max_new_tokens)[0]
        if len(images) != len(prompts):
            raise ConfigError(f"{len(images)} images and {len(prompts)} prompts: expected one each")
        out: list[MaskedText] = []
        with evaluating(self):
            for start in range(0, len(images), CHUNK):
                part = slice(start, start + CHUNK)
                out += self._answers(images[part], prompts[part], Decoding(max_new_tokens=max_new_tokens))
        return out

    def segment_images(self, images: Sequence[ImageLike], texts: Sequence[str]) -> list[Tensor]:
        """One mask an image, [H, W] bool: where it shows what its text names, the union of the targets in the answer to
        the wiring's ``question``; empty where the answer names none."""
        asked = [self.config.question.replace("{object}", text) for text in texts]
        answers = self.segment(list(images), asked, self.config.answer_tokens)
        return [answer.masks.any(0) for answer in answers]

    def _answers(self, images: Sequence[ImageLike], prompts: Sequence[str], decoding: Decoding) -> list[MaskedText]:
        processor = self.processor
        rows = processor.encode_prompts(prompts, len(images))  # pads on the left
        ids, real = rows["input_ids"].to(self.device), rows["attention_mask"].to(self.device)
        squares, resized, sizes = self.square(images)
        dtype = next(self.encoder.parameters()).dtype
        squares = squares.to(self.device, dtype)
        eye, levels = self._look(
            squares if processor.shares else processor.encode_images(images).to(self.device, dtype)
        )
        new = self._continue(eye, ids, real, decoding)  # [B, n]
        answers = [until_stop(row, sorted(processor.stop_ids)) for row in new.tolist()]
        drawn, row = self._drawn_of(ids, real, new, answers, eye, levels, None if processor.shares else squares)
        owner = row.cpu()
        canvas = (int(sizes[:, 0].max()), int(sizes[:, 1].max()))
        logits, _ = at_original_size(drawn, resized[owner], sizes[owner], self.square.size, canvas)
        logits = logits.cpu()
        return [
            self._masked_text(written, logits[owner == number], (int(sizes[number, 0]), int(sizes[number, 1])))
            for number, written in enumerate(answers)
        ]

    def _drawn_of(
        self,
        ids: Tensor,
        real: Tensor,
        new: Tensor,
        answers: Sequence[Sequence[int]],
        eye: Features,
        levels: Sequence[Features],
        mask_pixels: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Logits [M, h, w] over squares of the targets that answers name, and their rows [M].

        What was written is read once more: the state before each target's token is the one that predicted it, as the
        released ``evaluate`` has it.

        Args:
            ids: [B, T] prompts, pads on the left; ``real`` [B, T] bool.
            new: [B, n] ids written behind them; ``answers``, the same up to their stops.
        """
        names = len(self.mask_names)
        groups = [
            groups_of([place for place, id in enumerate(row) if id in self.processor.target_ids], names)
            for row in answers
        ]
        owner = [row for row, own in enumerate(groups) for _ in own]
        flat = [[ids.shape[1] + place for place in group] for own in groups for group in own]
        whole = torch.cat([ids, new[:, :-1]], 1)  # nobody reads what follows the last token
        attended = torch.cat([real, torch.ones_like(new[:, :-1], dtype=torch.bool)], 1)
        embeds, layout = self._sequence(whole, attended, eye)
        hidden = self.decoder(TokenBatch(embeds, layout))  # [B, T + n - 1, D]
        places = torch.tensor(flat, dtype=torch.long, device=ids.device).view(-1, names)
        row = torch.tensor(owner, dtype=torch.long, device=ids.device)
        return self._draw(hidden, places, row, mask_pixels, levels), row

    def _masked_text(self, ids: Sequence[int], logits: Tensor, size: tuple[int, int]) -> MaskedText:
        """The answer, each target's tokens written as its number in brackets, and masks of logits [K, H, W] above 0."""
        logits = logits[:, : size[0], : size[1]]
        masks = logits > 0
        area = masks.flatten(1).sum(1).clamp(min=1)
        scores = (logits.sigmoid() * masks).flatten(1).sum(1) / area
        text = self.processor.decode(ids)
        written = re.compile(r"\s*".join(re.escape(name) for name in self.mask_names))
        phrases: list[str] = []

        def numbered(found: re.Match[str]) -> str:
            before = re.split(r"[.,;:?!]|\[\d+\]|\band\b", text[: found.start()])[-1]
            phrases.append(re.split(re.escape(self.mask_names[-1]), before)[-1].strip())
            return f"[{len(phrases)}]"

        return MaskedText(
            text=written.sub(numbered, text) if len(masks) else text,
            masks=masks,
            phrases=tuple(phrases),
            scores=tuple(scores.tolist()),
        )

    # -- text, which reads images as masks do ----------------------------------------------------------------------

    @torch.inference_mode()
    def generate_ids(
        self,
        pixel_values: Tensor | None,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoding: Decoding | None = None,
        **others: Any,
    ) -> Tensor:
        """As ``WritesText.generate_ids``; an image's padding is hidden."""
        if pixel_values is None:
            raise ConfigError("a segmenter writes about images: give pixel_values")
        real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        input_ids, real = align_right(input_ids, real)
        others = {name: value for name, value in others.items() if not name.startswith("instruction")}
        return self._continue(self._look(pixel_values)[0], input_ids, real, decoding or Decoding(), **others)

    def _continue(
        self,
        eye: Features,
        ids: Tensor,
        real: Tensor,
        decoding: Decoding,
        *,
        stop_ids: Sequence[int] | None = None,
        pad_id: int | None = None,
        generators: Sequence[torch.Generator] | None = None,
        tell: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        embeds, layout = self._sequence(ids, None if bool(real.all()) else real, eye)
        return write(
            self.decoder,
            embeds,
            layout,
            decoding,
            stop_ids=sorted(self.processor.stop_ids) if stop_ids is None else stop_ids,
            stop_sequences=self.processor.stop_sequences if stop_ids is None else (),
            pad_id=self.tokenizer.pad_id if pad_id is None else pad_id,
            generators=generators,
            prompt_ids=ids,
            tell=tell,
        )

    def text_logits(
        self,
        pixel_values: Tensor | None,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        instruction_ids: Tensor | None = None,
        instruction_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, T, V] of every position of rows with one image each; an image's padding is hidden."""
        if pixel_values is None:
            raise ConfigError("a segmenter reads pixels: give pixel_values")
        embeds, layout = self._sequence(input_ids, attention_mask, self._look(pixel_values)[0])
        return self.decoder.logits(self.decoder(TokenBatch(embeds, layout)))
