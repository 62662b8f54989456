"""What a wiring builds: a plain ``nn.Module`` that joins parts, declares its outputs, and offers capabilities."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.layout import Layout
from zoo.part import Features


class Model(nn.Module):
    """Base of models.

    Attributes:
        provides: Names of the outputs ``forward`` returns; objectives are checked against it.
        reads_image_tokens: ``forward`` and the objectives read images through ``encode_images`` alone, so that
            ``image_tokens`` [N, n, D] may stand in a batch in place of ``pixel_values`` (``zoo.data.feature_cache``).
    """

    provides: ClassVar[frozenset[str]] = frozenset()
    reads_image_tokens: ClassVar[bool] = False

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One forward pass over what ``processor`` made; returns what ``provides`` names."""
        raise TypeError(f"{type(self).__name__} defines no forward")

    def encode_images(self, pixel_values: Tensor | None, image_tokens: Tensor | None = None) -> Features:
        """The tokens [N, n, D] of the slot ``encoder``, without a graph where nothing of it learns.

        Args:
            pixel_values: [N, 3, H, W].
            image_tokens: [N, n, D], what the encoder made of the images earlier; the encoder is then not asked. Such
                features have no ``pooled``.

        Raises:
            ConfigError: Neither is given.
        """
        if image_tokens is not None:
            return Features(image_tokens, grid=square_grid(image_tokens.shape[1]))
        if pixel_values is None:
            raise ConfigError("the model was given neither pixel_values nor image_tokens")
        encoder: Any = self.encoder
        frozen = not any(p.requires_grad for p in encoder.parameters())
        with torch.no_grad() if frozen else nullcontext():
            features: Features = encoder(pixel_values)
        return features

    def reconfigure(self, config: Any) -> None:
        """Go on with a wiring configuration that differs in ``per_stage`` fields only (a stage's); no weight depends
        on them."""

    @property
    def processor(self) -> Any:
        """The ``zoo.data.processor`` object that turns samples into ``forward``'s batch; made on first use."""
        raise TypeError(f"{type(self).__name__} defines no processor")

    def layouts(self) -> dict[str, Layout]:
        """Name -> layout of each sequence the model attends over, for one item of typical length."""
        return {}

    def example_batch(self, batch_size: int = 1) -> dict[str, Tensor]:
        """A batch of the right shapes and dtypes on the model's own device, which may be "meta", for counting FLOPs."""
        raise TypeError(f"{type(self).__name__} defines no example_batch")

    def parts(self) -> dict[str, nn.Module]:
        """Path -> module of the top-level parts, in the order tokens pass through them."""
        return dict(self.named_children())

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


def square_grid(tokens: int) -> tuple[int, int] | None:
    """The patch grid of a square image with ``tokens`` tokens, one of which may be a class token; None if there is
    none.
    """
    for patches in (tokens, tokens - 1):
        side = math.isqrt(max(patches, 0))
        if side and side * side == patches:
            return (side, side)
    return None
