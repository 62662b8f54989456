"""Align, fuse and write with one BERT: BLIP's mixture of encoder-decoder (arXiv 2201.12086, section 3.1), and the two
models it is fine-tuned to that only write: captions of an image, answers to a question about it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor

from zoo.decoders.base import Decoder
from zoo.decoders.bert_decoder import BertDecoder, BertDecoderConfig
from zoo.encoders.base import Encoder, ImageEncoderConfig
from zoo.encoders.bert import Bert, BertConfig
from zoo.errors import ConfigError
from zoo.layout import Layout, Segment, lay_out
from zoo.models.base import Model
from zoo.models.fusion import TYPICAL_TEXT, Fusion, FusionConfig
from zoo.models.grounded import GroundedFields, WritesGrounded, shifted
from zoo.models.lazy import LazyOutputs
from zoo.part import PartConfig, seeded
from zoo.recipe import WiringConfig

if TYPE_CHECKING:
    from zoo.data.captions import CaptionProcessor


def _decoder(config: PartConfig, width: int, seed: int) -> Decoder:
    """The decoder reading a context of ``width``.

    Raises:
        ConfigError: A decoder that cross-attends nothing.
    """
    if not isinstance(config, BertDecoderConfig):
        raise ConfigError("this wiring needs a decoder that cross-attends: choose decoder=bert-decoder")
    with seeded(seed, "decoder"):
        return config.build(width)


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

    provides: ClassVar[frozenset[str]] = Fusion.provides | {"hidden", "targets"}

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
        self.decoder = _decoder(decoder_config, cast("Encoder", self.encoder).width, seed)
        if config.share and isinstance(self.decoder, BertDecoder):
            self.decoder.share_with(self.text_encoder.embed, self.text_encoder.trunk)

    def forward(self, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:  # type: ignore[override]
        """As ``Fusion.forward``, and ``hidden`` [B, T, D] and ``targets`` [B, T] of the caption being written, which
        are computed when an objective asks for them."""
        outputs = super().forward(batch)
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        makers: dict[str, Any] = {name: (lambda made, value=value: value) for name, value in outputs.items()}

        def hidden(made: LazyOutputs) -> Tensor:
            return self.decode(self.started(ids), mask, made["image_tokens"])

        return LazyOutputs({**makers, "hidden": hidden, "targets": lambda made: shifted(ids, mask)}, ids.device.type)

    def started(self, ids: Tensor) -> Tensor:
        """Text ids [B, T] with [DEC] in the first place."""
        return torch.cat([torch.full_like(ids[:, :1], self.start_id), ids[:, 1:]], 1)

    @property
    def typical_targets(self) -> int:
        return max(1, min(TYPICAL_TEXT, self.config.text_length) - 1)


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


class Writer(WritesGrounded, Model):
    """``encoder`` and ``decoder``: BLIP's captioner (models/blip.py of the release)."""

    provides: ClassVar[frozenset[str]] = frozenset({"hidden", "targets"})

    def __init__(
        self, config: WriterConfig, image_config: ImageEncoderConfig, decoder_config: PartConfig, seed: int
    ) -> None:
        super().__init__()
        self.config = self.grounded = config
        self.image_config, self.decoder_config, self.seed = image_config, decoder_config, seed
        self._tokenizer: Any = None
        self._processor: Any = None
        with seeded(seed, "encoder"):
            self.encoder: Encoder = image_config.build()
        self.decoder = _decoder(decoder_config, self._context_width(), seed)

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
        """Text ids [B, T] with [DEC] in the first place."""
        return torch.cat([torch.full_like(ids[:, :1], self.start_id), ids[:, 1:]], 1)

    # -- what surrounds the tensors --------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        """The decoder's text tokenizer, made on first use: published ones need files or the network."""
        from zoo.data.text import named_tokenizer

        if self._tokenizer is None:
            self._tokenizer = named_tokenizer(cast("Any", self.decoder_config).tokenizer)
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self._tokenizer, self._processor = tokenizer, None

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


@dataclass(frozen=True, kw_only=True)
class AnswererConfig(WriterConfig):
    """Joins an image encoder, a text encoder that lets a question read the image, and a decoder that reads the
    question's states.

    Attributes:
        question_length: Longest question in tokens.
        prompt: The question where a sample or a call gives none.
        share: As ``MEDConfig.share``; BLIP's release does not tie the two, and its widths may then differ.
    """

    slots: ClassVar[tuple[str, ...]] = ("encoder", "text_encoder", "decoder")

    question_length: int = 35
    text_length: int = 16
    prompt: str = "what is this?"
    share: bool = False

    def build(self, parts: Mapping[str, tuple[str, PartConfig]], seed: int) -> Answerer:
        """Build the model; every part is drawn from its own stream of ``seed``.

        Raises:
            ConfigError: Parts that do not fit each other.
        """
        image, text, decoder = (parts[slot][1] for slot in self.slots)
        return Answerer(self, cast("ImageEncoderConfig", image), text, decoder, seed)


class Answerer(Writer):
    """``encoder``, ``text_encoder``, ``decoder``: visual question answering of ALBEF and BLIP. The decoder reads the
    states of the question, never the image's tokens."""

    provides: ClassVar[frozenset[str]] = Writer.provides | {"answer_weights"}

    def __init__(
        self,
        config: AnswererConfig,
        image_config: ImageEncoderConfig,
        text_config: PartConfig,
        decoder_config: PartConfig,
        seed: int,
    ) -> None:
        if not isinstance(text_config, BertConfig):
            raise ConfigError(
                "this wiring needs a text encoder that cross-attends images: choose text_encoder=blip-bert or another"
                " on zoo.encoders.bert"
            )
        self.text_config: BertConfig = text_config
        super().__init__(config, image_config, decoder_config, seed)
        self.answerer = config
        with seeded(seed, "text_encoder"):
            self.text_encoder: Bert = text_config.build(self.encoder.width)
        if config.share and isinstance(self.decoder, BertDecoder):
            self.decoder.share_with(self.text_encoder.embed, self.text_encoder.trunk)

    def _context_width(self) -> int:
        return self.text_config.width

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Answer ``question_ids`` [B, Q] (with ``question_mask``) about ``pixel_values`` [B, 3, S, S] by ``input_ids``
        [A, T] with their ``attention_mask`` and ``labels``, as ``Writer.forward`` has them.

        The answers are one a question, unless ``answers_per_question`` [B] says how many each has, in order;
        ``answer_weights`` [A] is 1 by default.

        Returns:
            ``hidden`` [A, T, D], ``targets`` [A, T], and ``answer_weights`` [A], divided by the number of questions.
        """
        mask = batch.get("question_mask")
        states = self.asked(batch["pixel_values"], batch["question_ids"], mask)
        questions, counts = len(states), batch.get("answers_per_question")
        if counts is not None:
            states = states.repeat_interleave(counts, 0)
            mask = None if mask is None else mask.repeat_interleave(counts, 0)
        ids = batch["input_ids"]
        hidden = self.decode(self.started(ids), batch.get("attention_mask"), states, mask)
        weights = batch.get("answer_weights")
        weights = states.new_ones(len(ids)) if weights is None else weights
        return {"hidden": hidden, "targets": shifted(batch["labels"], None), "answer_weights": weights / questions}

    def asked(self, pixel_values: Tensor, question_ids: Tensor, question_mask: Tensor | None = None) -> Tensor:
        """States [B, Q, D] of questions that read their images."""
        image = self.encoder(pixel_values)
        ids = self.text_encoder.reading(question_ids)
        states: Tensor = self.text_encoder(ids, question_mask, context=image.tokens, context_mask=image.mask).tokens
        return states

    def read(self, pixel_values: Tensor, prompts: Sequence[str] | None = None) -> tuple[Tensor, Tensor | None]:
        """The states of the questions ``prompts``, the wiring's own by default, and their mask."""
        said = [self.answerer.prompt] * len(pixel_values) if prompts is None else list(prompts)
        rows = self.processor.encode_questions(said)
        ids, mask = (rows[name].to(self.device) for name in ("question_ids", "question_mask"))
        return self.asked(pixel_values, ids, mask), mask

    def begin(self, prompts: Sequence[str] | None, count: int) -> list[list[int]]:
        """An answer begins with the start token; the prompt is the question, which it cross-attends."""
        return [[self.start_id] for _ in range(count)]

    def _make_processor(self, length: int) -> Any:
        from zoo.data.questions import QuestionProcessor

        return QuestionProcessor(
            self._transform(),
            self.tokenizer,
            length,
            question_length=min(self.answerer.question_length, self.text_config.context_length),
            question=self.answerer.prompt,
            seed=self.seed,
        )

    def layouts(self) -> dict[str, Layout]:
        """As ``Writer.layouts``, and the question, whose tokens read each other and the image."""
        question = Segment("question", min(TYPICAL_TEXT, self.answerer.question_length), "text", "full")
        return {**super().layouts(), "question": lay_out([question])}

    def example_batch(self, batch_size: int = 1) -> dict[str, Tensor]:
        """As ``Writer.example_batch``, with a question of typical length an item."""
        length = min(TYPICAL_TEXT, self.answerer.question_length)
        ids = torch.full((batch_size, length), 5, dtype=torch.long, device=self.device)
        return {
            **super().example_batch(batch_size),
            "question_ids": ids,
            "question_mask": torch.ones_like(ids, dtype=torch.bool),
        }
