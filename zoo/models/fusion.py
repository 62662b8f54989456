"""Align, then fuse: two encoders that meet in a dot product, and a text encoder that then reads the image.

ALBEF (arXiv 2107.07651) and BLIP (arXiv 2201.12086) are this wiring; they differ in parts and objectives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.encoders.base import Encoder, ImageEncoderConfig
from zoo.encoders.bert import Bert, BertConfig
from zoo.errors import ConfigError
from zoo.layout import Layout, Segment, lay_out
from zoo.models.base import Model
from zoo.models.pairs import EmbedsPairs
from zoo.part import Features, PartConfig, seeded
from zoo.recipe import WiringConfig

if TYPE_CHECKING:
    from zoo.capabilities import ImageLike
    from zoo.data.fused import FusionProcessor

TYPICAL_TEXT = 16
"""Tokens of a caption, as layouts and FLOP counts assume."""

COLDEST, WARMEST = 0.001, 0.5
"""Bounds of the temperature (model_pretrain.py of the release)."""


@dataclass(frozen=True, kw_only=True)
class FusionConfig(WiringConfig):
    """Joins an image encoder and a text encoder that fuses.

    Attributes:
        embed_width: Width of the shared space.
        temperature: Initial softmax temperature, which similarities are divided by; it learns within [0.001, 0.5].
        text_length: Longest text in tokens.
        end: Close texts with [SEP]; ALBEF does not.
        matching: Own the matching head.
        rerank_similarity: Add the cosine similarity to the matching logit where candidates are ordered again (BLIP).
        image_ids: Let batches say which image a pair is of (retrieval fine-tuning).
        augment: What training images go through (``none``, ``random-resized-crop``, ``shift``, ``flip``,
            ``shift-flip``).
    """

    slots: ClassVar[tuple[str, ...]] = ("encoder", "text_encoder")

    embed_width: int = 256
    temperature: float = 0.07
    text_length: int = 30
    end: bool = False
    matching: bool = True
    rerank_similarity: bool = False
    image_ids: bool = False
    augment: str = "none"

    def __post_init__(self) -> None:
        if self.embed_width < 1 or not COLDEST <= self.temperature <= WARMEST:
            raise ValueError(f"embed_width must be 1 or more, and temperature in [{COLDEST}, {WARMEST}]")
        if self.text_length < 3:
            raise ValueError(f"text_length = {self.text_length} must be 3 or more")

    def build(self, parts: Mapping[str, tuple[str, PartConfig]], seed: int) -> Fusion:
        """Build the model; every part and head is drawn from its own stream of ``seed``.

        Raises:
            ConfigError: An image encoder that pools nothing, or a text encoder that cannot read images.
        """
        return Fusion(self, cast("ImageEncoderConfig", parts["encoder"][1]), parts["text_encoder"][1], seed)


class Fusion(EmbedsPairs, Model):
    """``encoder``, ``text_encoder``, ``image_projection``, ``text_projection``, ``temperature``, ``matching_head``."""

    shares_images: ClassVar[bool] = True  # ``fuse`` takes ``rows``
    provides: ClassVar[frozenset[str]] = frozenset(
        {"image_embeds", "text_embeds", "logit_scale", "image_tokens", "text_tokens"}
    )

    def __init__(
        self, config: FusionConfig, image_config: ImageEncoderConfig, text_config: PartConfig, seed: int
    ) -> None:
        super().__init__()
        if not isinstance(text_config, BertConfig):
            raise ConfigError(
                "this wiring needs a text encoder that cross-attends images: choose text_encoder=albef-bert or another"
                " on zoo.encoders.bert"
            )
        self.config = config
        self.image_config = image_config
        self.text_config: BertConfig = text_config
        self.text_slot, self.augment, self.seed = "text_encoder", config.augment, seed
        self.shared_width = config.embed_width
        with seeded(seed, "encoder"):
            self.encoder: Encoder = image_config.build()
        if not self.encoder.pooled_width:
            raise ConfigError(
                "the image encoder pools nothing, but images and texts are compared: set encoder.pool=true"
            )
        with seeded(seed, "text_encoder"):
            self.text_encoder: Bert = text_config.build(self.encoder.width)
        with seeded(seed, "projection.image"):
            self.image_projection = nn.Linear(self.encoder.pooled_width, config.embed_width)
        with seeded(seed, "projection.text"):
            self.text_projection = nn.Linear(self.text_encoder.pooled_width, config.embed_width)
        with seeded(seed, "matching_head"):
            self.matching_head = nn.Linear(self.text_encoder.width, 2) if config.matching else None
        self.temperature = nn.Parameter(torch.tensor(config.temperature))

    # -- tensors ---------------------------------------------------------------------------------------------------

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Encode ``pixel_values`` [B, 3, S, S] and ``input_ids`` [B, T] with ``attention_mask``, each alone.

        Returns:
            What ``encode`` does, and ``logit_scale``, the logarithm of 1 / temperature.
        """
        if self.training and torch.is_grad_enabled():
            with torch.no_grad():
                self.temperature.clamp_(COLDEST, WARMEST)
        return {**self.encode(batch), "logit_scale": self.logit_scale}

    def encode(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``image_embeds`` and ``text_embeds`` [B, embed_width] of unit length, and the states of each alone:
        ``image_tokens`` [B, N, D] and ``text_tokens`` [B, T, D]. A momentum copy runs this too."""
        image = self.encoder(batch["pixel_values"])
        text = self.text_encoder(batch["input_ids"], batch.get("attention_mask"))
        return {
            "image_embeds": F.normalize(self.image_projection(image.pooled), dim=-1),
            "text_embeds": F.normalize(self.text_projection(text.pooled), dim=-1),
            "image_tokens": image.tokens,
            "text_tokens": text.tokens,
        }

    @property
    def logit_scale(self) -> Tensor:
        """ln(1 / temperature), with its gradient."""
        return -self.temperature.log()

    def momentum_parts(self) -> tuple[str, ...]:
        """The parts of which training keeps a moving average: all that ``encode`` and masked words need."""
        return ("encoder", "text_encoder", "image_projection", "text_projection")

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """Projected features [B, embed_width] of ``pixel_values`` [B, 3, S, S], not normalised."""
        features: Tensor = self.image_projection(self.encoder(pixel_values).pooled)
        return features

    def text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Projected features [B, embed_width] of ``input_ids`` [B, T] read alone, not normalised."""
        features: Tensor = self.text_projection(self.text_encoder(input_ids, attention_mask).pooled)
        return features

    def fuse(
        self,
        image: Features,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        text_tokens: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Features:
        """Let a text read an image: ``tokens`` [B, T, D], ``pooled`` the first of them.

        Args:
            image: ``tokens`` [B, N, D], what ``encode`` calls ``image_tokens``.
            text_tokens: [B, T, D], what ``encode`` made of the same text; a stack that can goes on from there.
            rows: [B] int64, which of the images each text reads, by default its own; images that several texts read
                need then be given and projected once.
        """
        states = text_tokens if self.text_encoder.split else None
        mask = image.mask if image.mask is None or rows is None else image.mask[rows]
        ids = self.text_encoder.reading(input_ids)
        fused: Features = self.text_encoder(
            ids, attention_mask, context=image.tokens, context_rows=rows, context_mask=mask, states=states
        )
        return fused

    def matching_logits(self, fused: Features) -> Tensor:
        """Logits [B, 2] of (no match, match) from what ``fuse`` gave."""
        if self.matching_head is None:
            raise ConfigError("this model has no matching head: set wiring.matching=true")
        logits: Tensor = self.matching_head(fused.pooled)
        return logits

    def match_logits(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits [B, 2] of (no match, match) of image b and text b."""
        return self.matching_logits(self.fuse(self.encoder(pixel_values), input_ids, attention_mask))

    def word_logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocab_size] of the words that fused states [..., D] predict."""
        return self.text_encoder.logits(hidden)

    # -- capabilities ----------------------------------------------------------------------------------------------

    def match(self, images: Sequence[ImageLike], texts: Sequence[str]) -> Tensor:
        """The logit of "match" of image n and text n, as the head gives it: [N] float32."""
        if isinstance(images, str) or isinstance(texts, str) or len(images) != len(texts):
            raise ConfigError(f"{len(images)} images and {len(texts)} texts: match takes lists of equal length")

        def judged(chunk: Sequence[tuple[ImageLike, str]]) -> Tensor:
            pixels = self._pixels([image for image, _ in chunk])
            return self.match_logits(pixels, *self._ids([text for _, text in chunk]))[:, 1].float()

        return self._chunked(list(zip(images, texts, strict=True)), judged, torch.empty(0, device=self.device))

    def match_pairs(self, images: Sequence[ImageLike], texts: Sequence[str], pairs: Tensor) -> Tensor:
        """The logit of "match" of many pairs [P, 2] of (image, text) rows: [P] float32, equal to ``match`` of each.

        Every image and every text is read once.
        """
        chosen = [(int(image), int(text)) for image, text in pairs.tolist()]
        seen: list[Tensor] = []
        read: list[dict[str, Tensor]] = []

        def look(chunk: Sequence[ImageLike]) -> Tensor:
            tokens: Tensor = self.encoder(self._pixels(chunk)).tokens
            seen.append(tokens)
            return tokens[:, 0, 0]

        def judged(chunk: Sequence[tuple[int, int]]) -> Tensor:
            rows, columns = (torch.tensor(side, device=self.device) for side in zip(*chunk, strict=True))
            if not read:
                ids, mask = self._ids(texts)
                read.append({"ids": ids, "mask": mask, "states": self.text_encoder(ids, mask).tokens})
            ids, mask, states = (read[0][name][columns] for name in ("ids", "mask", "states"))
            longest = int(mask.sum(1).max())
            ids, mask, states = ids[:, :longest], mask[:, :longest], states[:, :longest]
            fused = self.fuse(Features(torch.cat(seen)[rows]), ids, mask, text_tokens=states)
            return self.matching_logits(fused)[:, 1].float()

        empty = torch.empty(0, device=self.device)
        self._chunked(images, look, empty)
        return self._chunked(chosen, judged, empty)

    def grounding(self, images: Sequence[ImageLike], texts: Sequence[str], layer: int | None = None) -> Tensor:
        """Where in image n text n is: [N, h, w] over the grid of patches, 0 or more; see ``zoo.models.grounding``.

        Args:
            layer: Index of the text encoder's layer whose cross-attention is looked at; 8 of 12 as published.
        """
        from zoo.models.grounding import grounding_maps

        if isinstance(images, str) or isinstance(texts, str) or len(images) != len(texts):
            raise ConfigError(f"{len(images)} images and {len(texts)} texts: grounding takes lists of equal length")

        def looked(chunk: Sequence[tuple[ImageLike, str]]) -> Tensor:
            with torch.inference_mode(False):
                pixels, ids = self._pixels([image for image, _ in chunk]), self._ids([text for _, text in chunk])
                return grounding_maps(self, pixels, *ids, layer=layer)

        return self._chunked(list(zip(images, texts, strict=True)), looked, torch.empty(0, device=self.device))

    @property
    def rerank_similarity(self) -> bool:
        """Whether candidates are ordered again by the matching logit plus the similarity, or by the logit alone."""
        return self.config.rerank_similarity

    # -- what surrounds the tensors --------------------------------------------------------------------------------

    @property
    def processor(self) -> FusionProcessor:
        """Turns samples into ``pixel_values``, ``input_ids`` and ``attention_mask``; made on first use.

        Raises:
            ConfigError: The tokenizer has more ids than the text encoder has rows.
        """
        from zoo.data.fused import FusionProcessor

        if not isinstance(self._processor, FusionProcessor):
            plain = super().processor
            self._processor = FusionProcessor(
                plain.transform,
                plain.tokenizer,
                min(self.config.text_length, self.text_config.context_length),
                end=self.config.end,
                image_ids=self.config.image_ids,
                seed=self.seed,
            )
        return self._processor

    @property
    def vocab_size(self) -> int:
        """Ids that a masked word may be replaced by: the tokenizer's."""
        return self.text_config.vocab_size - self.text_config.added

    @property
    def special_ids(self) -> dict[str, int]:
        """Ids of ``cls``, ``pad`` and ``mask``; a tokenizer without [MASK] lends its image token, which no text has.

        Raises:
            ConfigError: A tokenizer with neither.
        """
        tokenizer = self.tokenizer
        mask = tokenizer.mask_id
        mask = tokenizer.image_token_id if mask is None else mask
        if mask is None:
            raise ConfigError(
                f"tokenizer {self.text_config.tokenizer!r} has no [MASK] and no image token: choose one that has"
            )
        return {"cls": tokenizer.bos_id, "pad": tokenizer.pad_id, "mask": int(mask)}

    def layouts(self) -> dict[str, Layout]:
        """The image and a caption of typical length, each reading all of itself; fusion adds the image as context."""
        text = min(TYPICAL_TEXT, self.config.text_length)
        return {
            "image": lay_out([Segment("image", self.encoder.tokens, "image", "full")]),
            "text": lay_out([Segment("text", text, "text", "full")]),
        }

    def example_batch(self, batch_size: int = 1) -> dict[str, Tensor]:
        """``pixel_values``, ``input_ids`` and ``attention_mask`` for ``batch_size`` pairs of typical length."""
        size, length = self.image_config.image_size, min(TYPICAL_TEXT, self.config.text_length)
        ids = torch.full((batch_size, length), 5, dtype=torch.long, device=self.device)
        dtype = next(self.encoder.parameters()).dtype
        batch = {
            "pixel_values": torch.zeros(batch_size, 3, size, size, dtype=dtype, device=self.device),
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids, dtype=torch.bool),
        }
        if self.config.image_ids:
            batch["image_ids"] = torch.arange(batch_size, device=self.device)
        return batch
