"""The trunk: one transformer for every system whose attention or routing is special."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.layout import Layout
from zoo.nn import flex
from zoo.nn.attention import Mask, Reading
from zoo.nn.block import Block
from zoo.nn.cache import KVCache
from zoo.nn.config import TrunkConfig
from zoo.nn.experts import expert_or_one, route_of, run
from zoo.nn.norm import make_norm
from zoo.nn.positions import frequencies, relative_bias, rotary

if TYPE_CHECKING:
    pass


class Trunk(nn.Module):
    """A stack of layers over embedded tokens; embeddings stand in front of it, heads behind.

    Parameters start from torch's global generator: matrices from a normal of ``init_std`` cut off at two of them,
    biases 0, norms the identity. Wrap the construction in a seeded ``fork_rng`` to make it reproducible; on the meta
    device nothing is drawn.

    Parameter names: ``layers.N.{attn_norm, attn.{q,k,v,out,q_norm,k_norm,sub_norm,bias_k,bias_v}, cross_norm,
    cross.{q,k,v,out,context_norm}, ffn_norm, ffn.{gate,up,down,sub_norm}, attn_scale, cross_scale, ffn_scale}``,
    ``final_norm``, ``rel_bias``; a routed unit has its expert number behind its name (``ffn.1.up``, ``attn.q.0``).
    """

    kernel: str = "auto"  # of self-attention under a mask: zoo.nn.flex.KERNELS
    _kept_frequencies: Tensor | None = None

    def __init__(self, config: TrunkConfig) -> None:
        super().__init__()
        self.config = c = config
        self.layers = nn.ModuleList(Block(c, i) for i in range(c.depth))
        experts = max(c.tables[-1], default=-1) + 1 if c.depth and "final_norm" in c.routed else 0
        self.final_norm = expert_or_one(lambda: make_norm(c.norm, c.width, c.eps), experts) if c.final_norm else None
        self.rel_bias = nn.Parameter(torch.zeros(c.rel_rows, c.depth, c.heads)) if c.rel_rows else None

    def forward(
        self,
        x: Tensor,
        layout: Layout | None = None,
        *,
        positions: Tensor | None = None,
        context: Tensor | None = None,
        context_rows: Tensor | None = None,
        context_mask: Tensor | None = None,
        relative_index: Tensor | None = None,
        cache: KVCache | None = None,
        layers: slice | None = None,
        taps: bool = False,
        final_norm: bool = True,
        mask: Mask = None,
    ) -> Tensor | tuple[Tensor, tuple[Tensor, ...]]:
        """Run the rows through the layers.

        Args:
            x: ``[B, T, D]`` embedded tokens; with a cache the last rows of the layout only.
            layout: describes every key, cached ones included; None = every row reads every row, modality 0.
            positions: ids of the rows of ``x`` for rotary, ``[B, T]`` or ``[B, axes, T]``; the layout's by default.
            context: ``[B, N, C]`` what cross-attention reads; without it (and none cached) cross-attention is skipped
                with its residual and norm, as ALBEF, BLIP and the Q-Former do for text alone.
            context_rows: ``[B]`` int64: row b of ``x`` reads ``context[context_rows[b]]``, whose keys and values are
                then computed once however many rows read it. Row b reads ``context[b]`` by default.
            context_mask: ``[B, N]`` bool, True = real, or ``[B, T, N]`` where rows may read different parts (packing).
            relative_index: ``[T, K]`` or ``[B, T, K]`` rows of the relative position table.
            cache: keys and values of earlier rows; the new ones are added.
            layers: a range of layers, all by default.
            taps: also return the rows after every layer that ran (before the final norm).
            final_norm: apply the final norm, if the trunk has one.
            mask: what ``layout.mask`` or ``layout.block_mask`` gave for these rows, to build it once for many calls.

        Returns:
            ``[B, T, D]``, or that and a tuple of them with ``taps``.

        Raises:
            ConfigError: rows, layout and cache do not fit together.
        """
        c = self.config
        rows = x.shape[1]
        reading = Reading(context=context, context_rows=context_rows, cache=cache, relative_index=relative_index)
        reading.mask, reading.causal = self._masks(x, layout, cache, mask)
        if c.rope:
            reading.turn = self._turn(x, layout, cache, positions)
        if any("c" in block for block in c.layers):
            reading.cross_rows = self._cross_rows(layout, rows)
            reading.context_mask = _context_mask(context_mask, cache, x.dtype)
        chosen = range(c.depth)[layers] if layers is not None else range(c.depth)
        routes = {table: route_of(layout, rows, table) for table in {c.tables[i] for i in chosen} | set(c.tables[-1:])}
        seen: list[Tensor] = []
        for i in chosen:
            bias = self._relative(i, relative_index, x.dtype)
            x = self.layers[i](x, reading, routes[c.tables[i]], bias)
            if taps:
                seen.append(x)
        if final_norm and self.final_norm is not None:
            x = run(self.final_norm, x, routes[c.tables[-1]] if c.depth else 0)
        return (x, tuple(seen)) if taps else x

    def _masks(self, x: Tensor, layout: Layout | None, cache: KVCache | None, mask: Mask) -> tuple[Mask, bool]:
        rows, past = x.shape[1], cache.length if cache is not None else 0
        if layout is not None and layout.length != rows + past:
            raise ConfigError(
                f"the layout describes {layout.length} tokens, but there are {past} cached and {rows} new ones;"
                " append to or truncate the layout (or cache)"
            )
        if layout is not None and layout.batch not in (1, x.shape[0]):
            raise ConfigError(f"the layout has {layout.batch} rows, the tokens {x.shape[0]}; expected the same or 1")
        if mask is not None and not isinstance(mask, Tensor):
            if self.config.bias_kv or self.rel_bias is not None:
                raise ConfigError("a block mask cannot carry a relative bias or a learned key; give a dense mask")
            return mask, False
        causal = False
        if mask is None and layout is not None:
            if flex.chosen(self.kernel, self.config, layout, x, cache is not None, self.training):
                return flex.block_mask(layout), False
            mask, causal = layout.attend(rows)
            if causal and (self.config.bias_kv or self.rel_bias is not None):
                mask, causal = layout.mask(), False
        if isinstance(mask, Tensor) and mask.dtype == torch.bool:
            mask = _additive(mask, x.dtype)
        return mask, causal

    def _turn(
        self, x: Tensor, layout: Layout | None, cache: KVCache | None, positions: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        c = self.config
        if positions is None and layout is not None:
            positions = layout.position[..., layout.length - x.shape[1] :]
        elif positions is None:
            past = cache.length if cache is not None else 0
            positions = torch.arange(past, past + x.shape[1], device=x.device)[None]
        if positions.shape[-1] != x.shape[1] or (positions.ndim == 3 and positions.shape[1] != c.rope_axes):
            raise ConfigError(
                f"positions have shape {tuple(positions.shape)}; expected [batch, {x.shape[1]}] or"
                f" [batch, {c.rope_axes}, {x.shape[1]}]"
            )
        frequency = self._frequencies(positions.device)
        return rotary(positions, c.rope, c.rope_theta, c.rope_axes, x.dtype, c.rope_half, frequency)

    def _frequencies(self, device: torch.device) -> Tensor | None:
        """The rotary frequencies, kept from the first pass on a device: a written token is a pass of its own.

        No buffer: those are rounded with a model that goes to bf16, and left empty by one that comes from "meta".
        """
        if device.type == "meta" or torch.compiler.is_compiling():
            return None
        kept = self._kept_frequencies
        if kept is None or kept.device != device:
            c = self.config
            with torch.inference_mode(False):  # training may go on from here
                kept = frequencies(c.rope, c.rope_theta, c.rope_axes, c.rope_half, device)
            if type(kept) is not Tensor:  # a fake one, of shapes alone
                return kept
            self._kept_frequencies = kept
        return kept

    def _cross_rows(self, layout: Layout | None, rows: int) -> bool | tuple[tuple[int, int], ...] | Tensor:
        wanted = self.config.cross_modalities
        if wanted is None:
            return True
        if layout is None:
            return 0 in wanted
        highest = max([*wanted, *(m for _, _, m in layout.spans or ())])
        if layout.spans is None:
            of_rows = layout.modality[:, layout.length - rows :]
            return torch.stack([of_rows == m for m in wanted]).any(0)
        route = route_of(layout, rows, [int(m in wanted) for m in range(highest + 1)])
        if isinstance(route, int):
            return bool(route)
        return tuple((a, b) for a, b, yes in cast("tuple[tuple[int, int, int], ...]", route) if yes)

    def _relative(self, layer: int, index: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        if self.rel_bias is None or index is None:
            return None
        return relative_bias(self.rel_bias[:, layer], index).to(dtype)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn True = may attend into 0 and False into -inf, once for all layers."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))


def _context_mask(mask: Tensor | None, cache: KVCache | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None:
        return cache.context_mask if cache is not None else None
    mask = mask.bool()
    additive = _additive(mask[:, None, None] if mask.ndim == 2 else mask[:, None], dtype)  # [B, 1, 1 | T, N]
    if cache is not None and mask.ndim == 2:
        cache.context_mask = additive
    return additive
