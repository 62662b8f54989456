"""The wiring ``bind``: several modalities in one space, with images as the hub (arXiv 2305.05665, section 3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.encoders.base import Encoder, ImageEncoderConfig, ModalityEncoderConfig, TextEncoderConfig
from zoo.errors import ConfigError, near
from zoo.layout import Layout, Segment, lay_out
from zoo.models.base import Model, evaluating
from zoo.models.lazy import LazyOutputs
from zoo.models.tokenizing import OwnsTokenizer
from zoo.part import PartConfig, seeded
from zoo.plugin import catalogue
from zoo.recipe import WiringConfig
from zoo_modalities.imagebind.encoders import frames_of_clip

if TYPE_CHECKING:
    from zoo.capabilities import ImageLike
    from zoo_modalities.imagebind.processor import BindProcessor

TEMPERATURES = {"audio": 0.05, "depth": 0.2, "thermal": 0.1, "imu": 0.2}
"""Fixed softmax temperatures (section 5 of the paper; imagebind_model.py has their inverses 20, 5, 10, 5)."""
OTHER_TEMPERATURE = 0.07
MAX_SCALE = 100.0
TYPICAL_TEXT = 16
CHUNK = 32
"""Items a forward pass of ``embed``."""
AUGMENTS = ("none", "random-resized-crop")
RESERVED = frozenset({"image", "text", "video", "pixel_values", "input_ids", "attention_mask"})


@dataclass(frozen=True, kw_only=True)
class BindConfig(WiringConfig):
    """Joins an image encoder, a text encoder and encoders of further modalities, each with a matrix into one space.

    Attributes:
        modalities: The further ones, each with the encoder ``imagebind-NAME`` unless ``encoders`` says otherwise.
        encoders: Modality -> name of its encoder (``zoo list modality_encoder``).
        fields: Modality -> fields of its encoder that differ, ``{audio: {depth: 6}}``.
        sizes: What a scale sets of these encoders; the encoders' own fields win.
        embed_width: Width of the shared space.
        temperature: Initial softmax temperature of image and text, which learns; ``logit_scale`` starts at its inverse.
        temperatures: Modality -> its temperature, which is fixed; those of the paper where nothing is said.
        augment: What training images go through: ``none`` or ``random-resized-crop``, whose boxes maps of the same
            pixels share.
        crop_area: Smallest area of such a crop.
        video_clips: Clips of two seconds that a video is cut into, whose vectors are averaged.
        video_crops: Squares along the long side of each, as many times the vectors.
    """

    slots: ClassVar[tuple[str, ...]] = ("encoder", "text_encoder")
    scale_settles: ClassVar[frozenset[str]] = frozenset({"sizes"})

    modalities: list[str] = field(default_factory=lambda: ["audio", "depth", "thermal", "imu"])
    encoders: dict[str, str] = field(default_factory=dict)
    fields: dict[str, dict[str, Any]] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=dict)
    embed_width: int = 1024
    temperature: float = 0.07
    temperatures: dict[str, float] = field(default_factory=dict)
    augment: str = "none"
    crop_area: float = 0.5
    video_clips: int = 5
    video_crops: int = 3

    def __post_init__(self) -> None:
        if len(set(self.modalities)) != len(self.modalities) or RESERVED & set(self.modalities):
            raise ValueError(
                f"modalities = {list(self.modalities)} must be different ones beside image, text and video"
            )
        for name, given in (("encoders", self.encoders), ("fields", self.fields), ("temperatures", self.temperatures)):
            unknown = sorted(set(given) - set(self.modalities))
            if unknown:
                raise ValueError(f"{name} names {unknown[0]!r}, which is none of modalities{_near(unknown[0], self)}")
        if self.temperature <= 0 or any(t <= 0 for t in self.temperatures.values()):
            raise ValueError("temperatures must be above 0")
        if self.embed_width < 1 or self.video_clips < 1 or self.video_crops not in (1, 3):
            raise ValueError("embed_width and video_clips must be above 0, video_crops 1 or 3")
        if self.augment not in AUGMENTS:
            raise ValueError(f"augment = {self.augment!r} must be one of {', '.join(AUGMENTS)}")
        if not 0 < self.crop_area <= 1:
            raise ValueError(f"crop_area = {self.crop_area} must be in (0, 1]")

    def scaled(self, sizes: Mapping[str, Any]) -> Self:
        """Keep what the scale sets for the encoders of ``modalities``, which are no slots."""
        import dataclasses

        small = super().scaled(sizes)
        return dataclasses.replace(small, sizes={**self.sizes, **sizes}) if sizes else small

    def encoder_configs(self) -> dict[str, ModalityEncoderConfig]:
        """Modality -> the configuration of its encoder: its preset, then the scale, then ``fields``.

        Raises:
            ConfigError: An unknown encoder or field, or an encoder of another modality.
        """
        from zoo.registry import parse, to_plain

        out = {}
        for modality in self.modalities:
            name = self.encoders.get(modality, f"imagebind-{modality}")
            where = f"wiring.fields.{modality}"
            config: Any = catalogue()["modality_encoder"].parse(name, None, where).scaled(self.sizes)
            own = self.fields.get(modality, {})
            if own:
                config = parse(type(config), {**to_plain(config), **own}, where)
            if config.modality != modality:
                raise ConfigError(
                    f"wiring.encoders.{modality} = {name!r} reads {config.modality!r}; choose one that reads {modality}"
                )
            out[modality] = config
        return out

    def build(self, parts: Mapping[str, tuple[str, PartConfig]], seed: int) -> Bind:
        """Build the model; every encoder and matrix is drawn from its own stream of ``seed``.

        Raises:
            ConfigError: An encoder that pools nothing, or that is not known.
        """
        image, text = (parts[slot][1] for slot in self.slots)
        return Bind(self, cast("ImageEncoderConfig", image), cast("TextEncoderConfig", text), seed)


def _near(name: str, config: BindConfig) -> str:
    return near(name, config.modalities)


class Bind(OwnsTokenizer, Model):
    """Encoders, a matrix each (``image_projection``, ``text_projection``, ``projections``) and temperatures.

    The names of image and text parts are those of the wiring ``towers``, so that a CLIP trained there is taken over
    with ``init``.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"image_embeds", "text_embeds", "logit_scale"})

    def __init__(
        self, config: BindConfig, image_config: ImageEncoderConfig, text_config: TextEncoderConfig, seed: int
    ) -> None:
        super().__init__()
        self.config = config
        self.image_config = image_config
        self.text_config = text_config
        self.encoder_configs = config.encoder_configs()
        self.seed = seed
        self._processor: BindProcessor | None = None
        width = self.shared_width = config.embed_width
        with seeded(seed, "encoder"):
            self.encoder: Encoder = image_config.build()
        with seeded(seed, "text_encoder"):
            self.text_encoder: Encoder = text_config.build()
        self.encoders = nn.ModuleDict()
        for modality, own in self.encoder_configs.items():
            with seeded(seed, f"encoders.{modality}"):
                self.encoders[modality] = own.build()
        self.image_projection = _projection(self.encoder, width, seed, "image")
        self.text_projection = _projection(self.text_encoder, width, seed, "text")
        self.projections = nn.ModuleDict(
            {m: _projection(cast(Encoder, encoder), width, seed, m) for m, encoder in self.encoders.items()}
        )
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / config.temperature)))
        self.scales = nn.Module()
        for modality in self.encoders:
            temperature = config.temperatures.get(modality, TEMPERATURES.get(modality, OTHER_TEMPERATURE))
            self.scales.register_buffer(modality, torch.tensor(math.log(1 / temperature)))

    # -- tensors -------------------------------------------------------------------------------------------------------

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Embed ``pixel_values`` and what the batch holds beside them, each when it is first asked for.

        Returns:
            ``image_embeds`` [B, D]; for text and every modality of the batch ``NAME_embeds`` [n, D] of unit length and
            ``NAME_logit_scale``, the logarithm, which for text is called ``logit_scale``.
        """
        makers: dict[str, Callable[[LazyOutputs], Tensor]] = {
            "image_embeds": lambda _: F.normalize(self.image_features(batch["pixel_values"]), dim=-1),
            "logit_scale": lambda _: self.logit_scale,
        }
        if "input_ids" in batch:
            makers["text_embeds"] = lambda _: F.normalize(
                self.text_features(batch["input_ids"], batch.get("attention_mask")), dim=-1
            )
        for name in self.encoders:
            makers[f"{name}_logit_scale"] = lambda _, name=name: self.log_scale(name)  # type: ignore[misc]
            if name in batch:
                makers[f"{name}_embeds"] = lambda _, name=name: F.normalize(  # type: ignore[misc]
                    self.modality_features(name, batch[name]), dim=-1
                )
        return cast("dict[str, Tensor]", LazyOutputs(makers, batch["pixel_values"].device.type))

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """The head's output [B, D] of images [B, 3, H, W] or clips [B, 3, T, H, W], not normalised."""
        features: Tensor = self.image_projection(self.encoder(pixel_values).pooled)
        return features

    def text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The head's output [B, D] of token ids [B, T], not normalised; without a mask the largest id is the end."""
        features: Tensor = self.text_projection(self.text_encoder(input_ids, attention_mask).pooled)
        return features

    def modality_features(self, modality: str, x: Tensor) -> Tensor:
        """The head's output [B, D] of one of the further modalities, not normalised."""
        features: Tensor = self.projections[modality](self.encoders[modality](x).pooled)
        return features

    def log_scale(self, modality: str) -> Tensor:
        """Logarithm of the factor of a modality's vectors; learnt for text, fixed for the others."""
        return self.logit_scale if modality == "text" else cast(Tensor, getattr(self.scales, modality))

    def features(self, modality: str, x: Tensor) -> Tensor:
        """What the release returns: vectors of unit length times the modality's scale (at most 100; 1 for images).

        Args:
            modality: ``image`` (or ``vision``), ``text``, or one of ``config.modalities``.
            x: One item a row. With five axes or more, the second are clips: each is embedded and scaled, and the mean
                taken, which is then shorter.

        Returns:
            [B, D].

        Raises:
            ConfigError: An unknown modality, or a video [B, 3, T, H, W], which would be taken for clips.
        """
        image = modality in ("image", "vision")
        clips = x.ndim >= 5 and modality != "text"
        if image and x.ndim == 5 and x.shape[2] != 3:
            raise ConfigError(
                f"a video of shape {tuple(x.shape)} would be taken for clips: give [batch, clips, 3, frames, H, W], a"
                " single clip as [batch, 1, 3, frames, H, W]"
            )
        rows = x.flatten(0, 1) if clips else x
        if image:
            out = F.normalize(self.image_features(rows), dim=-1)
        elif modality == "text":
            out = F.normalize(self.text_features(rows), dim=-1)
        else:
            self._known(modality)
            out = F.normalize(self.modality_features(modality, rows), dim=-1)
        if not image:
            out = out * self.log_scale(modality).exp().clamp(max=MAX_SCALE)
        return out.view(*x.shape[:2], -1).mean(1) if clips else out

    def learns(self, modality: str) -> bool:
        """Whether anything of the pair (image, ``modality``) has a gradient in this stage."""
        if modality == "text":
            modules = [self.text_encoder, self.text_projection]
        else:
            modules = [self.encoders[modality], self.projections[modality]]
        modules += [self.encoder, self.image_projection]
        return any(p.requires_grad for module in modules for p in module.parameters())

    # -- capabilities --------------------------------------------------------------------------------------------------

    @property
    def modalities(self) -> tuple[str, ...]:
        """What ``embed`` takes."""
        return ("image", "text", "video", *self.encoders)

    def embed_images(self, images: Sequence[ImageLike]) -> Tensor:
        """Embed images: [N, D] float32 of unit length, on the model's device."""
        return self._chunks(
            images, lambda chunk: self.image_features(self.processor.encode_images(chunk).to(self.device, self._dtype))
        )

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embed texts: [N, D] float32 of unit length, on the model's device."""

        def features(chunk: Sequence[str]) -> Tensor:
            rows = self.processor.encode_texts(chunk)
            return self.text_features(rows["input_ids"].to(self.device), rows["attention_mask"].to(self.device))

        return self._chunks(texts, features)

    def embed(self, modality: str, items: Sequence[Any]) -> Tensor:
        """Embed items of any modality: [N, D] float32 of unit length, on the model's device.

        Args:
            modality: One of ``modalities``.
            items: Images, texts, or what ``Sample.meta["modalities"]`` carries under this name; audio also as WAV
                files, video also as lists of PIL images. Of several clips the mean is taken.

        Raises:
            ConfigError: Another modality, or one string in place of a list.
            DataError: An item that is no such thing: another rate, another shape, values that are not finite.
        """
        if modality == "image":
            return self.embed_images(items)
        if modality == "text":
            return self.embed_texts(items)
        self._known(modality)

        def features(chunk: Sequence[Any]) -> Tensor:
            prepared = [self._clips(modality, item) for item in chunk]
            rows = torch.cat(prepared).to(self.device, self._dtype)
            pick = self.image_features if modality == "video" else lambda x: self.modality_features(modality, x)
            units = F.normalize(torch.cat([pick(rows[i : i + CHUNK]) for i in range(0, len(rows), CHUNK)]), dim=-1)
            return torch.stack([part.mean(0) for part in torch.split(units, [len(p) for p in prepared])])

        return self._chunks(items, features)

    def combine(self, *embeddings: Tensor, weights: Sequence[float] | None = None) -> Tensor:
        """Embedding arithmetic: the sum of vectors, each brought to unit length first, brought to unit length again.

        Args:
            embeddings: [..., D] each.
            weights: Of each; 1 where nothing is said, and negative to take away.

        Raises:
            ConfigError: No vectors, or another number of weights.
        """
        if not embeddings or (weights is not None and len(weights) != len(embeddings)):
            raise ConfigError(f"{len(embeddings)} vectors to combine, with {len(weights or [])} weights: give one each")
        factors = weights if weights is not None else [1.0] * len(embeddings)
        total = torch.stack([w * F.normalize(e, dim=-1) for w, e in zip(factors, embeddings, strict=True)]).sum(0)
        return F.normalize(total, dim=-1)

    def _clips(self, modality: str, item: Any) -> Tensor:
        """The clips [n, ...] of an item."""
        if modality != "video":
            return self.encoder_configs[modality].prepare(item)
        from PIL import Image

        frames = getattr(self.image_config, "frames", 1)
        out = []
        for clip in frames_of_clip(item, frames, self.config.video_clips):
            for crop in _crops(clip, self.config.video_crops):
                pixels = self.processor.encode_images([Image.fromarray(frame) for frame in crop])  # [T, 3, S, S]
                out.append(pixels.transpose(0, 1) if frames > 1 else pixels[0])
        return torch.stack(out)

    def _known(self, modality: str) -> None:
        if modality not in self.modalities:
            raise ConfigError(f"the model embeds no {modality!r}{near(modality, self.modalities)}")

    def _chunks(self, items: Sequence[Any], features: Callable[[Sequence[Any]], Tensor]) -> Tensor:
        if isinstance(items, str):
            raise ConfigError("expected a list of items, got one string: wrap it in a list")
        items = list(items)
        with evaluating(self):
            rows = [F.normalize(features(items[i : i + CHUNK]).float(), dim=-1) for i in range(0, len(items), CHUNK)]
            return torch.cat(rows) if rows else torch.empty(0, self.shared_width, device=self.device)

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.encoder.parameters()).dtype

    # -- what surrounds the tensors ------------------------------------------------------------------------------------

    @property
    def processor(self) -> BindProcessor:
        """Turns samples into ``forward``'s batch; made on first use.

        Raises:
            ConfigError: The tokenizer has more ids than the text encoder has rows.
        """
        if self._processor is None:
            from zoo.data.images import ImageTransform
            from zoo.data.processor import PairProcessor
            from zoo_modalities.imagebind.processor import BindProcessor

            tokenizer, image, config = self.tokenizer, self.image_config, self.config
            if tokenizer.vocab_size > self.text_config.vocab_size:
                raise ConfigError(
                    f"tokenizer {self.text_config.tokenizer!r} has {tokenizer.vocab_size} ids, more than "
                    f"text_encoder.vocab_size = {self.text_config.vocab_size}: set one to fit the other"
                )
            transform = ImageTransform(
                size=image.image_size, mean=tuple(image.mean), std=tuple(image.std), mode=cast("Any", image.resize)
            )
            pairs = PairProcessor(transform, tokenizer, self.text_config.context_length, seed=self.seed)
            crop = (config.crop_area, 1.0) if config.augment == "random-resized-crop" else None
            self._processor = BindProcessor(pairs, self.encoder_configs, crop, self.seed)
        return self._processor

    def layouts(self) -> dict[str, Layout]:
        """One sequence a modality; text alone is causal."""
        text = min(TYPICAL_TEXT, self.text_config.context_length)
        others = {
            name: lay_out([Segment(name, cast(Encoder, encoder).tokens, attends="full")])
            for name, encoder in self.encoders.items()
        }
        return {
            "image": lay_out([Segment("image", self.encoder.tokens, "image", "full")]),
            "text": lay_out([Segment("text", text, "text", "causal")]),
            **others,
        }

    def example_batch(self, batch_size: int = 1) -> dict[str, Tensor]:
        """An image, a text of typical length and one clip of every modality for each of ``batch_size`` items."""
        size, length = self.image_config.image_size, min(TYPICAL_TEXT, self.text_config.context_length)
        device, dtype = self.device, self._dtype
        ids = torch.ones(batch_size, length, dtype=torch.long, device=device)
        return {
            "pixel_values": torch.zeros(batch_size, 3, size, size, dtype=dtype, device=device),
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids, dtype=torch.bool),
            **{
                name: torch.zeros(batch_size, *config.input_shape, dtype=dtype, device=device)
                for name, config in self.encoder_configs.items()
            },
        }


def _crops(clip: Sequence[np.ndarray], count: int) -> list[list[np.ndarray]]:
    """Squares at the ends and the middle of the long side; one where the frames are square or one is asked for."""
    height, width = clip[0].shape[:2]
    if count == 1 or height == width:
        return [list(clip)]
    side, spare = min(height, width), abs(height - width)
    cuts = [round(spare * place / 2) for place in range(3)]
    if width > height:
        return [[frame[:, at : at + side] for frame in clip] for at in cuts]
    return [[frame[at : at + side] for frame in clip] for at in cuts]


def _projection(encoder: Encoder, width: int, seed: int, name: str) -> nn.Module:
    """A matrix without a bias, or nothing for an encoder that projects itself."""
    if not encoder.pooled_width:
        raise ConfigError(f"the {name} encoder pools nothing, but one vector an item is compared: set its pool=true")
    if encoder.projects:
        if encoder.pooled_width != width:
            raise ConfigError(
                f"the {name} encoder projects to {encoder.pooled_width}, the shared space is {width} wide: set"
                f" wiring.embed_width to {encoder.pooled_width}"
            )
        return nn.Identity()
    with seeded(seed, f"projection.{name}"):
        projection = nn.Linear(encoder.pooled_width, width, bias=False)
        nn.init.normal_(projection.weight, std=encoder.pooled_width**-0.5)
    return projection
