"""Drawing with a denoiser in the latents of an autoencoder: from a text, from an image and a text, and parts of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from zoo.denoisers.base import Denoiser
from zoo.diffusion.noising import Process
from zoo.errors import ConfigError
from zoo.models.base import evaluating
from zoo.part import Features
from zoo.sampling.block import CHUNK
from zoo.sampling.canvas import check_masks, slots_of
from zoo.sampling.diffusion import Denoising, Tell, first_step
from zoo.sampling.guidance import weights
from zoo.sampling.latents import branches, draw_latents
from zoo.sampling.text import streams

if TYPE_CHECKING:
    from zoo.capabilities import ImageLike
    from zoo.tokenizers.base import LatentTokenizer

STEPS_OF_A_SCALE = 25
"""Steps of drawing where a ``scale`` makes a model small."""


@dataclass(frozen=True, kw_only=True)
class LatentDrawingFields:
    """How images are drawn where a call does not say otherwise. They change no weight.

    Attributes:
        sampler: ``ddpm``, ``ddim``, ``dpm-solver``, ``euler`` or ``pndm`` after the objective ``diffusion``;
            ``midpoint``, ``euler`` or ``rk45`` after ``flow`` (``zoo.sampling.diffusion``); empty = the first of them.
        drawing_steps: Steps of it; a ``scale`` settles on fewer.
        guidance: Scale s of classifier-free guidance, u + s (c - u); 1 = none.
        rescale: phi, how far the guided prediction's deviation is brought to the conditional one's (arXiv 2305.08891).
        eta: Of DDIM.
        spacing: How steps are spread: ``leading``, ``trailing`` or ``linspace``.
        offset: Added to the levels of ``leading``, 0 or 1.
        clean_end: The last step of ``ddim`` and ``pndm`` ends at no noise at all.
        strength: Share of the steps that are taken when an image is edited: how much of it is drawn anew.
    """

    drawing: ClassVar[frozenset[str]] = frozenset(
        {
            "sampler", "drawing_steps", "guidance", "rescale", "eta", "spacing", "offset", "clean_end", "strength",
        }
    )  # fmt: skip

    sampler: str = ""
    drawing_steps: int = 50
    guidance: float = 7.5
    rescale: float = 0.0
    eta: float = 0.0
    spacing: str = "leading"
    offset: int = 0
    clean_end: bool = True
    strength: float = 0.6

    def check_drawing(self) -> None:
        """Refuse values that no sampler knows.

        Raises:
            ValueError: One of them.
        """
        try:
            self.denoising()
            weights(self.guidance, "scale")
            first_step(self.drawing_steps, self.strength)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"rescale = {self.rescale} must lie in 0 to 1")

    def denoising(self, sampler: str | None = None, steps: int | None = None) -> Denoising:
        """How latents are drawn, with what a call says otherwise.

        Raises:
            ConfigError: Unknown sampler, or steps outside their range.
        """
        return Denoising(
            sampler=self.sampler if sampler is None else sampler,
            steps=self.drawing_steps if steps is None else steps,
            eta=self.eta,
            spacing=self.spacing,
            offset=self.offset,
            clean_end=self.clean_end,
        )


@dataclass(frozen=True)
class _Way:
    """What a call settles."""

    how: Denoising
    mix: tuple[float, ...]
    rescale: float
    tell: Tell | None = None


class DrawsByDenoising:
    """The capabilities ``generate_images``, ``inpaint_images`` and ``edit_images``.

    A model offers ``denoiser``, ``process``, ``image_tokenizer``, ``image_config``, ``processor`` and ``config``
    (``LatentDrawingFields``), and three methods: ``prompt_rows`` checks and encodes all texts, ``condition`` makes the
    denoiser's condition of some of these rows, ``no_condition`` that of the branch without one. What makes a condition
    of its own calls ``draw``.
    """

    denoiser: Denoiser
    process: Process
    config: Any
    image_config: Any
    image_tokenizer: LatentTokenizer

    if TYPE_CHECKING:

        @property
        def processor(self) -> Any: ...
        @property
        def device(self) -> torch.device: ...

    def prompt_rows(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Every text as a row of a batch for ``condition``, all of them looked at before any is worked on.

        Raises:
            ConfigError: A text that does not fit.
        """
        raise TypeError(f"{type(self).__name__} defines no prompt_rows")

    def condition(self, batch: Mapping[str, Tensor]) -> Features:
        """What the denoiser reads for the rows of a batch: ``tokens`` [B, S, D], their ``mask``, ``pooled``."""
        raise TypeError(f"{type(self).__name__} defines no condition")

    def no_condition(self) -> Features:
        """What it reads without a condition, for guidance: a single row, or as many as there are images."""
        raise TypeError(f"{type(self).__name__} defines no no_condition")

    # -- capabilities ----------------------------------------------------------------------------------------------

    def generate_images(
        self,
        texts: Sequence[str],
        *,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str | None = None,
        rescale: float | None = None,
        together: int = CHUNK,
        tell: Tell | None = None,
    ) -> Tensor:
        """Draw one image a text: [N, 3, H, W] float32 in [0, 1].

        Args:
            seed: Image n's noise comes from a stream of (seed, n) alone.
            steps: Of the sampler; this and what follows is the wiring's by default.
            guidance: Scale of classifier-free guidance, 1 = none.
            sampler: One of those of the model's process.
            rescale: phi of the guidance's rescaling.
            together: Images drawn as one batch. It changes nothing of an image, unless attention processors of the
                denoiser let images of a batch read each other.
            tell: Hears of every prediction of a batch before it is made: its number from 0, and its noise level.

        Raises:
            ConfigError: A sampler of another process, values out of range, or a text that does not fit.
        """
        way = self._way(sampler, steps, guidance, rescale, tell)
        _check_list(texts, "texts")
        if together < 1:
            raise ConfigError(f"together = {together} must be 1 or more")
        rows = self.prompt_rows(texts)
        drawn = [torch.empty(0, 3, *self._size, device=self.device)]
        with evaluating(self):  # type: ignore[arg-type]
            for start in range(0, len(texts), together):
                condition = self.condition(self._part(rows, start, together))
                generators = streams(seed, start, len(condition.tokens))
                drawn.append(self._pictures(self._latents(condition, None, way, generators)))
            return torch.cat(drawn)

    def draw(
        self,
        condition: Features,
        unconditional: Features | None = None,
        *,
        seed: int = 0,
        first: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str | None = None,
        rescale: float | None = None,
        noise: Tensor | None = None,
        tell: Tell | None = None,
    ) -> Tensor:
        """Draw one image for each row of a condition, as one batch: [N, 3, H, W] float32 in [0, 1].

        Args:
            condition: Tokens [N, S, D] of the denoiser's ``condition_width``, ``mask`` [N, S], ``pooled`` [N, P].
            unconditional: The same of the branch without a condition, one row or N; ``no_condition()`` by default.
            first: Number of the first image in the whole request, which settles its noise.
            noise: [N, C, h, w] to start from instead of that of the streams.
            steps, guidance, sampler, rescale, tell: As of ``generate_images``.

        Raises:
            ConfigError: A condition of another width, or as ``generate_images``.
        """
        way = self._way(sampler, steps, guidance, rescale, tell)
        with evaluating(self):  # type: ignore[arg-type]
            generators = streams(seed, first, len(condition.tokens))
            return self._pictures(self._latents(condition, unconditional, way, generators, noise=noise))

    def inpaint_images(
        self,
        images: Sequence[ImageLike],
        masks: Tensor,
        texts: Sequence[str],
        *,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str | None = None,
        rule: str = "any",
    ) -> Tensor:
        """Draw a part of images anew: [N, 3, H, W] float32 in [0, 1]. After every step the latents elsewhere are those
        of the image at that step's noise level, after the last one the image's own; all pixels are then decoded.

        Args:
            images: As the image tokenizer is shown them.
            masks: [N, H, W] bool, True = draw anew.
            rule: What a pixel does to its latent; see ``zoo.sampling.canvas.slots_of``.

        Raises:
            ConfigError: Masks of another size, number or dtype; otherwise as ``generate_images``.
        """
        _check_list(images, "images")
        way = self._way(sampler, steps, guidance, None, None)
        if way.how.of(self.process) == "rk45":
            raise ConfigError("sampler = 'rk45' chooses its own steps: choose midpoint or euler to inpaint")
        check_masks(masks, len(images), self._size)
        grid = self.image_config.grid
        unknown = slots_of(masks, grid, rule).view(-1, 1, *grid)
        return self._from_images(images, texts, way, seed, unknown=unknown)

    def edit_images(
        self,
        images: Sequence[ImageLike],
        instructions: Sequence[str],
        *,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str | None = None,
        strength: float | None = None,
    ) -> Tensor:
        """Draw each image on from a noisy form of itself, with a text (SDEdit): [N, 3, H, W] float32 in [0, 1].

        Args:
            instructions: One an image: what the result shows, as a caption says it.
            strength: Share of the steps that are taken, above 0 to 1: the more, the less is left of the image; the
                wiring's by default.

        Raises:
            ConfigError: A strength that leaves no step; otherwise as ``generate_images``.
        """
        _check_list(images, "images")
        way = self._way(sampler, steps, guidance, None, None)
        strength = self.config.strength if strength is None else strength
        if first_step(way.how.steps, strength) and way.how.of(self.process) == "rk45":
            raise ConfigError("sampler = 'rk45' chooses its own steps: choose midpoint or euler to edit")
        return self._from_images(images, instructions, way, seed, strength=strength)

    def prepared_images(self, images: Sequence[ImageLike]) -> Tensor:
        """The images as the image tokenizer is shown them, [N, 3, H, W] float32 in [0, 1]."""
        shown = [torch.empty(0, 3, *self._size, device=self.device)]
        for start in range(0, len(images), CHUNK):
            shown.append(self.image_config.shown(self._latent_pixels(images[start : start + CHUNK])))
        return torch.cat(shown)

    # -- latents ---------------------------------------------------------------------------------------------------

    def _latents(
        self,
        condition: Features,
        unconditional: Features | None,
        way: _Way,
        generators: Sequence[torch.Generator],
        **more: Any,
    ) -> Tensor:
        """Latents [N, C, h, w] for the rows of a condition; guidance adds the branch without one."""
        if len(way.mix) == 2:
            condition = branches([condition, self.no_condition() if unconditional is None else unconditional])
        return draw_latents(
            self.denoiser, self.process, condition, way.how, way.mix, generators,
            grid=self.image_config.grid, rescale=way.rescale, tell=way.tell,
            size_ids=self.size_ids(len(condition.tokens)), **more,
        )  # fmt: skip

    def size_ids(self, rows: int) -> Tensor | None:
        """The sizes [rows, 6] of images that fill the canvas, where the denoiser reads such."""
        if not self.denoiser.reads_sizes:
            return None
        side = self.image_config.image_size
        return torch.tensor([[side, side, 0, 0, side, side]], device=self.device).expand(rows, -1)

    def _from_images(
        self, images: Sequence[ImageLike], texts: Sequence[str], way: _Way, seed: int, **more: Any
    ) -> Tensor:
        """Draw on from images; ``more`` are ``unknown`` [N, 1, h, w] or ``strength``."""
        _check_list(texts, "texts")
        if len(images) != len(texts):
            raise ConfigError(f"{len(images)} images and {len(texts)} texts: expected one each")
        rows = self.prompt_rows(texts)
        unknown = more.pop("unknown", None)
        drawn = [torch.empty(0, 3, *self._size, device=self.device)]
        with evaluating(self):  # type: ignore[arg-type]
            for start in range(0, len(images), CHUNK):
                condition = self.condition(self._part(rows, start, CHUNK))
                known = self.image_tokenizer.encode(self._latent_pixels(images[start : start + CHUNK])).float()
                here = None if unknown is None else unknown[start : start + CHUNK].to(self.device)
                generators = streams(seed, start, len(known))
                latents = self._latents(condition, None, way, generators, known=known, unknown=here, **more)
                drawn.append(self._pictures(latents))
            return torch.cat(drawn)

    def _pictures(self, latents: Tensor) -> Tensor:
        """Latents [N, C, h, w] as images [N, 3, H, W] float32 in [0, 1]."""
        tokenizer: Any = self.image_tokenizer
        pixels = tokenizer.decode(latents.to(next(tokenizer.parameters()).dtype)).float()
        shown: Tensor = self.image_config.shown(pixels)
        return shown

    def _latent_pixels(self, images: Sequence[ImageLike]) -> Tensor:
        """Images [N, 3, H, W] as the image tokenizer reads them."""
        like = next(self.image_tokenizer.parameters())
        pixels: Tensor = self.processor.encode_images(images)
        return pixels.to(like.device, like.dtype)

    # -- what a call settles ---------------------------------------------------------------------------------------

    def _way(
        self,
        sampler: str | None,
        steps: int | None,
        guidance: float | None,
        rescale: float | None,
        tell: Tell | None,
    ) -> _Way:
        how: Denoising = self.config.denoising(sampler, steps)
        how.of(self.process)
        rescale = self.config.rescale if rescale is None else rescale
        if not 0 <= rescale <= 1:
            raise ConfigError(f"rescale = {rescale} must lie in 0 to 1")
        return _Way(how, weights(self.config.guidance if guidance is None else guidance, "scale"), rescale, tell)

    def _part(self, rows: Mapping[str, Tensor], start: int, count: int) -> dict[str, Tensor]:
        return {name: value[start : start + count].to(self.device) for name, value in rows.items()}

    @property
    def _size(self) -> tuple[int, int]:
        return self.image_config.image_size, self.image_config.image_size


def _check_list(values: Sequence[Any], name: str) -> None:
    if isinstance(values, str):
        raise ConfigError(f"expected a list of {name}, got one string: wrap it in a list")
