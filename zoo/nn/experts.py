"""Experts by modality: which module every token goes through."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn

from zoo.layout import Layout

Spans: TypeAlias = tuple[tuple[int, int, int], ...]
Route: TypeAlias = int | Spans | Tensor
"""One expert for all tokens, static ``(start, stop, expert)`` spans, or the expert of every token ``[B, T]``."""


class Experts(nn.ModuleList):
    """One module per expert; ``experts(x, route)`` sends every token of ``x`` ``[B, T, D]`` through its own.

    Static spans slice (one graph under torch.compile, no value is read back); a route tensor gathers, which
    synchronises with the host, and is only used for batches whose rows disagree. A step in which a modality is absent
    leaves its expert without a gradient: tell DistributedDataParallel (find_unused_parameters).
    """

    def forward(self, x: Tensor, route: Route) -> Tensor:
        if isinstance(route, int):
            return cast(Tensor, self[route](x))
        if isinstance(route, tuple):
            return by_spans(self, x, route)
        flat, ids = x.flatten(0, 1), route.expand(x.shape[0], -1).reshape(-1)
        out: Tensor | None = None
        for number, expert in enumerate(self):
            index = (ids == number).nonzero().squeeze(1)
            part = expert(flat[index][None])[0]  # [tokens of the expert, out]
            if out is None:
                out = part.new_zeros(flat.shape[0], *part.shape[1:])
            out = out.index_copy(0, index, part)
        assert out is not None
        return out.view(*x.shape[:2], *out.shape[1:])


def by_spans(experts: nn.ModuleList, x: Tensor, spans: Spans) -> Tensor:
    """Run each expert once over all its spans and put the results back in order."""
    out: list[Tensor | None] = [None] * len(spans)
    for number in sorted({expert for _, _, expert in spans}):
        own = [i for i, span in enumerate(spans) if span[2] == number]
        pieces = [x[:, spans[i][0] : spans[i][1]] for i in own]
        result = experts[number](pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1))
        for i, piece in zip(own, result.split([p.shape[1] for p in pieces], 1), strict=True):
            out[i] = piece
    return torch.cat(cast("list[Tensor]", out), 1)


def expert_or_one(make: Callable[[], nn.Module], experts: int) -> nn.Module:
    """Return one module, or :class:`Experts` of them where ``experts`` > 0."""
    return Experts(make() for _ in range(experts)) if experts else make()


def run(module: nn.Module, x: Tensor, route: Route) -> Tensor:
    """Call a module that may or may not be routed."""
    return cast(Tensor, module(x, route) if isinstance(module, Experts) else module(x))


def route_of(layout: Layout | None, rows: int, table: Iterable[int]) -> Route:
    """Return the route of the last ``rows`` tokens of the layout under one route table (modality id -> expert)."""
    table = tuple(table)
    if not table:
        return 0
    if layout is None:
        return table[0]
    if layout.spans is None:
        lookup = torch.tensor(table, device=layout.modality.device)
        return lookup[layout.modality[:, layout.length - rows :]]
    first = layout.length - rows
    spans: list[tuple[int, int, int]] = []
    for start, stop, modality in layout.spans:
        start, stop = max(start - first, 0), stop - first
        if stop <= start:
            continue
        if spans and spans[-1][2] == table[modality]:
            spans[-1] = (spans[-1][0], stop, table[modality])
        else:
            spans.append((start, stop, table[modality]))
    return spans[0][2] if len(spans) == 1 else tuple(spans)
