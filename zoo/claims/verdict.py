"""What runs say of a claim. The rule:

A claim bounds a quantity. With the 95 % interval of the quantity over seeds and items, and its p value against the
bound that matters, corrected by Holm over all claims of the report that have an answer,

- ``reproduced``: the interval lies within the bounds, and p is below 0.05;
- ``contradicted``: the interval lies outside of them, and p is below 0.05;
- ``not at this scale``: neither; what could have been found is said with it.

One seed is ``exploratory`` whatever it shows. FLOPs, which are counted, need one seed and no correction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from zoo.claims.claim import Claim
from zoo.claims.measure import Measured, Unmeasured, measure
from zoo.claims.plan import Plan, read_plan
from zoo.compare.item_scores import ScoreFiles
from zoo.compare.rundir import Run
from zoo.compare.statistics import LEVEL, holm

REPRODUCED = "reproduced"
OPEN = "not at this scale"
CONTRADICTED = "contradicted"
EXPLORATORY = "exploratory"
REFUSED = "refused"
UNFINISHED = "unfinished"
NOT_RUN = "not yet run"
STATES = (REPRODUCED, OPEN, CONTRADICTED, EXPLORATORY, REFUSED, UNFINISHED, NOT_RUN)


@dataclass(frozen=True)
class Answer:
    """What is known of one claim.

    Attributes:
        state: One of ``STATES``.
        measured: Its quantity; None where there is none.
        p_adjusted: Of it, over the ``family`` claims that were corrected together.
        detectable: What would have been found with a chance of 80 % at the strictest level of the family.
        reason: Why there is no answer, in one line.
        seeds: Training seeds that were asked for, over all arms.
        minutes: That its runs took, those that come first left out; None where nothing was run.
        first_minutes: Of the runs that come first.
        runs: How many it has; done: how many of them are finished.
        settings: What the user changed in all of them.
    """

    claim: Claim
    state: str
    measured: Measured | None = None
    p_adjusted: float = math.nan
    family: int = 0
    detectable: float = math.nan
    reason: str = ""
    seeds: tuple[str, ...] = ()
    minutes: float | None = None
    first_minutes: float | None = None
    runs: int = 0
    done: int = 0
    settings: tuple[str, ...] = ()


def side(measured: Measured, bounds: tuple[float, float]) -> str:
    """Where the interval lies: ``within`` the bounds, ``outside`` of them, or on a bound (``across``)."""
    (low, high), (least, most) = measured.interval, bounds
    if low >= least and high <= most:
        return "within"
    return "outside" if high < least or low > most else "across"


def p_value(measured: Measured, bounds: tuple[float, float]) -> float:
    """Against the bounds that the value lies within, the larger (both must be excluded); else against that which it
    breaks."""
    least, most = bounds
    if measured.value < least:
        return measured.p(least)
    if measured.value > most:
        return measured.p(most)
    return max((measured.p(bound) for bound in bounds if math.isfinite(bound)), default=1.0)


def state_of(measured: Measured, bounds: tuple[float, float], p_adjusted: float) -> str:
    """One of the three answers, or exploratory."""
    if measured.exploratory:
        return EXPLORATORY
    where = side(measured, bounds)
    if where == "across" or not (p_adjusted < LEVEL or measured.exact):
        return OPEN
    return REPRODUCED if where == "within" else CONTRADICTED


def decide(measured: Mapping[str, Measured], claims: Mapping[str, Claim]) -> dict[str, tuple[str, float, int, float]]:
    """Name of a claim -> state, p after correction, size of the family, and what could have been found.

    The family are the claims with two seeds or more; those with one are a family of their own.
    """
    found: dict[str, tuple[str, float, int, float]] = {}
    for exploratory in (False, True):
        family = [n for n, m in measured.items() if not m.exact and m.exploratory == exploratory]
        adjusted = holm([p_value(measured[name], claims[name].bounds) for name in family])
        for name, p in zip(family, adjusted, strict=True):
            state = state_of(measured[name], claims[name].bounds, p)
            found[name] = state, p, len(family), measured[name].detectable(LEVEL / len(family))
    for name, m in measured.items():
        if m.exact:
            found[name] = state_of(m, claims[name].bounds, 0.0), 0.0, 1, 0.0
    return found


def answers(claims: Sequence[Claim], scale: str, out: Path) -> list[Answer]:
    """What the runs below ``out`` say of each claim, in the order given."""
    measured: dict[str, Measured] = {}
    partial: dict[str, Answer] = {}
    files = ScoreFiles()
    for claim in claims:
        plan = read_plan(claim, scale, out)
        if plan is None:
            partial[claim.name] = Answer(claim, NOT_RUN)
            continue
        partial[claim.name], found = _measured(claim, plan, out, files)
        if found is not None:
            measured[claim.name] = found
    decided = decide(measured, {claim.name: claim for claim in claims})
    result = []
    for claim in claims:
        answer = partial[claim.name]
        if claim.name in decided:
            state, p, family, detectable = decided[claim.name]
            answer = replace(
                answer, state=state, measured=measured[claim.name], p_adjusted=p, family=family, detectable=detectable
            )
        result.append(answer)
    return result


def _measured(claim: Claim, plan: Plan, out: Path, files: ScoreFiles) -> tuple[Answer, Measured | None]:
    arms = plan.read_runs(out)
    runs = {run.path: run for points in arms.values() for seeds in points.values() for run in seeds.values()}
    seeds = tuple(dict.fromkeys(s for points in arms.values() for seeds in points.values() for s in seeds))
    minutes = sum(_seconds(run) for run in runs.values()) / 60
    first = sum(_seconds(Run.read(out / folder)) for folder in plan.first.values()) / 60
    done = sum(run.status == "done" for run in runs.values())
    found: Measured | None = None
    state = reason = ""
    try:
        found = measure(claim, arms, files)
    except Unmeasured as error:
        reason = str(error)
        state = REFUSED if reason.startswith(REFUSED) else UNFINISHED
    return Answer(
        claim,
        state,
        found,
        reason=reason,
        seeds=seeds,
        minutes=minutes,
        first_minutes=first,
        runs=len(runs),
        done=done,
        settings=tuple(plan.settings),
    ), found


def _seconds(run: Run) -> float:
    wall = run.number("cost", "seconds", "wall") or run.number("wall_seconds")
    if wall is not None:
        return wall
    return sum(run.number("cost", "seconds", part) or 0.0 for part in ("training", "features", "evaluation"))
