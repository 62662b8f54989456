"""The quantity of a claim, measured on its runs, with what a repetition might be off by.

Differences and interactions of metrics are estimated over seeds and items as everywhere (`zoo.compare.statistics`);
costs, parity and losses have one value a seed, and Student's distribution over seeds. With one seed nothing is known of
other seeds, and FLOPs, which are counted, have no error.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from zoo.claims.claim import Claim
from zoo.claims.parity import parities
from zoo.claims.plan import ONE
from zoo.compare.item_scores import DRAWS, Floats, ItemScores, ScoreFiles, ScoreTable, generator
from zoo.compare.leaderboard import Row, comparable
from zoo.compare.rundir import Run
from zoo.compare.statistics import LEVEL, SEED_DRAWS, Estimate, estimate, paired_estimates
from zoo.errors import RunError
from zoo.evaluation.catalogue import MetricInfo, metric_info

Arms = Mapping[str, Mapping[str, Mapping[str, Run]]]
"""Role -> point -> seed -> run."""

TAIL = 0.1
"""Share of a curve, at its end, whose mean is the loss at the end."""

LOST = 1.0
"""A run is lost that ends this many nats above its lowest loss (a mean over as many lines), or without a loss."""


class Unmeasured(RunError):
    """Why a claim has no answer: runs are missing, or must not be compared."""


@dataclass(frozen=True)
class Measured:
    """A quantity.

    Attributes:
        estimate: Of it, or of its logarithm.
        log: Whether it is the logarithm; ``value`` and ``interval`` are not.
        exact: Counted, not measured: one run is enough, and there is no error.
        below, above: The quantity may be any less, or more: a curve that ended before it crossed.
        facts: What else a reader wants to know: arm -> its number.
    """

    estimate: Estimate
    log: bool = False
    exact: bool = False
    below: bool = False
    above: bool = False
    facts: Mapping[str, str] | None = None

    @property
    def seeds(self) -> int:
        return self.estimate.seeds

    @property
    def exploratory(self) -> bool:
        """Nothing is known of other seeds."""
        return not self.exact and self.seeds < 2

    @property
    def value(self) -> float:
        return self._plain(self.estimate.mean)

    @cached_property
    def interval(self) -> tuple[float, float]:
        """95 %, not widened for other claims."""
        if self.exact:
            return self.value, self.value
        low, high = self.estimate.interval()
        return (
            (0.0 if self.log else -math.inf) if self.below else self._plain(low),
            math.inf if self.above else self._plain(high),
        )

    def p(self, bound: float) -> float:
        """Two-sided p value of the quantity being ``bound``; 0 where it was counted."""
        if self.exact:
            return 0.0 if self.value != bound else 1.0
        at = math.log(bound) if self.log and bound > 0 else -math.inf if self.log else bound
        return replace(self.estimate, mean=self.estimate.mean - at).p if math.isfinite(at) else 0.0

    def detectable(self, level: float = LEVEL) -> float:
        """The least distance from a bound that is found with a chance of 80 % (a factor of a ratio)."""
        return self._plain(self.estimate.detectable(level)) if not self.exact else 0.0

    def _plain(self, value: float) -> float:
        return math.exp(min(value, 700.0)) if self.log else value


def measure(claim: Claim, arms: Arms, files: ScoreFiles | None = None) -> Measured:
    """Measure a claim's quantity on the seeds that all its arms have finished.

    Raises:
        Unmeasured: No seed is finished by all arms, runs must not be compared, or something was not measured.
    """
    kind = claim.config.kind
    if kind == "divergence":
        return _divergence(arms)
    rows = {role: {point: _row(claim, role, runs) for point, runs in points.items()} for role, points in arms.items()}
    shared = set.intersection(*(set(r.seeds) for points in rows.values() for r in points.values()))
    if not shared:
        raise Unmeasured("no seed was finished by all arms")
    rows = {
        role: {point: Row(r.name, tuple(run for run in r.runs if run.seed in shared)) for point, r in points.items()}
        for role, points in rows.items()
    }
    reasons = refusals(claim, rows)
    if reasons:
        raise Unmeasured(f"refused: {reasons[0]}")
    if kind == "cost":
        return _cost(claim, rows["baseline"][ONE], rows["variant"][ONE])
    if kind == "parity":
        return _parity(claim, rows)
    return _scores(claim, rows, files or ScoreFiles())


def _row(claim: Claim, role: str, runs: Mapping[str, Run]) -> Row:
    finished = [run for run in runs.values() if run.status == "done" and not run.problems]
    if not finished:
        said = [f"{run.name} (seed {seed}) {_state(run)}" for seed, run in runs.items()]
        raise Unmeasured("; ".join(said[:2]) or f"{claim.arms[role].label} was not run")
    return Row(claim.arms[role].label, tuple(sorted(finished, key=lambda run: run.seed)))


def _state(run: Run) -> str:
    error = run.manifest.get("error")
    known = {"unknown": "was not started", "done": "; ".join(run.problems), "failed": f"failed: {error}"}
    return known.get(run.status, f"is {run.status}")


def refusals(claim: Claim, rows: Mapping[str, Mapping[str, Row]]) -> list[str]:
    """Why a claim's rows must not be compared, one line each: other data, evaluation, budget or order.

    What a claim itself changes may differ: the budget of parity's points, the training data of ``evaluate_on`` (the
    evaluation is then that on the common data, of which each file of items holds the conditions).
    """
    first = next(iter(rows["baseline"].values()))
    may = ("other budget",) if claim.config.points and claim.config.along == "flops" else ()
    if claim.config.evaluate_on:
        may = (*may, "other data", "other evaluation", "other sample order", "no order", "no data", "no evaluation")
    found = []
    for role, points in rows.items():
        for row in points.values():
            if row is not first:
                reasons = [why for why in comparable(row, first) if not why.startswith(may or ("\0",))]
                found += [f"{row.name} ({role}) against {first.name}: {why}" for why in reasons]
    if claim.config.evaluate_on:
        runs = [run for points in rows.values() for row in points.values() for run in row.runs]
        specs = {_spec(items_of(claim, run), claim.task) for run in runs}
        if len(specs) > 1 or None in specs:
            found.append(f"not all runs were measured on {claim.config.evaluate_on} under the same conditions")
    return found


def items_of(claim: Claim, run: Run) -> Path:
    """The folder whose ``items`` a claim reads: the run's, or that of its evaluation on other data."""
    if not claim.config.evaluate_on:
        return run.path
    config = run.config.get("evaluation")
    split = config.get("split", "test") if isinstance(config, Mapping) else "test"
    return run.path / "eval" / f"{claim.config.evaluate_on}-{split}"


def _spec(folder: Path, task: str) -> str | None:
    """The hash of an evaluation's conditions, out of its file of items."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        held = pq.read_schema(folder / "items" / f"{task}.parquet").metadata or {}
    except (OSError, pa.ArrowException):
        return None
    return held.get(b"spec_hash", b"").decode() or None


def _info(claim: Claim) -> tuple[str, str, MetricInfo]:
    task, _, metric = claim.config.metric.partition("/")
    info = metric_info(task, metric)
    assert info is not None  # the loader looked
    return task, metric, info


def _scores(claim: Claim, rows: Mapping[str, Mapping[str, Row]], files: ScoreFiles) -> Measured:
    """Kinds ``difference`` and ``interaction``: over seeds and items."""
    task, _, info = _info(claim)
    sign = -1.0 if info.higher_is_better is False else 1.0
    scores: dict[str, list[ItemScores]] = {}
    facts = {}
    for role, points in rows.items():
        row = points[ONE]
        read = [files.scores(items_of(claim, run), task, info) for run in row.runs]
        if not read or any(one is None for one in read):
            raise Unmeasured(f"{row.name} has no scores of {claim.config.metric}: {_skipped(row.runs[0], task)}")
        scores[role] = [one for one in read if one is not None]
        values = [float(ScoreTable.of([one]).metrics[0]) for one in scores[role]]
        facts[claim.arms[role].label if role in ("baseline", "variant") else f"{role}: {row.name}"] = _plus_minus(
            values, info.percent
        )
    if claim.config.kind == "difference":
        found = paired_estimates({"": (scores["variant"], scores["baseline"])}, key=task).get("")
    else:
        order = ("variant", "baseline", "than.variant", "than.baseline")
        found = _contrast([scores[role] for role in order], task)
    if found is None:
        raise Unmeasured(f"{claim.config.metric} is not finite, or measured on fewer than two items")
    if sign < 0:
        found = replace(found, mean=-found.mean, errors=-found.errors[::-1])
    return Measured(found, facts=facts)


def _skipped(run: Run, task: str) -> str:
    skipped = run.manifest.get("skipped")
    reason = skipped.get(task) if isinstance(skipped, Mapping) else None
    return str(reason or "evaluate it again")


class _Differences(ScoreTable):
    """Differences of runs in place of runs: what `estimate` then takes is a difference of differences.

    Columns are those of ``table``'s first half less those of its second.
    """

    table: ScoreTable

    @classmethod
    def within(cls, table: ScoreTable) -> _Differences:
        made = cls(table.numerators, table.denominators, table.items, table.key)
        object.__setattr__(made, "table", table)
        return made

    def _halves(self, values: Floats) -> Floats:
        half = values.shape[-1] // 2
        return np.asarray(values[..., :half] - values[..., half:], dtype=np.float64)

    @cached_property
    def metrics(self) -> Floats:
        return self._halves(self.table.metrics)

    @cached_property
    def influence(self) -> Floats:
        return self._halves(self.table.influence)

    @cached_property
    def redrawn(self) -> Floats:
        return self._halves(self.table.redrawn)


def _contrast(scores: Sequence[list[ItemScores]], key: str) -> Estimate | None:
    """(first less second) less (third less fourth), all paired by seed and item."""
    one, two, three, four = scores
    seeds = len(one)
    table = _Differences.within(ScoreTable.of([*one, *three, *two, *four], key))
    return estimate(table, range(seeds), range(seeds, 2 * seeds))


def _plus_minus(values: Sequence[float], percent: bool = False) -> str:
    factor, unit = (100, " %") if percent else (1, "")
    spread = f" ± {factor * statistics.stdev(values):.3g}" if len(values) > 1 else ""
    return f"{factor * statistics.fmean(values):.4g}{spread}{unit}"


def over_seeds(values: Sequence[float], key: str) -> Estimate:
    """The mean of one value a seed, with Student's distribution of S - 1 degrees of freedom.

    One seed has no error that could be told: its interval is the value itself.
    """
    seeds, mean = len(values), statistics.fmean(values)
    scale = statistics.stdev(values) / math.sqrt(seeds) if seeds > 1 else 0.0
    draws = DRAWS * SEED_DRAWS
    drawn = generator(key).standard_t(max(1, seeds - 1), size=16 * draws) if scale else np.zeros(16 * draws)
    drawn = np.sort(drawn)[8::16]  # as quantiles: less noisy than draws at random
    return Estimate(mean, scale * (drawn - drawn[::-1]) / 2, items=0, clusters=0, seeds=seeds)


PATHS = {"flops": ("flops", "total"), "seconds": ("seconds", "training"), "memory": ("peak_memory_bytes",)}
UNITS: Mapping[str, Callable[[float], str]] = {
    "flops": lambda x: f"{x / 1e12:.3g} TFLOP",
    "seconds": lambda x: f"{x:.3g} s",
    "memory": lambda x: f"{x / 1e6:.3g} MB",
}


def _cost(claim: Claim, baseline: Row, variant: Row) -> Measured:
    """Kind ``cost``: the ratio, seed by seed."""
    metric = claim.config.metric
    logs, sums = [], {"baseline": 0.0, "variant": 0.0}
    for own, other in zip(variant.runs, baseline.runs, strict=True):
        new, old = own.number("cost", *PATHS[metric]), other.number("cost", *PATHS[metric])
        if not new or not old:
            raise Unmeasured(f"{(own if not new else other).name} has no {metric} in its manifest")
        logs.append(math.log(new / old))
        sums["variant"] += new / len(variant.runs)
        sums["baseline"] += old / len(baseline.runs)
    facts = {claim.arms[role].label: UNITS[metric](value) for role, value in sums.items()}
    return Measured(over_seeds(logs, metric), log=True, exact=metric == "flops", facts=facts)


def _parity(claim: Claim, rows: Mapping[str, Mapping[str, Row]]) -> Measured:
    """Kind ``parity``: the share of what the baseline took, seed by seed."""
    task, metric, info = _info(claim)
    shares = parities(claim, rows, task, metric, higher=info.higher_is_better is not False)
    if shares is None:
        raise Unmeasured(f"{claim.config.metric} was not measured at every point: give the command again")
    found = over_seeds([math.log(s.share) for s in shares], claim.config.along)
    facts = {
        claim.arms["baseline"].label: f"{shares[0].needed:.4g} {claim.config.along} a seed",
        claim.arms["variant"].label: ", ".join(s.text for s in shares),
    }
    return Measured(
        found, log=True, below=any(s.below for s in shares), above=any(s.above for s in shares), facts=facts
    )


def end_loss(run: Run) -> tuple[float, bool]:
    """The loss at the end, and whether the run is lost. A run without a finite loss at its end counts with its first.

    Raises:
        Unmeasured: No loss was logged, or the run is still under way.
    """
    if run.status not in ("done", "failed", "trained"):
        raise Unmeasured(f"{run.name} (seed {run.seed}) {_state(run)}")
    losses = [float(line["loss"]) for line in run.curve if isinstance(line.get("loss"), int | float)]
    if not losses:
        raise Unmeasured(f"{run.name} (seed {run.seed}) logged no loss")
    count = max(1, round(TAIL * len(losses)))
    end = statistics.fmean(losses[-count:])
    if not math.isfinite(end):
        return next((x for x in losses if math.isfinite(x)), math.inf), True
    means = [statistics.fmean(losses[i : i + count]) for i in range(len(losses) - count + 1)]
    return end, end > min(x for x in means if math.isfinite(x)) + LOST


def _divergence(arms: Arms) -> Measured:
    """Kind ``divergence``: loss at the end, seed by seed; a failed run counts as well."""
    ends: dict[str, dict[str, tuple[float, bool]]] = {
        role: {seed: end_loss(run) for seed, run in points[ONE].items()} for role, points in arms.items()
    }
    seeds = [seed for seed in ends["baseline"] if seed in ends["variant"]]
    if not seeds:
        raise Unmeasured("no seed was finished by both arms")
    firsts = {role: next(iter(points[ONE].values())) for role, points in arms.items()}
    differ = [kind for kind in ("data", "budget") if len({run.hashes.get(kind) for run in firsts.values()}) > 1]
    if differ:
        raise Unmeasured(f"refused: the arms differ in {' and '.join(differ)}")
    gains = [ends["baseline"][seed][0] - ends["variant"][seed][0] for seed in seeds]
    facts = {
        role: f"{_plus_minus([ends[role][s][0] for s in seeds])} nats, "
        f"{sum(ends[role][s][1] for s in seeds)} of {len(seeds)} lost"
        for role in ("baseline", "variant")
    }
    return Measured(over_seeds(gains, "divergence"), facts=facts)
