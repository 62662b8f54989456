"""A language model that reads images and draws them: tokens of its vocabulary stand for an image, and what its states
become at them is a diffusion model's condition (MiniGPT-5, arXiv 2310.02239; NExT-GPT, 2309.05519; SEED-X, 2404.14396).

The three differ in their output connector, in what it is compared with, and in their stages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.connectors.base import ConnectorConfig
from zoo.data.drawn import VOKEN_TARGETS, check_answers
from zoo.decoders.base import DecoderConfig
from zoo.decoders.extended import ExtendedDecoder, extended
from zoo.denoisers.base import DenoiserConfig
from zoo.draws import rand
from zoo.encoders.base import Encoder, ImageEncoderConfig, TextEncoderConfig
from zoo.errors import ConfigError
from zoo.layout import Layout, Segment
from zoo.models.base import square_grid
from zoo.models.bridge import Bridge, BridgeConfig
from zoo.models.latent_diffusion import Denoises
from zoo.models.latent_diffusion_drawing import LatentDrawingFields
from zoo.models.lazy import LazyOutputs
from zoo.models.llm_draws_writing import WritesAndDraws
from zoo.models.writing import IGNORE
from zoo.output_connectors.base import OutputConnector, OutputConnectorConfig
from zoo.part import Features, PartConfig, seeded
from zoo.tokenizers.base import BaseTokenizerConfig

if TYPE_CHECKING:
    from zoo.data.drawn import DrawnProcessor
    from zoo.data.text import TextTokenizer

STEPS_OF_A_SCALE = 20
"""Steps of drawing where a ``scale`` makes a model small."""

SOURCES = ("language", "image", "text")
"""Where the condition comes from: the language model, the image that is to be drawn, or the text it is drawn for."""


@dataclass(frozen=True, kw_only=True)
class LLMDrawsConfig(LatentDrawingFields, BridgeConfig):
    """Joins an image encoder, a connector and a language model, as ``bridge``, with an output connector, and with the
    text encoder, the denoiser and the image tokenizer of a latent diffusion model.

    Attributes:
        vokens: Tokens of the vocabulary that stand for an image (MiniGPT-5 and GILL call them so).
        voken_targets: Which of them are learned as next tokens (``zoo.data.drawn.VOKEN_TARGETS``). ``official``: the
            first and the last, as released; ``first``: the others follow by rule; ``all``.
        answers: What an answer holds (``image``, ``both``, ``text``) -> share of the samples; empty = all alike.
        ask: What asks for a text and its image.
        scenes: Scenes of a story that an answer tells; 0 = all that follow.
        drop: Share of the images in training that are drawn without a condition, for guidance.
        condition_from: ``language``; ``image``: what the output connector makes of the image's own features, as
            SEED-X's de-tokenizer learns to draw; ``text``: the text encoder's states of the caption, in an answer of
            what was written before the image, back to the one before it. This is the baseline of two stages, which
            writes a caption and draws it: no voken's state reaches the image.
        pad_id: As of ``latent-diffusion``: id with which captions are filled up, all of which the text encoder reads
            and the denoiser was trained on. -1: pads are not read; behind its end a caption is its last state again.
        sample_latents: Draw latents from the tokenizer's Gaussian in training; otherwise take its mean.
    """

    slots: ClassVar[tuple[str, ...]] = (
        "encoder",
        "connector",
        "decoder",
        "output_connector",
        "text_encoder",
        "denoiser",
        "image_tokenizer",
    )
    per_stage: ClassVar[frozenset[str]] = (
        BridgeConfig.per_stage
        | LatentDrawingFields.drawing
        | {"answers", "ask", "scenes", "drop", "condition_from", "sample_latents", "voken_targets"}
    )
    scale_settles: ClassVar[frozenset[str]] = BridgeConfig.scale_settles | {"drawing_steps", "pad_id"}

    vokens: int = 8
    voken_targets: str = "official"
    answers: dict[str, float] = field(default_factory=dict)
    ask: str = ""
    scenes: int = 1
    drop: float = 0.1
    condition_from: str = "language"
    pad_id: int = -1
    sample_latents: bool = True

    def __post_init__(self) -> None:
        BridgeConfig.__post_init__(self)
        self.check_drawing()
        if self.vokens < 1 or self.scenes < 0 or self.pad_id < -1 or not 0 <= self.drop < 1:
            raise ValueError(
                f"vokens = {self.vokens}, scenes = {self.scenes}, pad_id = {self.pad_id}, drop = {self.drop}: expected"
                " vokens of 1 or more, scenes of 0 or more, pad_id of -1 or more, drop in [0, 1)"
            )
        for name, value, known in (
            ("voken_targets", self.voken_targets, VOKEN_TARGETS),
            ("condition_from", self.condition_from, SOURCES),
        ):
            if value not in known:
                raise ValueError(f"{name} = {value!r} must be one of {', '.join(known)}")
        if self.answers:
            check_answers(self.answers)

    def scaled(self, sizes: Mapping[str, Any]) -> Self:
        """As the bridge's; fewer steps of drawing, and a pad that is in the scale's vocabulary."""
        changed = super().scaled(sizes)
        if "width" in sizes:
            changed = replace(changed, drawing_steps=min(self.drawing_steps, STEPS_OF_A_SCALE))
        if self.pad_id >= sizes.get("vocab_size", self.pad_id + 1):
            changed = replace(changed, pad_id=0)
        return changed

    def build(self, parts: Mapping[str, tuple[str, PartConfig]], seed: int) -> LLMDraws:
        """Build the model; every part is drawn from its own stream of ``seed``.

        Raises:
            ConfigError: Parts that do not fit each other.
        """
        return LLMDraws(self, {slot: parts[slot][1] for slot in self.slots}, seed)


class LLMDraws(WritesAndDraws, Bridge, Denoises):
    """``Bridge`` with ``output_connector``, and behind it ``text_encoder``, ``denoiser`` and ``image_tokenizer``.

    The decoder is an ``ExtendedDecoder`` whose last rows are the image's tokens. What a stage's objectives do not read
    does not run.

    Attributes:
        voken_ids: Ids of the image's tokens, in order.
    """

    provides: ClassVar[frozenset[str]] = (
        Bridge.provides | Denoises.provides | {"aligned", "alignment_target", "has_target"}
    )
    reads_image_tokens: ClassVar[bool] = False
    reads_image_codes: ClassVar[bool] = False
    config: LLMDrawsConfig
    decoder: ExtendedDecoder

    def __init__(self, config: LLMDrawsConfig, parts: Mapping[str, PartConfig], seed: int) -> None:
        base = cast("DecoderConfig", parts["decoder"])
        if base.reads_context:
            raise ConfigError(
                "wiring llm-draws puts images among the words, and this decoder reads them by cross-attention: choose a"
                " decoder-only language model"
            )
        eye = cast("ImageEncoderConfig", parts["encoder"])
        super().__init__(config, eye, cast("ConnectorConfig", parts["connector"]), extended(base, config.vokens), seed)
        self._eye_config, self.language_config = eye, base
        self.text_config = cast("TextEncoderConfig", parts["text_encoder"])
        self.draws_latents = config.sample_latents
        self._captions: TextTokenizer | None = None
        self.voken_ids = tuple(range(base.vocab_size, base.vocab_size + config.vokens))
        with seeded(seed, "text_encoder"):
            text_encoder: Encoder = self.text_config.build()
        if config.pad_id >= self.text_config.vocab_size:
            raise ConfigError(
                f"wiring.pad_id = {config.pad_id} is no id of text_encoder.vocab_size = {self.text_config.vocab_size}"
            )
        grid = square_grid(self.encoder.tokens)
        with seeded(seed, "output_connector"):
            self.output_connector: OutputConnector = cast("OutputConnectorConfig", parts["output_connector"]).build(
                in_width=self.decoder.width,
                in_tokens=config.vokens,
                out_width=text_encoder.width,
                image_width=self.encoder.width if grid else 0,
                image_tokens=grid[0] * grid[1] if grid else 0,
            )
        self.text_encoder = text_encoder
        denoiser = cast("DenoiserConfig", parts["denoiser"])
        if denoiser.reads_pooled:
            raise ConfigError(
                "this denoiser reads a pooled vector, which no output connector makes: choose denoiser=unet-sd21, or"
                " another that reads tokens alone"
            )
        images = cast("BaseTokenizerConfig", parts["image_tokenizer"])
        self.build_denoiser(denoiser, images, seed, text_encoder.width, text_encoder.pooled_width)
        longest = getattr(text_encoder, "context_length", self.output_connector.outputs)
        if self._by_text and self.output_connector.outputs > longest:
            raise ConfigError(
                f"the output connector makes {self.output_connector.outputs} tokens, to be those of a caption, and the"
                f" text encoder reads {longest}: set output_connector.queries, or text_encoder.context_length"
            )
        if config.condition_from == "image" and self._by_text:
            raise ConfigError(
                "wiring.condition_from = 'image' needs an output connector that reads image features:"
                " output_connector=query-resampler"
            )

    @property
    def eye_config(self) -> ImageEncoderConfig:
        return self._eye_config

    @property
    def _by_text(self) -> bool:
        return self.output_connector.aligns == "text"

    def reconfigure(self, config: Any) -> None:
        super().reconfigure(config)
        self.draws_latents = config.sample_latents

    # -- tensors ---------------------------------------------------------------------------------------------------

    def forward(self, batch: Mapping[str, Tensor]) -> LazyOutputs:  # type: ignore[override]
        """Promise ``hidden`` and ``targets`` as ``Bridge.forward``, and of the M images that are drawn what follows.

        Beside the bridge's tensors the batch holds ``drawn_values`` [M, 3, H, W], the images as the image tokenizer
        reads them, in the order of their tokens in ``input_ids``; ``caption_ids`` and ``caption_mask`` [M, L], and
        ``has_caption`` [M]; ``drawn_shown`` [M, 3, h, w], the images as the encoder reads them, for connectors that are
        compared with images. ``drop_draw`` [M] in [0, 1) settles which images see no condition (those below
        ``wiring.drop``); it is drawn in training and none is dropped otherwise. ``image_time`` and ``image_noise`` are
        as of ``zoo.diffusion.noising.times_and_noise``.

        Promises:
            ``aligned`` and ``alignment_target`` [M, m, D_a], what the output connector makes of the states and what it
            is compared with; ``has_target`` [M]; ``prediction`` and ``denoising_target`` [M, C, h, w], ``noised`` [M]
            and ``level`` [M].
        """
        none = not len(batch["drawn_values"])
        drawn = self._one_blank(batch) if none else dict(batch)  # weight zero: it keeps the parts in the graph
        dropped = self._dropped(drawn, none)
        joint: dict[str, dict[str, Tensor]] = {}

        def of(name: str, make: Any) -> dict[str, Tensor]:
            if name not in joint:
                joint[name] = make()
            return joint[name]

        def read() -> dict[str, Tensor]:
            return Bridge.forward(self, batch)

        def kept(tensor: Tensor) -> Tensor:
            return tensor[:0] if none else tensor

        def aligned(out: LazyOutputs) -> Tensor:
            if none:
                states = out["hidden"].new_zeros(1, self.config.vokens, self.decoder.width)
            else:
                states = self._states(batch["input_ids"], out["hidden"], len(batch["drawn_values"]))
            if dropped is not None and self.output_connector.unconditional == "states":
                states = states.masked_fill(dropped[:, None, None], 0.0)
            return self.output_connector.align(states)

        def diffused(out: LazyOutputs) -> dict[str, Tensor]:
            images = {"pixel_values": drawn["drawn_values"]} | {
                name: drawn[name] for name in ("image_time", "image_noise") if name in drawn
            }
            return self.diffuse(images, self._training_condition(out, drawn, dropped), none)

        def whole(out: LazyOutputs) -> Tensor:
            """The connector's output before it is cut where the batch draws nothing."""
            return of("aligned", lambda: {"aligned": aligned(out)})["aligned"]

        makers: dict[str, Any] = {
            "hidden": lambda out: of("read", read)["hidden"],
            "targets": lambda out: of("read", read)["targets"],
            "whole": whole,
            "aligned": lambda out: kept(out["whole"]),
            "alignment_target": lambda out: kept(self._alignment_target(drawn, dropped)),
            "has_target": lambda out: kept(drawn["has_caption"] | (not self._by_text)),
        }
        for name in ("prediction", "denoising_target", "noised", "level"):
            makers[name] = lambda out, name=name: kept(of("diffused", lambda: diffused(out))[name])
        return LazyOutputs(makers, batch["input_ids"].device.type)

    def _one_blank(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The images of a batch that draws none: one that is blank."""
        like = batch["drawn_values"]
        size, eye, length = self.image_config.image_size, self.eye_config.image_size, self.output_connector.outputs
        ids = torch.zeros(1, length, dtype=torch.long, device=like.device)
        return {
            "drawn_values": like.new_zeros(1, 3, size, size),
            "drawn_shown": like.new_zeros(1, 3, eye, eye),
            "caption_ids": ids,
            "caption_mask": torch.ones_like(ids, dtype=torch.bool),
            "has_caption": torch.ones_like(ids[:, 0], dtype=torch.bool),
        }

    def _dropped(self, drawn: Mapping[str, Tensor], blank: bool) -> Tensor | None:
        """Which images [M] see no condition; None where none does."""
        values = drawn["drawn_values"]
        draw = drawn.get("drop_draw")
        if draw is None and self.training and self.config.drop and not values.is_meta:
            draw = rand((0 if blank else len(values),), values.device)
            draw = draw.new_ones(1) if blank else draw
        return None if draw is None else draw < self.config.drop

    def _states(self, ids: Tensor, hidden: Tensor, count: int) -> Tensor:
        """The states [M, vokens, D] that stand for the ``count`` images whose tokens are in ``ids`` [B, T].

        MiniGPT-5's begin with the state that predicts the first token, and lack that of the last; other connectors read
        the states of the tokens themselves, NExT-GPT's plus their input embeddings.

        Raises:
            ConfigError: ``ids`` hold another number of images (on the CPU).
        """
        first = (ids == self.voken_ids[0]).flatten()
        if ids.device.type == "cpu" and int(first.sum()) != count:
            raise ConfigError(
                f"input_ids hold the tokens of {int(first.sum())} images to be drawn, and the batch has {count}: make"
                " both with the model's processor"
            )
        at = first.int().argsort(descending=True, stable=True)[:count]  # nothing waits for the device
        shift = -int(self.output_connector.shifted)
        place = at[:, None] + torch.arange(self.config.vokens, device=ids.device) + shift  # [M, n]
        states = hidden.flatten(0, 1)[place]
        if self.output_connector.adds_embeddings:
            states = states + self.decoder.embed(ids.flatten()[place])
        return states

    def _training_condition(self, out: LazyOutputs, drawn: Mapping[str, Tensor], dropped: Tensor | None) -> Features:
        """What the denoiser reads of the batch's images."""
        connector = self.output_connector
        if self.config.condition_from == "text":
            with torch.no_grad():
                states = self._caption_states(drawn["caption_ids"], drawn["caption_mask"])
                blind = states if dropped is None else self._empty_text()
            return Features(states if dropped is None else torch.where(dropped[:, None, None], blind, states))
        aligned = self._target(drawn) if self.config.condition_from == "image" else out["whole"]
        condition = connector.condition(aligned)
        if dropped is None or connector.unconditional != "image":
            return condition
        blank = self.no_condition().tokens
        return Features(torch.where(dropped[:, None, None], blank, condition.tokens))

    def _alignment_target(self, drawn: Mapping[str, Tensor], dropped: Tensor | None) -> Tensor:
        """What the connector's output is compared with; that of the empty caption where the states are zeros."""
        target = self._target(drawn)
        if dropped is not None and self.output_connector.unconditional == "states" and self._by_text:
            target = torch.where(dropped[:, None, None], self._empty_text(), target)
        return target

    @torch.no_grad()
    def condition_of(self, texts: Sequence[str]) -> Features:
        """What the denoiser reads of captions [N, L, D]: the text encoder's states."""
        rows = {name: value.to(self.device) for name, value in self.processor.encode_captions(texts).items()}
        return Features(self._caption_states(rows["caption_ids"], rows["caption_mask"]))

    @torch.no_grad()
    def _target(self, drawn: Mapping[str, Tensor]) -> Tensor:
        """[M, m, D_a] of the captions, or of the images as the encoder sees them."""
        if self._by_text:
            return self._caption_states(drawn["caption_ids"], drawn["caption_mask"])
        return self._features_of(drawn["drawn_shown"])

    def _features_of(self, pixel_values: Tensor) -> Tensor:
        """The encoder's patches of images, without a class token, as the connector is to return them."""
        features = self.encode_images(pixel_values)
        side = square_grid(features.tokens.shape[1])
        patches = side[0] * side[1] if side else features.tokens.shape[1]
        return self.output_connector.target(features.tokens[:, -patches:])

    def _caption_states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The text encoder's states [M, L, D] of captions [M, L], as the denoiser was trained to read them."""
        if self.config.pad_id >= 0:
            filled: Tensor = self.text_encoder(ids.masked_fill(~mask, self.config.pad_id)).tokens
            return filled
        tokens = self.text_encoder(ids, mask).tokens  # [M, l, D]
        last = (mask.sum(1) - 1).clamp(0, tokens.shape[1] - 1)  # [M]
        place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids).minimum(last[:, None])
        states: Tensor = tokens.gather(1, place[..., None].expand(-1, -1, tokens.shape[2]))
        return states

    def _empty_text(self) -> Tensor:
        """States [1, L, D] of the caption that says nothing."""
        if next(self.text_encoder.parameters()).is_meta:
            ids = torch.zeros(1, self.output_connector.outputs, dtype=torch.long, device=self.device)
            return self._caption_states(ids, torch.ones_like(ids, dtype=torch.bool))
        return self.condition_of([""]).tokens

    def no_condition(self) -> Features:
        """What the denoiser reads without a condition [1, S, D]: each system's own (see ``OutputConnector``)."""
        connector, like = self.output_connector, self.decoder.input_rows
        if self.config.condition_from == "text":
            with torch.no_grad():
                return Features(self._empty_text())
        if connector.unconditional == "states":
            none: Features = connector(like.new_zeros(1, self.config.vokens, self.decoder.width))
            return none
        with torch.no_grad():
            if connector.unconditional == "text":
                return Features(self._empty_text())
            size = self.eye_config.image_size
            zeros = torch.zeros(1, 3, size, size, dtype=next(self.encoder.parameters()).dtype, device=like.device)
            blank = self._features_of(zeros)
        return connector.condition(blank)

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile the parts, as ``nn.Module.compile``: ``forward`` itself computes nothing yet."""
        for part in (self.encoder, self.decoder, self.denoiser):
            part.compile(*args, **options)

    # -- what surrounds the tensors --------------------------------------------------------------------------------

    @property
    def captions(self) -> TextTokenizer:
        """The text encoder's tokenizer, made on first use."""
        if self._captions is None:
            from zoo.data.text import named_tokenizer

            self._captions = named_tokenizer(self.text_config.tokenizer)
        return self._captions

    @property
    def processor(self) -> DrawnProcessor:
        """Turns samples into ``forward``'s batch; made on first use.

        Raises:
            ConfigError: A tokenizer has more ids than its part has rows.
        """
        if self._processor is None:
            from zoo.data.drawn import DrawnProcessor

            self._processor = DrawnProcessor(**self._processor_fields())
        return cast("DrawnProcessor", self._processor)

    def _processor_fields(self) -> dict[str, Any]:
        config = self.config
        for slot, tokenizer, part in (
            ("decoder", self.tokenizer, self.language_config),
            ("text_encoder", self.captions, self.text_config),
        ):
            if tokenizer.vocab_size > part.vocab_size:
                raise ConfigError(
                    f"tokenizer {part.tokenizer!r} has {tokenizer.vocab_size} ids, {slot}.vocab_size is"
                    f" {part.vocab_size}: set one to fit the other"
                )
        return {
            **super()._processor_fields(),
            "canvas": self._transform(),
            "captions": self.captions,
            "caption_length": self.output_connector.outputs if self._by_text else self.text_config.context_length,
            "caption_bos": getattr(self.text_config, "starts_with_bos", True),
            "drawn": self.voken_ids,
            "drawn_targets": config.voken_targets,
            "answers": config.answers or None,
            "ask": config.ask,
            "scenes": config.scenes,
            "show_drawn": not self._by_text,
        }

    def layouts(self) -> dict[str, Layout]:
        """The bridge's sequence, and an answer that draws."""
        drawn = [Segment("text", self.typical_targets), Segment("vokens", self.config.vokens, predicted=True)]
        return {**super().layouts(), "drawing": self.decoder.sketch(drawn)}

    def example_batch(self, batch_size: int = 1) -> dict[str, Tensor]:
        """An image that is read, a caption of typical length and an image that is drawn an item."""
        batch = super().example_batch(batch_size)
        device, length = self.device, self.output_connector.outputs
        vokens = torch.tensor(self.voken_ids, device=device).expand(batch_size, -1)
        ids = torch.full((batch_size, length), 1, dtype=torch.long, device=device)
        size = self.image_config.image_size
        like = next(self.image_tokenizer.parameters())
        labels = vokens.clone()
        labels[:, 1:] = IGNORE
        return {
            **batch,
            "input_ids": torch.cat([batch["input_ids"], vokens], 1),
            "labels": torch.cat([batch["labels"], labels], 1),
            "attention_mask": F.pad(batch["attention_mask"], (0, self.config.vokens), value=True),
            "drawn_values": torch.zeros(batch_size, 3, size, size, dtype=like.dtype, device=device),
            "drawn_shown": batch["pixel_values"],
            "caption_ids": ids,
            "caption_mask": torch.ones_like(ids, dtype=torch.bool),
            "has_caption": torch.ones_like(ids[:, 0], dtype=torch.bool),
        }
