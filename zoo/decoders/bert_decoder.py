"""A BERT that writes: causal self-attention, cross-attention to an image (or a question), and BERT's LM head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from torch import Tensor

from zoo.decoders.base import Decoder, DecoderConfig
from zoo.errors import ConfigError
from zoo.layout import TokenBatch
from zoo.nn import KVCache, MLMHead, TokenEmbedding, Trunk, TrunkConfig, share_, start_std


@dataclass(frozen=True, kw_only=True)
class BertDecoderConfig(DecoderConfig):
    """BERT base by default, as BLIP's decoder (models/med.py of the release).

    Attributes:
        vocab_size: Rows of the embedding table, ``added`` ids included.
        added: Ids behind those of the tokenizer. BLIP has two: the last but one, [DEC], starts what the decoder
            writes, the last, [ENC], what the image-grounded encoder reads.
        types: Rows of a token type table, of which only row 0 is read; 0 = none (ALBEF's answer decoder has 2).
        width: Hidden size.
        depth: Layers; each has self-attention, cross-attention and FFN, each with a norm behind it.
        heads: Attention heads.
        ffn: Width of the feed-forward layers.
        dropout: On every branch, the embeddings and the attention weights while training.
        eps: Of the norms.
    """

    reads_context: ClassVar[bool] = True

    tokenizer: str = "hf:google-bert/bert-base-uncased"
    vocab_size: int = 30524
    context_length: int = 512
    added: int = 2
    types: int = 0
    width: int = 768
    depth: int = 12
    heads: int = 12
    ffn: int = 3072
    dropout: float = 0.1
    eps: float = 1e-12

    def __post_init__(self) -> None:
        if not 0 <= self.added < self.vocab_size:
            raise ValueError(f"added = {self.added} must be 0 or more and below vocab_size = {self.vocab_size}")

    def scaled(self, sizes: Mapping[str, Any]) -> Self:
        """As every part's; the ``added`` ids come on top of the scale's vocabulary, which is the tokenizer's."""
        small = super().scaled(sizes)
        return replace(small, vocab_size=sizes["vocab_size"] + self.added) if "vocab_size" in sizes else small

    def trunk(self, context_width: int) -> TrunkConfig:
        """The layers' configuration, which read a context of ``context_width``."""
        return TrunkConfig(
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            ffn=self.ffn,
            eps=self.eps,
            placement="post",
            final_norm=False,
            dropout=self.dropout,
            attention_dropout=self.dropout,
            blocks=("scf",) * self.depth,
            context_width=context_width,
            init_std=start_std(self.width),
        )

    def build(self, context_width: int | None = None) -> BertDecoder:
        """Build the decoder; ``context_width`` is the width of what it cross-attends, its own by default."""
        return BertDecoder(self, context_width or self.width)


class BertDecoder(Decoder):
    """``embed_tokens`` (a ``TokenEmbedding``), ``trunk`` and ``head``, whose matrix is the token table.

    ``forward`` reads a ``context`` [B, N, context_width]; without one (and none cached) cross-attention is skipped.
    """

    def __init__(self, config: BertDecoderConfig, context_width: int) -> None:
        super().__init__()
        self.config = config
        self.width = config.width
        self.vocab_size = config.vocab_size
        self.context_length = config.context_length
        self.context_width = context_width
        self.embed_tokens = TokenEmbedding(
            config.vocab_size,
            config.width,
            positions=config.context_length,
            types=config.types,
            norm="layer",
            eps=config.eps,
            dropout=config.dropout,
        )
        self.trunk = Trunk(config.trunk(context_width))
        self.head = MLMHead(config.width, config.vocab_size, eps=config.eps)

    def share_with(self, embed: TokenEmbedding, trunk: Trunk) -> None:
        """Use the embeddings, cross-attention and FFN (with their norms) of a text encoder: everything but
        self-attention and its norm (BLIP, arXiv 2201.12086, section 3.1).

        Raises:
            ConfigError: The encoder has other sizes, or layers without cross-attention.
        """
        own, other = self.embed_tokens, embed
        for table, of in ((own.tokens, other.tokens), (own.positions, other.positions)):
            if table is None or of is None or table.weight.shape != of.weight.shape:
                sizes = [None if t is None else tuple(t.weight.shape) for t in (table, of)]
                raise ConfigError(
                    f"the decoder's embedding table is {sizes[0]} and the text encoder's {sizes[1]}: parts that share"
                    " need equal vocab_size, context_length and width"
                )
        a, b = self.trunk.config, trunk.config
        if (a.width, a.ffn, a.heads, a.context_width) != (b.width, b.ffn, b.heads, b.context_width):
            raise ConfigError(
                f"a decoder of width {a.width}, ffn {a.ffn}, {a.heads} heads cannot share with a text encoder of width"
                f" {b.width}, ffn {b.ffn}, {b.heads} heads: set them equal"
            )
        share_(self.trunk, trunk)
        self.embed_tokens = embed

    def embed(self, ids: Tensor) -> Tensor:
        """Rows of the token table [B, T, width]; positions and the norm behind them are added by ``forward``, which
        knows the places."""
        embeds: Tensor = self.embed_tokens.tokens(ids)
        return embeds

    def forward(
        self, batch: TokenBatch, cache: Any = None, *, context: Tensor | None = None, context_mask: Tensor | None = None
    ) -> Tensor:
        """Hidden states [B, T, width] of the last layer.

        Args:
            batch: Embeddings of ``embed`` and their layout, whose positions count from 0.
            context: [B, N, context_width] what cross-attention reads; a cache keeps its keys and values.
            context_mask: [B, N] bool, True = real.
        """
        rows = batch.embeds.shape[1]
        table = self.embed_tokens.positions
        assert table is not None
        if batch.layout.length > table.num_embeddings:
            raise ConfigError(
                f"{batch.layout.length} tokens for a decoder of {table.num_embeddings} positions: shorten the text or"
                " raise decoder.context_length"
            )
        position = batch.layout.position[..., batch.layout.length - rows :]  # [B | 1, T]
        x = batch.embeds + table(position)
        if self.embed_tokens.types is not None:
            x = x + self.embed_tokens.types.weight[0]
        x = self.embed_tokens.finish(x)
        hidden = self.trunk(x, batch.layout, context=context, context_mask=context_mask, cache=cache)
        assert isinstance(hidden, Tensor)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.head(hidden, self.embed_tokens.tokens.weight)
        return logits

    def new_cache(self) -> KVCache:
        return KVCache()

    def select_cache(self, cache: Any, index: Tensor) -> Any:
        """The cache of the batch rows ``index`` [N]; repeats allowed. ``cache`` must not be used afterwards."""
        cache.reorder(index)
        return cache

    @property
    def start_id(self) -> int:
        """[DEC], the id in slot 0 of what the decoder reads; without added ids the wiring takes the tokenizer's BOS."""
        return self.vocab_size - 2 if self.config.added >= 2 else -1

    def extra_repr(self) -> str:
        return f"context_width={self.context_width}"
