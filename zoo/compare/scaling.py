"""How a metric falls or grows with training compute, family by family: power laws, and how much compute one family
needs to reach the score of another.

A family is one recipe at several sizes and budgets. Of its points only the front counts, the best score for each
amount of compute: a large model stopped early says how not to spend FLOPs, nothing about the family. The law is
log metric = log a + b log FLOPs, by least squares, as the trend lines of arXiv 2408.11039, figure 5; the parity ratio
is that paper's too (section 4.2): the FLOPs of one family over those of another at an equal score.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from zoo.compare.rundir import Run
from zoo.part import SIZE_FIELDS

DRAWS = 4000
FEWEST = 3
"""Points of a front that a law is fitted to."""
APART = 1.02
"""Two amounts of compute are two points if they differ by this factor."""


Point = tuple[float, float]
"""What was spent, and the score."""


@dataclass(frozen=True)
class Spent:
    """Runs of one size and budget, over seeds.

    Attributes:
        flops: of the whole training run, mean over seeds.
        scores: seed -> score.
        parameters: of the model.
        label: what is the family's own in this point, as ``width=64, 300 steps``.
    """

    flops: float
    scores: Mapping[str, float]
    parameters: float
    label: str = ""

    @property
    def score(self) -> float:
        return float(np.mean(list(self.scores.values())))


@dataclass(frozen=True)
class Law:
    """A power law, score = a FLOPs^b.

    Attributes:
        log_a, b: of the front's means.
        low, high: 95 % interval of b; NaN where two points or none are left over.
        draws: [DRAWS, 2] log a and b, drawn from seeds and from the scatter around the line.
        seeds: how many the intervals know of.
    """

    log_a: float
    b: float
    low: float
    high: float
    draws: NDArray[np.float64]
    seeds: int

    def score(self, flops: float) -> float:
        return math.exp(self.log_a + self.b * math.log(flops))


@dataclass(frozen=True)
class Family:
    """A recipe at several sizes and budgets, in one metric."""

    name: str
    points: tuple[Spent, ...]
    higher: bool

    @cached_property
    def front(self) -> tuple[Spent, ...]:
        """The points that no cheaper one reaches, by means over seeds; ascending."""
        return front_of(self.points, self.higher)

    @cached_property
    def law(self) -> Law | None:
        """The power law through the front; None of fewer than three points, or of scores that are not positive."""
        return fit(self.points, self.higher)


@dataclass(frozen=True)
class Parity:
    """What a family needs to reach a baseline's best score.

    Attributes:
        ratio: its FLOPs over the baseline's at that score, by both laws; NaN where its law does not lead there.
        low, high: 95 % interval of it.
        measured: the same between measured points, as text with ``≤`` or ``≥`` where the crossing lies outside of them.
        beyond: the law had to be drawn out past what was measured.
    """

    ratio: float
    low: float
    high: float
    measured: str
    beyond: bool


def family_name(run: Run) -> str:
    """The name of a run without the changes that are sizes."""
    return "+".join(part for part in run.name.split("+") if not _is_size(part))


def _is_size(change: str) -> bool:
    """Whether a part of a run's name changes a size, as ``encoder.width=64``."""
    key, equals, _ = change.partition("=")
    return bool(equals) and key.rpartition(".")[2] in SIZE_FIELDS


def families(runs: Sequence[Run], task: str, metric: str, higher: bool) -> list[Family]:
    """The families of runs that have the metric and enough points, in the order of the runs.

    Runs must share data and evaluation; those of the largest group that does are taken. Budgets differ, that is what
    it is about.
    """
    known = [run for run in runs if not run.control and metric in run.metrics.get(task, {}) and _spent(run)]
    alike: dict[tuple[str, str], list[Run]] = {}
    for run in known:
        alike.setdefault((run.hashes.get("data", ""), run.hashes.get("evaluation", "")), []).append(run)
    if not alike:
        return []
    taken = max(alike.values(), key=len)
    found: dict[str, list[Run]] = {}
    for run in taken:
        found.setdefault(family_name(run), []).append(run)
    made = [Family(name, _points(members, task, metric), higher) for name, members in found.items()]
    return [family for family in made if _levels(family.points) >= FEWEST]


def front_of(points: Sequence[Spent], higher: bool) -> tuple[Spent, ...]:
    """The points that no cheaper one reaches, ascending in FLOPs."""
    sign = 1 if higher else -1
    front: list[Spent] = []
    for point in sorted(points, key=lambda p: (p.flops, -sign * p.score)):
        if not front or sign * point.score > sign * front[-1].score:
            front.append(point)
    return tuple(front)


def fit(points: Sequence[Spent], higher: bool, draws: int = DRAWS, seed: int = 0) -> Law | None:
    """Fit a power law to the front of points.

    The interval knows two sources of error: other seeds (seeds are drawn with replacement, and the front is taken
    anew), and points that do not lie on a line (the coefficients are drawn from Student's distribution around the
    least-squares ones, with n - 2 degrees of freedom). A front of three has one degree, and a wide interval.
    """
    front = front_of(points, higher)
    if len(front) < FEWEST or any(p.score <= 0 for p in front):
        return None
    log_a, b, _ = _least_squares(front)
    stream = np.random.Generator(np.random.PCG64(seed))
    names = sorted({name for point in points for name in point.scores})
    found = []
    for _ in range(draws):
        chosen = [names[n] for n in stream.integers(len(names), size=len(names))]
        again = _drawn(points, chosen)
        drawn = front_of(again, higher)
        if len(drawn) < FEWEST or any(p.score <= 0 for p in drawn):
            continue
        mean_a, mean_b, covariance = _least_squares(drawn)
        student = stream.standard_t(len(drawn) - 2, size=2)
        found.append(np.array([mean_a, mean_b]) + _root(covariance) @ student)
    out = np.array(found) if found else np.full((1, 2), np.nan)
    low, high = np.quantile(out[:, 1], [0.025, 0.975]) if found else (math.nan, math.nan)
    return Law(log_a, b, float(low), float(high), out, len(names))


def parity(family: Family, baseline: Family) -> Parity | None:
    """The FLOPs a family needs to reach the best score of a baseline, over those the baseline needed; None where one
    has no law."""
    law, other = family.law, baseline.law
    if law is None or other is None:
        return None
    most = baseline.front[-1].flops
    ratio = _ratio(law.log_a, law.b, other.log_a, other.b, most)
    count = min(len(law.draws), len(other.draws))
    pairs = zip(law.draws[:count].tolist(), other.draws[:count].tolist(), strict=True)
    drawn = np.array([_ratio(mine[0], mine[1], theirs[0], theirs[1], most) for mine, theirs in pairs])
    # a law that leads nowhere needs compute without end: such draws count as the largest
    low, high = np.quantile(np.where(np.isnan(drawn), np.inf, drawn), [0.025, 0.975], method="nearest")
    curve = [(p.flops, p.score) for p in family.front]
    spent, below, above = crossing(curve, baseline.front[-1].score, family.higher)
    measured = f"{'≤ ' if below else '≥ ' if above else ''}{spent / most:.3g}"
    reach = [p.flops for p in family.points]
    beyond = not math.isnan(ratio) and not min(reach) <= ratio * most <= max(reach)
    return Parity(ratio, float(low), float(high), measured, beyond)


def crossing(curve: Sequence[Point], target: float, higher: bool) -> tuple[float, bool, bool]:
    """Where a curve first has ``target``, in proportion on a logarithmic axis between its points.

    Returns:
        What is spent there, whether it is at most this (the first point has it), at least this (no point has it; then
        that of the last).
    """
    sign = 1.0 if higher else -1.0
    points = sorted(curve)
    before: Point | None = None
    for spent, score in points:
        if sign * (score - target) >= 0:
            if before is None:
                return spent, True, False
            share = (target - before[1]) / (score - before[1])
            return math.exp(math.log(before[0]) + share * (math.log(spent) - math.log(before[0]))), False, False
        before = spent, score
    return points[-1][0], False, True


def _ratio(log_a: float, b: float, other_a: float, other_b: float, most: float) -> float:
    """FLOPs at which one law has the other's score at ``most``, over ``most``; NaN where they run apart."""
    if b == 0 or (b > 0) != (other_b > 0):
        return math.nan
    power = (other_a + other_b * math.log(most) - log_a) / b - math.log(most)
    return math.exp(power) if abs(power) < 500 else math.nan


def _least_squares(points: Sequence[Spent]) -> tuple[float, float, NDArray[np.float64]]:
    """log a, b, and their covariance [2, 2] from the scatter around the line."""
    x = np.log([p.flops for p in points])
    y = np.log([p.score for p in points])
    middle = x.mean()
    spread = float(((x - middle) ** 2).sum())
    b = float(((x - middle) * (y - y.mean())).sum() / spread)
    log_a = float(y.mean() - b * middle)
    rest = y - log_a - b * x
    variance = float((rest**2).sum() / (len(points) - 2))
    covariance = variance * np.array(
        [[1 / len(points) + middle**2 / spread, -middle / spread], [-middle / spread, 1 / spread]]
    )
    return log_a, b, covariance


def _root(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    """A square root of a covariance, which may be singular."""
    values, vectors = np.linalg.eigh(covariance)
    root: NDArray[np.float64] = vectors * np.sqrt(np.clip(values, 0, None))
    return root


def _drawn(points: Sequence[Spent], seeds: Sequence[str]) -> list[Spent]:
    """The points with the scores of seeds drawn with replacement; a point without any of them keeps its own."""
    out = []
    for point in points:
        scores = {f"{n}": point.scores[name] for n, name in enumerate(seeds) if name in point.scores}
        out.append(Spent(point.flops, scores or point.scores, point.parameters))
    return out


def _spent(run: Run) -> float | None:
    return run.number("cost", "flops", "total")


def _points(runs: Sequence[Run], task: str, metric: str) -> tuple[Spent, ...]:
    """Runs of one size and budget as one point."""

    def key(run: Run) -> tuple[str, ...]:
        # a name does not tell the scale
        return run.name, str(run.manifest.get("scale")), run.hashes.get("recipe", ""), run.hashes.get("budget", "")

    found = []
    for _, same in groupby(sorted(runs, key=key), key=key):
        members = list(same)
        flops = [value for run in members if (value := _spent(run)) is not None]
        sizes = [value for run in members if (value := run.number("parameters", "total")) is not None]
        found.append(
            Spent(
                flops=sum(flops) / len(flops),
                scores={run.seed: run.metrics[task][metric] for run in members},
                parameters=sum(sizes) / len(sizes) if sizes else math.nan,
                label=_label(members[0]),
            )
        )
    return tuple(sorted(found, key=lambda p: p.flops))


def _label(run: Run) -> str:
    """What is the point's own: ``scale tiny, encoder.width=64, 300 steps``."""
    steps, scale = run.number("cost", "steps"), run.manifest.get("scale")
    sizes = [part for part in run.name.split("+") if _is_size(part)]
    return ", ".join(
        [*([f"scale {scale}"] if scale else []), *sizes, *([f"{steps:.0f} steps"] if steps is not None else [])]
    )


def _levels(points: Sequence[Spent]) -> int:
    """How many different amounts of compute there are."""
    count, last = 0, 0.0
    for point in points:
        if point.flops > APART * last:
            count, last = count + 1, point.flops
    return count
