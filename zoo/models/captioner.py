"""Two towers and a decoder in one forward pass: CoCa's wiring (arXiv 2205.01917).

The lower half of the text decoder reads no image and gives the text's vector; the upper half goes on from its states
and reads the image, which gives captions. So one pass of each part serves the contrastive and the captioning loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.connectors.base import Connector, ConnectorConfig
from zoo.decoders.base import Decoder, DecoderConfig
from zoo.encoders.base import Encoder, ImageEncoderConfig, TextEncoderConfig
from zoo.encoders.causal_text import CausalText
from zoo.errors import ConfigError
from zoo.layout import Layout, Segment, TokenBatch, lay_out
from zoo.models.base import Model
from zoo.models.captioning import WritesCaptions
from zoo.models.towers import TYPICAL_TEXT, Towers, TowersConfig, _projection
from zoo.models.writing import IGNORE
from zoo.part import Features, PartConfig, seeded

if TYPE_CHECKING:
    from zoo.data.captions import CaptionProcessor


@dataclass(frozen=True, kw_only=True)
class CaptionerConfig(TowersConfig):
    """Joins an image encoder, a pooler, a causal text encoder and a decoder that goes on from its states.

    Attributes:
        shared_width: Width of the space images and texts are compared in; 0 = the text encoder's.
        prompt: Text before a caption where a sample or a call gives none; it is read and not trained.
    """

    slots: ClassVar[tuple[str, ...]] = ("encoder", "connector", "text_encoder", "decoder")

    prompt: str = ""

    def build(self, parts: Mapping[str, tuple[str, PartConfig]], seed: int) -> Captioner:
        """Build the model; every part and projection is drawn from its own stream of ``seed``.

        Raises:
            ConfigError: Parts that do not fit each other.
        """
        return Captioner(
            self,
            cast("ImageEncoderConfig", parts["encoder"][1]),
            cast("ConnectorConfig", parts["connector"][1]),
            cast("TextEncoderConfig", parts["text_encoder"][1]),
            cast("DecoderConfig", parts["decoder"][1]),
            seed,
        )


class Captioner(Towers, WritesCaptions):
    """``encoder``, ``connector``, ``text_encoder``, ``decoder``, a projection for each vector, and a temperature.

    The image's vector is the connector's where it pools one, else the encoder's.
    """

    provides: ClassVar[frozenset[str]] = frozenset(
        {"image_embeds", "text_embeds", "logit_scale", "hidden", "targets", "image_tokens"}
    )

    def __init__(
        self,
        config: CaptionerConfig,
        image_config: ImageEncoderConfig,
        connector_config: ConnectorConfig,
        text_config: TextEncoderConfig,
        decoder_config: DecoderConfig,
        seed: int,
    ) -> None:
        Model.__init__(self)  # the towers' own constructor builds two parts only
        self.config: CaptionerConfig = config
        self.image_config = image_config
        self.text_config = text_config
        self.decoder_config = decoder_config
        self.seed = seed
        self._tokenizer = None
        self._processor = None
        with seeded(seed, "encoder"):
            self.encoder: Encoder = image_config.build()
        with seeded(seed, "text_encoder"):
            text_encoder = text_config.build()
        with seeded(seed, "decoder"):
            decoder: Decoder = decoder_config.build()
        check_halves(text_encoder, text_config, decoder, decoder_config)
        with seeded(seed, "connector"):
            self.connector: Connector = connector_config.build(
                in_width=self.encoder.width, in_tokens=self.encoder.tokens, out_width=decoder.context_width
            )
        self.text_encoder: CausalText = cast(CausalText, text_encoder)
        self.decoder = decoder
        self.shared_width = config.shared_width or text_encoder.pooled_width
        if pooled := int(getattr(self.connector, "pooled_width", 0)):
            with seeded(seed, "projection.image"):
                projection = nn.Linear(pooled, self.shared_width, bias=False)
                nn.init.normal_(projection.weight, std=pooled**-0.5)
            self.image_projection: nn.Module = projection
        elif self.encoder.pooled_width:
            self.image_projection = _projection(self.encoder, self.shared_width, seed, "image")
        else:
            raise ConfigError(
                "neither encoder nor connector gives one vector an image, which the contrastive loss compares: set"
                " encoder.pool=true, or choose connector=attentional-pooler"
            )
        self.text_projection = _projection(self.text_encoder, self.shared_width, seed, "text")
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / config.temperature)))

    # -- tensors ---------------------------------------------------------------------------------------------------

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Read ``pixel_values`` [B, 3, H, W] and ``input_ids`` [B, T] with their ``attention_mask``, each part once.

        ``labels`` [B, T] (-100 = no target) name the ids that are trained, in their own places; all but the first and
        the pads by default.

        Returns:
            ``image_embeds`` and ``text_embeds`` [B, shared_width] of unit length, ``logit_scale`` (the logarithm),
            ``hidden`` [B, t, width], ``targets`` [B, t], the id each row should predict, and ``image_tokens``
            [B, n, width].
        """
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        image = self.read_image(batch["pixel_values"])
        text = self.text_encoder(ids, mask)
        length = text.tokens.shape[1]  # pads behind the longest text may be gone
        labels = batch.get("labels")
        if labels is None:
            real = ids != self.text_encoder.config.pad_id if mask is None else mask.bool()
            labels = ids.masked_fill(~real, IGNORE)
        return {
            "image_embeds": F.normalize(self.image_projection(image.pooled), dim=-1),
            "text_embeds": F.normalize(self.text_projection(text.pooled), dim=-1),
            "logit_scale": self.logit_scale,
            "hidden": self.read_on(text.tokens[:, :-1], image.tokens),
            "targets": labels[:, 1:length],
            "image_tokens": image.tokens,
        }

    def read_image(self, pixel_values: Tensor) -> Features:
        """The image tokens [B, n, width] that the decoder reads, and the vector ``pooled``, not projected, for pixel
        values [B, 3, H, W]."""
        frozen = not any(p.requires_grad for p in self.encoder.parameters())
        with torch.no_grad() if frozen else nullcontext():
            features = self.encoder(pixel_values)
        pooled: Features = self.connector(features)
        return pooled if pooled.pooled is not None else Features(pooled.tokens, pooled.mask, features.pooled)

    def read_on(self, states: Tensor, image_tokens: Tensor, context_mask: Tensor | None = None) -> Tensor:
        """Hidden states [B, t, width] of the decoder on a text's states [B, t, width].

        Pads behind the text are read by nobody before them, so that plain causal attention needs no mask.
        """
        layout = lay_out([Segment("text", states.shape[1], predicted=True)], device=states.device)
        hidden: Tensor = self.decoder(TokenBatch(states, layout), context=image_tokens, context_mask=context_mask)
        return hidden

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """Projected image features [B, shared_width], not normalised, of pixel values [B, 3, H, W]."""
        features: Tensor = self.image_projection(self.read_image(pixel_values).pooled)
        return features

    def text_logits(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, T, V] of every position of ``input_ids`` [B, T]: what follows it, given the image.

        Args:
            attention_mask: [B, T], 1 = real; not needed, as pads stand behind the text.
            decoder_input_ids: Not used: the decoder reads ``input_ids``.
        """
        states = self._states(input_ids)
        return self.decoder.logits(self.read_on(states, self.read_image(pixel_values).tokens))

    def _states(self, ids: Tensor) -> Tensor:
        """States [B, T, width] of texts whose class token nobody asks for."""
        layout = lay_out([Segment("text", ids.shape[1])], device=ids.device)
        return self.text_encoder.states(self.text_encoder.embed(ids), layout)

    # -- what surrounds the tensors --------------------------------------------------------------------------------

    @property
    def processor(self) -> CaptionProcessor:  # type: ignore[override]
        """Turns samples into ``forward``'s batch; made on first use.

        Raises:
            ConfigError: The tokenizer has more ids than the text encoder has rows.
        """
        if self._processor is None:
            from zoo.data.captions import CaptionProcessor

            pairs = super().processor  # checks the sizes
            self._processor = CaptionProcessor(
                pairs.transform, pairs.tokenizer, pairs.context_length, prompt=self.config.prompt, seed=self.seed
            )
        return cast("CaptionProcessor", self._processor)

    def layouts(self) -> dict[str, Layout]:
        """The image (every token reads every other), the lower half with the class token behind a caption of typical
        length, and the upper half, whose rows read the pooled image tokens as well."""
        text = self.typical_targets + 1
        return {
            "image": lay_out([Segment("image", self.encoder.tokens, "image", "full")]),
            "text": lay_out([Segment("text", text), Segment("cls", 1)]),
            "caption": lay_out([Segment("text", text - 1, predicted=True)]),
        }

    @property
    def typical_targets(self) -> int:
        return max(1, min(TYPICAL_TEXT, self.text_config.context_length) - 1)


def check_halves(
    text_encoder: Encoder, text_config: TextEncoderConfig, decoder: Decoder, decoder_config: DecoderConfig
) -> None:
    """Refuse a decoder that cannot go on from a text encoder's states.

    Raises:
        ConfigError: What does not fit, and what to choose.
    """
    if not isinstance(text_encoder, CausalText):
        raise ConfigError(
            "wiring 'captioner' writes with its text encoder, which must be causal with its class token last: choose"
            " text_encoder=coca-text-512 or another coca-text"
        )
    if not decoder.context_width:
        raise ConfigError(
            "wiring 'captioner' needs a decoder that cross-attends the image: choose decoder=coca-decoder-512 or"
            " another coca-decoder"
        )
    for name, lower, upper in (
        ("width", text_encoder.width, decoder.width),
        ("vocab_size", text_config.vocab_size, decoder_config.vocab_size),
        ("tokenizer", text_config.tokenizer, decoder_config.tokenizer),
    ):
        if lower != upper:
            raise ConfigError(
                f"text_encoder.{name} = {lower} and decoder.{name} = {upper} are two halves of one text decoder: set"
                " them equal"
            )
