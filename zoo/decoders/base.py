"""What a text decoder is: embeddings laid out as a sequence in, hidden states and logits out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.layout import Layout, Segment, TokenBatch, lay_out
from zoo.part import PartConfig


class Decoder(nn.Module):
    """Base of text decoders.

    Attributes:
        width: Width of its embeddings and hidden states.
        vocab_size: Rows of the embedding table and width of the logits.
        context_width: Width of the context that it cross-attends; 0 = it reads none. Decoders that read one take
            ``context`` [B, N, context_width] and ``context_mask`` [B, N] by keyword in ``forward``, and keep its keys
            and values in the cache.
        image_tokens: Slots of one image, which the wiring says; a layout on the meta device has nothing else to go by.
    """

    width: int
    vocab_size: int
    context_width: int = 0
    image_tokens: int = 0

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] -> embeddings [B, T, width], without positions."""
        raise TypeError(f"{type(self).__name__} defines no embed")

    def forward(self, batch: TokenBatch, cache: Any = None) -> Tensor:
        """Hidden states [B, T, width] after the final norm.

        With a cache (``new_cache``), ``batch.embeds`` holds only the new rows, and ``batch.layout`` has every key.
        """
        raise TypeError(f"{type(self).__name__} defines no forward")

    def arrange(self, layout: Layout, ids: Tensor, slots: Tensor) -> Layout:
        """The layout as this decoder counts positions, routes rows and masks; by default as it is given.

        Called last when a wiring lays out a sequence, in training and in decoding.

        Args:
            layout: Plain causal, its positions not counting pads.
            ids: [B, T] token ids, image placeholders included.
            slots: [B, T] bool, True where a placeholder stands.
        """
        return layout

    def grow(self, layout: Layout) -> Layout:
        """The layout with one more token, which this decoder has just written; by default at the next position, of the
        last segment and route."""
        return layout.append(layout.names[-1])

    def sketch(self, segments: Sequence[Segment]) -> Layout:
        """The layout of a typical sequence as ``arrange`` makes it, for pictures: segments in order, those of images
        named ``image``."""
        return lay_out(segments)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., width] -> logits [..., vocab_size]."""
        raise TypeError(f"{type(self).__name__} defines no logits")

    def logits_of(self, hidden: Tensor, columns: slice) -> Tensor:
        """The logits [..., n] of the ids ``columns`` alone, out of hidden states [..., width]."""
        return self.logits(hidden)[..., columns]

    def tables(self) -> tuple[Tensor, Tensor]:
        """The embedding table and the rows of the output map, [vocab_size, width] both, which may be one tensor.

        Raises:
            ConfigError: It has no such tables, and can be given no further tokens.
        """
        raise ConfigError(
            f"the decoder {type(self).__name__} cannot be given further tokens: choose a language model of"
            " transformers, or one on the trunk"
        )

    def new_cache(self) -> Any:
        """An empty key/value cache for ``forward``."""
        raise TypeError(f"{type(self).__name__} defines no cache")

    def select_cache(self, cache: Any, index: Tensor) -> Any:
        """The cache with the rows ``index`` [B'] (long) in that order: candidates of one image, beams."""
        raise TypeError(f"{type(self).__name__} cannot select rows of a cache")

    def cut_cache(self, cache: Any, length: int) -> Any:
        """The cache of the first ``length`` tokens: an image's rows are forgotten after every step of drawing it.
        ``cache`` must not be used afterwards."""
        raise TypeError(f"{type(self).__name__} cannot cut a cache")


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(PartConfig):
    """Fields every text decoder has.

    Attributes:
        tokenizer: A text tokenizer's name.
        vocab_size: Rows of the embedding table.
        context_length: Longest sequence, image tokens included.
        reads_context: The decoder cross-attends to a context (of the class).
    """

    reads_context: ClassVar[bool] = False

    tokenizer: str = "openmoji-bpe"
    vocab_size: int = 1024
    context_length: int = 256

    def build(self) -> Decoder:
        raise TypeError(f"{type(self).__name__} defines no build")
