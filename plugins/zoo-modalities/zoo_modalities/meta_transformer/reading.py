"""Taking a modality out of samples, with messages that name the sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zoo.data.images import ImageTransform
from zoo.data.sample import Sample
from zoo.errors import DataError
from zoo_modalities.data.signal import Signal, check, signals_of


def item_of(sample: Sample, name: str) -> Any:
    """What a sample carries of a modality.

    Raises:
        DataError: Nothing; the message says what it carries.
    """
    signals = signals_of(sample)
    if name not in signals:
        carried = ", ".join(signals) or "none"
        raise DataError(
            f"sample {sample.id!r} has no {name} (modalities: {carried}): choose data that have it, or another"
            " data_tokenizer"
        )
    return signals[name]


def values_of(
    sample: Sample,
    name: str,
    ndim: int,
    *,
    rate: float | None = None,
    rows: int | None = None,
    least: int = 1,
) -> NDArray[np.float32]:
    """The values of a sample's modality as float32, refused where ``check`` refuses them.

    Raises:
        DataError: Naming the sample.
    """
    item = item_of(sample, name)
    try:
        return check(item, name, ndim, rate=rate, rows=rows, least=least)
    except DataError as error:
        raise DataError(f"sample {sample.id!r}: {error}") from None


def draws_of(samples: Sequence[Sample], draws: Sequence[int] | None) -> Sequence[int]:
    """How often each sample was drawn, 0 where nobody says."""
    return draws if draws is not None else [0] * len(samples)


def maps_to_images(maps: Sequence[NDArray[np.float32]], size: int, channels: int) -> Tensor:
    """Maps [H, W] or images [C, H, W] in [0, 1] -> [B, channels, size, size] in [-1, 1]: bilinear, one channel
    repeated.

    Raises:
        DataError: A map of neither one nor ``channels`` channels.
    """
    rows = []
    for values in maps:
        image = torch.from_numpy(np.array(values, np.float32))
        image = image[None] if image.ndim == 2 else image
        if len(image) not in (1, channels):
            raise DataError(f"an image of {len(image)} channels, expected 1 or {channels} (data_tokenizer.channels)")
        image = torch.nn.functional.interpolate(
            image[None], (size, size), mode="bilinear", align_corners=False, antialias=True
        )[0]
        rows.append(image.expand(channels, -1, -1))
    return torch.stack(rows) * 2 - 1


def frames_to_images(clip: NDArray[np.uint8], transform: ImageTransform) -> Tensor:
    """Frames [T, H, W, 3] of bytes -> [T, 3, S, S], each as the transform shows an image."""
    if transform.takes_arrays(clip.shape[1], clip.shape[2], False):
        return transform.from_array(clip)
    from PIL import Image

    return transform([Image.fromarray(frame) for frame in clip])


def example_signal(sample: int, *shape: int, low: float = 0.0, high: float = 1.0) -> NDArray[np.float32]:
    """Uniform numbers of a sample of ``examples``, the same ones every time."""
    generator = np.random.Generator(np.random.PCG64(sample))
    return generator.uniform(low, high, shape).astype(np.float32)


def example_samples(count: int, name: str, *shape: int, rate: float | None = None) -> list[Sample]:
    """Samples of uniform numbers."""
    return [
        Sample(f"example-{i}", meta={"modalities": {name: Signal(example_signal(i, *shape), rate)}})
        for i in range(count)
    ]
