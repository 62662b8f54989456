"""A statement about two images, true or false: BLIP's NLVR2 model (models/blip_nlvr.py of the release)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from zoo.encoders.base import Encoder, ImageEncoderConfig
from zoo.encoders.twin_bert import TwinBert, TwinBertConfig
from zoo.errors import ConfigError
from zoo.layout import Layout, Segment, lay_out
from zoo.models.base import Model, evaluating
from zoo.models.fusion import TYPICAL_TEXT
from zoo.models.tokenizing import OwnsTokenizer
from zoo.part import PartConfig, seeded
from zoo.recipe import WiringConfig

if TYPE_CHECKING:
    from zoo.capabilities import ImageLike

CHUNK = 64


@dataclass(frozen=True, kw_only=True)
class ComparerConfig(WiringConfig):
    """Joins an image encoder and a text encoder that reads two images.

    Attributes:
        text_length: Longest statement in tokens.
        augment: What training images go through.
    """

    slots: ClassVar[tuple[str, ...]] = ("encoder", "text_encoder")

    text_length: int = 35
    augment: str = "none"

    def build(self, parts: Mapping[str, tuple[str, PartConfig]], seed: int) -> Comparer:
        """Build the model; every part is drawn from its own stream of ``seed``.

        Raises:
            ConfigError: A text encoder that does not read two images.
        """
        return Comparer(self, cast("ImageEncoderConfig", parts["encoder"][1]), parts["text_encoder"][1], seed)


class Comparer(OwnsTokenizer, Model):
    """``encoder``, ``text_encoder``, and ``head``: an MLP with ReLU on the fused [ENC]."""

    provides: ClassVar[frozenset[str]] = frozenset({"verdict_logits", "verdicts"})

    def __init__(
        self, config: ComparerConfig, image_config: ImageEncoderConfig, text_config: PartConfig, seed: int
    ) -> None:
        super().__init__()
        if not isinstance(text_config, TwinBertConfig):
            raise ConfigError("this wiring compares two images: choose text_encoder=blip-twin-bert")
        self.config, self.image_config, self.seed = config, image_config, seed
        self.text_config: TwinBertConfig = text_config
        self._processor: Any = None
        with seeded(seed, "encoder"):
            self.encoder: Encoder = image_config.build()
        with seeded(seed, "text_encoder"):
            self.text_encoder: TwinBert = text_config.build(self.encoder.width)
        width = self.text_encoder.width
        with seeded(seed, "head"):
            self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Judge the statements ``input_ids`` [B, T] about ``pixel_values`` and ``other_pixel_values`` [B, 3, S, S].

        Returns:
            ``verdict_logits`` [B, 2] of (false, true), and the batch's ``labels`` [B] as ``verdicts``.
        """
        logits = self.verdict_logits(
            batch["pixel_values"], batch["other_pixel_values"], batch["input_ids"], batch.get("attention_mask")
        )
        return {"verdict_logits": logits, "verdicts": batch["labels"]}

    def verdict_logits(
        self, first: Tensor, second: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Logits [B, 2] of (false, true) for images ``first`` and ``second`` [B, 3, S, S], encoded in one pass."""
        one, two = self.encoder(torch.cat([first, second])).tokens.chunk(2)  # [B, N, D] each
        ids = self.text_encoder.reading(input_ids)
        fused = self.text_encoder(ids, attention_mask, context=torch.cat([one, two], 1))
        logits: Tensor = self.head(fused.pooled)
        return logits

    def match(self, images: Sequence[ImageLike], texts: Sequence[str]) -> Tensor:
        """The logit of "true" [N] float32 of a statement about image n shown on both sides."""
        if isinstance(images, str) or isinstance(texts, str) or len(images) != len(texts):
            raise ConfigError(f"{len(images)} images and {len(texts)} texts: match takes lists of equal length")
        scores = [torch.empty(0, device=self.device)]
        with evaluating(self):
            for start in range(0, len(images), CHUNK):
                part = slice(start, start + CHUNK)
                pixels = self.processor.encode_images(images[part]).to(self.device)
                rows = self.processor.encode_texts(texts[part])
                ids, mask = (rows[name].to(self.device) for name in ("input_ids", "attention_mask"))
                scores.append(self.verdict_logits(pixels, pixels, ids, mask)[:, 1].float())
        return torch.cat(scores)

    # -- what surrounds the tensors --------------------------------------------------------------------------------

    @property
    def processor(self) -> Any:
        """Turns samples into ``forward``'s batch; made on first use."""
        if self._processor is None:
            from zoo.data.compared import ComparedProcessor
            from zoo.data.images import ImageTransform

            image = self.image_config
            transform = ImageTransform(
                size=image.image_size,
                mean=tuple(image.mean),
                std=tuple(image.std),
                mode=cast("Any", image.resize),
                augment=cast("Any", self.config.augment),
            )
            length = min(self.config.text_length, self.text_config.context_length)
            self._processor = ComparedProcessor(transform, self.tokenizer, length, seed=self.seed)
        return self._processor

    def layouts(self) -> dict[str, Layout]:
        """One image, and a statement of typical length, whose tokens read each other and both images."""
        text = min(TYPICAL_TEXT, self.config.text_length)
        return {
            "image": lay_out([Segment("image", self.encoder.tokens, "image", "full")]),
            "text": lay_out([Segment("text", text, "text", "full")]),
        }

    def example_batch(self, batch_size: int = 1) -> dict[str, Tensor]:
        """Two images and a statement of typical length an item."""
        size, length = self.image_config.image_size, min(TYPICAL_TEXT, self.config.text_length)
        ids = torch.full((batch_size, length), 5, dtype=torch.long, device=self.device)
        dtype = next(self.encoder.parameters()).dtype
        pixels = torch.zeros(batch_size, 3, size, size, dtype=dtype, device=self.device)
        return {
            "pixel_values": pixels,
            "other_pixel_values": pixels.clone(),
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids, dtype=torch.bool),
            "labels": torch.arange(batch_size, device=self.device) % 2,
        }
