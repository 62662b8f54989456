"""A decoder that goes on from a text encoder's states and cross-attends an image: CoCa's multimodal text half."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch.nn.functional as F
from torch import Tensor, nn

from zoo.decoders.base import Decoder, DecoderConfig
from zoo.layout import TokenBatch
from zoo.nn import KVCache, Trunk, TrunkConfig, init_clip_
from zoo.nn.config import Act


@dataclass(frozen=True, kw_only=True)
class MultimodalDecoderConfig(DecoderConfig):
    """CoCa's multimodal text half; defaults: that of open_clip's coca_ViT-B-32.

    Attributes:
        width: Hidden size, that of the text encoder and of the image tokens.
        depth: Layers, each with self-attention and cross-attention.
        heads: Attention heads.
        ffn: Width of the feed-forward networks.
        two_ffn: open_clip's layer: self-attention and cross-attention each followed by a feed-forward network, and a
            norm on the image tokens in every layer. Otherwise the paper's: self-attention, cross-attention, one
            feed-forward network.
        act: Activation of the feed-forward networks.
        eps: Of every norm.
    """

    reads_context: ClassVar[bool] = True

    tokenizer: str = "clip-bpe"
    vocab_size: int = 49408
    context_length: int = 76
    width: int = 512
    depth: int = 12
    heads: int = 8
    ffn: int = 2048
    two_ffn: bool = True
    act: Act = "gelu"
    eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width = {self.width} must be a multiple of heads = {self.heads}")

    def trunk(self) -> TrunkConfig:
        """The layers' configuration; one of open_clip's is two of the trunk's."""
        blocks = ("sf", "cf") * self.depth if self.two_ffn else ("scf",) * self.depth
        return TrunkConfig(
            width=self.width,
            depth=len(blocks),
            heads=self.heads,
            ffn=self.ffn,
            act=self.act,
            eps=self.eps,
            blocks=blocks,
            context_norm=self.two_ffn,
        )

    def build(self) -> MultimodalDecoder:
        return MultimodalDecoder(self)


class MultimodalDecoder(Decoder):
    """``trunk`` and ``lm_head``, a matrix of its own that starts from N(0, 1/width).

    It owns no token table: ``TokenBatch.embeds`` are the states of a text encoder. (open_clip's decoder never runs its
    own initialisation, which leaves its output matrix to uninitialised memory.)
    """

    def __init__(self, config: MultimodalDecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.width = self.context_width = config.width
        self.vocab_size = config.vocab_size
        self.context_length = config.context_length
        self.trunk = Trunk(config.trunk())
        init_clip_(self.trunk)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        nn.init.normal_(self.lm_head.weight, std=config.width**-0.5)

    def embed(self, ids: Tensor) -> Tensor:
        """Rows of the output matrix [B, T, width], for want of a token table; the wiring ``captioner`` has a text
        encoder embed instead."""
        return F.embedding(ids, self.lm_head.weight)

    def forward(
        self, batch: TokenBatch, cache: Any = None, *, context: Tensor | None = None, context_mask: Tensor | None = None
    ) -> Tensor:
        """Hidden states [B, T, width] after the final norm.

        Args:
            batch: States of a text encoder in place of embeddings, with their layout.
            context: [B, N, width] image tokens; a cache keeps their keys and values. Without one cross-attention is
                skipped.
            context_mask: [B, N] bool, True = real.
        """
        hidden = self.trunk(batch.embeds, batch.layout, context=context, context_mask=context_mask, cache=cache)
        return cast(Tensor, hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(hidden)
        return logits

    def new_cache(self) -> KVCache:
        return KVCache()

    def select_cache(self, cache: Any, index: Tensor) -> Any:
        """The cache of the batch rows ``index`` [N]; repeats allowed. ``cache`` must not be used afterwards."""
        cache.reorder(index)
        return cache
