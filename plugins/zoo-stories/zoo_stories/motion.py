"""The semantic motion predictor (StoryDiffusion, arXiv 2405.01434, section 3.2): what lies between two pictures, in the
space of an image encoder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from zoo.data.images import ImageTransform
from zoo.data.processor import images_of
from zoo.data.sample import Sample
from zoo.encoders.base import Encoder, ImageEncoderConfig
from zoo.errors import ConfigError, DataError
from zoo.models.base import Model, evaluating
from zoo.nn.config import TrunkConfig
from zoo.nn.trunk import Trunk
from zoo.objectives.base import Objective, full_precision
from zoo.part import PartConfig, seeded
from zoo.recipe import ObjectiveConfig, WiringConfig

if TYPE_CHECKING:
    from zoo.capabilities import ImageLike

TIMES = 16
"""Sines, and as many cosines, of a frame's time."""
CHUNK = 64
"""Images that are encoded at once."""
FRAMES = 4
"""Frames of a batch that only counts FLOPs."""


@dataclass(frozen=True, kw_only=True)
class MotionConfig(WiringConfig):
    """An image encoder, which never learns here, and a transformer over the embeddings of frames.

    Attributes:
        width, depth, heads, ffn: Of the transformer. The paper says 8 layers of width 1,024 with 12 heads, by which
            1,024 does not divide; 16 here.
        interpolate: Predict the interpolation alone, the paper's ablation; the transformer is there and counts for
            nothing.
    """

    slots: ClassVar[tuple[str, ...]] = ("encoder",)

    width: int = 1024
    depth: int = 8
    heads: int = 16
    ffn: int = 4096
    interpolate: bool = False

    def __post_init__(self) -> None:
        if min(self.width, self.depth, self.heads, self.ffn) < 1 or self.width % self.heads:
            raise ValueError(
                f"width = {self.width}, depth = {self.depth}, heads = {self.heads}, ffn = {self.ffn}: expected 1 or"
                " more, and a width that heads divide"
            )

    def build(self, parts: Mapping[str, tuple[str, PartConfig]], seed: int) -> MotionModel:
        """Build the model.

        Raises:
            ConfigError: An encoder that gives an image no vector.
        """
        return MotionModel(self, cast("ImageEncoderConfig", parts["encoder"][1]), seed)


class MotionPredictor(nn.Module):
    """Between two embeddings: their linear interpolation, read by a transformer, whose output is added to it.

    The paper has the transformer give the embeddings themselves. Here it gives what is to be added, in units of the
    distance of both ends, which may be small beside their length: nothing at the start and always nothing at the ends.

    Args:
        embed: Width of the embeddings, D.
    """

    def __init__(self, embed: int, width: int, depth: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.enter = nn.Linear(2 * embed, width)
        self.time = nn.Linear(2 * TIMES, width)
        self.trunk = Trunk(TrunkConfig(width=width, depth=depth, heads=heads, ffn=ffn))
        self.leave = nn.Linear(width, embed)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, line: Tensor) -> Tensor:
        """What is to be added [B, L, D] to the interpolation [B, L, D], whose ends are embeddings of the pictures."""
        count = line.shape[1]
        share = torch.linspace(0, 1, count, device=line.device, dtype=line.dtype)[:, None]  # [L, 1]
        waves = share * math.pi * torch.arange(1, TIMES + 1, device=line.device, dtype=line.dtype)
        time = self.time(torch.cat([waves.sin(), waves.cos()], 1))  # [L, width]
        way = line[:, -1:] - line[:, :1]  # [B, 1, D]
        distance = way.norm(dim=-1, keepdim=True).clamp(min=1e-6)
        x = self.enter(torch.cat([line, (way / distance).expand(-1, count, -1)], 2)) + time
        added: Tensor = self.leave(self.trunk(x)) * distance * 4 * share * (1 - share)
        return added


class MotionModel(Model):
    """``encoder``, frozen, and ``predictor``; embeddings have unit length."""

    provides: ClassVar[frozenset[str]] = frozenset({"motion", "motion_line", "motion_target"})

    def __init__(self, config: MotionConfig, image_config: ImageEncoderConfig, seed: int) -> None:
        super().__init__()
        self.config, self.image_config, self.seed = config, image_config, seed
        with seeded(seed, "encoder"):
            self.encoder: Encoder = image_config.build()
        if not self.encoder.pooled_width:
            raise ConfigError("the encoder gives an image no vector to predict: set encoder.pool=true")
        with seeded(seed, "predictor"):
            self.predictor = MotionPredictor(
                self.encoder.pooled_width, config.width, config.depth, config.heads, config.ffn
            )
        self._processor: MotionProcessor | None = None

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Read frames, ``pixel_values`` [B, L, 3, H, W].

        Returns:
            ``motion``, ``motion_line`` (the interpolation) and ``motion_target`` (the frames' own), [B, L, D].
        """
        pixels = batch["pixel_values"]
        if pixels.ndim != 5 or pixels.shape[1] < 3:
            raise ConfigError(
                f"pixel_values have shape {list(pixels.shape)}, expected [B, frames, 3, H, W] with 3 frames or more:"
                " choose data of several frames, such as data=moving-scenes"
            )
        with torch.no_grad():
            target = torch.unflatten(self.embeddings(pixels.flatten(0, 1)), 0, pixels.shape[:2])  # [B, L, D]
        line = self.line(target[:, 0], target[:, -1], target.shape[1])
        return {"motion": self.motion(line), "motion_line": line, "motion_target": target}

    @staticmethod
    def line(first: Tensor, last: Tensor, count: int) -> Tensor:
        """The interpolation [B, count, D] of [B, D]; its ends are exactly the given ones."""
        share = torch.linspace(0, 1, count, device=first.device, dtype=first.dtype)[None, :, None]
        return first[:, None] * (1 - share) + last[:, None] * share

    def motion(self, line: Tensor) -> Tensor:
        """Predicted embeddings [B, L, D] of a line [B, L, D]."""
        added: Tensor = self.predictor(line)
        return line + added * (0 if self.config.interpolate else 1)

    def embeddings(self, pixel_values: Tensor) -> Tensor:
        """Embeddings [N, D] of unit length of pixel values [N, 3, H, W]."""
        return F.normalize(self.encoder(pixel_values).pooled, dim=-1)

    # -- capabilities ----------------------------------------------------------------------------------------------

    def embed_images(self, images: Sequence[ImageLike]) -> Tensor:
        """Embed images: [N, D] float32 of unit length, in the space motion is predicted in."""
        like = next(self.encoder.parameters())
        parts = [torch.empty(0, self.encoder.pooled_width, device=like.device)]
        with evaluating(self):
            for start in range(0, len(images), CHUNK):
                pixels = self.processor.encode_images(images[start : start + CHUNK])
                parts.append(self.embeddings(pixels.to(like.device, like.dtype)).float())
        return torch.cat(parts)

    def predict_motion(self, first: Sequence[ImageLike], last: Sequence[ImageLike], count: int) -> Tensor:
        """Embeddings [N, count, D] of ``count`` frames from each first to its last picture, both included.

        Raises:
            ConfigError: Fewer than 3 frames, or pictures that are not one each.
        """
        if count < 3 or len(first) != len(last):
            raise ConfigError(f"count = {count} frames from {len(first)} to {len(last)} pictures: expected 3 or more")
        line = self.line(self.embed_images(first), self.embed_images(last), count)
        with evaluating(self):
            return self.motion(line.to(next(self.predictor.parameters()).dtype)).float()

    # -- what surrounds the tensors --------------------------------------------------------------------------------

    @property
    def processor(self) -> MotionProcessor:
        """Turns samples of several frames into ``forward``'s batch; made on first use."""
        if self._processor is None:
            image = self.image_config
            transform = ImageTransform(
                size=image.image_size,
                mean=tuple(image.mean),
                std=tuple(image.std),
                mode=image.resize,  # type: ignore[arg-type]
            )
            self._processor = MotionProcessor(transform)
        return self._processor

    def example_batch(self, batch_size: int = 1) -> dict[str, Tensor]:
        size, like = self.image_config.image_size, next(self.encoder.parameters())
        frames = torch.zeros(batch_size, FRAMES, 3, size, size, dtype=like.dtype, device=like.device)
        return {"pixel_values": frames}


class MotionProcessor:
    """Samples of several images as [B, L, 3, S, S]."""

    def __init__(self, transform: ImageTransform) -> None:
        self.transform = transform

    def __call__(
        self,
        samples: Sequence[Sample],
        train: bool = False,
        draws: Sequence[int] | None = None,
        pixels: NDArray[np.uint8] | None = None,
    ) -> dict[str, Tensor]:
        """Return ``pixel_values``.

        Raises:
            DataError: Samples of another number of images, or of fewer than 3.
        """
        frames = [images_of(sample) for sample in samples]
        for sample, images in zip(samples, frames, strict=True):
            if len(images) < 3 or len(images) != len(frames[0]):
                raise DataError(
                    f"sample {sample.id!r} has {len(images)} images, expected 3 or more and as many as the others:"
                    " choose data of moving pictures, such as data=moving-scenes"
                )
        every = self.encode_images([image for images in frames for image in images])
        return {"pixel_values": torch.unflatten(every, 0, (len(samples), len(frames[0])))}

    def encode_images(self, images: Sequence[Any]) -> Tensor:
        """[N, 3, S, S] float32."""
        return self.transform(images)


@dataclass(frozen=True, kw_only=True)
class MotionErrorConfig(ObjectiveConfig):
    """Squared distance of predicted and real embeddings."""

    def build(self) -> MotionError:
        return MotionError()


class MotionError(Objective):
    """Mean squared distance of predicted and real embeddings, over the frames between both ends.

    The paper's loss is of the video that is drawn from them, through a video diffusion model, which there is none of
    here; this is the same error before anything is drawn. Reports the error of the interpolation beside it.
    """

    learns: ClassVar[str] = "motion"
    needs: ClassVar[frozenset[str]] = frozenset({"motion", "motion_line", "motion_target"})

    def forward(
        self, model: Any, batch: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        target = outputs["motion_target"]
        with full_precision(target):
            loss = inner_error(outputs["motion"], target).mean()
            line = inner_error(outputs["motion_line"], target).mean()
        return loss, {"error": loss.detach(), "interpolation": line.detach()}


def inner_error(predicted: Tensor, target: Tensor) -> Tensor:
    """Squared distance [B], the mean over the frames between both ends, of embeddings [B, L, D]."""
    return (predicted.float() - target.float())[:, 1:-1].square().sum(-1).mean(1)
