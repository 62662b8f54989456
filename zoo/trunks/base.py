"""What a trunk part is: one transformer that reads an image, a text, or both in one sequence."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from zoo.part import PartConfig


@dataclass
class Rows:
    """What a trunk makes of its inputs.

    Attributes:
        image: [B, 1 + h*w, D], class token first; None where no image was read.
        text: [B, T, D]; None where no text was read.
        taps: The rows after every layer that ran, in the order of the joint sequence; only when they were asked for.
    """

    image: Tensor | None = None
    text: Tensor | None = None
    taps: tuple[Tensor, ...] = ()


class SharedTrunk(nn.Module):
    """Base of trunk parts.

    Attributes:
        width: Width D of the rows.
        tokens: Rows of an image of the configured size, class token included.
        grid: (height, width) of its patches.
        vocab_size: Rows of the token table.
    """

    width: int
    tokens: int
    grid: tuple[int, int]
    vocab_size: int

    def embed_image(self, pixel_values: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Pixel values [B, 3, H, W] -> rows [B, 1 + h*w, D] as ``forward`` reads them; the patches ``hidden``
        [B, h*w] bool are replaced by the mask token."""
        raise TypeError(f"{type(self).__name__} defines no embed_image")

    def embed_text(self, input_ids: Tensor) -> Tensor:
        """Token ids [B, T] -> rows [B, T, D] as ``forward`` reads them."""
        raise TypeError(f"{type(self).__name__} defines no embed_text")

    def forward(self, image: Tensor | None = None, text: Tensor | None = None, mask: Tensor | None = None) -> Rows:
        """Read embedded rows of an image, of a text, or of both; ``mask`` [B, T], 1 = real, is that of the text."""
        raise TypeError(f"{type(self).__name__} defines no forward")


@dataclass(frozen=True, kw_only=True)
class SharedTrunkConfig(PartConfig):
    """Fields every trunk part has.

    Attributes:
        image_size: Side of the square input, pixels.
        mean, std: Of the input normalisation, per channel, of values in [0, 1].
        resize: ``crop`` (short side, then centre), ``squash`` (exact square) or ``pad`` (to a square).
        tokenizer: A text tokenizer's name.
        vocab_size: Rows of the token table.
        context_length: Longest text, tokens.
    """

    image_size: int = 224
    mean: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5])
    std: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5])
    resize: str = "squash"
    tokenizer: str = "openmoji-bpe"
    vocab_size: int = 1024
    context_length: int = 128

    def __post_init__(self) -> None:
        if self.resize not in ("crop", "squash", "pad"):
            raise ValueError(f"resize = {self.resize!r} must be crop, squash or pad")
        if self.context_length < 3:
            raise ValueError(f"context_length = {self.context_length} leaves no room for text between BOS and EOS")

    def build(self) -> SharedTrunk:
        raise TypeError(f"{type(self).__name__} defines no build")
