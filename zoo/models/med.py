"""Align, fuse and write with one BERT: BLIP's mixture of encoder-decoder (arXiv 2201.12086, section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor

from zoo.decoders.bert_decoder import BertDecoder
from zoo.encoders.base import Encoder, ImageEncoderConfig
from zoo.models.fusion import TYPICAL_TEXT, Fusion, FusionConfig
from zoo.models.grounded import GroundedFields, WritesGrounded, shifted
from zoo.models.lazy import LazyOutputs
from zoo.models.writer import grounded_decoder
from zoo.part import PartConfig

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, kw_only=True)
class MEDConfig(FusionConfig, GroundedFields):
    """Joins an image encoder, a text encoder that fuses, and a decoder.

    Attributes:
        share: Encoder and decoder are one but for self-attention: embeddings, cross-attention and FFN.
    """

    slots: ClassVar[tuple[str, ...]] = ("encoder", "text_encoder", "decoder")

    share: bool = True
    end: bool = True

    def build(self, parts: Mapping[str, tuple[str, PartConfig]], seed: int) -> MED:
        """Build the model; every part and head is drawn from its own stream of ``seed``.

        Raises:
            ConfigError: Parts that do not fit each other.
        """
        image, text, decoder = (parts[slot][1] for slot in self.slots)
        return MED(self, cast("ImageEncoderConfig", image), text, decoder, seed)


class MED(WritesGrounded, Fusion):  # type: ignore[misc, override]
    """``Fusion`` and a ``decoder``, which by default shares all but self-attention with the ``text_encoder``.

    One text takes three ways, told apart by the id in its first place: [CLS] alone, [ENC] reading the image, [DEC]
    being written.
    """

    # fusion starts from ids again, so that the states of the text alone are of no use to anybody
    provides: ClassVar[frozenset[str]] = Fusion.provides - {"text_tokens"} | {"hidden", "targets"}

    def __init__(
        self,
        config: MEDConfig,
        image_config: ImageEncoderConfig,
        text_config: PartConfig,
        decoder_config: PartConfig,
        seed: int,
    ) -> None:
        super().__init__(config, image_config, text_config, seed)
        self.grounded = config
        self.decoder = grounded_decoder(decoder_config, cast("Encoder", self.encoder).width, seed)
        if config.share and isinstance(self.decoder, BertDecoder):
            self.decoder.share_with(self.text_encoder.embed, self.text_encoder.trunk)

    def forward(self, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:  # type: ignore[override]
        """As ``Fusion.forward``, and ``hidden`` [B, T, D] and ``targets`` [B, T] of the caption being written, which
        are computed when an objective asks for them."""
        outputs = super().forward(batch)
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        makers: dict[str, Any] = {
            name: (lambda made, value=value: value) for name, value in outputs.items() if name in self.provides
        }

        def hidden(made: LazyOutputs) -> Tensor:
            return self.decode(self.started(ids), mask, made["image_tokens"])

        return LazyOutputs({**makers, "hidden": hidden, "targets": lambda made: shifted(ids, mask)}, ids.device.type)

    def started(self, ids: Tensor) -> Tensor:
        """Text ids [B, T] with [DEC] in the first place."""
        return torch.cat([torch.full_like(ids[:, :1], self.start_id), ids[:, 1:]], 1)

    @property
    def typical_targets(self) -> int:
        return max(1, min(TYPICAL_TEXT, self.config.text_length) - 1)
