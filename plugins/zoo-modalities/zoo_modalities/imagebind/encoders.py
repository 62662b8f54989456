"""ImageBind's six encoders: images and clips, text, audio, depth and thermal maps, IMU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast

import numpy as np
import torch
from torch import Tensor, nn

from zoo.data.images import uniforms
from zoo.encoders.base import ImageEncoderConfig, ModalityEncoderConfig, TextEncoderConfig
from zoo.errors import ConfigError, DataError
from zoo.nn import TokenEmbedding
from zoo.part import Features
from zoo_modalities.data.signal import Signal, check, read_wav
from zoo_modalities.fbank import fbank
from zoo_modalities.imagebind.parts import Bound, Patches, Windows, trunk_config


def _divides(width: int, heads: int) -> None:
    if width % heads:
        raise ValueError(f"width = {width} must be a multiple of heads = {heads}")


# -- images and clips ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class VisionConfig(ImageEncoderConfig):
    """ImageBind's image and video encoder; defaults: that of ``ImageBindModel`` (the checkpoint is larger).

    Attributes:
        patch_size: Side of a patch, pixels.
        width, depth, heads, ffn: Of the trunk.
        frames: Frames a patch covers; a still image is that many equal ones.
    """

    patch_size: int = 14
    width: int = 1024
    depth: int = 24
    heads: int = 16
    ffn: int = 4096
    frames: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        _divides(self.width, self.heads)
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size = {self.image_size} must be a multiple of patch_size = {self.patch_size}")
        if self.layer != -1 or not self.cls:
            raise ValueError("ImageBind's encoder gives the last layer with its class token: leave layer and cls alone")
        if self.frames < 1:
            raise ValueError(f"frames = {self.frames} must be 1 or more")

    def build(self) -> Vision:
        return Vision(self)


class Vision(Bound):
    """Reads images, and clips of ``frames`` frames."""

    def __init__(self, config: VisionConfig) -> None:
        c = config
        kernel, size = (c.frames, c.patch_size, c.patch_size), (c.frames, c.image_size, c.image_size)
        embed = Patches(c.width, 3, kernel, kernel, size, patch_norm=False, norm=True)
        trunk = trunk_config(width=c.width, depth=c.depth, heads=c.heads, ffn=c.ffn)
        super().__init__(embed, trunk, 1 + embed.grid[1] * embed.grid[2])
        self.config = config
        self.grid = (embed.grid[1], embed.grid[2])

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Features:
        """Encode images [B, 3, H, W] or clips [B, 3, frames, H, W]; other sizes than the configured one resize the
        positions.

        Returns:
            ``tokens`` [B, 1 + h*w, width], CLS first, without a norm; ``pooled`` [B, width]; the patch ``grid``.
        """
        patch, frames = self.config.patch_size, self.config.frames
        if x.ndim not in (4, 5) or x.shape[1] != 3 or x.shape[-1] % patch or x.shape[-2] % patch:
            raise ConfigError(
                f"pixel values have shape {tuple(x.shape)}, the encoder reads [batch, 3, H, W] or [batch, 3, {frames},"
                f" H, W] with sides that are multiples of {patch}; several clips are [batch, clips, 3, {frames}, H, W]"
            )
        if x.ndim == 4:
            x = x[:, :, None].expand(-1, -1, frames, -1, -1)
        hidden = self.hidden(self.embed(x))
        grid = (x.shape[-2] // patch, x.shape[-1] // patch)
        return Features(hidden, None, self.pool(hidden[:, 0]), grid)


# -- text ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TextConfig(TextEncoderConfig):
    """ImageBind's causal text encoder; defaults: that of ``ImageBindModel``.

    Attributes:
        width, depth, heads, ffn: Of the trunk.
    """

    width: int = 768
    depth: int = 12
    heads: int = 12
    ffn: int = 3072

    def __post_init__(self) -> None:
        _divides(self.width, self.heads)

    def build(self) -> Text:
        return Text(self)


class Text(Bound):
    """Its vector is the state of the text's end."""

    embed: TokenEmbedding

    def __init__(self, config: TextConfig) -> None:
        c = config
        embed = TokenEmbedding(c.vocab_size, c.width, positions=c.context_length)
        nn.init.normal_(cast(nn.Embedding, embed.positions).weight, std=0.01)
        trunk = trunk_config(width=c.width, depth=c.depth, heads=c.heads, ffn=c.ffn)
        super().__init__(embed, trunk, c.context_length, causal=True)
        self.context_length = c.context_length

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Features:
        """Encode token ids [B, T], T up to ``context_length``; pads must stand behind the text.

        Args:
            mask: [B, T], True = real: the last real token is the end. Without one it is the largest id, as in the
                release.

        Returns:
            ``tokens`` [B, T, width] without a norm, their ``mask``, and ``pooled`` [B, width], the end behind the
            head's norm. On the CPU T shrinks to the longest text of the mask.

        Raises:
            ConfigError: The text is too long.
        """
        if x.shape[1] > self.context_length:
            raise ConfigError(
                f"a text has {x.shape[1]} tokens, the text encoder reads {self.context_length}: truncate it"
            )
        end = x.argmax(-1) if mask is None else mask.long().sum(-1) - 1
        if mask is not None and x.device.type == "cpu":  # where looking is free; columns of pads only cost time
            longest = max(1, int(mask.sum(-1).max()))
            x, mask = x[:, :longest], mask[:, :longest]
        hidden = self.hidden(self.embed(x))
        rows = torch.arange(len(x), device=x.device)
        return Features(hidden, None if mask is None else mask.bool(), self.pool(hidden[rows, end]))


# -- the others ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _TrunkFields(ModalityEncoderConfig):
    """Fields of the trunks that are trained against images.

    Attributes:
        width, depth, heads, ffn: Of the trunk.
        drop_path: Of the last layer in training; the first one's is 0, between them it rises evenly.
        dropout: Before the head's matrix, in training.
    """

    scale_settles: ClassVar[frozenset[str]] = frozenset({"drop_path"})

    width: int = 768
    depth: int = 12
    heads: int = 12
    ffn: int = 3072
    drop_path: float = 0.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _divides(self.width, self.heads)
        if not 0 <= self.drop_path < 1 or not 0 <= self.dropout < 1:
            raise ValueError(f"drop_path = {self.drop_path} and dropout = {self.dropout} must be in [0, 1)")

    def scaled(self, sizes: Mapping[str, Any]) -> Self:
        """A scale that sets dropout drops as many whole branches: a small trunk cannot spare them."""
        import dataclasses

        small = super().scaled(sizes)
        return dataclasses.replace(small, drop_path=sizes["dropout"]) if "dropout" in sizes else small

    def blocks(self) -> Any:
        """The trunk's configuration, with a learned key and value a layer."""
        return trunk_config(
            width=self.width, depth=self.depth, heads=self.heads, ffn=self.ffn, bias_kv=True, drop_path=self.drop_path
        )


@dataclass(frozen=True, kw_only=True)
class AudioConfig(_TrunkFields):
    """ImageBind's audio encoder: patches of a mel spectrogram (imagebind/data.py, load_and_transform_audio_data).

    Attributes:
        patch_size: Side of a patch, in mel bands and in frames of 10 ms.
        stride: From one patch to the next; smaller than a patch, they overlap. 0 = a patch.
        mel_bins: Bands.
        frames: Columns; a clip is cut or filled up with zeros to it.
        rate: Samples a second.
        seconds: Of a clip.
        clips: Clips of a longer recording in evaluation, evenly spaced; training draws one.
        mean, std: Of log energies.
        time_mask, band_mask: Most columns and bands that are blanked at random in training.
    """

    scale_settles: ClassVar[frozenset[str]] = frozenset({"drop_path", "stride", "mel_bins"})

    modality: str = "audio"
    patch_size: int = 16
    stride: int = 10
    mel_bins: int = 128
    frames: int = 204
    rate: int = 16000
    seconds: float = 2.0
    clips: int = 3
    mean: float = -4.268
    std: float = 9.138
    time_mask: int = 0
    band_mask: int = 0
    drop_path: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patch_size > min(self.mel_bins, self.frames) or self.stride < 0:
            raise ValueError(
                f"patch_size = {self.patch_size} must fit mel_bins = {self.mel_bins} and frames = {self.frames}, and"
                f" stride = {self.stride} be 0 or more"
            )
        if self.rate < 1 or self.seconds <= 0 or self.clips < 1 or self.std <= 0:
            raise ValueError("rate, seconds, clips and std must be above 0")
        if not 0 <= self.time_mask < self.frames or not 0 <= self.band_mask < self.mel_bins:
            raise ValueError("time_mask must be below frames, and band_mask below mel_bins")

    def scaled(self, sizes: Mapping[str, Any]) -> Self:
        """A scale that sets the patch reads 64 bands in patches that do not overlap: a fifth of the tokens."""
        import dataclasses

        small = super().scaled(sizes)
        return dataclasses.replace(small, stride=0, mel_bins=64) if "patch_size" in sizes else small

    @property
    def step(self) -> int:
        return self.stride or self.patch_size

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (1, self.mel_bins, self.frames)

    def prepare(self, item: Any, key: tuple[object, ...] | None = None) -> Tensor:
        """Spectrograms ``[clips, 1, mel_bins, frames]`` of a ``Signal`` or a WAV file.

        The recording loses its mean; a clip becomes log mel energies (`zoo_modalities.fbank`), normalised. What is
        no longer than a clip is one.

        Raises:
            DataError: Another rate than ``rate``, values that are not finite, shorter than one window of 25 ms.
        """
        if isinstance(item, str) or hasattr(item, "__fspath__"):
            item = read_wav(item)
        wave = check(item, self.modality, 1, rate=float(self.rate), least=int(0.025 * self.rate))
        wave = wave - wave.mean()
        length = round(self.seconds * self.rate)
        spare = max(0, len(wave) - length)
        if key is not None:
            starts = [int(uniforms(1, "clip", *key)[0] * (spare + 1))]
        elif spare == 0:
            starts = [0]
        else:
            starts = [round(spare * i / max(1, self.clips - 1)) for i in range(self.clips)]
        return torch.stack([self._spectrogram(wave[start : start + length], key) for start in starts])

    def _spectrogram(self, wave: np.ndarray, key: tuple[object, ...] | None) -> Tensor:
        energies = fbank(torch.from_numpy(np.ascontiguousarray(wave)), self.rate, self.mel_bins)  # [T, bins]
        energies = energies.T[:, : self.frames]
        picture = torch.zeros(self.mel_bins, self.frames)  # filled up before the mean is taken off, as in the release
        picture[:, : energies.shape[1]] = energies
        picture = (picture - self.mean) / self.std
        if key is not None and (self.time_mask or self.band_mask):
            u = uniforms(4, "mask", *key)
            columns, bands = int(u[0] * (self.time_mask + 1)), int(u[1] * (self.band_mask + 1))
            first, lowest = int(u[2] * (self.frames - columns + 1)), int(u[3] * (self.mel_bins - bands + 1))
            picture[:, first : first + columns] = 0
            picture[lowest : lowest + bands] = 0
        return picture[None]

    def build(self) -> Bound:
        kernel, step = (self.patch_size,) * 2, (self.step,) * 2
        embed = Patches(self.width, 1, kernel, step, (self.mel_bins, self.frames))
        return Bound(embed, self.blocks(), 1 + embed.grid[0] * embed.grid[1], dropout=self.dropout)


@dataclass(frozen=True, kw_only=True)
class MapConfig(_TrunkFields):
    """ImageBind's encoder of maps with one channel: depth (disparity) and thermal pictures.

    Attributes:
        image_size: Side of the square input.
        patch_size: Side of a patch.
        mean, std: Of the values, which are in 0..1.
        spatial: Pixels lie where the image's do, so that both are cropped alike in training.
    """

    spatial: ClassVar[bool] = True

    modality: str = "depth"
    image_size: int = 224
    patch_size: int = 16
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size = {self.image_size} must be a multiple of patch_size = {self.patch_size}")
        if self.std <= 0:
            raise ValueError(f"std = {self.std} must be above 0")

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (1, self.image_size, self.image_size)

    def prepare(self, item: Any, key: tuple[object, ...] | None = None) -> Tensor:
        """A map ``[1, 1, S, S]`` of [H, W]: resized by its short side (bicubic), cut to its middle, normalised.

        Raises:
            DataError: No map of one channel, or values that are not finite.
        """
        from PIL import Image

        values = check(item, self.modality, 2)
        short = min(values.shape)
        if values.shape != (self.image_size, self.image_size):
            height, width = (int(self.image_size * n / short) for n in values.shape)
            picture = Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)
            top, left = round((height - self.image_size) / 2), round((width - self.image_size) / 2)
            values = np.asarray(picture)[top : top + self.image_size, left : left + self.image_size]
        tensor = torch.from_numpy(np.ascontiguousarray(values))
        return ((tensor - self.mean) / self.std)[None, None]

    def build(self) -> Bound:
        kernel, size = (self.patch_size,) * 2, (self.image_size,) * 2
        embed = Patches(self.width, 1, kernel, kernel, size)
        return Bound(embed, self.blocks(), 1 + embed.grid[0] * embed.grid[1], dropout=self.dropout)


@dataclass(frozen=True, kw_only=True)
class IMUConfig(_TrunkFields):
    """ImageBind's encoder of a motion sensor.

    Attributes:
        channels: Of the sensor: acceleration and rotation rate along three axes.
        steps: Of a recording; longer ones are cut to their middle.
        window: Steps a token.
        rate: Steps a second.
    """

    scale_settles: ClassVar[frozenset[str]] = frozenset({"drop_path", "window"})

    modality: str = "imu"
    width: int = 512
    depth: int = 6
    heads: int = 8
    ffn: int = 2048
    channels: int = 6
    steps: int = 2000
    window: int = 8
    rate: float = 400.0
    drop_path: float = 0.7
    dropout: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1 or self.steps % self.window or self.channels < 1 or self.rate <= 0:
            raise ValueError(
                f"steps = {self.steps} must be a multiple of window = {self.window}, channels and rate above 0"
            )

    def scaled(self, sizes: Mapping[str, Any]) -> Self:
        """A scale that sets patches reads windows five times as long: a fifth of the tokens."""
        import dataclasses

        small = super().scaled(sizes)
        return dataclasses.replace(small, window=40) if "patch_size" in sizes else small

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.channels, self.steps)

    def prepare(self, item: Any, key: tuple[object, ...] | None = None) -> Tensor:
        """A recording ``[1, channels, steps]``.

        Raises:
            DataError: Another number of channels or rate, too short, or values that are not finite.
        """
        values = check(item, self.modality, 2, rate=self.rate, rows=self.channels, least=self.steps)
        first = (values.shape[1] - self.steps) // 2
        return torch.from_numpy(np.ascontiguousarray(values[:, first : first + self.steps]))[None]

    def build(self) -> Bound:
        embed = Windows(self.width, self.channels, self.window, self.steps)
        return Bound(embed, self.blocks(), 1 + self.steps // self.window, dropout=self.dropout)


def frames_of_clip(item: Any, frames: int, clips: int, seconds: float = 2.0) -> list[list[np.ndarray]]:
    """Choose clips of ``seconds`` and of each so many frames, both evenly spaced (imagebind/data.py,
    load_and_transform_video_data).

    Args:
        item: A ``Signal`` of [T, H, W, 3] bytes, or a sequence of PIL images, which is one clip.
        frames: Of a clip: its first, its last, and what lies between.
        clips: Of a recording that is longer than one.

    Returns:
        For each clip its frames [H, W, 3].

    Raises:
        DataError: No frames, or frames of another form.
    """
    rate = None
    if isinstance(item, Signal):
        values, rate = np.asarray(item.values), item.rate
    else:
        try:
            values = np.stack([np.asarray(image.convert("RGB")) for image in item])
        except (AttributeError, TypeError, ValueError) as error:
            raise DataError(f"video: expected a Signal or images of one size, got {type(item).__name__}") from error
    if values.ndim != 4 or values.shape[-1] != 3 or values.dtype != np.uint8 or not len(values):
        raise DataError(f"video: frames are {values.dtype} {tuple(values.shape)}, expected uint8 [T, H, W, 3]")
    length = len(values) if not rate else min(len(values), max(frames, round(seconds * rate)))
    spare = len(values) - length
    starts = [round(spare * i / max(1, clips - 1)) for i in range(clips)] if spare else [0]
    return [[values[int(at)] for at in np.linspace(start, start + length - 1, frames)] for start in starts]
