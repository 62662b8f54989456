"""One decoder for text and continuous images: latents in patches stand among the words, text is predicted token by
token and images by denoising (Transfusion, arXiv 2408.11039)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor

from zoo.data.sequences import layout_of, next_targets, style
from zoo.decoders.base import Decoder, DecoderConfig
from zoo.diffusion.noising import DDPM, Process, times_and_noise
from zoo.errors import ConfigError
from zoo.layout import TokenBatch
from zoo.models.base import Model
from zoo.models.bridge import _check_slots
from zoo.models.latent_drawing import DrawsLatents
from zoo.models.unified_rows import LEAST_TEXT, UnifiedRows
from zoo.part import PartConfig, seeded
from zoo.patch_codecs.base import PatchCodec, PatchCodecConfig
from zoo.recipe import WiringConfig
from zoo.sampling.diffusion import Denoising
from zoo.tokenizers.base import BaseTokenizerConfig, LatentTokenizer

STEPS_OF_A_SCALE = 50
"""Steps of drawing where a ``scale`` makes a model small: a fifth of the paper's 250."""


@dataclass(frozen=True, kw_only=True)
class UnifiedLatentConfig(WiringConfig):
    """Joins a text decoder, a patch codec and a continuous image tokenizer.

    Attributes:
        style: How rows are written (``zoo.data.sequences``); one whose images are no codes.
        image_attention: Who reads whom inside an image: ``causal`` (the paper's ablation, table 5) or ``full``; empty =
            the style's own.
        tasks: Task (``t2i``, ``mmu``, ``lm``) -> share of the samples with image and text; empty = the style's, 80 %
            caption first.
        prompt_dropout: Share of captions left out in training, for guidance; -1 = the style's.
        prompt: The question where a sample or a call gives none.
        sample_latents: Draw latents from the tokenizer's Gaussian in training; otherwise take its mean.
        augment: What training images go through, as in ``bridge``.
        sampler: How images are drawn (``zoo.sampling.diffusion``): ddpm or ddim after the objective ``diffusion``,
            midpoint, euler or rk45 after ``flow``; empty = the first of them.
        drawing_steps: Steps of it; a ``scale`` settles on fewer.
        guidance: Scale s of classifier-free guidance, u + s (c - u); 1 = none.
        eta: Of DDIM.
    """

    slots: ClassVar[tuple[str, ...]] = ("decoder", "patch_codec", "image_tokenizer")
    per_stage: ClassVar[frozenset[str]] = frozenset(
        {
            "tasks",
            "prompt_dropout",
            "prompt",
            "sample_latents",
            "augment",
            "sampler",
            "drawing_steps",
            "guidance",
            "eta",
        }
    )
    scale_settles: ClassVar[frozenset[str]] = frozenset({"drawing_steps"})

    style: str = "transfusion"
    image_attention: str = ""
    tasks: dict[str, float] = field(default_factory=dict)
    prompt_dropout: float = -1.0
    prompt: str = ""
    sample_latents: bool = True
    augment: str = "none"
    sampler: str = ""
    drawing_steps: int = 250
    guidance: float = 5.0
    eta: float = 0.0

    def __post_init__(self) -> None:
        from zoo.data.unified_processor import check_tasks

        if style(self.style).with_image_attention(self.image_attention).images != "none":
            raise ValueError(
                f"style = {self.style!r} has images that are codes: choose wiring=unified for it, or style=transfusion"
            )
        if self.tasks:
            check_tasks(self.tasks)
        if not (self.prompt_dropout == -1 or 0 <= self.prompt_dropout <= 1):
            raise ValueError(f"prompt_dropout = {self.prompt_dropout} must lie between 0 and 1, or be -1, the style's")
        if self.guidance < 0:
            raise ValueError(f"guidance = {self.guidance} must be 0 or more; 1 is none")
        self.drawing()

    def drawing(self, sampler: str | None = None, steps: int | None = None) -> Denoising:
        """How images are drawn, with what a call says otherwise.

        Raises:
            ConfigError: Unknown sampler, or steps outside their range.
        """
        return Denoising(
            sampler=self.sampler if sampler is None else sampler,
            steps=self.drawing_steps if steps is None else steps,
            eta=self.eta,
        )

    def scaled(self, sizes: Mapping[str, Any]) -> Self:
        return replace(self, drawing_steps=min(self.drawing_steps, STEPS_OF_A_SCALE)) if "width" in sizes else self

    def build(self, parts: Mapping[str, tuple[str, PartConfig]], seed: int) -> UnifiedLatent:
        """Build the model; every part is drawn from its own stream of ``seed``.

        Raises:
            ConfigError: Parts that do not fit each other.
        """
        return UnifiedLatent(
            self,
            cast("DecoderConfig", parts["decoder"][1]),
            cast("PatchCodecConfig", parts["patch_codec"][1]),
            cast("BaseTokenizerConfig", parts["image_tokenizer"][1]),
            seed,
        )


class UnifiedLatent(UnifiedRows, DrawsLatents, Model):
    """``decoder`` over text and the two tokens around an image, ``patch_codec`` for what stands between them, and
    ``image_tokenizer``, which never learns here.

    Attributes:
        style: How rows are written.
        vocabulary: Ids of text and special tokens; the decoder has as many rows.
        places: Patches of an image.
        process: How images are made noisy; the objective ``diffusion`` or ``flow`` sets it.
        noise_limit: Largest share of the noise levels for images that stand before their caption.
    """

    provides: ClassVar[frozenset[str]] = frozenset(
        {"hidden", "targets", "prediction", "denoising_target", "noised", "level"}
    )
    reads_image_codes: ClassVar[bool] = True

    def __init__(
        self,
        config: UnifiedLatentConfig,
        decoder_config: DecoderConfig,
        codec_config: PatchCodecConfig,
        image_config: BaseTokenizerConfig,
        seed: int,
    ) -> None:
        super().__init__()
        self.config, self.decoder_config, self.image_config, self.seed = config, decoder_config, image_config, seed
        self.style = style(config.style).with_image_attention(config.image_attention)
        self.draws_latents = config.sample_latents
        with seeded(seed, "image_tokenizer"):
            tokenizer = image_config.build()
        if not isinstance(tokenizer, LatentTokenizer):
            raise ConfigError(
                f"the image tokenizer {type(tokenizer).__name__} makes codes, wiring 'unified-latent' reads latents:"
                " choose image_tokenizer=kl, or wiring=unified"
            )
        self.image_tokenizer: LatentTokenizer = tokenizer  # type: ignore[assignment]
        self.vocabulary = self.style.vocabulary(decoder_config.vocab_size)
        with seeded(seed, "decoder"):
            self.decoder: Decoder = replace(decoder_config, vocab_size=self.vocabulary.size).build()
        with seeded(seed, "patch_codec"):
            self.patch_codec: PatchCodec = codec_config.build(channels=tokenizer.channels, width=self.decoder.width)
        self.places = self.patch_codec.cells(image_config.grid)
        self.text_length = decoder_config.context_length - self.places - 2
        if self.text_length < LEAST_TEXT:
            raise ConfigError(
                f"{self.places} patches an image leave {self.text_length} tokens for text in decoder.context_length ="
                f" {decoder_config.context_length}: raise it, or set patch_codec.patch to a larger one"
            )
        self.set_process(DDPM(), 0.5)

    def set_process(self, process: Process, noise_limit: float) -> None:
        """Make images noisy by ``process`` from now on, and draw them by its ways back."""
        self.process, self.noise_limit = process, noise_limit

    def reconfigure(self, config: UnifiedLatentConfig) -> None:
        super().reconfigure(config)
        self.draws_latents = config.sample_latents

    # -- tensors ---------------------------------------------------------------------------------------------------

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Read what ``zoo.data.sequences.collate`` made: ``input_ids``, ``segment``, ``labels``, ``image_slots``, and
        of N images ``image_given``, ``image_first`` and ``pixel_values`` [N, 3, H, W] or ``image_latents``.

        Every image gets a time and noise of its own, from torch's global stream in training, and always alike in eval
        mode; the batch may bring them: ``image_time`` [N], a time of the process, and ``image_noise`` [N, C, h, w].
        Images that are given (the input of an edit) stay clean.

        Returns:
            ``hidden`` [B, T, width]; ``targets`` [B, T], the id each row should predict; ``prediction`` and
            ``denoising_target`` [N, C, h, w]; ``noised`` [N] bool, the images that have a loss; ``level`` [N], their
            noise.
        """
        ids, slots = batch["input_ids"], batch["image_slots"]
        embeds = self.decoder.embed(ids.masked_fill(slots, 0))  # [B, T, D]
        clean = self._latents(batch)  # [N, C, h, w]
        count, grid = len(clean), clean.shape[-2:]
        _check_slots(slots, count, self.places)
        given = batch["image_given"]
        if not count:  # a blank image of weight zero keeps the codec in the graph, or DDP would hang
            clean, given = clean.new_zeros(1, *clean.shape[1:]), given.new_zeros(1)
        noisy, level, target = self._noised(batch, clean, given, blank=not count)
        tokens, skips = self.patch_codec.encode(noisy, level)  # [N, n, D]
        layout = layout_of(batch["segment"], self.style, slots=slots, padding="right", document=batch.get("document"))
        if not count:
            hidden = self.decoder(TokenBatch(embeds + 0.0 * tokens.sum(), layout, ids=ids))
            states = tokens
        else:
            # places in row order; their number is known without looking, so that nothing waits for the device
            at = slots.flatten().int().argsort(descending=True, stable=True)[: count * self.places]  # [N n]
            if (order := batch.get("image_order")) is not None:
                at = at.view(count, self.places)[order.argsort()].flatten()
            embeds = embeds.flatten(0, 1).index_copy(0, at, tokens.flatten(0, 1).to(embeds.dtype)).view_as(embeds)
            hidden = self.decoder(TokenBatch(embeds, layout, ids=ids))  # [B, T, D]
            states = hidden.flatten(0, 1)[at].view(count, self.places, -1)  # [N, n, D]
        prediction = self.patch_codec.decode(states, skips, level, (grid[0], grid[1]))  # [N, C, h, w]
        if not count:
            hidden = hidden + 0.0 * prediction.sum()
            prediction, target, given, level = prediction[:0], target[:0], given[:0], level[:0]
        return {
            "hidden": hidden,
            "targets": next_targets(batch["labels"]),
            "prediction": prediction,
            "denoising_target": target,
            "noised": ~given,
            "level": level,
        }

    def _latents(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The clean latents [N, C, h, w] of the batch's images.

        Raises:
            ConfigError: Latents of another grid or number of channels.
        """
        grid, channels = self.image_config.grid, self.image_tokenizer.channels
        pixels = batch.get("pixel_values")
        if pixels is not None and not len(pixels) and "image_latents" not in batch:
            if self.draws_latents and self.training:  # ranks draw together
                self.image_tokenizer.drawn(pixels.new_zeros(0, 2 * channels, *grid), sample=True)
            return pixels.new_zeros(0, channels, *grid)
        latents = self.tokenize_images(batch)
        if tuple(latents.shape[1:]) != (channels, *grid):
            raise ConfigError(
                f"image latents have shape {tuple(latents.shape[1:])}, expected {(channels, *grid)}: store them with"
                " the image tokenizer of this recipe"
            )
        return latents

    def _noised(
        self, batch: Mapping[str, Tensor], clean: Tensor, given: Tensor, blank: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy latents, their levels [N], and what is to be predicted of them."""
        first = batch["image_first"] if len(batch["image_first"]) == len(clean) else given
        limit = torch.where(first, self.noise_limit, 1.0)
        time, noise = times_and_noise(self.process, clean, batch, self.training, limit, blank)
        noisy = self.process.corrupt(clean, noise, time)
        level = self.process.level(time)
        kept = given[:, None, None, None]
        return (
            torch.where(kept, clean, noisy),
            torch.where(given, torch.zeros_like(level), level),
            self.process.target(clean, noise, time),
        )

    @property
    def typical_targets(self) -> int:
        return self.typical_text + 2

    def example_batch(self, batch_size: int = 1) -> dict[str, Tensor]:
        """An image and a caption of typical length an item, the tasks in turn."""
        batch = {key: value.to(self.device) for key, value in self._example_rows(batch_size).items()}
        size, dtype = self.image_config.image_size, next(self.image_tokenizer.parameters()).dtype
        images = len(batch["image_given"])
        return batch | {"pixel_values": torch.zeros(images, 3, size, size, dtype=dtype, device=self.device)}
