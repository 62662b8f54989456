"""Autoregressive image codes over a prefix, with guidance: LlamaGen, Chameleon, any causal model of codes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from zoo.errors import ConfigError
from zoo.sampling.block import Branches, Prefix
from zoo.sampling.guidance import drawn, mixed, probabilities, raced, weights
from zoo.sampling.passes import passed


@dataclass(frozen=True, kw_only=True)
class CodeDecoding:
    """How the next code is drawn. Temperature, then top-k, then top-p, then softmax (LlamaGen's sample).

    Attributes:
        temperature: 0 = the likeliest code; else the logits are divided by it.
        top_k: Draw among the k likeliest codes only (and those level with the k-th); 0 = no limit.
        top_p: Draw among the fewest likeliest codes that hold this mass of what top-k left.
        guidance: See ``zoo.sampling.guidance.weights``.
        guidance_form: ``scale``, u + s(c - u), or ``muse``, (1 + w)c - wu.
        interval: Guidance acts on the codes 0 to ``interval`` + 1; behind them the unconditional rows are dropped
            (LlamaGen's ``cfg_interval``, whose code goes on computing them). -1 = always.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    guidance: float = 1.0
    guidance_form: str = "scale"
    interval: int = -1

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1 or self.interval < -1:
            raise ConfigError(
                f"temperature = {self.temperature}, top_k = {self.top_k}, top_p = {self.top_p}, interval ="
                f" {self.interval}: expected temperature >= 0, top_k >= 0, 0 < top_p <= 1 and interval >= -1"
            )
        weights(self.guidance, self.guidance_form)

    @property
    def weights(self) -> tuple[float, ...]:
        """Of the conditional and, where it is needed, the unconditional branch."""
        return weights(self.guidance, self.guidance_form)


class CodeDraws(Protocol):
    """Where a run's random numbers come from."""

    def code(self, number: int, p: Tensor) -> Tensor:
        """Draw code ``number`` of every row from ``p`` ``[B, K]``: ``[B]`` int64."""
        ...


class CodeStreams:
    """Own numbers of every row, so that its codes do not depend on what shares its batch."""

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self.generators = generators

    def code(self, number: int, p: Tensor) -> Tensor:
        """See ``CodeDraws``."""
        numbers = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in self.generators])
        return drawn(p, numbers.to(p.device))


@dataclass(frozen=True)
class RecordedCodes:
    """The numbers of a run that is to be repeated.

    Attributes:
        exponential: ``[B, n, K]`` ~ Exp(1): the code is argmax(p / E), as ``torch.multinomial`` draws one.
    """

    exponential: Tensor

    def code(self, number: int, p: Tensor) -> Tensor:
        """See ``CodeDraws``."""
        return raced(p, self.exponential[:, number])


@torch.inference_mode()
def decode_codes(
    prefix: Prefix | Branches,
    count: int,
    embed: Callable[[Tensor], Tensor],
    logits: Callable[[Tensor], Tensor],
    decoding: CodeDecoding,
    draws: CodeDraws | None,
    segment: str | int,
    *,
    mix: Sequence[float] | None = None,
    position: Tensor | None = None,
    modality: int | None = None,
    tell: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Draw ``count`` codes behind a prefix whose last row predicts the first.

    Args:
        prefix: Its rows are the branches one after the other: B conditional, then B unconditional ones. It holds all
            codes but the last afterwards, and as many branches as were still needed.
        count: n, how many codes.
        embed: Codes ``[B, 1]`` to embeddings ``[B, 1, D]``.
        logits: Hidden states ``[B, D]`` to the logits ``[B, K]`` of codes alone.
        decoding: The rules.
        draws: The random numbers; not needed at temperature 0.
        segment: Of the prefix's layout, which the codes belong to.
        mix: Weights of the branches, where they are not the two of ``decoding`` (Chameleon has three).
        position: ``[1 | rows, n]`` or ``[1 | rows, axes, n]`` ids of the codes; by default they go on from the last.
        modality: Expert route of the codes; that of the last token by default.
        tell: Receives every step: its number, the guided logits ``[B, K]`` and the codes ``[B]``.

    Returns:
        ``[B, n]`` int64.

    Raises:
        ConfigError: The rows are no whole branches, the codes do not fit the context, or draws are missing.
    """
    branches = tuple(mix if mix is not None else decoding.weights)
    if prefix.batch % len(branches):
        raise ConfigError(f"the prefix has {prefix.batch} rows; expected {len(branches)} branches of equal size")
    if decoding.temperature and draws is None:
        raise ConfigError(f"temperature = {decoding.temperature} needs random numbers: give draws, or temperature=0")
    rows = prefix.batch // len(branches)
    written: list[Tensor] = []
    for number in range(count):
        if number:
            if len(branches) > 1 and 0 <= decoding.interval < number - 1:
                branches = (1.0,)
                prefix.select(torch.arange(rows, device=prefix.hidden.device))
            place = None if position is None else position[..., number - 1 : number]
            if place is not None and place.shape[0] > prefix.batch:
                place = place[: prefix.batch]
            new = embed(written[-1][:, None]).repeat(len(branches), 1, 1)  # [branches * B, 1, D]
            prefix.block(new, segment, keep=True, position=place, modality=modality)
        guided = mixed(logits(prefix.hidden).float(), branches)  # [B, K]
        passed(rows)
        if decoding.temperature and draws is not None:
            code = draws.code(number, probabilities(guided, decoding))
        else:
            code = guided.argmax(-1)
        written.append(code)
        if tell is not None:
            tell(number, guided, code)
    return torch.stack(written, 1)
