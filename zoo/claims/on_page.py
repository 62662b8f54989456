"""Which claims a report shows: those whose runs are all on its page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from zoo.claims.claim import read_claims
from zoo.claims.plan import FOLDER, read_plan
from zoo.claims.report import to_html
from zoo.claims.verdict import answers
from zoo.compare.rundir import Run


def claims_html(runs: Sequence[Run]) -> str:
    """The section of claims, empty where there is none.

    Runs know the folder they were written to (``OUT/NAME/seed=...``), and it what was claimed of them
    (``zoo claims run --out OUT``). p is corrected over all claims that were run there, shown or not, so that a page and
    ``zoo claims report`` say the same.
    """
    shown = {run.path.resolve() for run in runs}
    sections = []
    for out in dict.fromkeys(path.parents[1] for path in sorted(shown) if (path.parents[1] / FOLDER).is_dir()):
        for scale in sorted(folder.name for folder in (out / FOLDER).iterdir() if folder.is_dir()):
            sections.append(_section(out, scale, shown))
    return "".join(sections)


def _section(out: Path, scale: str, shown: set[Path]) -> str:
    claims = read_claims()
    plans = {claim.name: read_plan(claim, scale, out) for claim in claims}
    known = [claim for claim in claims if plans[claim.name] is not None]
    kept = set()
    for name, plan in plans.items():
        if plan is not None:
            folders = [
                folder for points in plan.runs.values() for seeds in points.values() for folder in seeds.values()
            ]
            if all((out / folder).resolve() in shown for folder in folders):
                kept.add(name)
    given = [answer for answer in answers(known, scale, out) if answer.claim.name in kept]
    return to_html(given, scale) if given else ""
