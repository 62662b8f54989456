"""A causal language model on the zoo's own trunk, for layouts and routings that the library's models do not know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from zoo.decoders.base import Decoder, DecoderConfig
from zoo.layout import TokenBatch
from zoo.nn import KVCache, TokenEmbedding, Trunk, TrunkConfig, start_std


@dataclass(frozen=True, kw_only=True)
class TrunkLMConfig(DecoderConfig):
    """Like Llama by default: pre-RMSNorm, rotary positions on the whole head, SwiGLU, no biases.

    Attributes:
        width: Hidden size.
        depth: Layers.
        heads: Attention heads.
        kv_heads: Key/value heads; 0 = as many as heads.
        ffn: Width of the feed-forward layers.
        norm: ``rms`` or ``layer``.
        eps: Of the norms.
        placement: Where the norms stand, as in ``TrunkConfig``.
        act: Activation of the feed-forward layers; gated when ``gated``.
        gated: SwiGLU rather than one up projection.
        bias: Biases on every projection.
        rope_share: Part of each head that is rotated.
        rope_theta: Base of the rotary frequencies.
        qk_norm: ``none``, ``layer`` or ``rms`` on queries and keys.
        qk_norm_per_head: Their affine is a head's own (Chameleon).
        tie: The output matrix is the embedding table.
        head_bias: The output matrix has a bias (Phi); needs ``tie`` = false.
        dropout: On the output of every branch while training.
    """

    width: int = 576
    depth: int = 30
    heads: int = 9
    kv_heads: int = 3
    ffn: int = 1536
    norm: str = "rms"
    eps: float = 1e-5
    placement: str = "pre"
    act: str = "silu"
    gated: bool = True
    bias: bool = False
    rope_share: float = 1.0
    rope_theta: float = 10000.0
    qk_norm: str = "none"
    qk_norm_per_head: bool = False
    tie: bool = True
    head_bias: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.head_bias and self.tie:
            raise ValueError("head_bias = true needs tie = false: the embedding table has no bias")

    def trunk(self) -> TrunkConfig:
        """The trunk's configuration.

        Raises:
            ConfigError: A value the trunk does not know, or sizes that do not divide.
        """
        return TrunkConfig(
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            kv_heads=self.kv_heads or self.heads,
            ffn=self.ffn,
            norm=self.norm,  # type: ignore[arg-type]
            eps=self.eps,
            placement=self.placement,  # type: ignore[arg-type]
            act=self.act,  # type: ignore[arg-type]
            gated=self.gated,
            bias="qkv" if self.bias else "",
            out_bias=self.bias,
            ffn_bias=self.bias,
            rope=2 * int(self.width // max(self.heads, 1) * self.rope_share / 2),
            rope_theta=self.rope_theta,
            qk_norm=self.qk_norm,  # type: ignore[arg-type]
            qk_norm_per_head=self.qk_norm_per_head,
            dropout=self.dropout,
            init_std=start_std(self.width),
        )

    def build(self) -> TrunkLM:
        return TrunkLM(self)


class OnTrunk(Protocol):
    """What a configuration must say for a language model on the trunk."""

    @property
    def width(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def context_length(self) -> int: ...
    @property
    def tie(self) -> bool: ...
    def trunk(self) -> TrunkConfig: ...


class TrunkLM(Decoder):
    """``embedding``, ``trunk`` and, untied, ``lm_head``."""

    def __init__(self, config: OnTrunk) -> None:
        super().__init__()
        self.config: Any = config
        self.width = config.width
        self.vocab_size = config.vocab_size
        self.context_length = config.context_length
        self.embedding = TokenEmbedding(config.vocab_size, config.width)
        self.trunk = Trunk(config.trunk())
        bias = getattr(config, "head_bias", False)
        self.lm_head = None if config.tie else nn.Linear(config.width, config.vocab_size, bias=bias)

    def embed(self, ids: Tensor) -> Tensor:
        embeds: Tensor = self.embedding(ids)
        return embeds

    def forward(self, batch: TokenBatch, cache: Any = None) -> Tensor:
        hidden = self.trunk(batch.embeds, batch.layout, cache=cache)
        assert isinstance(hidden, Tensor)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        if self.lm_head is None:
            return nn.functional.linear(hidden, self.embedding.tokens.weight)
        logits: Tensor = self.lm_head(hidden)
        return logits

    def logits_of(self, hidden: Tensor, columns: slice) -> Tensor:
        if self.lm_head is None:
            return nn.functional.linear(hidden, self.embedding.tokens.weight[columns])
        bias = None if self.lm_head.bias is None else self.lm_head.bias[columns]
        return nn.functional.linear(hidden, self.lm_head.weight[columns], bias)

    def tables(self) -> tuple[Tensor, Tensor]:
        table: Tensor = self.embedding.tokens.weight
        return table, table if self.lm_head is None else self.lm_head.weight

    def new_cache(self) -> KVCache:
        return KVCache()

    def select_cache(self, cache: Any, index: Tensor) -> Any:
        """The cache of the batch rows ``index`` [N]; repeats allowed. ``cache`` must not be used afterwards."""
        cache.reorder(index)
        return cache

    def cut_cache(self, cache: Any, length: int) -> Any:
        """The cache of the first ``length`` tokens."""
        cache.truncate(length)
        return cache
