"""Beam search over a key/value cache. A row's result does not depend on the rows that share its batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zoo.errors import ConfigError
from zoo.layout import Layout, TokenBatch

if TYPE_CHECKING:
    from zoo.decoders.base import Decoder
    from zoo.sampling.text import Decoding

EMPTY = -1
"""Stands behind the end of a hypothesis until it is returned."""


def search(
    decoder: Decoder,
    embeds: Tensor,
    layout: Layout,
    decoding: Decoding,
    *,
    steps: int,
    stop_ids: Sequence[int],
    pad_id: int,
    context: Mapping[str, Tensor],
    seen: Tensor | None = None,
) -> Tensor:
    """The best hypothesis of each row, [B, n] int64, filled with ``pad_id`` behind its stop.

    In every step the 2·beams likeliest continuations are looked at: stops among the first ``beams`` of them finish a
    hypothesis, the first ``beams`` others go on. A row ends when ``beams`` hypotheses are finished and what goes on is,
    at its present length, no better than the worst of them. Hypotheses are compared by log p / length^length_penalty;
    ``Decoding.length`` says what counts (transformers' ``num_beams`` with ``early_stopping=False``).

    Args:
        embeds, layout: As ``zoo.sampling.text.write``.
        steps: Most tokens to write, at least one.
        context: What ``decoder`` reads beside its sequence, by keyword, in the first pass.
        seen: [B, V] bool, ids that the repetition penalty weighs down from the start; None = no penalty.
    """
    from zoo.sampling.text import penalised

    batch, beams, device = embeds.shape[0], decoding.beams, embeds.device
    whole, power = decoding.length == "whole", decoding.length_penalty
    stops = torch.tensor(list(stop_ids), device=device, dtype=torch.long)
    kept = max(2, 1 + len(stops)) * beams  # at least `beams` of them are no stops
    prompt = layout.real.sum(1).expand(batch) if whole else torch.zeros(batch, device=device)
    cache = decoder.new_cache()
    hidden = decoder(TokenBatch(embeds, layout), cache, **context)[:, -1:]  # [B, 1, D]
    rows = torch.arange(batch, device=device)[:, None]  # [B, 1] number of a row's first beam in the cache
    layout = _repeated(layout, beams)
    running = torch.zeros(batch, 1, device=device)  # log p of each beam; there is one at first
    tokens = torch.zeros(batch, 1, 0, dtype=torch.long, device=device)
    finished = torch.full((batch, beams), -torch.inf, device=device)  # log p / length^penalty, best first
    texts = torch.full((batch, beams, steps), EMPTY, dtype=torch.long, device=device)
    going = torch.ones(batch, 1, dtype=torch.bool, device=device)
    seen = None if seen is None else seen[:, None]  # [B, beams, V]
    first = torch.arange(kept, device=device) < beams

    for step in range(steps):
        log_p = decoder.logits(hidden).float().log_softmax(-1)  # [B, beams, V]
        if seen is not None:
            log_p = penalised(log_p, seen, decoding.repetition_penalty)
        if step < decoding.min_new_tokens:
            log_p[..., stops] = -torch.inf
        size = log_p.shape[-1]
        if size < kept:
            raise ConfigError(f"{beams} beams need a vocabulary of at least {kept} tokens, this one has {size}")
        scores, places = (running[..., None] + log_p).flatten(1).topk(kept)  # [B, kept]
        beam, token = places // size, places % size
        grown = torch.cat([_pick(tokens, beam), token[..., None]], -1)  # [B, kept, step + 1]
        ends = torch.isin(token, stops)
        before, after = (((prompt + step + n)[:, None].clamp(min=1) ** power) for n in (0, 1))  # lengths

        # a stop counts towards the length unless whole sequences are counted
        done = scores / (before if whole else after)
        finished, texts = _best(finished, texts, done.masked_fill(~(ends & first & going), -torch.inf), grown)
        running, chosen = scores.masked_fill(ends, -torch.inf).topk(beams)
        from_beam, tokens = beam.gather(1, chosen), _pick(grown, chosen)

        last = step == steps - 1
        if whole or not last:
            reach = scores[:, :1] / before if whole else running[:, :1] / after
            going = going & (reach > finished[:, -1:])
        if last:  # what was cut off is a hypothesis too
            finished, texts = _best(finished, texts, (running / after).masked_fill(~going, -torch.inf), tokens)
        if last or not bool(going.any()):
            break
        if seen is not None:
            seen = _pick(seen, from_beam).scatter(2, tokens[..., -1:], True)
        cache = decoder.select_cache(cache, (rows + from_beam).flatten())
        rows = torch.arange(batch, device=device)[:, None] * beams
        layout = decoder.grow(layout)
        fresh = decoder.embed(tokens[..., -1].reshape(-1, 1))  # [B * beams, 1, D]
        hidden = decoder(TokenBatch(fresh, layout), cache)[:, -1].unflatten(0, (batch, beams))

    best = texts[:, 0]  # [B, steps]
    length = int((best != EMPTY).sum(1).max())
    return best[:, :length].masked_fill(best[:, :length] == EMPTY, pad_id)


def _best(scores: Tensor, texts: Tensor, more: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """The best hypotheses [B, beams] out of ``scores`` [B, beams] and ``more`` [B, n], with their tokens."""
    padded = torch.nn.functional.pad(others, (0, texts.shape[2] - others.shape[2]), value=EMPTY)
    chosen, places = torch.cat([scores, more], 1).topk(scores.shape[1])
    return chosen, _pick(torch.cat([texts, padded], 1), places)


def _pick(values: Tensor, index: Tensor) -> Tensor:
    """``values`` [B, n, w] at ``index`` [B, k]: [B, k, w]."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[2]))


def _repeated(layout: Layout, count: int) -> Layout:
    """The layout with each row ``count`` times; a layout that stands for any batch stays as it is."""
    if layout.batch == 1 and layout.relation.shape[0] == 1 and layout.padding == "none":
        return layout

    def rows(x: Tensor) -> Tensor:
        return x.repeat_interleave(count, 0) if x.shape[0] > 1 or layout.batch == 1 else x

    relation = layout.relation if layout.relation.shape[0] == 1 else rows(layout.relation)
    return replace(
        layout,
        segment=rows(layout.segment),
        modality=rows(layout.modality),
        position=rows(layout.position),
        relation=relation,
    )
