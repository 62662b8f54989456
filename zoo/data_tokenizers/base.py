"""What a data tokenizer is: what a sample holds of one modality in, a sequence of tokens for a transformer out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from zoo.data.sample import Sample
from zoo.nn.init import start_std
from zoo.part import Features, PartConfig


@dataclass
class DataTokens(Features):
    """Tokens of a modality.

    Attributes:
        positions: [B, N, D] that are added before every block of the transformer, not once; None = the tokens hold
            theirs. (Meta-Transformer's point clouds.)
        place: [B, N] int64, which of the item's own elements a token stands for, where some of them do (the point that
            a group is around); -1 for a token that stands for none.
    """

    positions: Tensor | None = None
    place: Tensor | None = None


class DataTokenizer(nn.Module):
    """Base of data tokenizers.

    Attributes:
        width: Width D of the tokens.
        tokens: Tokens of an item of the size that its configuration names, class token included.
        cls: The first token stands for the whole item.
    """

    width: int
    tokens: int
    cls: bool

    def forward(self, inputs: Mapping[str, Tensor]) -> DataTokens:
        """Tokens [B, N, D] of what the configuration's ``collate`` made of samples, with their mask [B, N] where items
        differ in length; N may be less than ``tokens`` for smaller items."""
        raise TypeError(f"{type(self).__name__} defines no forward")


@dataclass(frozen=True, kw_only=True)
class DataTokenizerConfig(PartConfig):
    """Base of the configurations of data tokenizers.

    Attributes:
        modality: What it reads, a word for messages.
    """

    modality: ClassVar[str] = ""

    def build(self, width: int) -> DataTokenizer:
        """Build the tokenizer for a transformer of ``width``."""
        raise TypeError(f"{type(self).__name__} defines no build")

    def collate(
        self, samples: Sequence[Sample], train: bool = False, draws: Sequence[int] | None = None, seed: int = 0
    ) -> dict[str, Tensor]:
        """What ``forward`` reads, a row a sample, on the CPU; the workers of the data loader call it.

        Args:
            train: Augment, where the modality is; what is drawn depends on (seed, id, draw) alone.
            draws: How often each sample was drawn before; 0 by default.

        Raises:
            DataError: A sample lacks the modality, or has values or shapes that cannot be read; it names the sample.
        """
        raise TypeError(f"{type(self).__name__} defines no collate")

    def example(self, batch_size: int = 1) -> dict[str, Tensor]:
        """A batch of the right shapes and dtypes and of plausible values, for contracts and for counting FLOPs."""
        raise TypeError(f"{type(self).__name__} defines no example")

    def examples(self, count: int) -> list[Sample]:
        """Samples whose ``collate`` has the shapes of ``example``, for a model of this tokenizer to be asked about."""
        raise TypeError(f"{type(self).__name__} defines no examples")


class Sequenced(nn.Module):
    """What stands around a sequence of tokens: a class token before it and learned positions on it, or neither.

    Args:
        tokens: Longest sequence, without the class token.
        cls: Put one learned token first.
        positions: Add learned positions (the class token has one too).
        std: Of the normal that both start from; by default 0.02, more where the width is below 512 (``start_std``).
    """

    def __init__(self, width: int, tokens: int, *, cls: bool, positions: bool, std: float | None = None) -> None:
        super().__init__()
        std = start_std(width) if std is None else std
        self.cls = nn.Parameter(std * torch.randn(1, 1, width)) if cls else None
        self.positions = nn.Parameter(std * torch.randn(1, tokens + int(cls), width)) if positions else None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """[B, N, D] and mask [B, N] -> [B, (1 +) N, D] and its mask."""
        if self.cls is not None:
            x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1)
            if mask is not None:
                mask = torch.cat([torch.ones_like(mask[:, :1]), mask], 1)
        if self.positions is not None:
            x = x + self.positions[:, : x.shape[1]]
        return x, mask
