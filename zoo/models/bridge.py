"""A frozen or trained eye, a connector, and a language model that reads the connector's tokens in place of words.

LLaVA and stage 2 of BLIP-2 are this wiring; they differ in parts, template and stages only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.connectors.base import Connector, ConnectorConfig
from zoo.data.sequences import restarted
from zoo.decoders.base import Decoder, DecoderConfig
from zoo.encoders.base import Encoder, ImageEncoderConfig
from zoo.errors import ConfigError
from zoo.layout import Layout, Segment, TokenBatch, lay_out
from zoo.layout_facts import Padding, look_at_padding
from zoo.models.base import Model
from zoo.models.plain_text import ScoresPlainText
from zoo.models.tokenizing import OwnsTokenizer
from zoo.models.writing import IGNORE, WritesText, _given
from zoo.part import Features, PartConfig, seeded
from zoo.recipe import WiringConfig

if TYPE_CHECKING:
    from zoo.data.processor import PromptProcessor
    from zoo.data.text import TextTokenizer

TYPICAL_TEXT = 16
"""Text tokens of a caption with its template, as layouts and FLOP counts assume."""

TYPICAL_INSTRUCTION = 12
"""Ids of an instruction, as a connector reads it."""


@dataclass(frozen=True, kw_only=True)
class BridgeConfig(WiringConfig):
    """Joins an image encoder, a connector and a text decoder.

    Attributes:
        template: How image, question and answer are written (``zoo.data.templates``): plain, blip2, vicuna_v1,
            llava_v1, llava_v0, llava_llama_2, minigpt4_caption, minigpt4, minigpt4_llama_2, minigpt4_chat,
            instructblip.
        prompt: The question where a sample or a call gives none; empty = one of the template's instructions, drawn
            anew for each sample in training.
        preamble: Write the template's system text. A ``scale`` leaves it out: it would fill the short context of its
            language models, and tells them nothing.
        image_id: Placeholder id of an image slot in ``input_ids``; -1 = the first id outside the decoder's vocabulary.
            The embedding of a slot is replaced, so the id needs no row of the table.
        visual_tokens: Tokens an image becomes; 0 = as many as the connector returns by itself.
        augment: What training images go through (``none``, ``random-resized-crop``, ``shift``, ``flip``,
            ``shift-flip``).
    """

    slots: ClassVar[tuple[str, ...]] = ("encoder", "connector", "decoder")
    per_stage: ClassVar[frozenset[str]] = frozenset({"template", "prompt", "preamble", "augment"})
    scale_settles: ClassVar[frozenset[str]] = frozenset({"preamble"})

    template: str = "plain"
    prompt: str = ""
    preamble: bool = True
    image_id: int = -1
    visual_tokens: int = 0
    augment: str = "none"

    def __post_init__(self) -> None:
        from zoo.data.templates import template

        template(self.template)
        if self.visual_tokens < 0:
            raise ValueError(f"visual_tokens = {self.visual_tokens} must be 0 (the connector's own) or more")

    def scaled(self, sizes: Mapping[str, Any]) -> Self:
        return replace(self, preamble=False) if "context_length" in sizes else self

    def build(self, parts: Mapping[str, tuple[str, PartConfig]], seed: int) -> Bridge:
        """Build the model; every part is drawn from its own stream of ``seed``.

        Raises:
            ConfigError: Parts that do not fit each other, or an encoder-decoder language model's template.
        """
        return Bridge(
            self,
            cast("ImageEncoderConfig", parts["encoder"][1]),
            cast("ConnectorConfig", parts["connector"][1]),
            cast("DecoderConfig", parts["decoder"][1]),
            seed,
        )


class Bridge(OwnsTokenizer, ScoresPlainText, WritesText, Model):
    """``encoder``, ``connector``, ``decoder``: image tokens spliced into the text at placeholders, all of it causal."""

    tokenizer_of: ClassVar[str] = "decoder_config"

    provides: ClassVar[frozenset[str]] = frozenset({"hidden", "targets"})
    reads_image_tokens: ClassVar[bool] = True
    gives_context: ClassVar[bool] = False
    """The language model reads a context by cross-attention, which ``forward`` gives it."""

    def __init__(
        self,
        config: BridgeConfig,
        image_config: ImageEncoderConfig,
        connector_config: ConnectorConfig,
        decoder_config: DecoderConfig,
        seed: int,
    ) -> None:
        super().__init__()
        self.config = config
        self.image_config = image_config
        self.connector_config = connector_config
        self.decoder_config = decoder_config
        self.seed = seed
        self._instruction_tokenizer: TextTokenizer | None = None
        self._processor: PromptProcessor | None = None
        if decoder_config.reads_context and not self.gives_context:
            raise ConfigError(
                "wiring bridge puts images among the words, and this decoder reads them by cross-attention: choose a"
                " decoder-only language model, or wiring bridge-seq2seq for a T5"
            )
        with seeded(seed, "encoder"):
            self.encoder: Encoder = image_config.build()
        if config.visual_tokens:
            connector_config = connector_config.with_tokens(config.visual_tokens, self.encoder.tokens)
            self.connector_config = connector_config
        with seeded(seed, "decoder"):
            decoder: Decoder = decoder_config.build()
        with seeded(seed, "connector"):
            self.connector: Connector = connector_config.build(
                in_width=self.encoder.width, in_tokens=self.encoder.tokens, out_width=decoder.width
            )
        self.decoder = decoder
        decoder.image_tokens = self.connector.tokens
        if self.connector.tokens + 2 > decoder_config.context_length:
            raise ConfigError(
                f"{self.connector.tokens} image tokens leave no room for text in decoder.context_length ="
                f" {decoder_config.context_length}: raise it, or choose a connector that returns fewer tokens"
            )

    # -- tensors ---------------------------------------------------------------------------------------------------

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Read ``pixel_values`` [N, 3, H, W] and ``input_ids`` [B, T] with a placeholder for every image token.

        Also read are ``attention_mask`` [B, T] (pads behind the text), ``labels`` [B, T] (-100 = no target; the label
        of a token stands in its own place, as transformers have it), and ``has_image`` [B] where some rows show none
        (their images are not looked at). Without ``has_image`` the images come in the order of their slots, any number
        a row, or as ``image_order`` says where rows are packed (``document``, ``zoo.data.packing``). ``image_tokens``
        [N, n_enc, D_enc], what the encoder made of the images, may stand in place of the pixels. ``instruction_ids``
        [B, Tq] and ``instruction_mask`` [B, Tq] are the instruction in the vocabulary of a connector that reads it.

        Returns:
            ``hidden`` [B, T, width] and ``targets`` [B, T], the id each row should predict: the labels shifted by one.
        """
        ids, labels = batch["input_ids"], batch["labels"]
        pixels, encoded = batch.get("pixel_values"), batch.get("image_tokens")
        if (has_image := batch.get("has_image")) is not None:
            pixels = None if pixels is None else pixels[has_image]
            encoded = None if encoded is None else encoded[has_image]
        text = self._instruction(batch)
        embeds = self._splice(ids, pixels, text=text, image_tokens=encoded, order=batch.get("image_order"))
        layout = self._layout(ids, batch.get("attention_mask"), padding="right", document=batch.get("document"))
        hidden = self.decoder(TokenBatch(embeds, layout))  # [B, T, D]
        return {"hidden": hidden, "targets": F.pad(labels[:, 1:], (0, 1), value=IGNORE)}

    def image_features(
        self, pixel_values: Tensor | None, text: Features | None = None, image_tokens: Tensor | None = None
    ) -> Tensor:
        """The connector's tokens [N, n, width] of N images: what stands in for words.

        Args:
            pixel_values: [N, 3, H, W].
            text: The instruction of each image, [N, Tq, D] from ``connector.embed_text``, for connectors that read it.
            image_tokens: [N, n_enc, D_enc], the encoder's tokens of the images, in place of ``pixel_values``.
        """
        tokens: Tensor = self.connector(self.encode_images(pixel_values, image_tokens), text).tokens
        return tokens

    def _instruction(self, batch: Mapping[str, Tensor]) -> Features | None:
        """The connector's tokens of the batch's instructions, a row each; None where it reads none."""
        ids = batch.get("instruction_ids")
        if not self.connector.reads_text or ids is None:
            return None
        return self.connector.embed_text(ids, batch.get("instruction_mask"))

    def _per_image(self, text: Features, slots: Tensor, images: int) -> Features:
        """Instructions [B, Tq, D] of the rows as those of ``images`` images, which stand at ``slots`` [B, T]."""
        counts = slots.sum(dim=1) // self.connector.tokens  # [B]
        if slots.device.type != "cpu":  # on a CPU _check_slots has the better message
            torch._assert_async(counts.sum() == images, "image placeholders and images differ in number")
        elif int(counts.sum()) != images:
            _check_slots(slots, images, self.connector.tokens)

        def spread(rows: Tensor) -> Tensor:
            return rows.repeat_interleave(counts, dim=0, output_size=images)  # a known size waits for no device

        return Features(spread(text.tokens), mask=None if text.mask is None else spread(text.mask))

    def text_logits(
        self,
        pixel_values: Tensor | None,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        instruction_ids: Tensor | None = None,
        instruction_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, T, V] of every position.

        Args:
            pixel_values: [N, 3, H, W], the images in the order of their slots, row by row; None where no row shows one.
            input_ids: [B, T] with ``image_token_id`` at each of an image's slots.
            attention_mask: [B, T], 1 = real; pads may stand on either side.
            decoder_input_ids: Not used: the decoder reads ``input_ids``.
            instruction_ids: [B, Tq], the instructions in the connector's vocabulary, where it reads them.
            instruction_mask: [B, Tq], 1 = real.
        """
        text = self._instruction(_given(instruction_ids, instruction_mask))
        embeds = self._splice(input_ids, pixel_values, text=text)
        layout = self._layout(input_ids, attention_mask)
        return self.decoder.logits(self.decoder(TokenBatch(embeds, layout)))

    def _splice(
        self,
        ids: Tensor,
        pixel_values: Tensor | None,
        features: Tensor | None = None,
        text: Features | None = None,
        image_tokens: Tensor | None = None,
        order: Tensor | None = None,
    ) -> Tensor:
        """Embeddings [B, T, D] with image tokens in place of the placeholders.

        Args:
            features: [N, n, D], the connector's tokens, where they are known.
            text: Instructions of the rows, from ``_instruction``.
            order: [N], the image in each group of slots, where they do not stand in their order (packed rows).

        Raises:
            ConfigError: Slots and image tokens differ in number (on an accelerator an assertion, so that nothing waits
                for it).
        """
        slots = ids == self.image_token_id  # [B, T]
        embeds = self.decoder.embed(ids.masked_fill(slots, 0))  # [B, T, D]
        shown = image_tokens if image_tokens is not None else pixel_values
        if features is None and shown is not None and len(shown):
            _check_slots(slots, len(shown), self.connector.tokens)
            own = None if text is None else self._per_image(text, slots, len(shown))
            features = self.image_features(pixel_values, own, image_tokens)
        if features is None:
            if not (torch.is_grad_enabled() and any(p.requires_grad for p in self.connector.parameters())):
                _check_slots(slots, 0, self.connector.tokens)
                return embeds
            # text alone: a blank image of weight zero keeps the connector in the graph, or DDP would hang
            size = self.eye_config.image_size
            blank = embeds.new_zeros(1, 3, size, size)
            first = None if text is None else Features(text.tokens[:1], None if text.mask is None else text.mask[:1])
            return embeds + 0.0 * self.image_features(blank, first).sum()
        _check_slots(slots, features.shape[0], features.shape[1])
        features = features if order is None else features[order]
        return embeds.masked_scatter(slots[..., None], features.to(embeds.dtype))

    def _layout(
        self,
        ids: Tensor,
        attention_mask: Tensor | None,
        padding: Padding | None = None,
        document: Tensor | None = None,
    ) -> Layout:
        """Plain causal attention over text and image tokens alike, unless the decoder arranges them otherwise;
        positions do not count pads in front.

        ``padding="right"`` promises that pads stand behind the text, which on an accelerator nobody looks at.
        """
        batch, length = ids.shape
        real = None if attention_mask is None else attention_mask.bool()
        position: Tensor | None = None
        if real is not None and padding is None:
            padding = look_at_padding(real) if real.device.type == "cpu" else "any"
        if real is not None and padding == "any":
            position = (real.long().cumsum(1) - 1).clamp(min=0)
        layout = lay_out(
            [Segment("sequence", length, predicted=True)],
            batch,
            real=real,
            position=position,
            padding=padding,
            device=ids.device,
        )
        # rows may hold their images anywhere, so that a token's modality is known by its id alone
        slots = ids == self.image_token_id  # [B, T]
        layout = replace(layout, modality=slots.long(), spans=None)
        if document is not None:
            return replace(layout, position=restarted(document)).separate(document)
        return self.decoder.arrange(layout, ids, slots)

    @property
    def reads_packed_rows(self) -> bool:  # type: ignore[override]
        """Where nothing but the causal rule, positions and the order of the slots ties a row together."""
        own = type(self) is Bridge and type(self.decoder).arrange is Decoder.arrange
        return own and not self.connector.reads_text and getattr(self.decoder, "takes_positions", True)

    @property
    def row_length(self) -> int:
        """Longest row."""
        return self.decoder_config.context_length

    # -- what surrounds the tensors --------------------------------------------------------------------------------

    @property
    def eye_config(self) -> ImageEncoderConfig:
        """Of the encoder that reads images."""
        return self.image_config

    @property
    def image_token_id(self) -> int:
        """The placeholder of an image slot in ``input_ids``."""
        return self.config.image_id if self.config.image_id >= 0 else self.decoder_config.vocab_size

    @property
    def instruction_tokenizer(self) -> TextTokenizer | None:
        """The connector's text tokenizer, where it reads the instruction; made on first use."""
        if self._instruction_tokenizer is None and self.connector.reads_text:
            from zoo.data.text import named_tokenizer

            self._instruction_tokenizer = named_tokenizer(getattr(self.connector_config, "tokenizer", ""))
        return self._instruction_tokenizer

    @instruction_tokenizer.setter
    def instruction_tokenizer(self, tokenizer: TextTokenizer) -> None:
        self._instruction_tokenizer = tokenizer
        self._processor = None

    def reconfigure(self, config: BridgeConfig) -> None:
        self.config = config
        self._processor = None

    @property
    def processor(self) -> PromptProcessor:
        """Turns samples into ``forward``'s batch; made on first use.

        Raises:
            ConfigError: The tokenizer has more ids than the decoder has rows.
        """
        if self._processor is None:
            from zoo.data.processor import PromptProcessor

            self._processor = PromptProcessor(**self._processor_fields())
        return self._processor

    def _processor_fields(self) -> dict[str, Any]:
        """What the parts and the wiring say about the processor, as ``PromptProcessor`` takes it.

        Raises:
            ConfigError: A tokenizer has more ids than the part that reads them has rows.
        """
        from zoo.data.images import ImageTransform

        image, connector = self.eye_config, cast("Any", self.connector_config)
        readers = [("decoder", self.tokenizer, self.decoder_config)]
        if self.instruction_tokenizer is not None:
            readers.append(("connector", self.instruction_tokenizer, connector))
        for slot, tokenizer, reader in readers:
            if tokenizer.vocab_size > reader.vocab_size:
                raise ConfigError(
                    f"tokenizer {reader.tokenizer!r} has {tokenizer.vocab_size} ids, {slot}.vocab_size"
                    f" is {reader.vocab_size}: set one to fit the other"
                )
        fields: dict[str, Any] = {
            "transform": ImageTransform(
                size=image.image_size,
                mean=tuple(image.mean),
                std=tuple(image.std),
                mode=cast("Any", image.resize),
                augment=cast("Any", self.config.augment),
            ),
            "tokenizer": self.tokenizer,
            "layout": self.config.template,
            "image_tokens": self.connector.tokens,
            "image_token_id": self.image_token_id,
            "max_length": self.decoder_config.context_length,
            "prompt": self.config.prompt,
            "seed": self.seed,
            "preamble": self.config.preamble,
        }
        if self.instruction_tokenizer is not None:
            longest = min(connector.instruction_length, connector.context_length)
            fields |= {"instructed": self.instruction_tokenizer, "instruction_length": longest}
        return fields

    def layouts(self) -> dict[str, Layout]:
        """The decoder's sequence with a caption of typical length, as the template orders it."""
        from zoo.data.templates import template

        image = Segment("image", self.connector.tokens, "image", "causal")
        text = Segment("text", self.typical_targets, "text", "causal", predicted=True)
        if template(self.config.template).image_before_bos:
            return {"decoder": self.decoder.sketch([image, text])}
        told = self.config.preamble and template(self.config.template).system
        before = Segment("before", TYPICAL_TEXT if told else 1, "text", "causal")
        return {"decoder": self.decoder.sketch([before, image, text])}

    @property
    def typical_targets(self) -> int:
        return max(1, min(TYPICAL_TEXT, self.decoder_config.context_length - self.connector.tokens - 1))

    def example_batch(self, batch_size: int = 1) -> dict[str, Tensor]:
        """One image and a caption of typical length an item, every text token a target."""
        size, text, slots = self.eye_config.image_size, self.typical_targets, self.connector.tokens
        device = self.device
        ids = torch.ones(batch_size, slots + text, dtype=torch.long, device=device)
        ids[:, :slots] = self.image_token_id
        labels = torch.ones_like(ids)
        labels[:, :slots] = IGNORE
        dtype = next(self.encoder.parameters()).dtype
        asked = torch.ones(batch_size, TYPICAL_INSTRUCTION, dtype=torch.long, device=device)
        instruction = {"instruction_ids": asked, "instruction_mask": asked.bool()} if self.connector.reads_text else {}
        return {
            **instruction,
            "pixel_values": torch.zeros(batch_size, 3, size, size, dtype=dtype, device=device),
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids, dtype=torch.bool),
            "labels": labels,
        }


def _check_slots(slots: Tensor, images: int, tokens: int) -> None:
    """Raise where the number of slots is not images x tokens."""
    if slots.device.type == "cpu":
        found = int(slots.sum())
        if found != images * tokens:
            raise ConfigError(
                f"input_ids hold {found} image placeholders, but {images} images give {tokens} tokens each:"
                f" expected {images * tokens} placeholders"
            )
    elif slots.device.type != "meta":
        torch._assert_async(slots.sum() == images * tokens, "image placeholders and image tokens differ in number")
