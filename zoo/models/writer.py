"""An image encoder and a decoder that cross-attends it: what BLIP's mixture is fine-tuned to for captions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor

from zoo.decoders.base import Decoder
from zoo.decoders.bert_decoder import BertDecoderConfig
from zoo.encoders.base import Encoder, ImageEncoderConfig
from zoo.errors import ConfigError
from zoo.layout import Layout, Segment, lay_out
from zoo.models.base import Model
from zoo.models.fusion import TYPICAL_TEXT
from zoo.models.grounded import GroundedFields, WritesGrounded, shifted
from zoo.models.tokenizing import OwnsTokenizer
from zoo.part import PartConfig, seeded
from zoo.recipe import WiringConfig

if TYPE_CHECKING:
    from zoo.data.captions import CaptionProcessor


def grounded_decoder(config: PartConfig, width: int, seed: int) -> Decoder:
    """The decoder reading a context of ``width``.

    Raises:
        ConfigError: A decoder that cross-attends nothing.
    """
    if not isinstance(config, BertDecoderConfig):
        raise ConfigError("this wiring needs a decoder that cross-attends: choose decoder=bert-decoder")
    with seeded(seed, "decoder"):
        return config.build(width)


@dataclass(frozen=True, kw_only=True)
class WriterConfig(WiringConfig, GroundedFields):
    """Joins an image encoder and a decoder that cross-attends its tokens.

    Attributes:
        text_length: Longest text in tokens.
        augment: What training images go through (``none``, ``random-resized-crop``, ``shift``, ``flip``,
            ``shift-flip``).
    """

    slots: ClassVar[tuple[str, ...]] = ("encoder", "decoder")

    text_length: int = 40
    augment: str = "none"

    def build(self, parts: Mapping[str, tuple[str, PartConfig]], seed: int) -> Writer:
        """Build the model; every part is drawn from its own stream of ``seed``.

        Raises:
            ConfigError: A decoder that cross-attends nothing.
        """
        return Writer(self, cast("ImageEncoderConfig", parts["encoder"][1]), parts["decoder"][1], seed)


class Writer(OwnsTokenizer, WritesGrounded, Model):
    """``encoder`` and ``decoder``: BLIP's captioner (models/blip.py of the release)."""

    tokenizer_of: ClassVar[str] = "decoder_config"

    provides: ClassVar[frozenset[str]] = frozenset({"hidden", "targets"})

    def __init__(
        self, config: WriterConfig, image_config: ImageEncoderConfig, decoder_config: PartConfig, seed: int
    ) -> None:
        super().__init__()
        self.config = self.grounded = config
        self.image_config, self.decoder_config, self.seed = image_config, decoder_config, seed
        self._processor: Any = None
        with seeded(seed, "encoder"):
            self.encoder: Encoder = image_config.build()
        self.decoder = grounded_decoder(decoder_config, self._context_width(), seed)

    def _context_width(self) -> int:
        return self.encoder.width

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Write ``input_ids`` [B, T] (BOS in the first place, for which [DEC] stands in) about ``pixel_values``
        [B, 3, S, S]; ``labels`` [B, T] are in the places of the tokens, -100 on BOS, prompt and pads.

        Returns:
            ``hidden`` [B, T, D] and the ``targets`` [B, T] they predict.
        """
        context = self.encoder(batch["pixel_values"]).tokens
        hidden = self.decode(self.started(batch["input_ids"]), batch.get("attention_mask"), context)
        return {"hidden": hidden, "targets": shifted(batch["labels"], None)}

    def started(self, ids: Tensor) -> Tensor:
        """Text ids [B, T] with [DEC] in the first place; as they are where the decoder has no [DEC] (ALBEF)."""
        if getattr(self.decoder, "start_id", -1) < 0:
            return ids
        return torch.cat([torch.full_like(ids[:, :1], self.start_id), ids[:, 1:]], 1)

    # -- what surrounds the tensors --------------------------------------------------------------------------------

    @property
    def processor(self) -> Any:
        """Turns samples into ``forward``'s batch; made on first use.

        Raises:
            ConfigError: The tokenizer has more ids than the decoder has rows.
        """
        if self._processor is None:
            tokenizer, decoder = self.tokenizer, cast("Any", self.decoder_config)
            if tokenizer.vocab_size > decoder.vocab_size:
                raise ConfigError(
                    f"tokenizer {decoder.tokenizer!r} has {tokenizer.vocab_size} ids, more than decoder.vocab_size ="
                    f" {decoder.vocab_size}: set one to fit the other"
                )
            self._processor = self._make_processor(min(self.config.text_length, decoder.context_length))
        return self._processor

    def _make_processor(self, length: int) -> CaptionProcessor:
        from zoo.data.captions import CaptionProcessor

        prompt = self.config.prompt
        return CaptionProcessor(self._transform(), self.tokenizer, length, prompt=prompt, seed=self.seed)

    def _transform(self) -> Any:
        from zoo.data.images import ImageTransform

        image = self.image_config
        return ImageTransform(
            size=image.image_size,
            mean=tuple(image.mean),
            std=tuple(image.std),
            mode=cast("Any", image.resize),
            augment=cast("Any", self.config.augment),
        )

    @property
    def typical_targets(self) -> int:
        return max(1, min(TYPICAL_TEXT, self.config.text_length) - 1)

    def layouts(self) -> dict[str, Layout]:
        """The image, every token reading every other, and a caption of typical length, which reads the image too."""
        text = min(TYPICAL_TEXT, self.config.text_length)
        return {
            "image": lay_out([Segment("image", self.encoder.tokens, "image", "full")]),
            "decoder": lay_out([Segment("text", text, "text", "causal", predicted=True)]),
        }

    def example_batch(self, batch_size: int = 1) -> dict[str, Tensor]:
        """One image and a caption of typical length an item, every token behind the first a target."""
        size, length = self.image_config.image_size, min(TYPICAL_TEXT, self.config.text_length)
        ids = torch.full((batch_size, length), 5, dtype=torch.long, device=self.device)
        labels = ids.clone()
        labels[:, 0] = -100
        dtype = next(self.encoder.parameters()).dtype
        return {
            "pixel_values": torch.zeros(batch_size, 3, size, size, dtype=dtype, device=self.device),
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids, dtype=torch.bool),
            "labels": labels,
        }
