"""At what share of the baseline's compute, or of its forward passes, the variant has the baseline's score."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from zoo.claims.claim import Claim
from zoo.compare.leaderboard import Row
from zoo.compare.rundir import Run
from zoo.compare.scaling import Point, crossing


@dataclass(frozen=True)
class Share:
    """Of one seed.

    Attributes:
        share: What the variant needs divided by what the baseline took.
        needed: What the baseline took.
        below: The variant was as good at its first point already: the share is at most this.
        above: It never was: the share is at least this.
    """

    share: float
    needed: float
    below: bool = False
    above: bool = False

    @property
    def text(self) -> str:
        return f"{'≤ ' if self.below else '≥ ' if self.above else ''}{self.share:.3g}"


def parities(
    claim: Claim, rows: Mapping[str, Mapping[str, Row]], task: str, metric: str, higher: bool
) -> list[Share] | None:
    """The share of every seed; None where a point was not measured.

    The baseline's score is that of its most expensive point.
    """
    read = _by_flops if claim.config.along == "flops" else _by_passes
    curves = {role: read(points, task, metric) for role, points in rows.items()}
    shares = []
    for seed, baseline in curves["baseline"].items():
        variant = curves["variant"].get(seed)
        if not variant or not baseline:
            return None
        needed, target = max(baseline)
        spent, below, above = crossing(variant, target, higher)
        shares.append(Share(spent / needed, needed, below, above))
    return shares or None


def _by_flops(points: Mapping[str, Row], task: str, metric: str) -> dict[str, list[Point]]:
    """Seed -> training FLOPs and score of its runs; nothing where one lacks either."""
    found: dict[str, list[Point]] = {}
    for row in points.values():
        for run in row.runs:
            spent, score = run.number("cost", "flops", "total"), run.metrics.get(task, {}).get(metric)
            curve = found.setdefault(run.seed, [])
            if spent and score is not None:
                curve.append((spent, score))
    return {seed: curve if len(curve) == len(points) else [] for seed, curve in found.items()}


def _by_passes(points: Mapping[str, Row], task: str, metric: str) -> dict[str, list[Point]]:
    """Seed -> forward passes an image and score, of the evaluations that ``zoo eval --sweep steps=`` left."""
    (row,) = points.values()
    return {run.seed: _swept(run, task, metric) for run in row.runs}


def _swept(run: Run, task: str, metric: str) -> list[Point]:
    curve = []
    for file in sorted(run.path.glob("eval/steps=*/metrics.json")):
        try:
            found = json.loads(file.read_text(encoding="utf-8"))[task]
            curve.append((float(found["passes"]), float(found[metric])))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return curve
