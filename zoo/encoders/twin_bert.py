"""A BERT that reads two images: a pair of cross-attentions in place of each layer's one (BLIP's NLVR2 model)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from zoo.encoders.bert import Bert, BertConfig
from zoo.nn import TrunkConfig
from zoo.nn.attention import Attention, Reading


@dataclass(frozen=True, kw_only=True)
class TwinBertConfig(BertConfig):
    """BLIP's BERT for two images.

    Attributes:
        average_share: Share of the layers, from the first, that average what they read of the two images; the others
            merge it by a matrix. 6 of 12 in models/nlvr_encoder.py of the release.
    """

    vocab_size: int = 30524
    added: int = 2
    types: int = 0
    text_share: float = 1.0
    cross_share: float = 1.0
    lm_head: bool = False
    average_share: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.average_share <= 1:
            raise ValueError(f"average_share = {self.average_share} must lie in [0, 1]")

    @property
    def first_merge(self) -> int:
        """Number of the first layer that merges."""
        return round(self.depth * self.average_share)

    def build(self, context_width: int | None = None) -> TwinBert:
        """As ``BertConfig.build``; ``context_width`` is that of one image's tokens."""
        return TwinBert(self, context_width)


class Twins(nn.Module):
    """Two cross-attentions, one for each half of the context, averaged or merged by a matrix."""

    def __init__(self, config: TrunkConfig, layer: int, merge: bool) -> None:
        super().__init__()
        self.layer = layer
        self.first = Attention(config, layer, cross=True)
        self.second = Attention(config, layer, cross=True)
        self.second.load_state_dict(self.first.state_dict())  # both start as one, as from the pre-trained model
        self.merge = nn.Linear(2 * config.width, config.width) if merge else None

    def read_context(self, x: Tensor, reading: Reading) -> Tensor:
        """Let the rows ``x`` [B, T, D] read the context [B, 2N, C], a half each."""
        assert reading.context is not None
        halves = reading.context.chunk(2, 1)
        both = [
            one.read_context(x, replace(reading, context=half))
            for one, half in zip((self.first, self.second), halves, strict=True)
        ]
        if self.merge is None:
            return (both[0] + both[1]) / 2
        merged: Tensor = self.merge(torch.cat(both, -1))
        return merged


class TwinBert(Bert):
    """``Bert`` whose ``context`` is the tokens of two images, [B, 2N, D], one behind the other."""

    def __init__(self, config: TwinBertConfig, context_width: int | None = None) -> None:
        super().__init__(config, context_width)
        if context_width is not None:
            for i, layer in enumerate(self.trunk.layers):
                layer.cross = Twins(self.trunk.config, i, merge=i >= config.first_merge)
