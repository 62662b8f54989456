"""What an encoder is: a modality in, tokens out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from zoo.part import Features, PartConfig

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]


class Encoder(nn.Module):
    """Base of encoders.

    Attributes:
        width: Width of the tokens.
        pooled_width: Width of ``Features.pooled``; 0 when the encoder pools nothing.
        tokens: Tokens an item, for the configured input size.
        projects: True when ``pooled`` already lies in the space to be shared, and needs no projection by the wiring.
    """

    width: int
    pooled_width: int
    tokens: int
    projects: bool = False

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Features:
        """Encode ``x``, pixel values [B, 3, H, W] or token ids [B, T] with their key mask [B, T] (True = real)."""
        raise TypeError(f"{type(self).__name__} defines no forward")


@dataclass(frozen=True, kw_only=True)
class ImageEncoderConfig(PartConfig):
    """Fields every image encoder has.

    Attributes:
        image_size: Side of the square input, pixels.
        layer: Block whose output is the tokens, counted as Python indexes: -1 the last, -2 the one before (LLaVA).
            Blocks after it are not built when nothing else reads them.
        cls: Keep the class token among the tokens, if there is one.
        mean: Per-channel mean of the input normalisation, of values in [0, 1].
        std: Per-channel standard deviation.
        resize: ``crop`` (short side, then centre), ``squash`` (exact square) or ``pad`` (to a square, in the mean
            colour).
    """

    image_size: int = 224
    layer: int = -1
    cls: bool = True
    mean: list[float] = field(default_factory=lambda: list(CLIP_MEAN))
    std: list[float] = field(default_factory=lambda: list(CLIP_STD))
    resize: str = "crop"

    def __post_init__(self) -> None:
        if self.resize not in ("crop", "squash", "pad"):
            raise ValueError(f"resize = {self.resize!r} must be crop, squash or pad")

    def build(self) -> Encoder:
        raise TypeError(f"{type(self).__name__} defines no build")


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig(PartConfig):
    """Fields every text encoder has.

    Attributes:
        tokenizer: A text tokenizer's name (``clip-bpe``, ``openmoji-bpe``, ``hf:FOLDER_OR_HUB_ID``).
        vocab_size: Rows of the embedding table.
        context_length: Longest input, tokens.
    """

    tokenizer: str = "clip-bpe"
    vocab_size: int = 49408
    context_length: int = 77

    def build(self) -> Encoder:
        raise TypeError(f"{type(self).__name__} defines no build")


@dataclass(frozen=True, kw_only=True)
class ModalityEncoderConfig(PartConfig):
    """Fields every encoder of a further modality has: audio, depth, a motion sensor, ...

    Attributes:
        modality: What it reads: the name under which samples carry it.
    """

    modality: str = ""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of what ``forward`` reads of one item, without the batch."""
        raise TypeError(f"{type(self).__name__} defines no input_shape")

    def prepare(self, item: Any, key: tuple[object, ...] | None = None) -> Tensor:
        """Turn what a sample carries into ``[clips, *input_shape]`` float32.

        Args:
            key: (seed, id, draw) in training, which decides all that is drawn, and one clip comes out; None in
                evaluation, where several may.

        Raises:
            DataError: The item is not what the encoder reads, in one line.
        """
        raise TypeError(f"{type(self).__name__} defines no prepare")

    def build(self) -> Encoder:
        raise TypeError(f"{type(self).__name__} defines no build")
