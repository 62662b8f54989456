"""Drawing images with a transformer whose vocabulary holds their codes: masked or autoregressive, from one prefix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.data.sequences import layout_of
from zoo.errors import ConfigError
from zoo.layout import Layout
from zoo.models.interleaving import WritesInterleaved
from zoo.sampling.block import CHUNK, Prefix, distinct
from zoo.sampling.canvas import check_direction, check_masks, extended, slots_of
from zoo.sampling.codes import CodeDecoding, CodeDraws, CodeStreams, decode_codes
from zoo.sampling.guidance import mixed
from zoo.sampling.masked import Draws, MaskedDecoding, Predict, Streams, Tell, decode
from zoo.sampling.text import streams

if TYPE_CHECKING:
    from zoo.capabilities import ImageLike


@dataclass(frozen=True, kw_only=True)
class DrawingFields:
    """How images are drawn where a call does not say otherwise. They change no weight.

    Attributes:
        drawing_steps: Forward passes over an image whose codes are masked.
        guidance: Weight of the text: w of (1 + w)c - wu for masked codes (Show-o), s of u + s(c - u) for codes one
            after the other; None = 1.75 and 3.0.
        image_guidance: Weight of the images that stand before one drawn code by code (Chameleon).
        drawing_temperature: For masked codes of the noise on the choice of slots, else of the codes; None = 1.0, 0.7.
        drawing_top_k: For codes one after the other: draw among the k likeliest; 0 = no limit.
        drawing_top_p: For codes one after the other: draw among the fewest that hold this mass.
        mask_annealing: How that noise falls: ``product``, ``linear`` or ``linspace``; see
            ``zoo.sampling.masked.MaskedDecoding``.
        mask_start: What the number of masks is a share of when part of an image is known: ``grid`` (Show-o) or
            ``unknown`` (MaskGIT, aMUSEd).
    """

    drawing_steps: int = 18
    guidance: float | None = None
    image_guidance: float = 1.2
    drawing_temperature: float | None = None
    drawing_top_k: int = 0
    drawing_top_p: float = 0.9
    mask_annealing: str = "product"
    mask_start: str = "grid"

    drawing: ClassVar[frozenset[str]] = frozenset(
        {
            "drawing_steps", "guidance", "image_guidance", "drawing_temperature", "drawing_top_k", "drawing_top_p",
            "mask_annealing", "mask_start",
        }
    )  # fmt: skip

    def check_drawing(self, schedule: str = "cosine") -> None:
        """Refuse values that no rule knows.

        Raises:
            ValueError: One of them.
        """
        try:
            self.masked_decoding(schedule)
            self.code_decoding()
        except ConfigError as error:
            raise ValueError(str(error)) from None
        if self.image_guidance < 0:
            raise ValueError(f"image_guidance = {self.image_guidance} must be 0 or more")

    def masked_decoding(self, schedule: str = "cosine") -> MaskedDecoding:
        """The rules for masked codes, whose share falls as ``schedule`` says; raises ConfigError for a value that is
        none."""
        if self.mask_start not in ("grid", "unknown"):
            raise ConfigError(f"mask_start = {self.mask_start!r}: expected grid or unknown")
        return MaskedDecoding(
            steps=self.drawing_steps,
            guidance=1.75 if self.guidance is None else self.guidance,
            schedule=schedule,
            temperature=1.0 if self.drawing_temperature is None else self.drawing_temperature,
            annealing=self.mask_annealing,
            starting_ratio=1.0 if self.mask_start == "grid" else None,
        )

    def code_decoding(self) -> CodeDecoding:
        """The rules for codes one after the other; raises ConfigError for a value that is none."""
        return CodeDecoding(
            temperature=0.7 if self.drawing_temperature is None else self.drawing_temperature,
            top_k=self.drawing_top_k,
            top_p=self.drawing_top_p,
            guidance=3.0 if self.guidance is None else self.guidance,
        )


class DrawsImages(WritesInterleaved):
    """The capabilities ``generate_images`` and ``generate_interleaved``.

    What stands before an image is forwarded once for all steps, the empty prompt of guidance once for the whole batch;
    the head runs on the slots that are still unknown and on the columns of codes alone. The model offers ``style``,
    ``vocabulary``, ``decoder`` (with ``logits_of``), ``image_tokenizer``, ``image_config``, ``places`` and
    ``prompt_rows``; see ``Unified``.
    """

    # -- capabilities ----------------------------------------------------------------------------------------------

    def generate_images(
        self, texts: Sequence[str], *, seed: int = 0, steps: int | None = None, guidance: float | None = None
    ) -> Tensor:
        """Draw an image a text: [N, 3, H, W] float32 in [0, 1].

        Args:
            seed: Row n draws from ``streams(seed, n, 1)``.
            steps: Forward passes over an image, for masked codes.
            guidance: See ``DrawingFields``.

        Raises:
            ConfigError: A text that does not fit, or values out of range.
        """
        rows = self.prompt_chunks(texts)
        how = self._decoding(steps, guidance)
        codes = [torch.empty(0, self._slots, dtype=torch.long, device=self.device)]
        with self._evaluating():
            for start in range(0, len(texts), CHUNK):
                ids, segment = rows[start // CHUNK]
                codes.append(self._drawn(ids, segment, how, streams(seed, start, len(ids) // 2)))
            return self.shown(torch.cat(codes), self.image_tokenizer.grid)

    # -- codes -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def masked_codes(
        self,
        ids: Tensor,
        segment: Tensor,
        codes: Tensor,
        unknown: Tensor,
        decoding: MaskedDecoding,
        draws: Draws,
        tell: Tell | None = None,
    ) -> Tensor:
        """Draw the unknown codes of an image behind prompts.

        Args:
            ids: [B, P] int64 prompts, then as many without their texts where ``decoding`` is guided; pads in front.
            segment: [B or 2 B, P] int64, their segment numbers, -1 at pads.
            codes: [B, n] int64; what stands at unknown slots is not read.
            unknown: [B, n] bool.
            tell: Hears every step.

        Returns:
            [B, n] int64.
        """
        prefix = self.prefix(ids, segment, codes.shape[1])
        return decode(codes, unknown, self.masked_predict(prefix, decoding.weights), decoding, draws, tell)

    @torch.inference_mode()
    def next_codes(
        self, ids: Tensor, segment: Tensor, count: int, decoding: CodeDecoding, draws: CodeDraws | None
    ) -> Tensor:
        """Draw ``count`` codes one after the other behind prompts, [B, count] int64; arguments as of
        ``masked_codes``."""
        prefix = self.prefix(ids, segment, count)
        return decode_codes(prefix, count, self.code_embeds, self.code_logits, decoding, draws, self.block_segment(1))

    def prefix(self, ids: Tensor, segment: Tensor, slots: int) -> Prefix:
        """Forward what stands before an image of so many slots, equal rows once."""
        first, rows = distinct(ids, segment)
        # the layout with the image to come, without it: its segment has a name then
        layout = self.layout_with(segment[first], [slots + 2]).truncate(ids.shape[1])
        return Prefix(self.decoder, self.decoder.embed(ids[first]), layout, rows)

    def layout_with(self, segment: Tensor, images: Sequence[int]) -> Layout:
        """The layout of rows [B, T] with images of so many tokens behind them."""
        number = int(segment.max()) if segment.numel() else 0
        for place, tokens in enumerate(images):
            segment = F.pad(segment, (0, tokens), value=max(number, 0) + 1 + place)
        return layout_of(segment, self.style)

    def block_segment(self, number: int) -> str:
        """Name of the segment of the image ``number``, from 1."""
        return "text" if self.style.full == "none" else f"image {number}"

    def masked_predict(self, prefix: Any, weights: Sequence[float], number: int = 1) -> Predict:
        """The guided logits of an image's unknown slots behind a prefix, whose rows are whole branches."""
        segment = self.block_segment(number)

        def predict(codes: Tensor, unknown: Tensor) -> Tensor:
            block = self.image_block(torch.where(unknown, self.vocabulary.mask_id - self.vocabulary.first_code, codes))
            embeds = self.decoder.embed(block).repeat(len(weights), 1, 1)  # [branches * B, n + 2, D]
            hidden = prefix.block(embeds, segment)[:, 1:-1]
            wanted = hidden[unknown.repeat(len(weights), 1)]  # [branches * M, D]
            return mixed(self.code_logits(wanted).float(), weights)

        return predict

    def image_block(self, codes: Tensor) -> Tensor:
        """Ids [B, n + 2] of an image with its start and end."""
        start, end = (
            codes.new_full((len(codes), 1), self.vocabulary.id(n)) for n in (self.style.start, self.style.end)
        )
        return torch.cat([start, codes + self.vocabulary.first_code, end], 1)

    def shown(self, codes: Tensor, grid: tuple[int, int]) -> Tensor:
        """Draw the pixels of codes [B, h·w]: [B, 3, H, W] float32 in [0, 1]."""
        parts = codes.split(CHUNK) if len(codes) else [codes]  # type: ignore[no-untyped-call]
        return torch.cat([self.image_config.shown(self.image_tokenizer.decode(part, grid)) for part in parts])

    @property
    def draws_code_by_code(self) -> bool:
        """Whether an image takes as many forward passes as it has codes, and no number of steps can be chosen."""
        return self.style.images != "masked"

    # -- what a call settles ---------------------------------------------------------------------------------------

    @property
    def _slots(self) -> int:
        return int(self.image_tokenizer.grid[0] * self.image_tokenizer.grid[1])

    def _decoding(self, steps: int | None, guidance: float | None) -> MaskedDecoding | CodeDecoding:
        if self.image_tokenizer.stored:
            raise ConfigError("this recipe's image tokenizer stores codes and draws no pixels: choose one that does")
        fields: DrawingFields = self.config
        if self.style.images == "masked":
            masked = fields.masked_decoding(getattr(fields, "schedule", "cosine"))
            return replace(
                masked,
                steps=masked.steps if steps is None else steps,
                guidance=masked.guidance if guidance is None else guidance,
            )
        if steps is not None:
            raise ConfigError(f"steps = {steps}: this model draws its codes one after the other; leave steps out")
        codes = fields.code_decoding()
        return codes if guidance is None else replace(codes, guidance=guidance)

    def _drawn(
        self,
        ids: Tensor,
        segment: Tensor,
        how: MaskedDecoding | CodeDecoding,
        generators: Sequence[torch.Generator],
        codes: Tensor | None = None,
        unknown: Tensor | None = None,
    ) -> Tensor:
        """Codes [B, n] behind the prompts [2 B, P] of both branches."""
        count = len(ids) // 2
        if len(how.weights) == 1:
            ids, segment = ids[:count], segment[:count]
        if isinstance(how, CodeDecoding):
            return self.next_codes(ids, segment, self._slots, how, CodeStreams(generators))
        if codes is None or unknown is None:
            codes = torch.zeros(count, self._slots, dtype=torch.long, device=ids.device)
            unknown = torch.ones_like(codes, dtype=torch.bool)
        return self.masked_codes(ids, segment, codes, unknown, how, Streams(generators))


class InpaintsImages(DrawsImages):
    """The capability ``inpaint_images``, and ``extrapolate_images``: of models whose codes are masked."""

    def prepared_images(self, images: Sequence[ImageLike]) -> Tensor:
        """The images as the image tokenizer is shown them, [N, 3, H, W] float32 in [0, 1]."""
        side = self.image_config.image_size
        shown = [torch.empty(0, 3, side, side, device=self.device)]
        for start in range(0, len(images), CHUNK):
            pixels = self._tokenizer_pixels(images[start : start + CHUNK])
            shown.append(self.image_config.shown(pixels).float())
        return torch.cat(shown)

    def inpaint_images(
        self,
        images: Sequence[ImageLike],
        masks: Tensor,
        texts: Sequence[str],
        *,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        rule: str = "any",
    ) -> Tensor:
        """Draw a part of images anew: [N, 3, H, W] float32 in [0, 1]. The codes elsewhere stay bit for bit; the pixels
        are all drawn by the image tokenizer.

        Args:
            images: As the image tokenizer is shown them.
            masks: [N, H, W] bool, True = draw anew.
            rule: What a pixel does to its slot; see ``zoo.sampling.canvas.slots_of``.

        Raises:
            ConfigError: Masks of another size, number or dtype; a text that does not fit.
        """
        if len(images) != len(texts):
            raise ConfigError(f"{len(images)} images and {len(texts)} texts: expected one each")
        rows, how, grid = self.prompt_chunks(texts), self._decoding(steps, guidance), self.image_tokenizer.grid
        side = self.image_config.image_size
        check_masks(masks, len(images), (side, side))
        unknown = slots_of(masks, grid, rule).to(self.device)
        drawn = [torch.empty(0, self._slots, dtype=torch.long, device=self.device)]
        with self._evaluating():
            for start in range(0, len(images), CHUNK):
                ids, segment = rows[start // CHUNK]
                codes = self._encode(self._tokenizer_pixels(images[start : start + CHUNK])).to(self.device)
                own = streams(seed, start, len(codes))
                drawn.append(self._drawn(ids, segment, how, own, codes, unknown[start : start + CHUNK]))
            return self.shown(torch.cat(drawn), grid)

    def extrapolate_images(
        self,
        images: Sequence[ImageLike],
        texts: Sequence[str],
        directions: Sequence[str],
        *,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        offset: int = 0,
    ) -> Tensor:
        """Draw images on beyond their edges: [N, 3, H', W'] float32 in [0, 1], where every round adds half an image.

        Args:
            images: As the image tokenizer is shown them.
            texts: One an image.
            directions: ``left``, ``right``, ``up`` or ``down``, one a round.
            offset: Slots a round draws beyond half of the grid.

        Raises:
            ConfigError: An unknown direction, no such offset, or a text that does not fit.
        """
        if len(images) != len(texts):
            raise ConfigError(f"{len(images)} images and {len(texts)} texts: expected one each")
        if isinstance(directions, str):
            raise ConfigError(f"directions = {directions!r}: expected a list, one direction a round")
        for direction in directions:
            check_direction(direction)
        rows, how, grid = self.prompt_chunks(texts), self._decoding(steps, guidance), self.image_tokenizer.grid
        wide = [torch.empty(0, *grid, dtype=torch.long, device=self.device)] if not len(images) else []
        with self._evaluating():
            for start in range(0, len(images), CHUNK):
                ids, segment = rows[start // CHUNK]
                known = self._encode(self._tokenizer_pixels(images[start : start + CHUNK]))
                canvas = known.to(self.device).view(-1, *grid)
                own = streams(seed, start, len(canvas))

                def draw(codes: Tensor, unknown: Tensor) -> Tensor:
                    return self._drawn(ids, segment, how, own, codes, unknown)  # noqa: B023

                for direction in directions:
                    canvas = extended(canvas, direction, grid, draw, offset)
                wide.append(canvas)
            whole = torch.cat(wide)
            return self.shown(whole.flatten(1), (whole.shape[1], whole.shape[2]))
