"""The two conditions of LlamaGen: a caption, read by a text encoder, and a class (gpt.py, CaptionEmbedder and
LabelEmbedder)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from zoo.connectors.base import Connector, ConnectorConfig
from zoo.data.conditions import CaptionedProcessor, ClassProcessor
from zoo.decoders.base import DecoderConfig
from zoo.encoders.base import Encoder, TextEncoderConfig
from zoo.errors import ConfigError
from zoo.layout import Layout
from zoo.models.image_lm import TYPICAL_TEXT, ConditionedConfig, ImageLM
from zoo.models.tokenizing import OwnsTokenizer
from zoo.nn import start_std
from zoo.part import Features, PartConfig, seeded
from zoo.sampling.text import align_right
from zoo.tokenizers.base import ImageTokenizerConfig

if TYPE_CHECKING:
    pass

CLASSES = 1000
"""ImageNet's."""

EMBEDDED_LABELS = (
    *(
        "flag",
        "family",
        "couple",
        "kiss",
        "handshake",
        "heart",
        "wheelchair",
        "worker",
        "hand",
        "face",
        "cat",
        "button",
    ),
    *("ball", "mountain", "woman", "women", "man", "men", "person", "people", "*"),
)
"""Words of OpenMoji's names, in the order in which they decide, and the class of all other names."""


@dataclass(frozen=True, kw_only=True)
class CaptionedConfig(ConditionedConfig):
    """Joins a text encoder, a connector, a language model of codes and an image tokenizer.

    Attributes:
        prefix_tokens: Tokens of a caption at most: 120. Shorter captions take fewer; what is read does not depend on
            how many pads stand in front.
    """

    slots: ClassVar[tuple[str, ...]] = ("text_encoder", "connector", "decoder", "image_tokenizer")
    scale_settles: ClassVar[frozenset[str]] = frozenset({"prefix_tokens"})

    guidance: float = 7.5
    top_k: int = 1000
    prefix_tokens: int = 120

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prefix_tokens < 2:
            raise ValueError(f"prefix_tokens = {self.prefix_tokens} must be 2 or more")

    def scaled(self, sizes: Mapping[str, Any]) -> Self:
        """A scale gives captions half of its context."""
        if "context_length" not in sizes:
            return self
        return dataclasses.replace(self, prefix_tokens=min(self.prefix_tokens, max(2, sizes["context_length"] // 2)))

    def build(self, parts: Mapping[str, tuple[str, PartConfig]], seed: int) -> CaptionedImageLM:
        """Build the model; every part is drawn from its own stream of ``seed``.

        Raises:
            ConfigError: Parts that do not fit each other.
        """
        return CaptionedImageLM(
            self,
            cast("TextEncoderConfig", parts["text_encoder"][1]),
            cast("ConnectorConfig", parts["connector"][1]),
            cast("DecoderConfig", parts["decoder"][1]),
            cast("ImageTokenizerConfig", parts["image_tokenizer"][1]),
            seed,
        )


class CaptionedImageLM(OwnsTokenizer, ImageLM):
    """``text_encoder``, ``connector``, ``decoder``, ``image_tokenizer``, and ``unconditional`` [prefix_tokens, C], the
    features of no caption.

    The released file holds them as a parameter inside a buffer, which no optimizer sees: drawn once, never trained.
    """

    unconditional: Tensor

    def __init__(
        self,
        config: CaptionedConfig,
        text_config: TextEncoderConfig,
        connector_config: ConnectorConfig,
        decoder_config: DecoderConfig,
        image_config: ImageTokenizerConfig,
        seed: int,
    ) -> None:
        self.text_config, self.connector_config = text_config, connector_config
        self.longest_text = min(config.prefix_tokens, text_config.context_length)
        super().__init__(config, decoder_config, image_config, seed, config.prefix_tokens)

    def _make_condition(self, seed: int) -> None:
        with seeded(seed, "text_encoder"):
            self.text_encoder: Encoder = self.text_config.build()

    def _join(self, seed: int) -> None:
        width, tokens = self.text_encoder.width, self.prefix_tokens
        with seeded(seed, "connector"):
            self.connector: Connector = self.connector_config.build(
                in_width=width, in_tokens=tokens, out_width=self.decoder.width
            )
        if self.connector.tokens > tokens:
            raise ConfigError(
                f"the connector returns {self.connector.tokens} tokens, the prefix has room for {tokens}: raise"
                " wiring.prefix_tokens"
            )
        with seeded(seed, "unconditional"):
            self.register_buffer("unconditional", torch.randn(tokens, width) / width**0.5)

    def condition(self, batch: Mapping[str, Tensor], dropped: Tensor) -> tuple[Tensor, Tensor | None]:
        """The prefix of ``input_ids`` [B, L] with ``attention_mask`` [B, L] (pads behind), or of ``caption_features``
        [B, P, C] with ``caption_mask`` [B, P] (pads, zeros, in front), what a text encoder made of captions earlier.

        Where a caption is dropped, its mask stays: no caption is as long as the one it stands for, as released.
        """
        if "caption_features" in batch:
            tokens, real = batch["caption_features"], batch["caption_mask"].bool()
            self._check_features(tokens)
        else:
            tokens, real = self._encoded(batch["input_ids"], batch.get("attention_mask"))
        none = self.unconditional[-tokens.shape[1] :].to(tokens.dtype)  # [P, C]
        tokens = torch.where(dropped[:, None, None], none, tokens)
        joined = self.connector(Features(tokens, mask=real))
        return joined.tokens, joined.mask

    def _encoded(self, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The text encoder's tokens [B, P, C], pads in front and zero, and which are real."""
        frozen = not any(p.requires_grad for p in self.text_encoder.parameters())
        with torch.no_grad() if frozen else nullcontext():
            tokens = self.text_encoder(ids, mask).tokens
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()[:, : tokens.shape[1]]
        if not real.is_meta and not bool(real.all()):
            tokens, real = align_right(tokens, real)
            tokens = tokens * real[..., None]
        return tokens, real

    def _check_features(self, tokens: Tensor) -> None:
        if tokens.shape[1] > self.prefix_tokens or tokens.shape[2] != self.unconditional.shape[1]:
            raise ConfigError(
                f"caption_features have shape {tuple(tokens.shape)}, expected [batch, up to {self.prefix_tokens},"
                f" {self.unconditional.shape[1]}]"
            )

    def _rows(self, texts: Sequence[str]) -> dict[str, Tensor]:
        return self.processor.encode_texts(texts, whole=True)

    # -- what surrounds the tensors --------------------------------------------------------------------------------

    @property
    def processor(self) -> CaptionedProcessor:
        """Turns samples into ``forward``'s batch; made on first use.

        Raises:
            ConfigError: The tokenizer has more ids than the text encoder has rows.
        """
        if self._processor is None:
            if self.tokenizer.vocab_size > self.text_config.vocab_size:
                raise ConfigError(
                    f"tokenizer {self.text_config.tokenizer!r} has {self.tokenizer.vocab_size} ids, more than"
                    f" text_encoder.vocab_size = {self.text_config.vocab_size}: set one to fit the other"
                )
            self._processor = CaptionedProcessor(
                self._transform(),
                self.tokenizer,
                self.longest_text,
                bos=getattr(self.text_config, "starts_with_bos", True),
                codes=cast("Any", self.image_tokenizer) if self.image_tokenizer.stored else None,
                seed=self.seed,
            )
        processor: CaptionedProcessor = self._processor
        return processor

    def layouts(self) -> dict[str, Layout]:
        """A caption of typical length and the image, all of it causal."""
        return {"decoder": self.layout(min(TYPICAL_TEXT, self.longest_text))}

    def example_batch(self, batch_size: int = 1) -> dict[str, Tensor]:
        """An image and a caption of typical length an item."""
        length = min(TYPICAL_TEXT, self.longest_text)
        ids = torch.ones(batch_size, length, dtype=torch.long, device=self.device)
        mask = torch.ones_like(ids, dtype=torch.bool)
        return {**self._example_images(batch_size), "input_ids": ids, "attention_mask": mask}


@dataclass(frozen=True, kw_only=True)
class ClassedConfig(ConditionedConfig):
    """Joins a table of classes, a language model of codes and an image tokenizer.

    Attributes:
        labels: Names of the classes, in order; none: a class is known by its number. ``*`` is the class of every text
            that names no other.
        classes: How many; 0 = as many as labels, or ImageNet's 1,000 without labels.
        label_key: Where a sample's ``meta`` has its label or number; without one its first text decides.
    """

    slots: ClassVar[tuple[str, ...]] = ("decoder", "image_tokenizer")
    scale_settles: ClassVar[frozenset[str]] = frozenset({"labels"})

    guidance: float = 4.0
    top_k: int = 2000
    labels: list[str] = field(default_factory=list)
    classes: int = 0
    label_key: str = "label"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.classes < 0 or (self.classes and self.classes < len(self.labels)):
            raise ValueError(f"classes = {self.classes} must be 0, or no fewer than the {len(self.labels)} labels")

    @property
    def count(self) -> int:
        """Number of classes, that of no class not counted."""
        return self.classes or len(self.labels) or CLASSES

    def scaled(self, sizes: Mapping[str, Any]) -> Self:
        """A scale for the embedded corpus has its labels, where none are given."""
        if self.labels or "tokenizer" not in sizes:
            return self
        return dataclasses.replace(self, labels=list(EMBEDDED_LABELS), classes=0)

    def build(self, parts: Mapping[str, tuple[str, PartConfig]], seed: int) -> ClassedImageLM:
        """Build the model; every part is drawn from its own stream of ``seed``.

        Raises:
            ConfigError: Parts that do not fit each other.
        """
        return ClassedImageLM(
            self,
            cast("DecoderConfig", parts["decoder"][1]),
            cast("ImageTokenizerConfig", parts["image_tokenizer"][1]),
            seed,
        )


class ClassedImageLM(ImageLM):
    """``classes`` (the last row is that of no class), ``decoder``, ``image_tokenizer``."""

    config: ClassedConfig

    def __init__(
        self, config: ClassedConfig, decoder_config: DecoderConfig, image_config: ImageTokenizerConfig, seed: int
    ) -> None:
        super().__init__(config, decoder_config, image_config, seed, 1)

    def _join(self, seed: int) -> None:
        with seeded(seed, "classes"):
            self.classes = nn.Embedding(self.config.count + 1, self.decoder.width)
            nn.init.normal_(self.classes.weight, std=start_std(self.decoder.width))

    def condition(self, batch: Mapping[str, Tensor], dropped: Tensor) -> tuple[Tensor, Tensor | None]:
        """The row of ``classes`` [B], in the rows ``dropped`` that of no class."""
        classes = batch["classes"].masked_fill(dropped, self.config.count)
        return self.classes(classes)[:, None], None  # [B, 1, D]

    def _rows(self, texts: Sequence[str]) -> dict[str, Tensor]:
        return {"classes": torch.tensor([self.processor.class_of(text) for text in texts], dtype=torch.long)}

    # -- what surrounds the tensors --------------------------------------------------------------------------------

    @property
    def processor(self) -> ClassProcessor:
        """Turns samples into ``forward``'s batch; made on first use."""
        if self._processor is None:
            self._processor = ClassProcessor(
                self._transform(),
                self.config.count,
                self.config.labels,
                self.config.label_key,
                codes=cast("Any", self.image_tokenizer) if self.image_tokenizer.stored else None,
                seed=self.seed,
            )
        processor: ClassProcessor = self._processor
        return processor

    def layouts(self) -> dict[str, Layout]:
        """One class token and the image, all of it causal."""
        return {"decoder": self.layout(1)}

    def example_batch(self, batch_size: int = 1) -> dict[str, Tensor]:
        """An image and a class an item."""
        classes = torch.zeros(batch_size, dtype=torch.long, device=self.device)
        return {**self._example_images(batch_size), "classes": classes}
