"""The beam search that BEiT-3's released captions come from (unilm, beit3/engine_for_finetuning.py), with its rules."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zoo.layout import Layout, TokenBatch

if TYPE_CHECKING:
    from zoo.decoders.base import Decoder

LOOKED_AT = 3
"""Continuations a beam that a step looks at."""


@dataclass
class Best:
    """The best finished hypothesis of a row: its words, and log p / length^penalty."""

    words: list[int] = field(default_factory=list)
    score: float = -float("inf")


@torch.inference_mode()
def search_as_released(
    decoder: Decoder,
    embeds: Tensor,
    layout: Layout,
    *,
    beams: int,
    length_penalty: float,
    max_length: int,
    eos_id: int,
) -> tuple[list[list[int]], Tensor]:
    """The best caption of each row, and its score.

    It differs from ``zoo.sampling.beam`` in what a length is and when it ends. A length counts the first token, the
    words and one [MASK], so that a hypothesis closed after n words has n + 2. One best hypothesis is kept; a row ends
    when the best continuation, divided by the *largest* length's penalty, is no better. At ``max_length`` every
    continuation is closed: its last word is thrown away and its probability counted.

    Args:
        decoder: What reads a [MASK] behind every prefix (``zoo.models.mask_writing.MaskDecoder``).
        embeds: [B, T, D] image and first token; ``layout`` theirs.
        max_length: First token, words and [MASK] at most.

    Returns:
        The words of each row, and [B] float: log p / length^penalty.
    """
    batch, device = embeds.shape[0], embeds.device
    cache = decoder.new_cache()
    hidden = decoder(TokenBatch(embeds, layout), cache)[:, -1]  # [B, D]
    log_p = decoder.logits(hidden).float().log_softmax(-1)  # [B, V]
    best = [Best() for _ in range(batch)]
    done = [False] * batch
    written: list[list[list[int]]] = [[[]] for _ in range(batch)]  # one beam a row at first
    scores = [torch.zeros(1, device=device) for _ in range(batch)]
    rows = [[n] for n in range(batch)]  # where each beam of a row stands in the batch
    name = layout.names[-1]
    for length in range(2, max_length + 1):
        chosen: list[list[tuple[float, int, int]]] = [[] for _ in range(batch)]  # score, word, beam
        for n in range(batch):
            if done[n]:
                continue
            total = scores[n][:, None] + log_p[rows[n]]  # [beams, V]
            top, places = total.flatten().topk(min(LOOKED_AT * beams, total.numel()))
            done[n] = best[n].score >= float(top[0]) / max_length**length_penalty
            if done[n]:
                continue
            for value, place in zip(top.tolist(), places.tolist(), strict=True):
                beam, word = divmod(place, total.shape[1])
                if word == eos_id or length == max_length:
                    score = value / length**length_penalty
                    if score > best[n].score:
                        best[n] = Best(written[n][beam], score)
                else:
                    chosen[n].append((value, word, beam))
                if len(chosen[n]) == beams:
                    break
        index = [rows[n][beam] for n in range(batch) for _, _, beam in chosen[n]]
        if not index:
            break
        words = [word for n in range(batch) for _, word, _ in chosen[n]]
        at = 0
        for n in range(batch):
            written[n] = [[*written[n][beam], word] for _, word, beam in chosen[n]]
            scores[n] = torch.tensor([value for value, _, _ in chosen[n]], device=device)
            rows[n] = list(range(at, at + len(chosen[n])))
            at += len(chosen[n])
        cache = decoder.select_cache(cache, torch.tensor(index, device=device))
        layout = layout.append(name)
        fresh = decoder.embed(torch.tensor(words, device=device)[:, None])
        hidden = decoder(TokenBatch(fresh, layout), cache)[:, -1]
        log_p = decoder.logits(hidden).float().log_softmax(-1)
    return [b.words for b in best], torch.tensor([b.score for b in best], device=device)
