"""Quality of drawn images against the forward passes they took: the table and the plot of docs/text-and-images.md.

    zoo eval RUN --tasks text-to-image --sweep steps=8,16,32,64
    python benchmarks/steps_against_quality.py Show-o=RUN Chameleon=RUN/eval/guidance=1 --out docs/steps.svg

A folder is a run, whose every ``eval/steps=N`` is a point, or one evaluation (a folder with metrics.json), one point.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from zoo.compare.charts import Trend, trends
from zoo.compare.plotting import standalone

COLUMNS = ("score", "score_other", "r_precision", "frechet", "cmmd")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="LABEL=FOLDER")
    parser.add_argument("--metric", default="score")
    parser.add_argument("--out", type=Path, metavar="FILE.svg")
    arguments = parser.parse_args()
    curves = {}
    for given in arguments.folders:
        label, equals, folder = given.partition("=")
        if not equals:
            parser.error(f"{given}: expected LABEL=FOLDER")
        curves[label] = points(Path(folder))
        if not curves[label]:
            parser.error(f"{folder}: no eval/steps=N and no metrics.json of text-to-image; run zoo eval first")
    print(f"| model | passes | {' | '.join(COLUMNS)} |\n| --- | --- | {' | '.join('---' for _ in COLUMNS)} |")
    for label, found in curves.items():
        for point in found:
            print(f"| {label} | {point['passes']:.0f} | {' | '.join(f'{point[c]:.3f}' for c in COLUMNS)} |")
    last = next(iter(curves.values()))[0]
    real = [last[f"{column}_real"] for column in COLUMNS]
    print(f"| real images | | {' | '.join(f'{value:.3f}' for value in real)} |")
    if arguments.out:
        drawn = [
            Trend(
                points=[(p["passes"], p[arguments.metric]) for p in found],
                hollow=[False] * len(found),
                label=label,
                series=n,
            )
            for n, (label, found) in enumerate(curves.items())
        ]
        svg = trends(
            drawn, "forward passes an image", arguments.metric, lambda y: f"{y:.2f}",
            f"{arguments.metric} against forward passes", last[f"{arguments.metric}_real"], "real images",
        )  # fmt: skip
        arguments.out.write_text(standalone(svg), encoding="utf-8")


def points(folder: Path) -> list[dict[str, Any]]:
    """Return the task's metrics of every evaluation, by passes."""
    files = sorted(folder.glob("eval/steps=*/metrics.json")) or [folder / "metrics.json"]
    found = [json.loads(file.read_text(encoding="utf-8")).get("text-to-image") for file in files if file.exists()]
    return sorted((f for f in found if f), key=lambda f: f["passes"])


if __name__ == "__main__":
    main()
