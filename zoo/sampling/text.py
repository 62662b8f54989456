"""Writing text with a decoder: greedy, sampled or by beams, over a key/value cache, the same whatever shares the
batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zoo.decoders.base import Decoder
from zoo.errors import ConfigError
from zoo.layout import Layout, TokenBatch
from zoo.sampling.beam import search
from zoo.sampling.guidance import drawn, probabilities

LENGTHS = ("new", "whole")


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: Most tokens to write.
        min_new_tokens: Tokens to write before a stop is allowed.
        temperature: 0 = greedy; else the logits are divided by it.
        top_k: Sample among the k likeliest tokens only (and those level with the k-th); 0 = no limit.
        top_p: Sample among the fewest likeliest tokens that hold this mass of what top_k left (nucleus sampling, arXiv
            1904.09751).
        seed: Of the samples; every row has its own stream.
        beams: Hypotheses a row that are followed at once; 1 = none but the one (``zoo.sampling.beam``).
        length_penalty: Exponent of the length by which a hypothesis' log p is divided; 0 = plain log p.
        length: What that length is: ``new`` counts the written tokens and the stop (transformers since 4.3x), ``whole``
            the prompt and the written tokens without the stop (transformers 4.15, which BLIP was published with). With
            a prompt of one token the two agree.
        repetition_penalty: Above 1, logits of ids that stand in the prompt or were written are divided by it where
            positive and multiplied where negative (CTRL, arXiv 1909.05858, section 4.1).
    """

    max_new_tokens: int = 32
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    beams: int = 1
    length_penalty: float = 1.0
    length: str = "new"
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ConfigError(
                f"max_new_tokens = {self.max_new_tokens}, min_new_tokens = {self.min_new_tokens}:"
                " expected 0 <= min_new_tokens <= max_new_tokens and at least one new token"
            )
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ConfigError(
                f"temperature = {self.temperature}, top_k = {self.top_k}, top_p = {self.top_p}:"
                " expected temperature >= 0, top_k >= 0 and 0 < top_p <= 1"
            )
        if self.beams < 1 or self.repetition_penalty <= 0 or self.length not in LENGTHS:
            raise ConfigError(
                f"beams = {self.beams}, repetition_penalty = {self.repetition_penalty}, length = {self.length!r}:"
                f" expected beams >= 1, repetition_penalty > 0 and length one of {', '.join(LENGTHS)}"
            )
        if self.beams > 1 and self.temperature:
            raise ConfigError(f"beams = {self.beams} with temperature = {self.temperature}: set one or the other")


def choose(logits: Tensor, decoding: Decoding, draw: Tensor | None = None) -> Tensor:
    """The next token of each row; what is left to choose from is ``zoo.sampling.guidance.probabilities``.

    Args:
        logits: [B, V] float.
        draw: [B] uniform numbers in [0, 1), needed when the temperature is above 0. A row's token is a function of
            its own logits and number.

    Returns:
        [B] int64.
    """
    if decoding.temperature == 0:
        return logits.argmax(dim=-1)
    if draw is None:
        raise ConfigError("sampling at a temperature above 0 needs one uniform number a row")
    return drawn(probabilities(logits, decoding), draw)


def penalised(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits (or log p) [..., V] with those of the ids ``seen`` [..., V] weighed down; see ``Decoding``."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def ids_seen(ids: Tensor, vocab_size: int, real: Tensor | None = None) -> Tensor:
    """Which of the ids 0 to ``vocab_size`` - 1 stand in ``ids`` [B, T]: [B, vocab_size] bool. Ids outside (image
    placeholders) and those that are not ``real`` [B, T] are left out."""
    kept = (ids >= 0) & (ids < vocab_size)
    if real is not None:
        kept = kept & real
    counts = torch.zeros(ids.shape[0], vocab_size, dtype=torch.long, device=ids.device)
    return counts.scatter_add(1, ids.clamp(0, vocab_size - 1), kept.long()) > 0


def streams(seed: int, first: int, count: int) -> list[torch.Generator]:
    """One generator a row, by its number in the whole request, so that splitting it into batches changes nothing."""
    return [torch.Generator().manual_seed((seed * 1_000_003 + first + i) % 2**63) for i in range(count)]


@torch.inference_mode()
def write(
    decoder: Decoder,
    embeds: Tensor,
    layout: Layout,
    decoding: Decoding,
    *,
    stop_ids: Sequence[int],
    pad_id: int,
    generators: Sequence[torch.Generator] | None = None,
    context: Tensor | None = None,
    context_mask: Tensor | None = None,
    prompt_ids: Tensor | None = None,
    stop_sequences: Sequence[Sequence[int]] = (),
    tell: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Continue each row of a prompt until a stop token or ``max_new_tokens``.

    Args:
        embeds: [B, T, D] the prompts; pads, if any, in front (see ``align_right``), so that all rows end together.
        layout: Their layout, with positions that do not count pads.
        stop_ids: Tokens after which a row is finished; the stop is part of what is returned.
        pad_id: Fills rows behind their stop.
        generators: One a row, when sampling; made from ``decoding.seed`` by default.
        context: [B, N, C] what a cross-attending decoder reads, handed over with the prompt.
        context_mask: [B, N] bool, True = real.
        prompt_ids: [B, T] the ids of the prompts, which a repetition penalty counts.
        stop_sequences: Several tokens after which a row is finished, ``###`` in two pieces, say; beams do not look at
            them.
        tell: Receives every column [B] as it is chosen; not with beams.

    Returns:
        [B, n] int64 new token ids, n <= ``max_new_tokens``. Writing also ends where the decoder's context is full.

    Raises:
        ConfigError: The prompt itself does not fit the decoder's context.
    """
    given = {"context": context, "context_mask": context_mask}
    if decoding.beams > 1:
        steps = min(decoding.max_new_tokens, _room(decoder, embeds.shape[1], decoding))
        return search(
            decoder, embeds, layout, decoding,
            steps=steps, stop_ids=stop_ids, pad_id=pad_id,
            context={key: value for key, value in given.items() if value is not None},
            seen=_seen(decoder, embeds, layout, decoding, prompt_ids),
        )  # fmt: skip
    tokens = stream(
        decoder, embeds, layout, decoding,
        stop_ids=stop_ids, pad_id=pad_id, generators=generators, prompt_ids=prompt_ids,
        stop_sequences=stop_sequences, **given,
    )  # fmt: skip
    written: list[Tensor] = []
    for token in tokens:
        written.append(token)
        if tell is not None:
            tell(token)
    return torch.stack(written, dim=1)


@torch.inference_mode()
def stream(
    decoder: Decoder,
    embeds: Tensor,
    layout: Layout,
    decoding: Decoding,
    *,
    stop_ids: Sequence[int],
    pad_id: int,
    generators: Sequence[torch.Generator] | None = None,
    context: Tensor | None = None,
    context_mask: Tensor | None = None,
    prompt_ids: Tensor | None = None,
    stop_sequences: Sequence[Sequence[int]] = (),
) -> Iterator[Tensor]:
    """The columns of what ``write`` returns, [B] int64 each, as they are chosen; arguments as there.

    Raises:
        ConfigError: Beams, which settle on no token before the end, or a prompt that does not fit.
    """
    if decoding.beams > 1:
        raise ConfigError(f"beams = {decoding.beams} cannot be streamed: write greedily or sample")
    batch, length = embeds.shape[:2]
    device = embeds.device
    room = _room(decoder, length, decoding)
    given = {"context": context, "context_mask": context_mask}
    reads = {key: value for key, value in given.items() if value is not None}
    seen = _seen(decoder, embeds, layout, decoding, prompt_ids)
    if decoding.temperature and generators is None:
        generators = streams(decoding.seed, 0, batch)
    stops = torch.tensor(list(stop_ids), device=device, dtype=torch.long)
    done = torch.zeros(batch, dtype=torch.bool, device=device)
    cache = decoder.new_cache()
    token: Tensor | None = None
    tail: list[Tensor] = []
    for step in range(min(decoding.max_new_tokens, room)):
        if token is not None:
            layout = decoder.grow(layout)
            embeds = decoder.embed(token[:, None])  # [B, 1, D]
        hidden = decoder(TokenBatch(embeds, layout), cache, **({} if step else reads))[:, -1]  # [B, D]
        logits = decoder.logits(hidden).float()  # [B, V]
        if seen is not None:
            logits = penalised(logits, seen, decoding.repetition_penalty)
        if step < decoding.min_new_tokens:
            logits[:, stops] = -torch.inf
        draw = None
        if generators is not None and decoding.temperature:
            draw = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in generators]).to(device)
        token = torch.where(done, pad_id, choose(logits, decoding, draw))
        yield token
        if seen is not None:
            seen = seen.scatter(1, token[:, None], True)
        done = done | torch.isin(token, stops)
        if stop_sequences and step >= decoding.min_new_tokens:
            tail.append(token)
            for sequence in stop_sequences:
                if len(sequence) <= len(tail):
                    last = zip(tail[-len(sequence) :], sequence, strict=True)
                    done = done | torch.stack([column == id for column, id in last]).all(0)
        if bool(done.all()):
            break


def _room(decoder: Decoder, length: int, decoding: Decoding) -> int:
    """How many tokens the decoder's context leaves behind a prompt of ``length``."""
    room = (getattr(decoder, "context_length", 0) or length + decoding.max_new_tokens) - length + 1
    if room < 1:
        raise ConfigError(
            f"the prompt has {length} tokens, image tokens included, and the decoder reads {length + room - 1}:"
            " shorten the prompt or give the decoder a longer context_length"
        )
    return room


def _seen(
    decoder: Decoder, embeds: Tensor, layout: Layout, decoding: Decoding, prompt_ids: Tensor | None
) -> Tensor | None:
    """The ids [B, V] that a repetition penalty counts before the first step; None without a penalty."""
    if decoding.repetition_penalty == 1:
        return None
    if prompt_ids is not None:
        return ids_seen(prompt_ids, decoder.vocab_size, layout.real)
    return torch.zeros(embeds.shape[0], decoder.vocab_size, dtype=torch.bool, device=embeds.device)


def align_right(x: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Move each row's real tokens to its end, in order, and cut columns that hold pads only.

    Args:
        x: [B, T, ...].
        real: [B, T] bool.

    Returns:
        (x [B, t, ...], real [B, t]).
    """
    # stable: pads (0) before real tokens (1), each in their own order
    order = real.long().argsort(dim=1, stable=True)
    keep = int(real.sum(dim=1).max())
    order = order[:, real.shape[1] - keep :]  # [B, t]
    index = order.reshape(*order.shape, *(1,) * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
    return x.gather(1, index), real.gather(1, order)


def until_stop(ids: Sequence[int], stop_ids: Sequence[int]) -> list[int]:
    """The ids before the first stop."""
    stops = set(stop_ids)
    return list(ids[: next((i for i, token in enumerate(ids) if token in stops), len(ids))])
