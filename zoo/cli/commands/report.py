"""zoo report: the leaderboard in the terminal and one self-contained HTML page."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("zoo report", description="Compare runs: a table here, and one HTML page.")
    parser.add_argument(
        "runs", nargs="*", default=["outputs"], help="run directories, or folders that hold some (outputs)"
    )
    parser.add_argument(
        "--out", default=None, metavar="FILE", help="the page (default: report.html in the first folder)"
    )
    parser.add_argument("--baseline", default=None, metavar="NAME", help="run name differences are taken to")
    arguments = parser.parse_args(argv)
    from zoo.compare.report import make_report

    out = Path(arguments.out) if arguments.out else Path(arguments.runs[0]) / "report.html"
    page = make_report([Path(run) for run in arguments.runs], out, baseline=arguments.baseline)
    print(page.resolve())
    return 0
