"""Stage 1 of BLIP-2 (arXiv 2301.12597): a frozen eye and a Q-Former that learns to see by comparing, matching and
writing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from torch import Tensor

from zoo.connectors.base import ConnectorConfig
from zoo.connectors.qformer import QFormer, QFormerConfig
from zoo.encoders.base import Encoder, ImageEncoderConfig
from zoo.errors import ConfigError
from zoo.layout import Layout, Segment, TokenBatch, lay_out
from zoo.layout_facts import Padding
from zoo.models.base import Model
from zoo.models.grounded import GroundedFields, WritesGrounded
from zoo.models.lazy import LazyOutputs
from zoo.models.pairs import EmbedsPairs
from zoo.models.query_heads import QueryFields, QueryWriter, ReadsQueries, query_heads
from zoo.part import PartConfig, seeded
from zoo.recipe import WiringConfig
from zoo.sampling.text import Decoding, align_right, write

if TYPE_CHECKING:
    from zoo.data.fused import FusionProcessor


@dataclass(frozen=True, kw_only=True)
class QueryingConfig(WiringConfig, QueryFields, GroundedFields):
    """Joins an image encoder and a Q-Former with its text branch.

    Attributes:
        beams: Beams of ``generate_text`` where the call does not say.
        beam_length: As in ``zoo.sampling.text.Decoding``; ``whole`` would count the queries.
        image_ids: Let batches say which image a pair is of (retrieval fine-tuning).
        augment: What training images go through (``none``, ``random-resized-crop``, ``shift``, ``flip``,
            ``shift-flip``).
    """

    slots: ClassVar[tuple[str, ...]] = ("encoder", "connector")

    beams: int = 1
    beam_length: str = "new"
    image_ids: bool = False
    augment: str = "none"

    def build(self, parts: Mapping[str, tuple[str, PartConfig]], seed: int) -> Querying:
        """Build the model; every part is drawn from its own stream of ``seed``.

        Raises:
            ConfigError: Another connector than a Q-Former with a text branch.
        """
        encoder, connector = (parts[slot][1] for slot in self.slots)
        return Querying(self, cast("ImageEncoderConfig", encoder), cast("ConnectorConfig", connector), seed)


class Querying(ReadsQueries, WritesGrounded, EmbedsPairs, Model):  # type: ignore[override]
    """``encoder``, ``connector`` (a ``QFormer`` without a projection) and ``heads``."""

    provides: ClassVar[frozenset[str]] = ReadsQueries.query_outputs
    reads_image_tokens: ClassVar[bool] = True

    def __init__(
        self, config: QueryingConfig, image_config: ImageEncoderConfig, connector_config: ConnectorConfig, seed: int
    ) -> None:
        super().__init__()
        self.config = self.grounded = config
        self.image_config = image_config
        self.text_config: QFormerConfig = cast("QFormerConfig", connector_config)
        self.text_slot, self.augment, self.seed = "connector", config.augment, seed
        self.shared_width = config.embed_width
        heads = query_heads(config, connector_config, seed)
        with seeded(seed, "encoder"):
            self.encoder: Encoder = image_config.build()
        with seeded(seed, "connector"):
            self.connector: QFormer = cast(
                "QFormer",
                connector_config.build(in_width=self.encoder.width, in_tokens=self.encoder.tokens, out_width=0),
            )
        self.heads = heads

    # -- tensors ---------------------------------------------------------------------------------------------------

    def forward(self, batch: Mapping[str, Tensor]) -> LazyOutputs:  # type: ignore[override]
        """Promise what ``query_makers`` describes of ``pixel_values`` [B, 3, S, S] (or ``image_tokens``, what the
        encoder made of them before) and ``input_ids`` [B, T] with ``attention_mask``."""
        ids = batch["input_ids"]
        makers = self.query_makers(
            batch.get("pixel_values"), ids, batch.get("attention_mask"), batch.get("image_tokens")
        )
        return LazyOutputs(makers, ids.device.type)

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """Projected features [B, Q, embed_width] of the queries of images read alone, not normalised."""
        features: Tensor = self.heads.image_projection(self.connector.hidden(self.encode_images(pixel_values)))
        return features

    def text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Projected features [B, embed_width] of ``input_ids`` [B, T] read alone, not normalised."""
        features: Tensor = self.heads.text_projection(self.read_text(input_ids, attention_mask))
        return features

    # -- writing -----------------------------------------------------------------------------------------------------

    @property
    def decoder(self) -> QueryWriter:  # type: ignore[override]
        """The Q-Former as a language model, which starts with [DEC] and ends with [SEP]."""
        return self.writer

    def decode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        context: Tensor,
        context_mask: Tensor | None = None,
        padding: Padding | None = "right",
    ) -> Tensor:
        """Hidden states [B, T, width] of texts [B, T] written from the images' tokens ``context`` [B, N, C]."""
        batch = self._with_queries(input_ids, attention_mask)
        hidden: Tensor = self.decoder(batch, None, context=context, context_mask=context_mask)
        return hidden[:, self.connector.tokens :]

    def _with_queries(self, ids: Tensor, mask: Tensor | None = None) -> TokenBatch:
        """[queries; text] of ids [B, T], embedded and laid out for writing."""
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        rows = self.decoder.embed(ids)  # [B, T, D]
        queries = self.connector.query_tokens.to(rows.dtype).expand(len(ids), -1, -1)
        return TokenBatch(torch.cat([queries, rows], 1), self.written_layout(real))

    @torch.inference_mode()
    def write_ids(
        self,
        context: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoding: Decoding | None = None,
        *,
        context_mask: Tensor | None = None,
        stop_ids: Sequence[int] | None = None,
        pad_id: int | None = None,
        generators: Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """New token ids [B, n] behind prompts [B, T], pads on either side; see ``zoo.sampling.text.write``. The model
        should be in eval mode.

        Args:
            context: [B, N, C] the encoder's tokens.
        """
        if attention_mask is not None:
            input_ids, attention_mask = align_right(input_ids, attention_mask.bool())
        batch = self._with_queries(input_ids, attention_mask)
        no_ids = input_ids.new_full((len(input_ids), self.connector.tokens), -1)
        return write(
            self.decoder,
            batch.embeds,
            batch.layout,
            decoding or Decoding(),
            stop_ids=[self.tokenizer.eos_id] if stop_ids is None else stop_ids,
            pad_id=self.tokenizer.pad_id if pad_id is None else pad_id,
            generators=generators,
            context=context,
            context_mask=context_mask,
            prompt_ids=torch.cat([no_ids, input_ids], 1),
        )

    def _continue(self, context: Tensor, mask: Tensor | None, begun: list[int], texts: Sequence[str]) -> Tensor:
        """Scores [C] of texts that share an image [1, N, C] and the ids they begin with; queries and start run once."""
        if not len(texts):
            return torch.empty(0, device=context.device)
        ids, real, targets = self._answered([begun] * len(texts), texts)
        first, writer = len(begun), self.decoder
        cache = writer.new_cache()
        head = writer(self._with_queries(ids[:1, :first]), cache, context=context, context_mask=mask)[:, -1:]
        cache = writer.select_cache(cache, torch.zeros(len(ids), dtype=torch.long, device=ids.device))
        tail = writer(TokenBatch(writer.embed(ids[:, first:]), self.written_layout(real)), cache)  # [C, T - first, D]
        hidden = torch.cat([head.expand(len(ids), -1, -1), tail[:, :-1]], 1)
        return self._nats(hidden, targets[:, first - 1 : -1])

    # -- what surrounds the tensors --------------------------------------------------------------------------------

    def caption_ids(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask [N, T] of texts from [CLS] to [SEP], on the model's device."""
        return self._ids(texts)

    @property
    def processor(self) -> FusionProcessor:  # type: ignore[override]
        """Turns samples into ``pixel_values``, ``input_ids`` and ``attention_mask``; made on first use.

        Raises:
            ConfigError: The tokenizer has more ids than the text branch has rows.
        """
        from zoo.data.fused import FusionProcessor

        if not isinstance(self._processor, FusionProcessor):
            check_vocabulary(self.text_config, self.tokenizer.vocab_size)
            plain = super().processor
            self._processor = FusionProcessor(
                plain.transform,
                plain.tokenizer,
                min(self.config.text_length, self.text_config.context_length),
                image_ids=self.config.image_ids,
                seed=self.seed,
            )
        return self._processor

    def layouts(self) -> dict[str, Layout]:
        """The image, and the three tasks on [queries; text] with a caption of typical length."""
        return {
            "image": lay_out([Segment("image", self.encoder.tokens, "image", "full")]),
            **self.query_layouts(),
        }

    def compile(self, *args: object, **options: object) -> None:
        """Compile the encoder, as ``nn.Module.compile``: ``forward`` itself computes nothing yet."""
        self.encoder.compile(*args, **options)

    def example_batch(self, batch_size: int = 1) -> dict[str, Tensor]:
        """``pixel_values``, ``input_ids`` and ``attention_mask`` for ``batch_size`` pairs of typical length."""
        size, device = self.image_config.image_size, self.device
        ids = torch.full((batch_size, self._typical_text), 5, dtype=torch.long, device=device)  # no special id
        dtype = next(self.encoder.parameters()).dtype
        batch = {
            "pixel_values": torch.zeros(batch_size, 3, size, size, dtype=dtype, device=device),
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids, dtype=torch.bool),
        }
        if self.config.image_ids:
            batch["image_ids"] = torch.arange(batch_size, device=device)
        return batch


def check_vocabulary(config: QFormerConfig, size: int) -> None:
    """Refuse a tokenizer with more ids than the text branch has rows for.

    Raises:
        ConfigError: Both numbers.
    """
    if size > config.vocab_size - config.added:
        raise ConfigError(
            f"tokenizer {config.tokenizer!r} has {size} ids, connector.vocab_size = {config.vocab_size} with"
            f" {config.added} of its own: set connector.vocab_size to {size + config.added} or more"
        )
