"""What a mask decoder is: images and prompts in, one mask a target out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from zoo.part import Features, PartConfig

Seen = tuple[Tensor, ...]
"""What a mask decoder makes of N images: [N, C, h, w] a level, the coarsest first."""


class MaskDecoder(nn.Module):
    """Base of mask decoders.

    A target is one mask. What says which mask is wanted are ``prompts`` vectors of width ``width``, states of a
    language model mapped to this width, one for each of its tokens that stand for a target.

    The picture it draws masks of is a square: an image whose longer side was resized to it, padded to the right and
    below. Logits may have fewer pixels than this square; they cover all of it.

    Attributes:
        width: Width of the prompts.
        prompts: Prompts a target, in a fixed order.
        layers: Blocks of the model's image encoder whose tokens ``encode`` reads, counted as Python indexes; empty
            where it reads pixels with an encoder of its own.
        image_size: Side of the square, in pixels, where it reads pixels; 0 = the square is the image encoder's.
    """

    width: int
    prompts: int
    layers: tuple[int, ...] = ()
    image_size: int = 0

    def encode(self, pixel_values: Tensor | None, features: Sequence[Features] = ()) -> Seen:
        """What all targets of an image share, computed once an image.

        Args:
            pixel_values: [N, 3, S, S] of the square, where ``layers`` is empty.
            features: For each of ``layers`` the tokens [N, h w, D] of the encoder, without a class token, with their
                ``grid`` and, where the square is padded, a ``mask`` [N, h w] bool of the patches that show something.
        """
        raise TypeError(f"{type(self).__name__} defines no encode")

    def decode(self, seen: Seen, prompts: Tensor, row: Tensor) -> Tensor:
        """Logits [M, h, w] of M targets, above 0 where a pixel belongs to it; one target does not affect another.

        Args:
            seen: What ``encode`` returned.
            prompts: [M, prompts, width].
            row: [M] long, the image of every target, 0 to N - 1.
        """
        raise TypeError(f"{type(self).__name__} defines no decode")


@dataclass(frozen=True, kw_only=True)
class MaskDecoderConfig(PartConfig):
    """Base of mask decoders' configuration; widths are derived when parts are joined.

    One that reads pixels has the fields ``image_size``, ``mean`` and ``std``, as an image encoder's configuration.
    """

    @property
    def prompts(self) -> int:
        """Prompts a target: as many tokens the vocabulary gets for it, before the decoder is built."""
        return 1

    def build(self, *, text_width: int, image_width: int) -> MaskDecoder:
        """Build the decoder.

        Args:
            text_width: Width of the language model.
            image_width: Width of the image encoder's tokens.
        """
        raise TypeError(f"{type(self).__name__} defines no build")
