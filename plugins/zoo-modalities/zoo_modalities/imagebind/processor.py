"""From samples with signals to the batch of the wiring ``bind``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zoo.data.images import ImageTransform, uniforms
from zoo.data.processor import PairProcessor
from zoo.data.sample import Sample
from zoo.data.text import TextTokenizer
from zoo.encoders.base import ModalityEncoderConfig
from zoo.errors import DataError
from zoo_modalities.data.signal import Signal, signals_of

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image

Box = tuple[float, float, float, float]


def crop_box(key: tuple[object, ...], scale: tuple[float, float]) -> Box:
    """A random box (left, upper, right, lower) in shares of the sides: an area of ``scale``, sides within 3:4 and 4:3.

    It depends on the key alone, so that whatever shows the same pixels is cut alike.
    """
    u = uniforms(4, "aligned-crop", *key)
    area = scale[0] + u[0] * (scale[1] - scale[0])
    ratio = math.exp((2 * u[1] - 1) * math.log(4 / 3))
    width, height = min(1.0, math.sqrt(area * ratio)), min(1.0, math.sqrt(area / ratio))
    left, upper = u[2] * (1 - width), u[3] * (1 - height)
    return left, upper, left + width, upper + height


class BindProcessor:
    """Images, and of every sample what it has beside.

    Args:
        pairs: Makes pixel values and token ids.
        encoders: Modality -> the configuration of its encoder, which prepares its signals.
        crop: Area of the random crops of training, which maps share with their image; None = none.
        seed: Of what is drawn.
    """

    def __init__(
        self,
        pairs: PairProcessor,
        encoders: Mapping[str, ModalityEncoderConfig],
        crop: tuple[float, float] | None,
        seed: int,
    ) -> None:
        self.pairs = pairs
        self.encoders = dict(encoders)
        self.crop = crop
        self.seed = seed

    @property
    def transform(self) -> ImageTransform:
        return self.pairs.transform

    @transform.setter
    def transform(self, transform: ImageTransform) -> None:
        self.pairs.transform = transform

    @property
    def tokenizer(self) -> TextTokenizer:
        return self.pairs.tokenizer

    def encode_images(self, images: Sequence[Image.Image | Path | str]) -> Tensor:
        """``[B, 3, S, S]`` float32, as in evaluation."""
        return self.pairs.encode_images(images)

    def encode_texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask`` [B, L]."""
        return self.pairs.encode_texts(texts)

    def __call__(
        self,
        samples: Sequence[Sample],
        train: bool = False,
        draws: Sequence[int] | None = None,
        pixels: NDArray[np.uint8] | None = None,
    ) -> dict[str, Tensor]:
        """Return a batch.

        ``pixel_values`` [B, 3, S, S]; of the samples with a text ``input_ids`` and ``attention_mask`` [n, L]; of those
        with a modality that the model reads a tensor [n, ...] of its name. Where not all samples have it, ``text_rows``
        or ``NAME_rows`` [n] says whose it is.

        Raises:
            DataError: A sample has no image, no sample has anything beside it, or a signal is no such thing.
        """
        draws = draws if draws is not None else [0] * len(samples)
        if pixels is None and any(s.image is None for s in samples):
            missing = next(s.id for s in samples if s.image is None)
            raise DataError(f"sample {missing!r} has no image, which this model binds everything to")
        batch = {"pixel_values": self._images(samples, train, draws, pixels)}
        text_rows = [i for i, s in enumerate(samples) if s.texts]
        if text_rows:
            texts = [self._text(samples[i], train, draws[i]) for i in text_rows]
            batch |= self.encode_texts(texts)
            if len(text_rows) < len(samples):
                batch["text_rows"] = torch.tensor(text_rows)
        signals = [signals_of(s) for s in samples]
        for name, config in self.encoders.items():
            rows = [i for i, own in enumerate(signals) if name in own]
            if rows:
                batch[name] = torch.cat(
                    [self._prepared(config, signals[i][name], samples[i], train, draws[i]) for i in rows]
                )
                if len(rows) < len(samples):
                    batch[f"{name}_rows"] = torch.tensor(rows)
        if self.encoders and not any("modalities" in s.meta for s in samples):
            raise DataError(
                f"the data carry no {', '.join(self.encoders)}, which this model binds to images: choose data that do,"
                " such as data=openmoji-modalities, or set wiring.modalities=[]"
            )
        if len(batch) == 1:
            raise DataError(f"sample {samples[0].id!r} and its batch have nothing beside images to bind to them")
        return batch

    def _prepared(
        self, config: ModalityEncoderConfig, signal: Signal, sample: Sample, train: bool, draw: int
    ) -> Tensor:
        key = (self.seed, sample.id, draw) if train else None
        if key is not None and self.crop is not None and getattr(config, "spatial", False):
            signal = Signal(cropped_map(np.asarray(signal.values), crop_box(key, self.crop)), signal.rate)
        try:
            return config.prepare(signal, key)[:1]
        except DataError as error:
            raise DataError(f"sample {sample.id!r}: {error}") from error

    def _images(
        self, samples: Sequence[Sample], train: bool, draws: Sequence[int], pixels: NDArray[np.uint8] | None
    ) -> Tensor:
        if not train or self.crop is None:
            if pixels is not None:
                return self.pairs.transform.from_array(pixels) if self._fits(pixels) else self._pictures(pixels)
            return self.encode_images([s.image for s in samples if s.image is not None])
        from PIL import Image

        shown: list[Any] = [Image.fromarray(p) for p in pixels] if pixels is not None else [s.image for s in samples]
        side, cut = self.transform.size, []
        for image, sample, draw in zip(shown, samples, draws, strict=True):
            box = crop_box((self.seed, sample.id, draw), self.crop)
            box_pixels = tuple(share * n for share, n in zip(box, (*image.size, *image.size), strict=True))
            cut.append(image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC, box_pixels))
        return self.encode_images(cut)

    def _fits(self, pixels: NDArray[np.uint8]) -> bool:
        return self.pairs.transform.takes_arrays(pixels.shape[1], pixels.shape[2], False)

    def _pictures(self, pixels: NDArray[np.uint8]) -> Tensor:
        from PIL import Image

        return self.encode_images([Image.fromarray(p) for p in pixels])

    def _text(self, sample: Sample, train: bool, draw: int) -> str:
        if not train or len(sample.texts) == 1:
            return sample.texts[0]
        return sample.texts[int(uniforms(1, "text", self.seed, sample.id, draw)[0] * len(sample.texts))]


def cropped_map(values: NDArray[Any], box: Box) -> NDArray[np.float32]:
    """The part of a map [H, W] within a box, at the map's own size (bicubic)."""
    from PIL import Image

    height, width = values.shape
    picture = Image.fromarray(np.ascontiguousarray(values, np.float32))
    pixels = (box[0] * width, box[1] * height, box[2] * width, box[3] * height)
    return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC, pixels))
