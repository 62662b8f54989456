"""The multiway transformer of VLMo (Bao et al., arXiv 2111.02358) and BEiT-3 (Wang et al., arXiv 2208.10442): shared
self-attention over images and text, units of their own for each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import ConfigError, WeightsError
from zoo.layout import Layout, Segment, lay_out
from zoo.nn import KVCache, PatchEmbedding, TokenEmbedding, Trunk, TrunkConfig, start_std
from zoo.nn.config import ROUTABLE
from zoo.nn.positions import pair_relative_index
from zoo.part import SIZE_FIELDS
from zoo.trunks.base import Rows, SharedTrunk, SharedTrunkConfig
from zoo.trunks.resize import resize_relative

TEXT, IMAGE, TEXT_IN_PAIR, IMAGE_IN_PAIR = range(4)
"""Modality ids: what a token is, and whether the pair experts take it."""

Kind = Literal["image", "text"]


@dataclass(frozen=True, kw_only=True)
class MultiwayConfig(SharedTrunkConfig):
    """A multiway trunk with its embeddings; defaults: VLMo base.

    Attributes:
        patch_size: Side of a patch, pixels.
        width, depth, heads, ffn: Of the transformer; every expert has the same ``ffn``.
        pair_layers: The last layers that have a third expert for the tokens of a pair; below them, and with 0
            everywhere, these take the experts of their own kind.
        routed: Units with one expert a kind: attn_norm, qkv, out, ffn_norm, ffn, final_norm (VLMo: ffn and its norm).
        text_first: Text stands before the image in a pair (VLMo), or behind it (BEiT-3).
        relative: A relative position bias a layer and head (VLMo base and large), instead of learned positions.
        text_rows: Longest text the position tables are made for; at least ``context_length`` is.
        first: Rows of the learned tables before position 0 (BEiT-3: 2, which nobody reads).
        text_norm: A norm on embedded text, and BERT's own token type (VLMo).
        kinds: Add an embedding of the kind, text or image (VLMo).
        mask_token: Own a vector for hidden patches.
        bias: Which of q, k, v own a bias, as letters.
        sub_norm: A norm before the attention output and before the last matrix of an expert (BEiT-3).
        eps: Of every norm of the transformer.
        layer_scale: Initial scale of every branch of a trunk of 12 layers or more; a shallower one starts at
            layer_scale^((depth - 4) / 8), 1 at 4 layers, or its branches would add nothing to train from. None = no
            scales.
        init_std: Of the matrices at the start; 0 = the published 0.02 for published widths (``zoo.nn.start_std``).
        dropout: On embedded text.
        drop_path: Of the last layer, rising from 0.
    """

    scale_settles: ClassVar[frozenset[str]] = frozenset({"pair_layers"})

    patch_size: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    ffn: int = 3072
    tokenizer: str = "hf:google-bert/bert-base-uncased"
    vocab_size: int = 30522
    context_length: int = 40
    pair_layers: int = 2
    routed: list[str] = field(default_factory=lambda: ["ffn_norm", "ffn"])
    text_first: bool = True
    relative: bool = True
    text_rows: int = 196
    first: int = 0
    text_norm: bool = True
    kinds: bool = True
    mask_token: bool = False
    bias: str = "qv"
    sub_norm: bool = False
    eps: float = 1e-6
    layer_scale: float | None = 0.1
    init_std: float = 0.0
    dropout: float = 0.1
    drop_path: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size = {self.image_size} is no multiple of patch_size = {self.patch_size}")
        if self.width % self.heads:
            raise ValueError(f"width = {self.width} is not divisible by heads = {self.heads}")
        if not 0 <= self.pair_layers <= self.depth:
            raise ValueError(f"pair_layers = {self.pair_layers} must lie in 0..depth = {self.depth}")
        unknown = sorted(set(self.routed) - set(ROUTABLE))
        if unknown or not self.routed:
            raise ValueError(f"routed = {self.routed} must name some of {', '.join(ROUTABLE)}")

    def scaled(self, sizes: Mapping[str, Any]) -> Self:
        """A scale that is shallower than the pair experts' layers has them in all of its layers."""
        own = {f.name for f in fields(self)} & SIZE_FIELDS & set(sizes)
        changed = {name: sizes[name] for name in sorted(own)}
        return replace(self, **changed, pair_layers=min(self.pair_layers, changed.get("depth", self.depth)))

    @property
    def pair_start(self) -> int:
        """The first layer with a pair expert."""
        return self.depth - self.pair_layers

    @property
    def rows(self) -> int:
        """Longest text the position tables are made for."""
        return max(self.text_rows, self.context_length)

    def trunk(self) -> TrunkConfig:
        """The transformer's configuration."""
        side = self.image_size // self.patch_size
        deep = min(1.0, max(0.0, (self.depth - 4) / 8))
        tables = ((0, 1, 0, 1),) * self.pair_start + ((0, 1, 2, 2),) * self.pair_layers
        return TrunkConfig(
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            ffn=self.ffn,
            eps=self.eps,
            bias=self.bias,
            sub_norm=self.sub_norm,
            rel_rows=(2 * side - 1) ** 2 + 3 + 2 + 2 * self.rows if self.relative else 0,
            layer_scale=None if self.layer_scale is None else self.layer_scale**deep,
            init_std=self.init_std or start_std(self.width),
            drop_path=self.drop_path,
            routed=tuple(self.routed),
            routes=tables if self.pair_layers else (0, 1, 0, 1),
        )

    def build(self) -> Multiway:
        return Multiway(self)


class Multiway(SharedTrunk):
    """``stem`` (a ``PatchEmbedding``), ``text`` (a ``TokenEmbedding``), ``kinds`` and ``trunk``.

    The same weights read an image alone, a text alone, or both: attention and whatever is not ``routed`` are one tensor
    in all modes, and every token of a kind goes through the experts of its kind.
    """

    index: Tensor | None

    def __init__(self, config: MultiwayConfig) -> None:
        super().__init__()
        self.config = c = config
        self.width, self.vocab_size = c.width, c.vocab_size
        self.stem = PatchEmbedding(
            c.width,
            c.image_size,
            c.patch_size,
            positions=not c.relative,
            first=0 if c.relative else c.first,
            mask_token=c.mask_token,
        )
        self.text = TokenEmbedding(
            c.vocab_size,
            c.width,
            positions=0 if c.relative else c.first + c.rows,
            first=c.first,
            types=2 if c.text_norm else 0,
            norm="layer" if c.text_norm else None,
            dropout=c.dropout,
        )
        self.kinds = nn.Embedding(2, c.width) if c.kinds else None
        if self.kinds is not None:
            nn.init.trunc_normal_(self.kinds.weight, std=0.02, a=-0.04, b=0.04)
        self.trunk = Trunk(c.trunk())
        self.grid = self.stem.grid
        self.tokens = self.grid[0] * self.grid[1] + 1
        with torch.device("cpu"):  # the table is made from values, which "meta" does not have
            index = pair_relative_index(self.grid, c.context_length, c.rows) if c.relative else None
        self.register_buffer("index", None if index is None else index.to(self.stem.patch.weight.device), False)

    def fit_stored(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The relative positions of an image of another size, resampled as BEiT does; ``stem`` fits its own.

        Args:
            stored: Tensors of a checkpoint whose shapes differ from this trunk's.

        Raises:
            WeightsError: Anything else that differs, which means a trunk of another size.
        """
        out: dict[str, Tensor] = {}
        own = dict(self.named_parameters())
        for name, tensor in stored.items():
            if name == "trunk.rel_bias" and tensor.shape[1:] == own[name].shape[1:]:
                side = math.isqrt(max(0, len(tensor) - 5 - 2 * self.config.rows))
                if side % 2 and side**2 + 5 + 2 * self.config.rows == len(tensor):
                    out[name] = resize_relative(tensor, (side + 1) // 2, self.grid[0])
                    continue
            if name != "stem.positions" or tensor.shape[2] != self.width:
                raise WeightsError(
                    f"trunk.{name} is {tuple(tensor.shape)} in the checkpoint and {tuple(own[name].shape)} in the"
                    " model: only image_size may differ from the checkpoint"
                )
        return out

    # -- embeddings ------------------------------------------------------------------------------------------------

    def embed_image(self, pixel_values: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Embed pixel values [B, 3, S, S] of the configured size to [B, 1 + h*w, D], class token first.

        Args:
            hidden: [B, h*w] bool, the patches whose place the mask token takes.

        Raises:
            ConfigError: Another size, for which there are no positions.
        """
        size = self.config.image_size
        if tuple(pixel_values.shape[-2:]) != (size, size):
            height, width = pixel_values.shape[-2:]
            raise ConfigError(
                f"an image of {height}x{width} pixels, expected {size}x{size}: load the weights with"
                f" trunk={{'image_size': {width}}} to have their positions interpolated"
            )
        rows: Tensor = self.stem(pixel_values, hidden)
        return rows if self.kinds is None else rows + self.kinds.weight[IMAGE]

    def embed_text(self, input_ids: Tensor) -> Tensor:
        """Embed token ids [B, T] to [B, T, D].

        Raises:
            ConfigError: More tokens than ``context_length``.
        """
        if input_ids.shape[1] > self.config.context_length:
            raise ConfigError(
                f"a text of {input_ids.shape[1]} tokens, the trunk reads {self.config.context_length}: shorten it or"
                " raise trunk.context_length"
            )
        rows: Tensor = self.text(input_ids)
        return rows if self.kinds is None else rows + self.kinds.weight[TEXT]

    # -- reading ---------------------------------------------------------------------------------------------------

    def layout(
        self,
        image: int = 0,
        text: int = 0,
        real: Tensor | None = None,
        *,
        pair: bool | None = None,
        causal: bool = False,
    ) -> Layout:
        """The layout of ``image`` and ``text`` tokens, either of which may be 0.

        Args:
            real: [B, text] bool, False for pads of the text.
            pair: Whether the pair experts take the tokens; by default where both are there.
            causal: Text reads the image and earlier text, and the image reads no text (BEiT-3's captioning).
        """
        both = bool(image and text)
        pair = both if pair is None else pair
        seen = Segment("image", image, IMAGE_IN_PAIR if pair else IMAGE, "full")
        read = Segment("text", text, TEXT_IN_PAIR if pair else TEXT, "causal" if causal else "full", predicted=causal)
        segments = [s for s in ((read, seen) if self.config.text_first else (seen, read)) if s.length]
        relation: dict[tuple[str, str], Literal["never", "past", "all"]] = {}
        if both:
            relation = {("text", "image"): "all", ("image", "text"): "never" if causal else "all"}
        if real is not None and image:
            real = F.pad(real.bool(), (0, image) if self.config.text_first else (image, 0), value=True)
        return lay_out(segments, real=real, relation=relation)

    def forward(
        self,
        image: Tensor | None = None,
        text: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        pair: bool | None = None,
        causal: bool = False,
        layers: slice | None = None,
        taps: bool = False,
        final_norm: bool = True,
        cache: KVCache | None = None,
        layout: Layout | None = None,
    ) -> Rows:
        """Read embedded rows: an image alone, a text alone, or both in one sequence.

        Args:
            image: [B, N, D] of ``embed_image`` (or what lower layers made of it).
            text: [B, T, D] of ``embed_text``.
            mask: [B, T], 1 = real text.
            pair: Send the tokens through the pair experts; by default where both are there.
            causal: As in ``layout``.
            layers: A range of layers, all by default.
            taps: Also return the rows after every layer.
            final_norm: Apply the last norm.
            cache: Keys and values of earlier rows; needs the ``layout`` of all keys.
            layout: Instead of what the other arguments say.
        """
        seen, read = (0 if rows is None else rows.shape[1] for rows in (image, text))
        there = [rows for rows in ((text, image) if self.config.text_first else (image, text)) if rows is not None]
        if not there:
            raise ConfigError("nothing to read: give embedded rows of an image, a text, or both")
        x = there[0] if len(there) == 1 else torch.cat(there, 1)  # [B, N + T, D]
        if layout is None:
            layout = self.layout(seen, read, mask, pair=pair, causal=causal)
        layout = layout.to(x.device)
        out = self.trunk(
            x,
            layout,
            relative_index=self.relative_index(seen, read),
            layers=layers,
            taps=taps,
            final_norm=final_norm,
            cache=cache,
        )
        hidden, tapped = cast("tuple[Tensor, tuple[Tensor, ...]]", out) if taps else (cast(Tensor, out), ())
        start = read if self.config.text_first else 0
        return Rows(
            image=hidden[:, start : start + seen] if seen else None,
            text=hidden[:, slice(read) if self.config.text_first else slice(seen, None)] if read else None,
            taps=tapped,
        )

    def relative_index(self, image: int, text: int) -> Tensor | None:
        """Rows of the relative table for every two tokens of ``image`` and ``text`` tokens: [N + T, N + T]."""
        if self.index is None:
            return None
        longest = self.config.context_length
        parts = [torch.arange(text), torch.arange(longest, longest + image)]  # places in the table's own order
        places = torch.cat(parts if self.config.text_first else parts[::-1]).to(self.index.device)
        return self.index[places[:, None], places]
