"""A causal text transformer whose class token stands behind the text (CoCa, arXiv 2205.01917, section 3.2).

Its last states, without a norm, are what a multimodal decoder goes on from; the class token alone becomes the text's
vector. Nobody reads the class token, so that captions can be written without it, a token at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.encoders.base import Encoder, TextEncoderConfig
from zoo.errors import ConfigError
from zoo.layout import Layout, Segment, lay_out
from zoo.nn import KVCache, TokenEmbedding, Trunk, TrunkConfig, init_clip_
from zoo.nn.config import Act
from zoo.part import Features

CLS_MASKS = ("corrected", "legacy")


@dataclass(frozen=True, kw_only=True)
class CausalTextConfig(TextEncoderConfig):
    """CoCa's unimodal text half; defaults: that of open_clip's coca_ViT-B-32.

    Attributes:
        context_length: Longest text, tokens; the class token comes on top.
        width: Width of the tokens.
        depth: Blocks.
        heads: Attention heads.
        ffn: Hidden width of the MLP.
        act: Activation of the MLP.
        eps: Of every norm.
        pad_id: Id of a pad where no mask is given.
        cls_mask: What the class token reads. ``corrected``: the text and itself. ``legacy``: open_clip's padding mask,
            which is one position late: the first pad too, and itself only where no pad stands before it. Released
            weights were trained with it.
    """

    context_length: int = 76
    width: int = 512
    depth: int = 12
    heads: int = 8
    ffn: int = 2048
    act: Act = "gelu"
    eps: float = 1e-5
    pad_id: int = 0
    cls_mask: str = "corrected"

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width = {self.width} must be a multiple of heads = {self.heads}")
        if self.cls_mask not in CLS_MASKS:
            raise ValueError(f"cls_mask = {self.cls_mask!r} must be one of {', '.join(CLS_MASKS)}")

    def trunk(self) -> TrunkConfig:
        """The blocks' configuration."""
        return TrunkConfig(
            width=self.width, depth=self.depth, heads=self.heads, ffn=self.ffn, act=self.act, eps=self.eps
        )

    def build(self) -> CausalText:
        return CausalText(self)


class CausalText(Encoder):
    """``embed_tokens`` (its last position is that of the class token), ``cls`` and ``trunk``, whose final norm is for
    the class token only."""

    def __init__(self, config: CausalTextConfig) -> None:
        super().__init__()
        self.config = config
        self.width = self.pooled_width = config.width
        self.tokens = self.context_length = config.context_length
        self.embed_tokens = TokenEmbedding(config.vocab_size, config.width, positions=config.context_length + 1)
        self.cls = nn.Parameter(torch.empty(config.width))
        for table in (self._positions.weight, self.cls):
            nn.init.normal_(table, std=0.01)
        self.trunk = Trunk(config.trunk())
        init_clip_(self.trunk)

    @property
    def _positions(self) -> nn.Embedding:
        return cast(nn.Embedding, self.embed_tokens.positions)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Features:
        """Encode token ids [B, T], T up to ``context_length``; pads must stand behind the text.

        The class token always has the last position of the table, however many pads there are.

        Args:
            mask: [B, T], True = real; without one, all up to the last id that is no ``pad_id``.

        Returns:
            ``tokens`` [B, T, width], the states after the last block without a norm, their ``mask``, and ``pooled``
            [B, width], the class token after the final norm. On the CPU T shrinks to the longest text.

        Raises:
            ConfigError: The text is too long.
        """
        self._check_length(x.shape[1])
        real = x != self.config.pad_id if mask is None else mask.bool()
        place = torch.arange(1, x.shape[1] + 1, device=x.device)
        count = (real * place).amax(1)  # [B] tokens of each text
        if x.device.type == "cpu":  # where looking is free; columns of pads only cost time
            longest = max(int(count.max()), 1)
            x, real = x[:, :longest], real[:, :longest]
        length = x.shape[1]
        read = self._read_legacy if self.config.cls_mask == "legacy" else self._read_corrected
        hidden, cls = read(x, real, count)
        pooled = cast(nn.Module, self.trunk.final_norm)(cls)
        return Features(hidden[:, :length], None if mask is None else real, pooled)

    def _read_corrected(self, ids: Tensor, real: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """States [B, T + 1, D] and the class token's [B, D].

        The class token stands directly behind each text, so that plain causal attention, which needs no mask, is all:
        what comes after it are pads, which nobody reads.
        """
        place = torch.arange(ids.shape[1] + 1, device=ids.device)
        end = place == count[:, None]  # [B, T + 1]
        embeds = self.embed(F.pad(ids, (0, 1)))
        embeds = torch.where(end[..., None], self.cls.to(embeds), embeds)
        embeds = embeds + self._positions(torch.where(end, self.context_length, place))
        layout = lay_out([Segment("text", ids.shape[1] + 1)], device=ids.device)
        hidden = cast(Tensor, self.trunk(embeds, layout, final_norm=False))
        return hidden, hidden[torch.arange(len(ids), device=ids.device), count]

    def _read_legacy(self, ids: Tensor, real: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """As ``_read_corrected`` with open_clip's padding mask (transformer.py, ``_build_additive_mask``)."""
        if ids.shape[1] < self.context_length:  # the first pad is read
            ids, real = F.pad(ids, (0, 1), value=self.config.pad_id), F.pad(real, (0, 1))
        batch, length = ids.shape
        place = torch.arange(length, device=ids.device)
        cls = (self.cls + self._positions.weight[-1]).expand(batch, 1, -1)
        embeds = torch.cat([self.embed(ids) + self._positions(place), cls], 1)  # [B, T + 1, D]
        seen = torch.cat([real.new_ones(batch, 1), real], 1)  # one position late
        segments = [Segment("text", length), Segment("cls", 1)]
        layout = lay_out(segments, batch, device=ids.device).hide(~seen)
        hidden = cast(Tensor, self.trunk(embeds, layout, final_norm=False))
        return hidden, hidden[:, -1]

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] -> rows of the token table [B, T, width], without positions."""
        embeds: Tensor = self.embed_tokens.tokens(ids)
        return embeds

    def states(self, embeds: Tensor, layout: Layout, cache: KVCache | None = None) -> Tensor:
        """States [B, T, width] of a text without a class token, as writing and scoring need them.

        Args:
            embeds: [B, T, width] of ``embed``; with a cache the new rows only.
            layout: Describes every token, cached ones included; positions are read from it.

        Raises:
            ConfigError: The text is too long.
        """
        self._check_length(layout.length)
        position = layout.position[..., layout.length - embeds.shape[1] :]  # [B | 1, T]
        states: Any = self.trunk(embeds + self._positions(position), layout, cache=cache, final_norm=False)
        return cast(Tensor, states)

    def _check_length(self, length: int) -> None:
        if length > self.context_length:
            raise ConfigError(f"a text has {length} tokens, the text encoder reads {self.context_length}: truncate it")
