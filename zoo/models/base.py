"""What a wiring builds: a plain ``nn.Module`` that joins parts, declares its outputs, and offers capabilities."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
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
        reads_image_codes: The same of the slot ``image_tokenizer`` and ``tokenize_images``: ``image_codes`` or
            ``image_latents`` may stand in place of ``pixel_values``. Not both.
        draws_latents: In training ``tokenize_images`` draws latents from the tokenizer's Gaussian, of which a cache
            then keeps the deviations as well.
        reads_packed_rows: ``forward`` and the objectives read batches of ``zoo.data.packing``; ``row_length`` is the
            longest row that the processor writes.
    """

    provides: ClassVar[frozenset[str]] = frozenset()
    reads_image_tokens: ClassVar[bool] = False
    reads_image_codes: ClassVar[bool] = False
    reads_packed_rows: ClassVar[bool] = False
    draws_latents: bool = False

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

    def tokenize_images(self, batch: Mapping[str, Tensor]) -> Tensor:
        """What the slot ``image_tokenizer`` makes of a batch's images, without a graph.

        Args:
            batch: With ``pixel_values`` [N, 3, H, W], or with what the tokenizer made of them earlier:
                ``image_codes`` [N, n], or ``image_latents`` [N, C, h, w] ([N, 2C, h, w] with the deviations).

        Returns:
            Codes [N, n] int64 in row order, or latents [N, C, h, w] at unit variance: their means, or in training
            draws where the model ``draws_latents``.

        Raises:
            ConfigError: The batch has none of them.
        """
        tokenizer: Any = self.image_tokenizer
        sample = self.draws_latents and self.training
        if tokenizer.discrete and "image_codes" in batch:
            return batch["image_codes"].long()
        if not tokenizer.discrete and "image_latents" in batch:
            latents = batch["image_latents"]
            if latents.shape[1] == tokenizer.channels:
                return latents
            drawn: Tensor = tokenizer.drawn(latents, sample)
            return drawn
        if "pixel_values" not in batch:
            kind = "image_codes" if tokenizer.discrete else "image_latents"
            raise ConfigError(f"the model was given neither pixel_values nor {kind}")
        pixels = batch["pixel_values"]
        with torch.no_grad():
            made: Tensor = tokenizer.encode(pixels) if tokenizer.discrete else tokenizer.encode(pixels, sample)
        return made

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


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients, for what a capability computes; afterwards every module is in the mode it was in:
    frozen parts stay in eval mode while others train."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, mode in training:
            module.training = mode


def square_grid(tokens: int) -> tuple[int, int] | None:
    """The patch grid of a square image with ``tokens`` tokens, one of which may be a class token; None if there is
    none.
    """
    for patches in (tokens, tokens - 1):
        side = math.isqrt(max(patches, 0))
        if side and side * side == patches:
            return (side, side)
    return None
