"""What meets in a Q-Former's queries: stage 1 of BLIP-2 (arXiv 2301.12597, section 3.1), for every wiring that has it.

The same rows compare images with texts, judge whether they match, and write: ``ReadsQueries`` says how, ``QueryHeads``
holds what stands on the Q-Former for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.connectors.base import ConnectorConfig
from zoo.connectors.qformer import RULES, QFormer, QFormerConfig
from zoo.decoders.base import Decoder
from zoo.encoders.base import Encoder
from zoo.errors import ConfigError
from zoo.layout import Layout, TokenBatch
from zoo.models.grounded import shifted
from zoo.models.lazy import LazyOutputs
from zoo.models.writing import WritesText, _chunks, _same_length
from zoo.nn import KVCache, MLMHead, start_std
from zoo.part import Features, seeded

if TYPE_CHECKING:
    from zoo.capabilities import ImageLike

TYPICAL_TEXT = 16
"""Tokens of a caption with its start and end, as layouts and FLOP counts assume."""

COLDEST = 0.001
"""Least temperature (ALBEF's bound)."""


@dataclass(frozen=True, kw_only=True)
class QueryFields:
    """Fields of the wirings with stage 1.

    Attributes:
        embed_width: Width of the shared space.
        temperature: Initial softmax temperature, which similarities are divided by; learned.
        text_length: Longest text in tokens, [CLS] and [SEP] included.
    """

    embed_width: int = 256
    temperature: float = 0.07
    text_length: int = 32

    def __post_init__(self) -> None:
        if self.embed_width < 1 or self.temperature <= 0:
            raise ValueError("embed_width must be 1 or more, and temperature above 0")
        if self.text_length < 3:
            raise ValueError(f"text_length = {self.text_length} must be 3 or more")


class QueryHeads(nn.Module):
    """``image_projection``, ``text_projection``, ``matching``, ``temperature`` and ``words`` (BERT's head, whose matrix
    is the text branch's token table)."""

    def __init__(self, config: QueryFields, width: int, vocab: int, eps: float) -> None:
        super().__init__()
        self.image_projection = nn.Linear(width, config.embed_width)
        self.text_projection = nn.Linear(width, config.embed_width)
        self.matching = nn.Linear(width, 2)
        self.temperature = nn.Parameter(torch.tensor(config.temperature))
        self.words = MLMHead(width, vocab, eps=eps, std=start_std(width))


def query_heads(config: QueryFields, connector_config: ConnectorConfig, seed: int) -> QueryHeads:
    """The heads of a Q-Former with a text branch, from their own stream of ``seed``.

    Raises:
        ConfigError: Another connector, or no text branch.
    """
    if not isinstance(connector_config, QFormerConfig) or not connector_config.text:
        raise ConfigError(
            "this wiring compares texts with a Q-Former's queries: choose connector=qformer with connector.text=true"
        )
    if not connector_config.added:
        raise ConfigError("a text is written from [DEC], the last row of the text branch: set connector.added=1")
    with seeded(seed, "heads"):
        return QueryHeads(config, connector_config.width, connector_config.vocab_size, connector_config.eps)


class QueryWriter(Decoder):
    """The Q-Former as a language model: rows of [queries; text] in, hidden states out.

    It holds the model's own parts and is no part itself. The queries are rows of the prompt, with position -1, and read
    the ``context``; text rows count from 0.
    """

    def __init__(self, connector: QFormer, heads: QueryHeads, context_width: int) -> None:
        super().__init__()
        self.connector, self.heads = connector, heads
        self.width, self.vocab_size = connector.config.width, connector.config.vocab_size
        self.context_width = context_width
        self.context_length = connector.tokens + connector.config.context_length
        self.start_id = self.vocab_size - 1  # [DEC]

    @property
    def _table(self) -> Any:
        assert self.connector.text is not None
        return self.connector.text

    def embed(self, ids: Tensor) -> Tensor:
        """Rows of the token table [B, T, width]; ``forward``, which knows the places, adds positions."""
        embeds: Tensor = self._table.tokens(ids)
        return embeds

    def forward(
        self, batch: TokenBatch, cache: Any = None, *, context: Tensor | None = None, context_mask: Tensor | None = None
    ) -> Tensor:
        """Hidden states [B, T, width]; ``context`` [B, N, C] are the image's tokens, which only queries read."""
        rows = batch.embeds.shape[1]
        position = batch.layout.position[..., batch.layout.length - rows :]  # [B | 1, T]
        placed = self._table.positions(position.clamp(min=0)) * (position >= 0)[..., None]
        image = None if context is None else Features(context, context_mask)
        return self.connector.read(batch.embeds + placed, batch.layout, image, cache=cache)

    def logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.heads.words(hidden, self._table.tokens.weight)
        return logits

    def new_cache(self) -> KVCache:
        return KVCache()

    def select_cache(self, cache: Any, index: Tensor) -> Any:
        """The cache of the batch rows ``index`` [N]; repeats allowed. ``cache`` must not be used afterwards."""
        cache.reorder(index)
        return cache


class ReadsQueries(WritesText):
    """What a model with an ``encoder``, a Q-Former ``connector`` with its text branch, and ``heads`` can do with them.

    Capabilities: ``embed_images``, ``embed_texts``, ``match``, ``match_pairs``.

    Attributes:
        shares_images: ``fuse`` takes ``rows``.
        rerank_similarity: Candidates are ordered again by matching logit plus cosine (section 6 of LAVIS' evaluation).
    """

    connector: QFormer
    heads: QueryHeads
    shares_images: ClassVar[bool] = True
    rerank_similarity: ClassVar[bool] = True
    query_outputs: ClassVar[frozenset[str]] = frozenset(
        {
            *("image_tokens", "text_ids", "text_mask", "query_states", "image_embeds", "text_embeds", "logit_scale"),
            *("writer_hidden", "writer_targets"),
        }
    )

    if TYPE_CHECKING:
        encoder: Encoder

        def encode_images(self, pixel_values: Tensor | None, image_tokens: Tensor | None = None) -> Features: ...
        def caption_ids(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
            """Ids and mask [N, T] of texts in the connector's vocabulary, [CLS] to [SEP], on the device."""

    # -- tensors ---------------------------------------------------------------------------------------------------

    def query_makers(
        self, pixels: Tensor | None, ids: Tensor, mask: Tensor | None, image_tokens: Tensor | None = None
    ) -> dict[str, Callable[[LazyOutputs], Tensor]]:
        """How ``query_outputs`` are made of ``pixels`` [B, 3, S, S] and ``ids`` [B, T], each when it is asked for.

        ``image_tokens`` [B, N, C] are those of the encoder, which is not asked where they are given; ``query_states``
        [B, Q, D] the queries after the image alone; ``image_embeds`` [B, Q, E] and ``text_embeds`` [B, E] of unit
        length; ``logit_scale`` ln(1 / temperature); ``writer_hidden`` [B, T, D] and ``writer_targets`` [B, T] of the
        text being written. The text goes on from the keys and values of ``query_states``: the queries are what they
        are without it.
        """
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        caches: list[KVCache] = []

        def queries(out: LazyOutputs) -> Tensor:
            caches.append(KVCache())
            return self.connector.hidden(Features(out["image_tokens"]), cache=caches[0])

        def written(out: LazyOutputs) -> Tensor:
            _ = out["query_states"]
            embeds = self.writer.embed(self.started(ids))
            layout = self.written_layout(real)
            hidden: Tensor = self.writer(TokenBatch(embeds, layout), caches[0])
            return hidden

        return {
            "image_tokens": lambda out: self.encode_images(pixels, image_tokens).tokens,
            "text_ids": lambda out: ids,
            "text_mask": lambda out: real,
            "query_states": queries,
            "image_embeds": lambda out: F.normalize(self.heads.image_projection(out["query_states"]), dim=-1),
            "text_embeds": lambda out: F.normalize(self.heads.text_projection(self.read_text(ids, mask)), dim=-1),
            "logit_scale": lambda out: self.logit_scale,
            "writer_hidden": written,
            "writer_targets": lambda out: shifted(ids, real),
        }

    @property
    def logit_scale(self) -> Tensor:
        """ln(1 / temperature), with its gradient. The release bounds the temperature nowhere; below ``COLDEST``, far
        from anything it learns, a logarithm would end the run."""
        return -self.heads.temperature.clamp(min=COLDEST).log()

    @property
    def writer(self) -> QueryWriter:
        """The Q-Former as a language model."""
        return QueryWriter(self.connector, self.heads, self.encoder.width)

    @property
    def writer_typical_targets(self) -> int:
        return self._typical_text - 1

    @property
    def _typical_text(self) -> int:
        config: Any = self.config
        return int(min(TYPICAL_TEXT, config.text_length, self.connector.config.context_length))

    def read_text(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """The state [B, D] of the first token of texts [B, T] read alone, each token reading every other."""
        text = self.connector.embed_text(ids, None if mask is None else mask.bool())
        return self.connector.hidden(None, text, queries=False)[:, 0]

    def fuse(
        self, image: Features, input_ids: Tensor, attention_mask: Tensor | None = None, *, rows: Tensor | None = None
    ) -> Features:
        """Let queries and text read each other, and the queries the image: ``tokens`` [B, Q, D], the queries' rows.

        Args:
            image: ``tokens`` [B, N, C] of the encoder.
            rows: [B] int64, the image that each text is about, its own by default.
        """
        text = self.connector.embed_text(input_ids, None if attention_mask is None else attention_mask.bool())
        hidden = self.connector.hidden(image, text, rows=rows)
        return Features(hidden[:, : self.connector.tokens])

    def matching_logits(self, fused: Features) -> Tensor:
        """Logits [B, 2] of (no match, match), the mean of the queries' own."""
        logits: Tensor = self.heads.matching(fused.tokens)  # [B, Q, 2]
        return logits.mean(1)

    def match_logits(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits [B, 2] of (no match, match) of image b and text b."""
        return self.matching_logits(self.fuse(self.encode_images(pixel_values), input_ids, attention_mask))

    def started(self, ids: Tensor) -> Tensor:
        """Text ids [B, T] with [DEC] in the first place."""
        return torch.cat([torch.full_like(ids[:, :1], self.connector.config.vocab_size - 1), ids[:, 1:]], 1)

    def written_layout(self, real: Tensor) -> Layout:
        """The layout of [queries; text] in which texts with the mask ``real`` [B, T] are written."""
        text = Features(real.new_empty(*real.shape, 0), mask=real)
        return self.connector.layout(text, batch=len(real), device=real.device, rule="generation")

    def query_layouts(self) -> dict[str, Layout]:
        """The three tasks' layouts with a caption of typical length."""
        text = Features(torch.empty(1, self._typical_text, 0))
        return {rule: self.connector.layout(text, rule=rule) for rule in RULES}

    # -- capabilities ----------------------------------------------------------------------------------------------

    def embed_images(self, images: Sequence[ImageLike]) -> Tensor:
        """Embed images: [N, Q, embed_width] float32, one row of unit length a query; the nearest to a text counts."""

        def embedded(part: slice) -> Tensor:
            states = self.connector.hidden(self.encode_images(self._pixels(images[part])))
            return F.normalize(self.heads.image_projection(states).float(), dim=-1)

        empty = (self.connector.tokens, self.heads.image_projection.out_features)
        return self._in_parts(images, embedded, empty)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embed texts: [N, embed_width] float32 of unit length, on the model's device."""

        def embedded(part: slice) -> Tensor:
            states = self.read_text(*self.caption_ids(texts[part]))
            return F.normalize(self.heads.text_projection(states).float(), dim=-1)

        return self._in_parts(texts, embedded, (self.heads.text_projection.out_features,))

    def match(self, images: Sequence[ImageLike], texts: Sequence[str]) -> Tensor:
        """The logit of "match" of image n and text n, as the head gives it: [N] float32."""
        _same_length(images, texts, "texts")
        return self._in_parts(
            images,
            lambda part: self.match_logits(self._pixels(images[part]), *self.caption_ids(texts[part]))[:, 1].float(),
        )

    def match_pairs(self, images: Sequence[ImageLike], texts: Sequence[str], pairs: Tensor) -> Tensor:
        """The logit of "match" of many pairs [P, 2] of (image, text) rows: [P] float32, equal to ``match`` of each.

        Every image is encoded once.
        """
        seen = self._in_parts(images, lambda part: self.encode_images(self._pixels(images[part])).tokens)

        def judged(part: slice) -> Tensor:
            used, rows = torch.unique(pairs[part, 0].to(self.device), return_inverse=True)
            ids, mask = self.caption_ids([texts[i] for i in pairs[part, 1].tolist()])
            return self.matching_logits(self.fuse(Features(seen[used]), ids, mask, rows=rows))[:, 1].float()

        return self._in_parts(pairs, judged)

    def _in_parts(self, items: Any, run: Callable[[slice], Tensor], empty: tuple[int, ...] = ()) -> Tensor:
        """Run over the items in chunks, in eval mode; the training mode of every module is restored."""
        if isinstance(items, str):
            raise ConfigError("expected a list of items, got one string: wrap it in a list")
        with self._evaluating():
            rows = [run(part) for part in _chunks(len(items))]
        return torch.cat(rows) if rows else torch.empty(0, *empty, device=self.device)
