"""One decoder for text and image codes: the codes are words of its own vocabulary, and what a row reads of another is
the style's (Show-o, Chameleon)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor

from zoo.data.sequences import IGNORE, TASKS, layout_of, next_targets, row_tasks, style
from zoo.decoders.base import Decoder, DecoderConfig
from zoo.draws import rand
from zoo.errors import ConfigError
from zoo.layout import Layout, TokenBatch
from zoo.models.base import Model
from zoo.models.bridge import _check_slots
from zoo.models.drawing import DrawingFields, DrawsImages, InpaintsImages
from zoo.models.unified_rows import LEAST_TEXT, UnifiedRows
from zoo.models.unified_text import WritesUnified
from zoo.objectives.masked_image_tokens import draw_masks
from zoo.part import PartConfig, seeded
from zoo.recipe import WiringConfig
from zoo.tokenizers.base import BaseTokenizerConfig, ImageTokenizer


@dataclass(frozen=True, kw_only=True)
class UnifiedConfig(DrawingFields, WiringConfig):
    """Joins a text decoder and an image tokenizer in one vocabulary.

    Attributes:
        style: How rows are written (``zoo.data.sequences``): show-o, chameleon.
        image_attention: Who reads whom inside an image: ``causal`` or ``full``; empty = the style's own. Codes that are
            predicted one after the other are causal.
        tasks: Task (``t2i``, ``mmu``, ``lm``) -> share of the samples with image and text; empty = the style's.
        text_length: Longest text of rows with a prefix of fixed length, BOS and EOS included; less where the decoder's
            context is short.
        prompt_dropout: Share of prompts left out in training, for guidance; -1 = the style's.
        prompt: The question where a sample or a call gives none.
        schedule: Share of hidden codes by a uniform number (``zoo.sampling.masked``), where images are drawn by
            masked prediction.
        least_masked: Smallest share of hidden codes.
        augment: What training images go through, as in ``bridge``.
        places: Ids of special tokens that the text vocabulary holds itself. A ``scale`` leaves both of these out.
        code_place: Id of code 0, where the text vocabulary holds the codes; -1 = they follow the special tokens.
    """

    slots: ClassVar[tuple[str, ...]] = ("decoder", "image_tokenizer")
    per_stage: ClassVar[frozenset[str]] = DrawingFields.drawing | {
        "tasks", "prompt_dropout", "prompt", "least_masked", "augment",
    }  # fmt: skip
    scale_settles: ClassVar[frozenset[str]] = frozenset({"places", "code_place"})

    style: str = "show-o"
    image_attention: str = ""
    tasks: dict[str, float] = field(default_factory=dict)
    text_length: int = 128
    prompt_dropout: float = -1.0
    prompt: str = ""
    schedule: str = "cosine"
    least_masked: float = 0.0
    augment: str = "none"
    places: dict[str, int] = field(default_factory=dict)
    code_place: int = -1

    def __post_init__(self) -> None:
        from zoo.data.unified_processor import check_tasks

        style(self.style).with_image_attention(self.image_attention)
        self.check_drawing(self.schedule)
        if self.tasks:
            check_tasks(self.tasks)
        if not (self.prompt_dropout == -1 or 0 <= self.prompt_dropout <= 1) or not 0 <= self.least_masked <= 1:
            raise ValueError(
                f"prompt_dropout = {self.prompt_dropout}, least_masked = {self.least_masked}: expected shares between 0"
                " and 1 (or prompt_dropout = -1, the style's)"
            )
        if self.text_length < LEAST_TEXT:
            raise ValueError(f"text_length = {self.text_length} must be {LEAST_TEXT} or more")

    def scaled(self, sizes: Mapping[str, Any]) -> Self:
        return replace(self, places={}, code_place=-1) if "vocab_size" in sizes else self

    def build(self, parts: Mapping[str, tuple[str, PartConfig]], seed: int) -> Unified:
        """Build the model; decoder and tokenizer are drawn from their own streams of ``seed``.

        Raises:
            ConfigError: Parts that do not fit each other.
        """
        kind = MaskedUnified if style(self.style).images == "masked" else Unified
        return kind(
            self,
            cast("DecoderConfig", parts["decoder"][1]),
            cast("BaseTokenizerConfig", parts["image_tokenizer"][1]),
            seed,
        )


class Unified(DrawsImages, UnifiedRows, WritesUnified, Model):
    """``decoder`` over the joined vocabulary, and ``image_tokenizer``, which never learns here.

    Attributes:
        style: How rows are written.
        vocabulary: Ids of text, special tokens, codes and the mask; the decoder has as many rows.
        places: Codes of an image.
    """

    reads_image_codes: ClassVar[bool] = True

    def __init__(
        self, config: UnifiedConfig, decoder_config: DecoderConfig, image_config: BaseTokenizerConfig, seed: int
    ) -> None:
        super().__init__()
        self.config, self.decoder_config, self.image_config, self.seed = config, decoder_config, image_config, seed
        self.style = style(config.style).with_image_attention(config.image_attention)
        if self.style.images == "none":
            raise ConfigError(
                f"wiring.style = {config.style!r} has images that are no codes: choose wiring=unified-latent for it"
            )
        self._build_before(decoder_config)
        with seeded(seed, "image_tokenizer"):
            tokenizer = image_config.build()
        if not isinstance(tokenizer, ImageTokenizer):
            raise ConfigError(
                f"the image tokenizer {type(tokenizer).__name__} makes latents, wiring 'unified' reads codes: choose"
                " image_tokenizer=vq, or wiring=unified-latent"
            )
        self.image_tokenizer = tokenizer
        if tokenizer.stored and config.augment != "none":
            raise ConfigError(
                f"stored codes are those of unchanged images, and wiring.augment = {config.augment!r} changes them: set"
                " wiring.augment=none"
            )
        vocabulary = self.style.vocabulary(decoder_config.vocab_size, tokenizer.codes)
        self.vocabulary = replace(vocabulary, places=dict(config.places), code_place=config.code_place)
        self.places = tokenizer.grid[0] * tokenizer.grid[1]
        with seeded(seed, "decoder"):
            self.decoder: Decoder = replace(decoder_config, vocab_size=self.vocabulary.size).build()
        self.text_length = min(config.text_length, decoder_config.context_length - self.places - 3)
        if self.text_length < LEAST_TEXT:
            raise ConfigError(
                f"{self.places} codes an image leave {self.text_length} tokens for text in decoder.context_length ="
                f" {decoder_config.context_length}: raise it, or choose an image tokenizer with a coarser grid"
            )
        self.image_tokenizer.eval()

    def _build_before(self, decoder_config: DecoderConfig) -> None:
        """Build parts that stand before the decoder."""

    @property
    def provides(self) -> frozenset[str]:  # type: ignore[override]
        """``hidden`` and ``targets``; ``code_targets`` where codes are predicted in their own place."""
        return frozenset({"hidden", "targets"} | ({"code_targets"} if self.style.images == "masked" else set()))

    # -- tensors ---------------------------------------------------------------------------------------------------

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Read what ``zoo.data.sequences.collate`` made: ``input_ids``, ``segment``, ``labels``, ``image_slots`` and
        ``task``, and of N images ``image_drawn`` with ``pixel_values`` [N, 3, H, W] or ``image_codes`` [N, n]; packed,
        there are ``document`` and ``image_order`` too (``zoo.data.packing``).

        Hidden codes are drawn from torch's global stream in training, and always alike in eval mode; the batch may
        bring the draw: ``mask_ratio`` [N] and ``mask_order`` [N, n], uniform numbers.

        Returns:
            ``hidden`` [B, T, width]; ``targets`` [B, T], the id each row should predict of the next token;
            ``code_targets`` [B, T], that which should stand in its own place (masked images, and what is around them).
        """
        ids, labels, slots = batch["input_ids"], batch["labels"], batch["image_slots"]
        ids, labels = self._fill(batch, ids, labels, slots)
        embeds = self._embed(batch, ids, slots)
        padding = "right" if not self.style.padded_prompt else None  # as collate pads
        layout = layout_of(
            batch["segment"], self.style, slots=slots, padding=cast("Any", padding), document=batch.get("document")
        )
        hidden = self.decoder(TokenBatch(embeds, layout, ids=ids))  # [B, T, D]
        if self.style.images != "masked":
            return {"hidden": hidden, "targets": next_targets(labels)}
        drawing = row_tasks(batch) == TASKS.index("t2i")
        own = slots | (drawing & (batch["segment"] > 0))  # [B, T]
        return {
            "hidden": hidden,
            "targets": next_targets(labels, own),
            "code_targets": labels.masked_fill(~own, IGNORE),
        }

    def _fill(self, batch: Mapping[str, Tensor], ids: Tensor, labels: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and labels with the images' codes in their places, hidden ones as the mask."""
        codes = self._codes(batch)
        _check_slots(slots, codes.shape[0], self.places)
        masks = (
            self._draw(batch, codes) if self.style.images == "masked" else None
        )  # also of no image: ranks draw together
        if not len(codes):
            return ids, labels
        codes = codes + self.vocabulary.first_code  # [N, n]
        wanted = shown = codes
        drawn = batch["image_drawn"][:, None]  # [N, 1]
        if masks is not None:
            hidden = masks & drawn
            shown = torch.where(hidden, self.vocabulary.mask_id, codes)
            drawn = hidden
        wanted = torch.where(drawn, codes, IGNORE)
        if (order := batch.get("image_order")) is not None:
            shown, wanted = shown[order], wanted[order]
        return ids.masked_scatter(slots, shown), labels.masked_scatter(slots, wanted)

    def _draw(self, batch: Mapping[str, Tensor], codes: Tensor) -> Tensor:
        """Which codes [N, n] are hidden."""
        ratio, order = batch.get("mask_ratio"), batch.get("mask_order")
        if ratio is None or order is None:
            if self.training:
                ratio, order = rand((len(codes),), codes.device), rand(codes.shape, codes.device)
            else:
                generator = torch.Generator().manual_seed(0)
                ratio = torch.rand(len(codes), generator=generator).to(codes.device)
                order = torch.rand(codes.shape, generator=generator).to(codes.device)
        return draw_masks(ratio, order, self.config.schedule, self.config.least_masked)

    def _codes(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The codes [N, n] of the batch's images: its own, or the frozen tokenizer's.

        Raises:
            ConfigError: Codes of another codebook or grid.
        """
        if "image_codes" not in batch and "pixel_values" in batch and not len(batch["pixel_values"]):
            return torch.zeros(0, self.places, dtype=torch.long, device=batch["pixel_values"].device)
        codes = self.tokenize_images(batch)
        if codes.ndim != 2 or codes.shape[1] != self.places:
            raise ConfigError(
                f"image_codes have shape {tuple(codes.shape)}, expected [images, {self.places}]: store them with the"
                " image tokenizer of this recipe"
            )
        if (
            codes.device.type == "cpu"
            and codes.numel()
            and not 0 <= int(codes.min()) <= int(codes.max()) < (self.image_tokenizer.codes)
        ):
            raise ConfigError(
                f"image_codes reach from {int(codes.min())} to {int(codes.max())}, outside a codebook of"
                f" {self.image_tokenizer.codes}: store them with the image tokenizer of this recipe"
            )
        return codes

    def _encode(self, pixels: Tensor) -> Tensor:
        return self.tokenize_images({"pixel_values": pixels})

    def _embed(self, batch: Mapping[str, Tensor], ids: Tensor, slots: Tensor) -> Tensor:
        """Embeddings [B, T, D] of ids whose places are filled."""
        return self.decoder.embed(ids)

    def token_logits(self, ids: Tensor, layout: Layout | None = None) -> Tensor:
        """Logits [B, T, V] over the joined vocabulary.

        Args:
            ids: [B, T] int64; codes as ids of the vocabulary.
            layout: Who reads whom; by default as the style numbers the ids, pads being ``vocabulary.id("pad")``.
        """
        if layout is None:
            pad = self.vocabulary.id("pad") if "pad" in self.style.specials else None
            layout = self._layout(ids, None if pad is None else ids != pad)
        return self.decoder.logits(self.decoder(TokenBatch(self.decoder.embed(ids), layout, ids=ids)))

    def code_embeds(self, codes: Tensor) -> Tensor:
        """Embeddings [..., D] of codes [...]."""
        return self.decoder.embed(codes + self.vocabulary.first_code)

    def code_logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., codes] of the codes alone, out of hidden states [..., D]; no other column is computed."""
        return self.decoder.logits_of(hidden, self.vocabulary.code_ids)

    def example_batch(self, batch_size: int = 1) -> dict[str, Tensor]:
        """An image and a caption of typical length an item, the tasks in turn."""
        batch = {key: value.to(self.device) for key, value in self._example_rows(batch_size).items()}
        images = batch["image_drawn"].shape[0]
        if self.image_tokenizer.stored:
            codes = torch.zeros(images, self.places, dtype=torch.long, device=self.device)
            return batch | {"image_codes": codes}
        size, dtype = self.image_config.image_size, next(self.image_tokenizer.parameters()).dtype
        return batch | {"pixel_values": torch.zeros(images, 3, size, size, dtype=dtype, device=self.device)}


class MaskedUnified(InpaintsImages, Unified):
    """``Unified`` whose images are drawn by masked prediction: any part of one can be drawn anew."""
