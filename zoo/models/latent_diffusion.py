"""Latent diffusion (arXiv 2112.10752): a text encoder, a denoiser that reads its tokens, and an autoencoder in whose
latents all of it happens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.data.conditions import CaptionedProcessor
from zoo.denoisers.base import Denoiser, DenoiserConfig
from zoo.diffusion.noising import DDPM, Process, times_and_noise
from zoo.draws import rand
from zoo.encoders.base import Encoder, TextEncoderConfig
from zoo.errors import ConfigError
from zoo.models.base import Model
from zoo.models.latent_diffusion_drawing import STEPS_OF_A_SCALE, DrawsByDenoising, LatentDrawingFields
from zoo.models.tokenizing import OwnsTokenizer
from zoo.part import Features, PartConfig, seeded
from zoo.recipe import WiringConfig
from zoo.tokenizers.base import BaseTokenizerConfig, LatentTokenizer

if TYPE_CHECKING:
    pass

TYPICAL_TEXT = 16
"""Tokens of a caption, as FLOP counts assume."""

NOTHING = ("empty", "zeros")


@dataclass(frozen=True, kw_only=True)
class LatentDiffusionConfig(LatentDrawingFields, WiringConfig):
    """Joins a text encoder, a denoiser and a continuous image tokenizer.

    Attributes:
        drop: Share of the training samples that see no condition, for guidance.
        unconditional: What no condition is: the ``empty`` text (Stable Diffusion), or ``zeros`` in place of the text
            encoder's states (SDXL).
        pad_id: Id with which every text is filled up to the text encoder's length, all of which the denoiser then
            reads, as Stable Diffusion does (49407, from 2 on 0). -1: texts keep their length and pads are not read.
        sample_latents: Draw latents from the tokenizer's Gaussian in training; otherwise take its mean.
        augment: What training images go through, as in ``bridge``.
    """

    slots: ClassVar[tuple[str, ...]] = ("text_encoder", "denoiser", "image_tokenizer")
    per_stage: ClassVar[frozenset[str]] = LatentDrawingFields.drawing | {"drop", "sample_latents", "augment"}
    scale_settles: ClassVar[frozenset[str]] = frozenset({"drawing_steps", "pad_id"})

    drop: float = 0.1
    unconditional: str = "empty"
    pad_id: int = -1
    sample_latents: bool = True
    augment: str = "none"

    def __post_init__(self) -> None:
        if not 0 <= self.drop < 1:
            raise ValueError(f"drop = {self.drop} must lie in [0, 1)")
        if self.unconditional not in NOTHING:
            raise ValueError(f"unconditional = {self.unconditional!r} must be one of {', '.join(NOTHING)}")
        if self.pad_id < -1:
            raise ValueError(f"pad_id = {self.pad_id} must be an id, or -1: pads are not read")
        self.check_drawing()

    def scaled(self, sizes: Mapping[str, Any]) -> Self:
        """A scale draws in fewer steps, and has a vocabulary of its own, whose pad is 0."""
        changed = self
        if "width" in sizes:
            changed = replace(changed, drawing_steps=min(self.drawing_steps, STEPS_OF_A_SCALE))
        if self.pad_id >= sizes.get("vocab_size", self.pad_id + 1):
            changed = replace(changed, pad_id=0)
        return changed

    def build(self, parts: Mapping[str, tuple[str, PartConfig]], seed: int) -> LatentDiffusion:
        """Build the model; every part is drawn from its own stream of ``seed``.

        Raises:
            ConfigError: Parts that do not fit each other.
        """
        return LatentDiffusion(
            self,
            cast("TextEncoderConfig", parts["text_encoder"][1]),
            cast("DenoiserConfig", parts["denoiser"][1]),
            cast("BaseTokenizerConfig", parts["image_tokenizer"][1]),
            seed,
        )


class Denoises(DrawsByDenoising, Model):
    """What every model has that draws by a denoiser in an autoencoder's latents, whatever makes the condition.

    Attributes:
        denoiser: Reads a condition of any length.
        image_tokenizer: The autoencoder; it never learns here.
        process: How latents are made noisy; the objective ``diffusion`` or ``flow`` sets it.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"prediction", "denoising_target", "noised", "level"})
    reads_image_codes: ClassVar[bool] = True

    def build_denoiser(
        self,
        denoiser_config: DenoiserConfig,
        image_config: BaseTokenizerConfig,
        seed: int,
        condition_width: int,
        pooled_width: int = 0,
    ) -> None:
        """Build both, each from its own stream of ``seed``.

        Raises:
            ConfigError: A tokenizer of codes, or a denoiser that does not fit the condition or the latents.
        """
        self.image_config, self.denoiser_config, self.seed = image_config, denoiser_config, seed
        with seeded(seed, "image_tokenizer"):
            tokenizer = image_config.build()
        if not isinstance(tokenizer, LatentTokenizer):
            raise ConfigError(
                f"the image tokenizer {type(tokenizer).__name__} makes codes, a denoiser reads latents: choose"
                " image_tokenizer=kl"
            )
        with seeded(seed, "denoiser"):
            self.denoiser: Denoiser = denoiser_config.build(
                condition_width, channels=tokenizer.channels, grid=image_config.grid, pooled_width=pooled_width
            )
        self.image_tokenizer: LatentTokenizer = tokenizer
        self._processor: Any = None
        self.set_process(DDPM(), 1.0)

    def set_process(self, process: Process, noise_limit: float) -> None:
        """Make latents noisy by ``process`` from now on, and draw them by its ways back."""
        self.process = process

    def diffuse(self, batch: Mapping[str, Tensor], condition: Features, blank: bool = False) -> dict[str, Tensor]:
        """Make the latents of a batch's images noisy and predict, with a condition of one row an image.

        Args:
            batch: ``pixel_values`` [N, 3, H, W] or ``image_latents``; ``valid`` [N] bool leaves images out of the loss;
                ``image_time`` and ``image_noise`` as of ``zoo.diffusion.noising.times_and_noise``.
            blank: It is the one blank image of a batch that shows none.

        Returns:
            ``prediction`` and ``denoising_target`` [N, C, h, w], ``noised`` [N] bool and ``level`` [N].

        Raises:
            ConfigError: Latents of another grid or number of channels.
        """
        expected = (self.image_tokenizer.channels, *self.image_config.grid)
        if blank and self.draws_latents and self.training:  # ranks draw together
            self.image_tokenizer.drawn(batch["pixel_values"].new_zeros(0, 2 * expected[0], *expected[1:]), sample=True)
        clean = batch["pixel_values"].new_zeros(1, *expected) if blank else self.tokenize_images(batch)
        if tuple(clean.shape[1:]) != expected:
            raise ConfigError(
                f"image latents have shape {tuple(clean.shape[1:])}, expected {expected}: store them with the image"
                " tokenizer of this recipe"
            )
        time, noise = times_and_noise(self.process, clean, batch, self.training, blank=blank)
        level = self.process.level(time)
        noisy = self.process.corrupt(clean, noise, time)
        prediction = self.denoiser(
            noisy, level, condition.tokens, condition.mask, condition.pooled, self.size_ids(len(level))
        )
        valid = batch.get("valid")
        return {
            "prediction": prediction,
            "denoising_target": self.process.target(clean, noise, time),
            "noised": torch.ones_like(level, dtype=torch.bool) if valid is None else valid.bool(),
            "level": level,
        }

    def _transform(self) -> Any:
        from zoo.data.images import ImageTransform

        image = self.image_config
        return ImageTransform(
            size=image.image_size,
            mean=tuple(image.mean),
            std=tuple(image.std),
            mode=cast("Any", image.resize),
            augment=self.config.augment,
        )

    def _example_images(self, batch_size: int) -> dict[str, Tensor]:
        size, like = self.image_config.image_size, next(self.image_tokenizer.parameters())
        return {"pixel_values": torch.zeros(batch_size, 3, size, size, dtype=like.dtype, device=like.device)}


class LatentDiffusion(OwnsTokenizer, Denoises):
    """``text_encoder``, ``denoiser``, and ``image_tokenizer``, which never learns here."""

    config: LatentDiffusionConfig

    def __init__(
        self,
        config: LatentDiffusionConfig,
        text_config: TextEncoderConfig,
        denoiser_config: DenoiserConfig,
        image_config: BaseTokenizerConfig,
        seed: int,
    ) -> None:
        super().__init__()
        self.config, self.text_config = config, text_config
        self.draws_latents = config.sample_latents
        with seeded(seed, "text_encoder"):
            self.text_encoder: Encoder = text_config.build()
        if config.pad_id >= text_config.vocab_size:
            raise ConfigError(
                f"wiring.pad_id = {config.pad_id} is no id of text_encoder.vocab_size = {text_config.vocab_size}"
            )
        self.build_denoiser(
            denoiser_config, image_config, seed, self.text_encoder.width, self.text_encoder.pooled_width
        )

    def reconfigure(self, config: Any) -> None:
        self.config, self._processor = config, None
        self.draws_latents = config.sample_latents

    # -- tensors ---------------------------------------------------------------------------------------------------

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Read captions, ``input_ids`` [B, L] and ``attention_mask`` [B, L] (pads behind), and make the latents of
        their images noisy; see ``diffuse``.

        ``drop_draw`` [B] in [0, 1) settles which rows see no condition (those below ``wiring.drop``); it is drawn in
        training and none is dropped otherwise. A ``condition`` [B, S, D], with ``condition_mask`` [B, S] and
        ``condition_pooled`` [B, P], stands for the captions where a batch has one.

        Returns:
            ``prediction`` and ``denoising_target`` [B, C, h, w], ``noised`` [B] bool and ``level`` [B].
        """
        given = batch["condition" if "condition" in batch else "input_ids"]
        draw = batch.get("drop_draw")
        if draw is None and self.training and self.config.drop and not given.is_meta:
            draw = rand((len(given),), given.device)
        return self.diffuse(batch, self.condition(batch, None if draw is None else draw < self.config.drop))

    def condition(self, batch: Mapping[str, Tensor], dropped: Tensor | None = None) -> Features:
        """The text encoder's tokens of a batch, those of no text in the rows ``dropped`` [B] bool."""
        if "condition" in batch:
            features = Features(batch["condition"], batch.get("condition_mask"), batch.get("condition_pooled"))
            return features if dropped is None else self._without(features, dropped)
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        if dropped is not None and self.config.unconditional == "empty":
            ids, mask = self._emptied(ids, mask, dropped)
        features = self._encoded(ids, mask)
        if dropped is not None and self.config.unconditional == "zeros":
            features = _zeroed(features, dropped)
        return features

    def no_condition(self) -> Features:
        """The empty text's tokens [1, S, D], or zeros in their place."""
        rows = {name: value.to(self.device) for name, value in self.processor.encode_texts([""]).items()}
        features = self._encoded(rows["input_ids"], rows["attention_mask"])
        if self.config.unconditional == "zeros":
            return _zeroed(features, torch.ones(1, dtype=torch.bool, device=self.device))
        return features

    def _encoded(self, ids: Tensor, mask: Tensor) -> Features:
        """Texts [B, L] as the denoiser reads them; without a graph where the text encoder does not learn."""
        frozen = not any(p.requires_grad for p in self.text_encoder.parameters())
        read: Tensor | None = mask
        if self.config.pad_id >= 0:
            length = self.text_config.context_length
            ids = F.pad(
                ids.masked_fill(~mask, self.config.pad_id), (0, length - ids.shape[1]), value=self.config.pad_id
            )
            read = None
        with torch.no_grad() if frozen else nullcontext():
            features: Features = self.text_encoder(ids, read)
        return features

    def _emptied(self, ids: Tensor, mask: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of ids, those ``dropped`` as the empty text has them."""
        empty = self.processor.encode_texts([""])["input_ids"][0].to(ids.device)  # [n], n <= L
        row, real = torch.zeros_like(ids[0]), torch.zeros_like(mask[0])
        row[: len(empty)], real[: len(empty)] = empty, True
        over = dropped[:, None]
        return torch.where(over, row, ids), torch.where(over, real, mask)

    def _without(self, features: Features, dropped: Tensor) -> Features:
        """A condition that was given, with rows that see none."""
        if self.config.unconditional == "zeros":
            return _zeroed(features, dropped)
        none = self.no_condition()
        length, at = features.tokens.shape[1], none.tokens.shape[1]
        if at > length:
            raise ConfigError(f"the condition has {length} tokens, that of no text {at}: give at least as many")
        tokens = F.pad(none.tokens, (0, 0, 0, length - at))
        real = F.pad(torch.ones_like(none.tokens[..., 0], dtype=torch.bool), (0, length - at))
        mask = torch.ones_like(features.tokens[..., 0], dtype=torch.bool) if features.mask is None else features.mask
        pooled = features.pooled
        if pooled is not None and none.pooled is not None:
            pooled = torch.where(dropped[:, None], none.pooled, pooled)
        over = dropped[:, None]
        return Features(torch.where(over[..., None], tokens, features.tokens), torch.where(over, real, mask), pooled)

    # -- what surrounds the tensors --------------------------------------------------------------------------------

    def prompt_rows(self, texts: Sequence[str]) -> dict[str, Tensor]:
        return self.processor.encode_texts(texts, whole=True)

    @property
    def processor(self) -> CaptionedProcessor:
        """Turns samples into ``forward``'s batch; made on first use.

        Raises:
            ConfigError: The tokenizer has more ids than the text encoder has rows.
        """
        if self._processor is None:
            if self.tokenizer.vocab_size > self.text_config.vocab_size:
                raise ConfigError(
                    f"tokenizer {self.text_config.tokenizer!r} has {self.tokenizer.vocab_size} ids, more than"
                    f" text_encoder.vocab_size = {self.text_config.vocab_size}: set one to fit the other"
                )
            self._processor = CaptionedProcessor(
                self._transform(),
                self.tokenizer,
                self.text_config.context_length,
                bos=getattr(self.text_config, "starts_with_bos", True),
                seed=self.seed,
            )
        processor: CaptionedProcessor = self._processor
        return processor

    def example_batch(self, batch_size: int = 1) -> dict[str, Tensor]:
        """An image and a caption of typical length an item."""
        length = min(TYPICAL_TEXT, self.text_config.context_length)
        ids = torch.ones(batch_size, length, dtype=torch.long, device=self.device)
        mask = torch.ones_like(ids, dtype=torch.bool)
        return {**self._example_images(batch_size), "input_ids": ids, "attention_mask": mask}


def _zeroed(features: Features, dropped: Tensor) -> Features:
    """A condition whose rows ``dropped`` [B] are zeros, of as many tokens as there are, all of them read."""
    over = dropped[:, None]
    mask = None if features.mask is None else features.mask | over
    pooled = None if features.pooled is None else features.pooled.masked_fill(over, 0)
    return Features(features.tokens.masked_fill(over[..., None], 0), mask, pooled)
