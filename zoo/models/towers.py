"""Two towers that meet in one dot product: CLIP's wiring (Radford et al. 2021, section 2.3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.encoders.base import Encoder, ImageEncoderConfig, TextEncoderConfig
from zoo.errors import ConfigError
from zoo.layout import Layout, Segment, lay_out
from zoo.models.base import Model, evaluating
from zoo.models.tokenizing import OwnsTokenizer
from zoo.part import PartConfig, seeded
from zoo.recipe import WiringConfig

if TYPE_CHECKING:
    from zoo.capabilities import ImageLike
    from zoo.data.processor import PairProcessor

TYPICAL_TEXT = 16
"""Tokens of a caption with its start and end, as layouts and FLOP counts assume."""

CHUNK = 64
"""Images or texts a forward pass of ``embed_images`` and ``embed_texts``."""

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class TowersConfig(WiringConfig):
    """Joins an image and a text encoder.

    Attributes:
        shared_width: Width of the shared space; 0 = the image encoder's where it projects itself, else the text
            encoder's, which holds for every CLIP size. Checkpoints with another width write it.
        temperature: Initial softmax temperature; ``logit_scale`` starts at ln(1 / temperature).
        augment: What training images go through (``none``, ``random-resized-crop``, ``shift``, ``flip``,
            ``shift-flip``).
    """

    slots: ClassVar[tuple[str, ...]] = ("encoder", "text_encoder")

    shared_width: int = 0
    temperature: float = 0.07
    augment: str = "none"

    def __post_init__(self) -> None:
        if self.shared_width < 0 or self.temperature <= 0:
            raise ValueError("shared_width must be 0 or more and temperature above 0")

    def build(self, parts: Mapping[str, tuple[str, PartConfig]], seed: int) -> Towers:
        """Build the model; every part and projection is drawn from its own stream of ``seed``.

        Raises:
            ConfigError: An encoder that pools nothing, or widths that do not meet.
        """
        return Towers(
            self,
            cast("ImageEncoderConfig", parts["encoder"][1]),
            cast("TextEncoderConfig", parts["text_encoder"][1]),
            seed,
        )


class Towers(OwnsTokenizer, Model):
    """An image encoder, a text encoder, a projection each (or none, where the encoder projects), and a temperature."""

    provides: ClassVar[frozenset[str]] = frozenset({"image_embeds", "text_embeds", "logit_scale"})

    def __init__(
        self, config: TowersConfig, image_config: ImageEncoderConfig, text_config: TextEncoderConfig, seed: int
    ) -> None:
        super().__init__()
        self.config = config
        self.image_config = image_config
        self.text_config = text_config
        self.seed = seed
        self._processor: PairProcessor | None = None
        with seeded(seed, "encoder"):
            self.encoder: Encoder = image_config.build()
        with seeded(seed, "text_encoder"):
            self.text_encoder: Encoder = text_config.build()
        for slot, tower in (("encoder", self.encoder), ("text_encoder", self.text_encoder)):
            if not tower.pooled_width:
                raise ConfigError(f"{slot} pools nothing, but towers compare one vector an item: set {slot}.pool=true")
        own = self.encoder.pooled_width if self.encoder.projects else self.text_encoder.pooled_width
        self.shared_width = config.shared_width or own
        self.image_projection = _projection(self.encoder, self.shared_width, seed, "image")
        self.text_projection = _projection(self.text_encoder, self.shared_width, seed, "text")
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / config.temperature)))

    # -- tensors ---------------------------------------------------------------------------------------------------

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Embed ``pixel_values`` [B, 3, H, W] and ``input_ids`` [B, T] with their ``attention_mask``.

        Returns:
            ``image_embeds`` and ``text_embeds`` [B, shared_width] of unit length, and ``logit_scale``, the logarithm.
        """
        images = self.image_features(batch["pixel_values"])
        texts = self.text_features(batch["input_ids"], batch.get("attention_mask"))
        return {
            "image_embeds": F.normalize(images, dim=-1),
            "text_embeds": F.normalize(texts, dim=-1),
            "logit_scale": self.logit_scale,
        }

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """Projected image features [B, shared_width], not normalised: transformers' ``get_image_features``."""
        features: Tensor = self.image_projection(self.encoder(pixel_values).pooled)
        return features

    def text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Projected text features [B, shared_width], not normalised: transformers' ``get_text_features``.

        Args:
            attention_mask: [B, T], 1 = real; pads must stand behind the text. Without one every encoder finds the
                end by itself.
        """
        features: Tensor = self.text_projection(self.text_encoder(input_ids, attention_mask).pooled)
        return features

    # -- capabilities ----------------------------------------------------------------------------------------------

    def embed_images(self, images: Sequence[ImageLike]) -> Tensor:
        """Embed images: [N, shared_width] float32 of unit length, on the model's device."""
        return self._embed(
            images, lambda chunk: self.image_features(self.processor.encode_images(chunk).to(self.device, self._dtype))
        )

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embed texts: [N, shared_width] float32 of unit length, on the model's device."""

        def features(chunk: Sequence[str]) -> Tensor:
            rows = self.processor.encode_texts(chunk)
            return self.text_features(rows["input_ids"].to(self.device), rows["attention_mask"].to(self.device))

        return self._embed(texts, features)

    def zero_shot_weights(self, names: Sequence[str], templates: Sequence[str] = ("a photo of a {}.",)) -> Tensor:
        """Embed class names: [C, shared_width] of unit length, to be compared with ``embed_images``.

        Every template is embedded and normalised, the templates are averaged, and the mean is normalised again, as in
        openai/CLIP's Prompt_Engineering_for_ImageNet.ipynb.

        Args:
            templates: Patterns with ``{}`` for the name.

        Raises:
            ConfigError: No templates, or one without ``{}``.
        """
        wrong = [t for t in templates if "{}" not in t]
        if not templates or wrong:
            raise ConfigError(
                f"templates must each hold {{}} for the name, unlike {wrong[0]!r}" if wrong else "no templates"
            )
        every = self.embed_texts([t.replace("{}", name) for name in names for t in templates])
        return F.normalize(every.view(len(names), len(templates), -1).mean(1), dim=-1)

    def _embed(self, items: Sequence[Item], features: Callable[[Sequence[Item]], Tensor]) -> Tensor:
        if isinstance(items, str):
            raise ConfigError("expected a list of items, got one string: wrap it in a list")
        items = list(items)
        with evaluating(self):
            rows = [F.normalize(features(items[i : i + CHUNK]).float(), dim=-1) for i in range(0, len(items), CHUNK)]
            return torch.cat(rows) if rows else torch.empty(0, self.shared_width, device=self.device)

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.encoder.parameters()).dtype

    # -- what surrounds the tensors --------------------------------------------------------------------------------

    @property
    def processor(self) -> PairProcessor:
        """Turns samples into ``pixel_values``, ``input_ids`` and ``attention_mask``; made on first use.

        Raises:
            ConfigError: The tokenizer has more ids than the text encoder has rows.
        """
        if self._processor is None:
            from zoo.data.images import ImageTransform
            from zoo.data.processor import PairProcessor

            tokenizer, image = self.tokenizer, self.image_config
            if tokenizer.vocab_size > self.text_config.vocab_size:
                raise ConfigError(
                    f"tokenizer {self.text_config.tokenizer!r} has {tokenizer.vocab_size} ids, more than "
                    f"text_encoder.vocab_size = {self.text_config.vocab_size}: set one to fit the other"
                )
            transform = ImageTransform(
                size=image.image_size,
                mean=tuple(image.mean),
                std=tuple(image.std),
                mode=cast("Any", image.resize),
                augment=cast("Any", self.config.augment),
            )
            self._processor = PairProcessor(transform, tokenizer, self.text_config.context_length, seed=self.seed)
        return self._processor

    def layouts(self) -> dict[str, Layout]:
        """The image (every token reads every other) and a caption of typical length (causal)."""
        text = min(TYPICAL_TEXT, self.text_config.context_length)
        return {
            "image": lay_out([Segment("image", self.encoder.tokens, "image", "full")]),
            "text": lay_out([Segment("text", text, "text", "causal")]),
        }

    def example_batch(self, batch_size: int = 1) -> dict[str, Tensor]:
        """``pixel_values``, ``input_ids`` and ``attention_mask`` for ``batch_size`` pairs of typical length."""
        size, length = self.image_config.image_size, min(TYPICAL_TEXT, self.text_config.context_length)
        ids = torch.ones(batch_size, length, dtype=torch.long, device=self.device)
        return {
            "pixel_values": torch.zeros(batch_size, 3, size, size, dtype=self._dtype, device=self.device),
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids, dtype=torch.bool),
        }


def _projection(encoder: Encoder, width: int, seed: int, name: str) -> nn.Module:
    """A matrix without bias, N(0, 1/in) as in openai/CLIP's model.py, or nothing for an encoder that projects
    itself."""
    if encoder.projects:
        if encoder.pooled_width != width:
            raise ConfigError(
                f"the {name} encoder projects to {encoder.pooled_width}, the shared space is {width} wide: "
                f"set its embed_width to {width}, or wiring.shared_width to {encoder.pooled_width}"
            )
        return nn.Identity()
    with seeded(seed, f"projection.{name}"):
        projection = nn.Linear(encoder.pooled_width, width, bias=False)
        nn.init.normal_(projection.weight, std=encoder.pooled_width**-0.5)
    return projection
