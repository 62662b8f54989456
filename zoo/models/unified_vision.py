"""The unified decoder with an eye of its own: where images are understood, an encoder's features stand in place of
codes (Show-o with CLIP-ViT, arXiv 2408.12528, table 1 and released ``train_w_clip_vit.py``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import torch
from torch import Tensor

from zoo.connectors.base import Connector, ConnectorConfig
from zoo.data.sequences import TASKS, row_tasks
from zoo.decoders.base import DecoderConfig
from zoo.encoders.base import Encoder, ImageEncoderConfig
from zoo.errors import ConfigError
from zoo.models.bridge import _check_slots
from zoo.models.unified import MaskedUnified, UnifiedConfig
from zoo.models.unified_rows import LEAST_TEXT
from zoo.part import PartConfig, seeded
from zoo.tokenizers.base import BaseTokenizerConfig

if TYPE_CHECKING:
    from zoo.capabilities import ImageLike


@dataclass(frozen=True, kw_only=True)
class UnifiedVisionConfig(UnifiedConfig):
    """As ``UnifiedConfig``, with an image encoder and a connector.

    Attributes:
        system: Text before the image where it is understood, never trained; Show-o writes it when it tunes on
            instructions.
        preamble: Write ``system``. A ``scale`` leaves it out: it would fill the short context of its decoders.
        answer_length: Longest text of ``mmu`` rows, with its end.
    """

    slots: ClassVar[tuple[str, ...]] = ("encoder", "connector", "decoder", "image_tokenizer")
    per_stage: ClassVar[frozenset[str]] = UnifiedConfig.per_stage | {"system"}

    scale_settles: ClassVar[frozenset[str]] = UnifiedConfig.scale_settles | {"preamble"}

    style: str = "show-o-features"
    system: str = ""
    preamble: bool = True
    answer_length: int = 576

    def scaled(self, sizes: Mapping[str, Any]) -> Self:
        config = super().scaled(sizes)
        return replace(config, preamble=False) if "context_length" in sizes else config

    def build(self, parts: Mapping[str, tuple[str, PartConfig]], seed: int) -> UnifiedVision:
        """Build the model; every part is drawn from its own stream of ``seed``.

        Raises:
            ConfigError: Parts that do not fit each other.
        """
        return UnifiedVision(
            self,
            cast("ImageEncoderConfig", parts["encoder"][1]),
            cast("ConnectorConfig", parts["connector"][1]),
            cast("DecoderConfig", parts["decoder"][1]),
            cast("BaseTokenizerConfig", parts["image_tokenizer"][1]),
            seed,
        )


class UnifiedVision(MaskedUnified):
    """``encoder`` and ``connector`` for images that are understood, ``image_tokenizer`` for those that are drawn."""

    reads_image_codes: ClassVar[bool] = False  # the encoder reads pixels

    def __init__(
        self,
        config: UnifiedVisionConfig,
        eye_config: ImageEncoderConfig,
        connector_config: ConnectorConfig,
        decoder_config: DecoderConfig,
        image_config: BaseTokenizerConfig,
        seed: int,
    ) -> None:
        self.eye_config, self.connector_config = eye_config, connector_config
        super().__init__(config, decoder_config, image_config, seed)
        if not self.style.features:
            raise ConfigError(
                f"wiring.style = {config.style!r} reads codes where it understands, wiring 'unified-vision' features:"
                " choose wiring=unified or wiring.style=show-o-features"
            )
        with seeded(seed, "connector"):
            self.connector: Connector = connector_config.build(
                in_width=self.encoder.width, in_tokens=self.encoder.tokens, out_width=self.decoder.width
            )
        self.seen = self.connector.tokens
        self.answer_length = min(config.answer_length, decoder_config.context_length - self.seen - 3)
        if self.answer_length < LEAST_TEXT:
            raise ConfigError(
                f"{self.seen} features an image leave {self.answer_length} tokens for text in decoder.context_length ="
                f" {decoder_config.context_length}: raise it, or choose a connector that returns fewer tokens"
            )

    def _build_before(self, decoder_config: DecoderConfig) -> None:
        with seeded(self.seed, "encoder"):
            self.encoder: Encoder = self.eye_config.build()

    def parts(self) -> dict[str, torch.nn.Module]:
        return {name: getattr(self, name) for name in UnifiedVisionConfig.slots}

    # -- tensors ---------------------------------------------------------------------------------------------------

    def _code_slots(self, batch: Mapping[str, Tensor]) -> Tensor:
        return batch["image_slots"] & (row_tasks(batch) != TASKS.index("mmu"))

    def _fill(self, batch: Mapping[str, Tensor], ids: Tensor, labels: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        return super()._fill(batch, ids, labels, self._code_slots(batch))

    def _embed(self, batch: Mapping[str, Tensor], ids: Tensor, slots: Tensor) -> Tensor:
        seen = slots & ~self._code_slots(batch)  # [B, T]
        embeds = self.decoder.embed(ids.masked_fill(seen, 0))
        values = batch["eye_values"]
        _check_slots(seen, len(values), self.seen)
        if len(values):
            features = self.image_features(values)  # [M, n, D]
            if (order := batch.get("eye_order")) is not None:
                features = features[order]
            return embeds.masked_scatter(seen[..., None], features.to(embeds.dtype))
        if not (torch.is_grad_enabled() and any(p.requires_grad for p in self.connector.parameters())):
            return embeds
        # no row is understood: a blank image of weight zero keeps the connector in the graph, or DDP would hang
        blank = embeds.new_zeros(1, 3, self.eye_config.image_size, self.eye_config.image_size)
        return embeds + 0.0 * self.image_features(blank).sum()

    def image_features(self, pixel_values: Tensor, *others: Any, **more: Any) -> Tensor:
        """The connector's tokens [N, n, D] of images [N, 3, H, W]."""
        tokens: Tensor = self.connector(self.encode_images(pixel_values)).tokens
        return tokens

    # -- what surrounds the tensors --------------------------------------------------------------------------------

    @property
    def row_length(self) -> int:
        return self.decoder_config.context_length

    def _processor_fields(self) -> dict[str, Any]:
        return super()._processor_fields() | {
            "system": self.config.system if self.config.preamble else "",
            "eye": self._transform(self.eye_config),
            "eye_places": self.seen,
            "answer_length": self.answer_length,
        }

    def _pixels(self, images: Sequence[ImageLike]) -> Tensor:
        dtype = next(self.encoder.parameters()).dtype
        pixels: Tensor = self.processor.eye(images)
        return pixels.to(self.device, dtype)

    def _places_of(self, task: str) -> int:
        return self.seen if task == "mmu" else self.places

    def example_batch(self, batch_size: int = 1) -> dict[str, Tensor]:
        """As that of ``Unified``, with an encoder's images for the rows that are understood."""
        batch = super().example_batch(batch_size)
        size, dtype = self.eye_config.image_size, next(self.encoder.parameters()).dtype
        seen = self._example_order(batch_size).count("mmu")
        return batch | {"eye_values": torch.zeros(seen, 3, size, size, dtype=dtype, device=self.device)}
