"""Masked-token decoding: all slots of an image are drawn at once, the least certain are masked again, and so on.

One loop serves MaskGIT (arXiv 2202.04200), MUSE, aMUSEd and Show-o; where they differ is data (``MaskedDecoding``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from zoo.errors import ConfigError, near
from zoo.sampling.guidance import drawn, raced, weights
from zoo.sampling.passes import passed

SCHEDULES = ("cosine", "linear", "sqrt", "sigmoid", "pow<exponent>")
ANNEALINGS = ("product", "linear", "linspace")
SELECTIONS = ("cutoff", "exact")

Predict = Callable[[Tensor, Tensor], Tensor]
"""(codes ``[B, n]``, unknown ``[B, n]`` bool) to the guided logits ``[M, K]`` of the unknown slots, row by row."""

Tell = Callable[[int, Tensor, Tensor], None]
"""Receives every step: its number, the drawn codes ``[B, n]`` and which slots are masked again ``[B, n]``."""


def mask_ratio(schedule: str, progress: Tensor) -> Tensor:
    """The share of slots that is masked after the share ``progress`` of the steps (or at time r in training).

    ``cosine`` cos(πr/2), ``linear`` 1 - r, ``pow<p>`` 1 - r^p, ``sqrt`` = pow0.5, ``sigmoid`` from -3 to 3 rescaled to
    [0, 1] (MaskGIT, section 4.3, and Show-o's models/sampling.py, whose lower bound of 1e-6 all but cosine have).

    Args:
        schedule: Its name.
        progress: Any shape, in [0, 1].

    Raises:
        ConfigError: No such schedule.
    """
    if schedule == "cosine":
        return torch.cos(progress * math.pi * 0.5)
    if schedule == "linear":
        ratio = 1 - progress
    elif schedule == "sigmoid":
        first, last = (torch.sigmoid(torch.tensor(end, dtype=progress.dtype)) for end in (-3.0, 3.0))
        ratio = (last - torch.sigmoid(progress * 6 - 3)) / (last - first)
    else:
        ratio = 1 - progress ** _exponent(schedule)
    return ratio.clamp(1e-6, 1.0)


def _exponent(schedule: str) -> float:
    text = "0.5" if schedule == "sqrt" else schedule.removeprefix("pow")
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if (schedule != "sqrt" and not schedule.startswith("pow")) or not 0 < value < math.inf:
        known = ("cosine", "linear", "sqrt", "sigmoid", "pow2.0")
        raise ConfigError(
            f"schedule = {schedule!r}: expected one of {', '.join(SCHEDULES)} (pow2.0, say){near(schedule, known)}"
        )
    return value


@dataclass(frozen=True, kw_only=True)
class MaskedDecoding:
    """How masked tokens are drawn. The defaults are Show-o's; ``maskgit`` and ``amused`` are in ``RULES``.

    Attributes:
        steps: Forward passes K.
        guidance: See ``zoo.sampling.guidance.weights``; without it (0 in ``muse``, 1 in ``scale``) the unconditional
            branch is not computed.
        guidance_form: ``muse``, (1 + w)c - wu, or ``scale``, u + s(c - u).
        schedule: See ``mask_ratio``.
        temperature: T0, of the noise on the confidence with which slots are chosen to stay.
        annealing: How T falls: ``product`` multiplies it by 1 - (s+1)/K after every step, and keeps the result
            (Show-o's code, which falls factorially); ``linear`` is T0·(1 - (s+1)/K) (MaskGIT); ``linspace`` runs evenly
            from T0 in the first step to ``last_temperature`` in the last (aMUSEd).
        last_temperature: Of ``linspace``.
        starting_ratio: The masks kept after step s are floor(n · starting_ratio · ratio). 1.0 counts them on the whole
            grid, however few slots are unknown at the start (Show-o: with few unknowns the early steps reveal one slot
            each). None is each row's own share of unknown slots (MaskGIT; aMUSEd takes that of the batch).
        selection: ``cutoff`` masks the slots strictly below the m-th order statistic (fewer than m in a tie), ``exact``
            exactly m, the first ones in a tie.
    """

    steps: int = 18
    guidance: float = 0.0
    guidance_form: str = "muse"
    schedule: str = "cosine"
    temperature: float = 1.0
    annealing: str = "product"
    last_temperature: float = 0.0
    starting_ratio: float | None = 1.0
    selection: str = "cutoff"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"steps = {self.steps} must be 1 or more")
        if self.temperature < 0 or self.last_temperature < 0:
            raise ConfigError(
                f"temperature = {self.temperature}, last_temperature = {self.last_temperature}: expected 0 or more"
            )
        if self.starting_ratio is not None and not 0 < self.starting_ratio <= 1:
            raise ConfigError(
                f"starting_ratio = {self.starting_ratio}: expected a share above 0 and at most 1, or None"
            )
        for name, known in (("annealing", ANNEALINGS), ("selection", SELECTIONS)):
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(f"{name} = {value!r}: expected one of {', '.join(known)}{near(value, known)}")
        mask_ratio(self.schedule, torch.zeros(()))
        weights(self.guidance, self.guidance_form)

    @property
    def weights(self) -> tuple[float, ...]:
        """Of the conditional and, where it is needed, the unconditional branch."""
        return weights(self.guidance, self.guidance_form)

    def temperatures(self) -> list[float]:
        """T of every step."""
        progress = [(step + 1) / self.steps for step in range(self.steps)]
        if self.annealing == "linear":
            return [self.temperature * (1 - r) for r in progress]
        if self.annealing == "linspace":
            return torch.linspace(self.temperature, self.last_temperature, self.steps).tolist()
        falling, out = self.temperature, []
        for r in progress:
            falling = falling * (1 - r)
            out.append(falling)
        return out

    def kept(self, step: int, unknown: Tensor, slots: int, start: Tensor | float = 1.0) -> Tensor:
        """How many slots stay masked after a step, at least one and fewer than were masked (but for a row's last one).

        Args:
            step: Its number, from 0.
            unknown: ``[B]`` masked slots before the step.
            slots: n.
            start: The starting ratio, ``[B]`` or one for all.

        Returns:
            ``[B]`` int64.
        """
        ratio = mask_ratio(self.schedule, torch.tensor((step + 1) / self.steps))
        count = (slots * (start * ratio)).floor().long().to(unknown.device)  # float32, as the released loops have it
        return count.minimum(unknown - 1).clamp(min=1)


RULES: dict[str, MaskedDecoding] = {
    "show-o": MaskedDecoding(),
    "maskgit": MaskedDecoding(steps=12, temperature=4.5, annealing="linear", starting_ratio=None),
    "amused": MaskedDecoding(
        steps=12, guidance=10.0, guidance_form="scale", temperature=2.0, annealing="linspace", starting_ratio=None
    ),
}
"""The published rules, by name."""


class Draws(Protocol):
    """Where a run's random numbers come from."""

    def codes(self, step: int, p: Tensor, unknown: Tensor) -> Tensor:
        """Draw a code ``[M]`` from each of the rows ``p`` ``[M, K]``, which are those of ``unknown`` ``[B, n]``."""
        ...

    def uniform(self, step: int, unknown: Tensor) -> Tensor:
        """Return numbers ``[B, n]`` in [0, 1) for the noise on the confidence."""
        ...


class Streams:
    """Own numbers of every row, so that its codes do not depend on what shares its batch."""

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self.generators = generators

    def _rand(self, unknown: Tensor) -> Tensor:
        rows = [torch.rand(unknown.shape[1], generator=g) for g in self.generators]
        return torch.stack(rows).to(unknown.device)  # [B, n]

    def codes(self, step: int, p: Tensor, unknown: Tensor) -> Tensor:
        """See ``Draws``."""
        return drawn(p, self._rand(unknown)[unknown])

    def uniform(self, step: int, unknown: Tensor) -> Tensor:
        """See ``Draws``."""
        return self._rand(unknown)


@dataclass(frozen=True)
class Recorded:
    """The numbers of a run that is to be repeated.

    Attributes:
        exponential: ``[steps, B, n, K]`` ~ Exp(1): the code is argmax(p / E), as ``torch.multinomial`` draws one.
        uniform_numbers: ``[steps, B, n]``; the last step's are not needed.
    """

    exponential: Tensor
    uniform_numbers: Tensor

    def codes(self, step: int, p: Tensor, unknown: Tensor) -> Tensor:
        """See ``Draws``."""
        return raced(p, self.exponential[step][unknown])

    def uniform(self, step: int, unknown: Tensor) -> Tensor:
        """See ``Draws``."""
        return self.uniform_numbers[step]


def gumbel(uniform: Tensor) -> Tensor:
    """-log(-log u), both logarithms cut off at 1e-20."""
    return -torch.log((-torch.log(uniform.clamp(min=1e-20))).clamp(min=1e-20))


def least(confidence: Tensor, count: Tensor, selection: str = "cutoff") -> Tensor:
    """Which slots are masked again.

    Args:
        confidence: ``[B, n]``, infinite where a slot is known.
        count: ``[B]`` int64, how many.
        selection: See ``MaskedDecoding``.

    Returns:
        ``[B, n]`` bool; never a known slot.
    """
    if selection == "exact":
        rank = confidence.argsort(dim=-1, stable=True).argsort(dim=-1)
        chosen = rank < count[:, None]
    else:
        ordered = confidence.sort(dim=-1).values
        last = confidence.shape[-1] - 1
        chosen = confidence < ordered.gather(1, count.clamp(max=last)[:, None])
        if last == 0:  # a single slot has nothing above it to be compared with
            chosen = (count > 0)[:, None].expand_as(chosen)
    return chosen & (confidence < torch.inf)


@torch.inference_mode()
def decode(
    codes: Tensor,
    unknown: Tensor,
    predict: Predict,
    decoding: MaskedDecoding,
    draws: Draws,
    tell: Tell | None = None,
) -> Tensor:
    """Draw the unknown slots.

    Per step: a code is drawn at every masked slot from softmax(logits) at temperature 1; its confidence is log p(drawn)
    + T·gumbel; the least certain ``MaskedDecoding.kept`` slots are masked again, except after the last step, whose
    codes are the result.

    Args:
        codes: ``[B, n]`` int64; what stands at unknown slots is not read.
        unknown: ``[B, n]`` bool; all other slots stay as they are, bit for bit.
        predict: The model, guided; it is asked for unknown slots only.
        decoding: The rules.
        draws: The random numbers.
        tell: Hears every step.

    Returns:
        ``[B, n]`` int64.
    """
    slots = codes.shape[1]
    start: Tensor | float = decoding.starting_ratio or 1.0
    if decoding.starting_ratio is None:
        start = unknown.float().mean(-1).cpu()  # [B]
    for step, temperature in enumerate(decoding.temperatures()):
        logits = predict(codes, unknown)  # [M, K]
        passed(len(codes))
        p = logits.float().softmax(-1)
        new = draws.codes(step, p, unknown)  # [M]
        codes = codes.masked_scatter(unknown, new)
        if step + 1 == decoding.steps:
            if tell is not None:
                tell(step, codes, torch.zeros_like(unknown))
            break
        certain = torch.full(codes.shape, torch.inf, device=codes.device)
        certain = certain.masked_scatter(unknown, p.gather(1, new[:, None])[:, 0].clamp(min=1e-20).log())
        certain = certain + temperature * gumbel(draws.uniform(step, unknown).float())
        again = least(certain, decoding.kept(step, unknown.sum(-1), slots, start), decoding.selection)
        if tell is not None:
            tell(step, codes, again)
        unknown = again
    return codes
