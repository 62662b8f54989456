"""Self- and cross-attention on scaled_dot_product_attention or FlexAttention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.nn import flex
from zoo.nn.cache import KVCache, Pair
from zoo.nn.config import TrunkConfig
from zoo.nn.experts import Route, expert_or_one, run
from zoo.nn.norm import HeadNorm, Linear, make_norm
from zoo.nn.positions import Rotary, rotate

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Mask = Union[Tensor, "BlockMask", None]


@dataclass(eq=False)
class Reading:
    """What every layer of one forward pass shares: who reads what.

    Attributes:
        mask: additive ``[B | 1, 1 | heads, T, K]`` of 0 and -inf, a FlexAttention block mask, or None.
        causal: k <= q without a mask.
        turn: rotary cos and sin, or None.
        relative_index: rows of the relative position table, or None.
        context: ``[B, N, C]`` what cross-attention reads, or None.
        context_rows: ``[B]`` int64, the context that each row of the batch reads where rows share some; None = its own.
        context_mask: additive, like ``mask``, for cross-attention.
        cross_rows: which rows cross-attend: True all, False none, static spans of them, or ``[B, T]`` bool.
        cache: keys and values of earlier rows, or None.
    """

    mask: Mask = None
    causal: bool = False
    turn: Rotary | None = None
    relative_index: Tensor | None = None
    context: Tensor | None = None
    context_rows: Tensor | None = None
    context_mask: Tensor | None = None
    cross_rows: bool | tuple[tuple[int, int], ...] | Tensor = True
    cache: KVCache | None = None


class Attention(nn.Module):
    """Queries, keys, values, output; everything optional comes from the config.

    Args:
        config: of the trunk.
        layer: its number, under which the cache knows it.
        experts: experts of this layer (0 = not routed).
        cross: reads a context instead of its own rows: no rotary, no QK-norm, no experts, no learned key.
    """

    def __init__(self, config: TrunkConfig, layer: int, experts: int = 0, cross: bool = False) -> None:
        super().__init__()
        c, source = config, (config.context_width or config.width) if cross else config.width
        self.layer, self.heads, self.kv_heads, self.head = layer, c.heads, c.keys, c.head
        self.dropout = c.attention_dropout
        routed = experts if "qkv" in c.routed and not cross else 0
        routed_out = experts if "out" in c.routed and not cross else 0

        def matrix(inputs: int, outputs: int, bias: bool, count: int) -> nn.Module:
            return expert_or_one(lambda: Linear(inputs, outputs, bias, std=c.init_std), count)

        def head_norm(heads: int) -> nn.Module:
            eps = c.eps if c.qk_eps is None else c.qk_eps
            if c.qk_norm_per_head:
                return expert_or_one(
                    lambda: HeadNorm("rms" if c.qk_norm == "rms" else "layer", heads, c.head, eps), routed
                )
            return expert_or_one(lambda: make_norm("rms" if c.qk_norm == "rms" else "layer", c.head, eps), routed)

        inner, shared = c.heads * c.head, c.keys * c.head
        self.q = matrix(c.width, inner, "q" in c.bias, routed)
        self.k = matrix(source, shared, "k" in c.bias, routed)
        self.v = matrix(source, shared, "v" in c.bias, routed)
        self.out = matrix(inner, c.width, c.out_bias, routed_out)
        plain = cross or c.qk_norm == "none"
        self.q_norm = None if plain else head_norm(c.heads)
        self.k_norm = None if plain else head_norm(c.keys)
        self.sub_norm = expert_or_one(lambda: make_norm(c.norm, inner, c.eps), routed_out) if c.sub_norm else None
        self.context_norm = make_norm(c.norm, source, c.eps) if cross and c.context_norm else None
        self.bias_k = self.bias_v = None
        if c.bias_kv and not cross:
            self.bias_k, self.bias_v = (nn.Parameter(torch.empty(self.kv_heads, self.head)) for _ in range(2))
            for parameter in (self.bias_k, self.bias_v):
                nn.init.trunc_normal_(parameter, std=c.init_std, a=-2 * c.init_std, b=2 * c.init_std)

    def forward(self, x: Tensor, reading: Reading, route: Route, bias: Tensor | None = None) -> Tensor:
        """Let the rows ``x`` ``[B, T, D]`` read themselves and the cache.

        Args:
            x: the rows.
            reading: mask, rotary, cache.
            route: experts of the rows.
            bias: relative position bias ``[1 | B, heads, T, K]``.
        """
        q = self._heads(run(self.q, x, route), self.heads)  # [B, T, heads, head]
        k = self._heads(run(self.k, x, route), self.kv_heads)
        v = self._heads(run(self.v, x, route), self.kv_heads)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = run(self.q_norm, q, route), run(self.k_norm, k, route)
        if reading.turn is not None:
            q, k = rotate(q, reading.turn), rotate(k, reading.turn)
        if reading.cache is not None:
            k, v = reading.cache.append(self.layer, k, v)
        mask = reading.mask
        if self.bias_k is not None and self.bias_v is not None:
            extra = (x.shape[0], 1, -1, -1)
            k = torch.cat([k, self.bias_k.to(k).expand(extra)], 1)
            v = torch.cat([v, self.bias_v.to(v).expand(extra)], 1)
            if isinstance(mask, Tensor):
                mask = F.pad(mask, (0, 1))
            bias = None if bias is None else F.pad(bias, (0, 1))
        if bias is not None:
            mask = mask + bias if isinstance(mask, Tensor) else bias
        return self._read(q, k, v, mask, reading.causal, route)

    def read_context(self, x: Tensor, reading: Reading) -> Tensor:
        """Let the rows ``x`` ``[B, T, D]`` read the context ``[B, N, C]`` (or the cached one)."""
        q = self._heads(self.q(x), self.heads)
        k, v = self._context(reading)
        return self._read(q, k, v, reading.context_mask, False, 0)

    def _context(self, reading: Reading) -> Pair:
        if reading.cache is not None and self.layer in reading.cache.cross:
            return reading.cache.cross[self.layer]
        context = reading.context
        assert context is not None
        if self.context_norm is not None:
            context = self.context_norm(context)
        pair = self._heads(self.k(context), self.kv_heads), self._heads(self.v(context), self.kv_heads)
        if reading.context_rows is not None:  # keys and values of a context are computed once, whoever reads it
            pair = pair[0].index_select(0, reading.context_rows), pair[1].index_select(0, reading.context_rows)
        if reading.cache is not None:
            reading.cache.cross[self.layer] = pair
        return pair

    def _read(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, causal: bool, route: Route) -> Tensor:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, heads, T, head]
        grouped = self.heads != self.kv_heads
        if mask is None or isinstance(mask, Tensor):
            p = self.dropout if self.training else 0.0
            out = F.scaled_dot_product_attention(q, k, v, mask, p, causal, enable_gqa=grouped)
        else:
            out = flex.attend(q, k, v, mask, grouped)
        out = out.transpose(1, 2).flatten(2)  # [B, T, heads * head]
        if self.sub_norm is not None:
            out = run(self.sub_norm, out, route)
        return run(self.out, out, route)

    def _heads(self, x: Tensor, heads: int) -> Tensor:
        return x.view(*x.shape[:2], heads, self.head)
