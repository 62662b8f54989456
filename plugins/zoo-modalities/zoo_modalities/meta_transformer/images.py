"""Images, infrared and X-ray pictures, clips and text: tokens by patches and by tables.

Released code: Data2Seq/Image.py, PatchEmbed, one convolution whose stride is its kernel. Its Video.py does not run; the
paper (section 3.2) replaces the convolution by one over time as well, which is what stands here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from zoo.data.images import ImageTransform, uniforms
from zoo.data.sample import Sample
from zoo.data.text import TextTokenizer, named_tokenizer
from zoo.data_tokenizers.base import DataTokenizer, DataTokenizerConfig, DataTokens, Sequenced
from zoo.errors import ConfigError, DataError
from zoo.nn import PatchEmbedding
from zoo_modalities.data.signal import Signal
from zoo_modalities.meta_transformer.reading import (
    draws_of,
    example_samples,
    example_signal,
    frames_to_images,
    item_of,
    maps_to_images,
    values_of,
)


@dataclass(frozen=True, kw_only=True)
class ImageTokensConfig(DataTokenizerConfig):
    """Patches of an image through one matrix.

    Attributes:
        image_size: Side of the square input, pixels.
        patch_size: Side of a patch, pixels.
        cls: Put a learned class token first. The released tokenizer has none and no positions; the released
            classifiers add them.
        positions: Add learned positions.
        mean, std: Of the input normalisation, per channel, of values in [0, 1].
        resize: ``crop``, ``squash`` or ``pad``, as of encoders.
        augment: What training images go through (``none``, ``random-resized-crop``, ``shift``, ``flip``,
            ``shift-flip``).
    """

    modality: ClassVar[str] = "image"

    image_size: int = 224
    patch_size: int = 16
    cls: bool = True
    positions: bool = True
    mean: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5])
    std: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5])
    resize: str = "crop"
    augment: str = "none"

    def __post_init__(self) -> None:
        check_patches(self.image_size, self.patch_size)

    def build(self, width: int) -> ImageTokens:
        return ImageTokens(width, self.image_size, self.patch_size, 3, cls=self.cls, positions=self.positions)

    @property
    def transform(self) -> ImageTransform:
        """How an image is shown."""
        return ImageTransform(
            size=self.image_size,
            mean=tuple(self.mean),
            std=tuple(self.std),
            mode=cast("Any", self.resize),
            augment=cast("Any", self.augment),
        )

    def collate(
        self, samples: Sequence[Sample], train: bool = False, draws: Sequence[int] | None = None, seed: int = 0
    ) -> dict[str, Tensor]:
        """``pixel_values`` [B, 3, S, S]."""
        missing = next((s for s in samples if s.image is None), None)
        if missing is not None:
            raise DataError(f"sample {missing.id!r} has no image: choose data that have one, or another data_tokenizer")
        keys = [(seed, s.id, d) for s, d in zip(samples, draws_of(samples, draws), strict=True)] if train else None
        return {"pixel_values": self.transform([s.image for s in samples if s.image is not None], keys)}

    def example(self, batch_size: int = 1) -> dict[str, Tensor]:
        return {"pixel_values": torch.zeros(batch_size, 3, self.image_size, self.image_size)}

    def examples(self, count: int) -> list[Sample]:
        from PIL import Image

        size = self.image_size
        pictures = [(255 * example_signal(i, size, size, 3)).astype(np.uint8) for i in range(count)]
        return [Sample(f"example-{i}", Image.fromarray(p)) for i, p in enumerate(pictures)]


def check_patches(size: int, patch: int) -> None:
    """Refuse an image that is no whole number of patches."""
    if patch < 1 or size % patch:
        raise ValueError(f"image_size = {size} must be a multiple of patch_size = {patch}")


class ImageTokens(DataTokenizer):
    """``embed``: Conv2d(channels, D, patch, stride patch), flattened in row order, class token, learned positions."""

    key: str

    def __init__(
        self, width: int, size: int, patch: int, channels: int, *, cls: bool, positions: bool, key: str = "pixel_values"
    ) -> None:
        super().__init__()
        self.width, self.cls, self.key = width, cls, key
        self.embed = PatchEmbedding(width, size, patch, channels=channels, cls=cls, positions=positions)
        self.tokens = self.embed.grid[0] * self.embed.grid[1] + int(cls)

    def forward(self, inputs: Mapping[str, Tensor]) -> DataTokens:
        """[B, C, S, S] -> [B, (1 +) (S / patch)², D]."""
        return DataTokens(self.embed(inputs[self.key]), grid=self.embed.grid)


@dataclass(frozen=True, kw_only=True)
class MapTokensConfig(DataTokenizerConfig):
    """What infrared and X-ray pictures share: values in [0, 1] of one or several channels, shown as an image.

    Attributes:
        image_size: Side of the square that pictures are resized to, pixels.
        patch_size: Side of a patch, pixels.
        channels: Of the convolution; a picture of one channel is repeated (the release reads them as RGB).
        cls: Put a learned class token first.
        positions: Add learned positions.
    """

    image_size: int = 224
    patch_size: int = 16
    channels: int = 3
    cls: bool = True
    positions: bool = True

    def __post_init__(self) -> None:
        check_patches(self.image_size, self.patch_size)
        if self.channels < 1:
            raise ValueError(f"channels = {self.channels} must be 1 or more")

    def build(self, width: int) -> ImageTokens:
        size, patch = self.image_size, self.patch_size
        return ImageTokens(width, size, patch, self.channels, cls=self.cls, positions=self.positions, key=self.modality)

    def collate(
        self, samples: Sequence[Sample], train: bool = False, draws: Sequence[int] | None = None, seed: int = 0
    ) -> dict[str, Tensor]:
        """The modality's name -> [B, channels, S, S] in [-1, 1]."""
        rows = []
        for sample in samples:
            item = item_of(sample, self.modality)
            axes = 3 if np.ndim(item.values if isinstance(item, Signal) else item) == 3 else 2
            values = values_of(sample, self.modality, axes)
            try:
                rows.append(maps_to_images([values], self.image_size, self.channels))
            except DataError as error:
                raise DataError(f"sample {sample.id!r}: {self.modality}: {error}") from None
        return {self.modality: torch.cat(rows)}

    def example(self, batch_size: int = 1) -> dict[str, Tensor]:
        return {self.modality: torch.zeros(batch_size, self.channels, self.image_size, self.image_size)}

    def examples(self, count: int) -> list[Sample]:
        return example_samples(count, self.modality, self.image_size, self.image_size)


@dataclass(frozen=True, kw_only=True)
class InfraredTokensConfig(MapTokensConfig):
    """Infrared pictures."""

    modality: ClassVar[str] = "infrared"


@dataclass(frozen=True, kw_only=True)
class XRayTokensConfig(MapTokensConfig):
    """X-ray pictures."""

    modality: ClassVar[str] = "xray"


@dataclass(frozen=True, kw_only=True)
class VideoTokensConfig(DataTokenizerConfig):
    """Clips in boxes of space and time.

    Attributes:
        image_size: Side of a frame, pixels.
        patch_size: Side of a box, pixels.
        frames: Frames of a clip, taken at equal distances.
        tubelet: Frames of a box.
        cls: Put a learned class token first.
        positions: Add learned positions.
    """

    modality: ClassVar[str] = "video"

    image_size: int = 224
    patch_size: int = 16
    frames: int = 8
    tubelet: int = 2
    cls: bool = True
    positions: bool = True

    def __post_init__(self) -> None:
        check_patches(self.image_size, self.patch_size)
        if self.tubelet < 1 or self.frames < 1 or self.frames % self.tubelet:
            raise ValueError(f"frames = {self.frames} must be a multiple of tubelet = {self.tubelet}")

    def build(self, width: int) -> VideoTokens:
        return VideoTokens(width, self)

    def collate(
        self, samples: Sequence[Sample], train: bool = False, draws: Sequence[int] | None = None, seed: int = 0
    ) -> dict[str, Tensor]:
        """``video`` [B, 3, T, S, S] in [-1, 1]."""
        transform = ImageTransform(size=self.image_size, mean=(0.5,) * 3, std=(0.5,) * 3)
        rows = []
        for sample in samples:
            clip = values_of(sample, "video", 4, rate=None)
            if clip.shape[3] != 3:
                raise DataError(f"sample {sample.id!r}: video: frames of {clip.shape[3]} channels, expected 3 (RGB)")
            chosen = clip[np.linspace(0, len(clip) - 1, self.frames).round().astype(int)]  # [T, H, W, 3]
            rows.append(frames_to_images(chosen.astype(np.uint8), transform).transpose(0, 1))
        return {"video": torch.stack(rows)}

    def example(self, batch_size: int = 1) -> dict[str, Tensor]:
        return {"video": torch.zeros(batch_size, 3, self.frames, self.image_size, self.image_size)}

    def examples(self, count: int) -> list[Sample]:
        shape = (self.frames, self.image_size, self.image_size, 3)
        clips = [(255 * example_signal(i, *shape)).astype(np.uint8) for i in range(count)]
        return [Sample(f"example-{i}", meta={"modalities": {"video": Signal(c, 2.0)}}) for i, c in enumerate(clips)]


class VideoTokens(DataTokenizer):
    """``patch``: Conv3d(3, D, (tubelet, patch, patch)) whose stride is its kernel; time first, then rows."""

    def __init__(self, width: int, config: VideoTokensConfig) -> None:
        super().__init__()
        c = config
        self.width, self.cls = width, c.cls
        box = (c.tubelet, c.patch_size, c.patch_size)
        self.patch = nn.Conv3d(3, width, box, box)
        boxes = (c.frames // c.tubelet) * (c.image_size // c.patch_size) ** 2
        self.sequence = Sequenced(width, boxes, cls=c.cls, positions=c.positions)
        self.tokens = boxes + int(c.cls)

    def forward(self, inputs: Mapping[str, Tensor]) -> DataTokens:
        """[B, 3, T, S, S] -> [B, (1 +) (T / tubelet) (S / patch)², D]."""
        boxes = self.patch(inputs["video"]).flatten(2).transpose(1, 2)  # [B, boxes, D]
        return DataTokens(self.sequence(boxes)[0])


@dataclass(frozen=True, kw_only=True)
class TextTokensConfig(DataTokenizerConfig):
    """Words by a table: the released code gives CLIP's ids and leaves the table to the user (Data2Seq, "text").

    Attributes:
        tokenizer: A text tokenizer's name.
        vocab_size: Rows of the table.
        context_length: Longest text, tokens; longer ones are cut.
        cls: Put a learned class token first.
        positions: Add learned positions.
    """

    modality: ClassVar[str] = "text"

    tokenizer: str = "clip-bpe"
    vocab_size: int = 49408
    context_length: int = 77
    cls: bool = True
    positions: bool = True

    def build(self, width: int) -> TextTokens:
        return TextTokens(width, self)

    def collate(
        self, samples: Sequence[Sample], train: bool = False, draws: Sequence[int] | None = None, seed: int = 0
    ) -> dict[str, Tensor]:
        """``input_ids`` [B, T] and ``attention_mask`` [B, T] of a text each: in training one of several is drawn."""
        tokenizer = shared_tokenizer(self.tokenizer)
        if tokenizer.vocab_size > self.vocab_size:
            raise ConfigError(
                f"tokenizer {self.tokenizer!r} has {tokenizer.vocab_size} ids, more than data_tokenizer.vocab_size ="
                f" {self.vocab_size}: set one to fit the other"
            )
        texts = []
        for sample, draw in zip(samples, draws_of(samples, draws), strict=True):
            if not sample.texts:
                raise DataError(
                    f"sample {sample.id!r} has no text: choose data that have one, or another data_tokenizer"
                )
            place = uniforms(1, "text", seed, sample.id, draw)[0] if train else 0.0
            texts.append(sample.texts[int(place * len(sample.texts))])
        rows = [[*row[: self.context_length - 1], tokenizer.eos_id] for row in tokenizer.encode(texts)]
        ids = torch.full((len(rows), max(map(len, rows), default=1)), tokenizer.pad_id)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = True
        return {"input_ids": ids, "attention_mask": mask}

    def example(self, batch_size: int = 1) -> dict[str, Tensor]:
        length = min(16, self.context_length)
        ids = torch.full((batch_size, length), 5, dtype=torch.long)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids, dtype=torch.bool)}

    def examples(self, count: int) -> list[Sample]:
        words = ("red apple", "a cat with wry smile", "flag: Japan", "sun")
        return [Sample(f"example-{i}", texts=(words[i % len(words)],)) for i in range(count)]


@lru_cache(maxsize=8)
def shared_tokenizer(name: str) -> TextTokenizer:
    """The text tokenizer of a name, made once in a process."""
    return named_tokenizer(name)


class TextTokens(DataTokenizer):
    """``table`` and what stands around a sequence."""

    def __init__(self, width: int, config: TextTokensConfig) -> None:
        super().__init__()
        c = config
        self.width, self.cls = width, c.cls
        self.table = nn.Embedding(c.vocab_size, width, _weight=0.02 * torch.randn(c.vocab_size, width))
        self.sequence = Sequenced(width, c.context_length, cls=c.cls, positions=c.positions)
        self.tokens = c.context_length + int(c.cls)

    def forward(self, inputs: Mapping[str, Tensor]) -> DataTokens:
        """Ids [B, T] and mask -> [B, (1 +) T, D] and its mask."""
        x, mask = self.sequence(self.table(inputs["input_ids"]), inputs["attention_mask"].bool())
        return DataTokens(x, mask)


def zero_padded(vectors: Tensor, width: int) -> Tensor:
    """Text vectors [B, E] of another encoder as one token each, [B, 1, width], with zeros behind them: the release's
    ``get_text_embeddings`` (CLIP ViT-B/32's 512 numbers in 768; Data2Seq/Text.py, ``zero_padding``).

    Raises:
        ConfigError: The vectors are wider than the tokens.
    """
    if vectors.shape[-1] > width:
        raise ConfigError(f"vectors of {vectors.shape[-1]} numbers do not fit into tokens of {width}")
    return nn.functional.pad(vectors, (0, width - vectors.shape[-1]))[:, None]
