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
    from zoo.compare.leaderboard import build_leaderboard
    from zoo.compare.report import report_command, write_report
    from zoo.compare.rundir import find_runs
    from zoo.compare.tables import print_leaderboard

    board = build_leaderboard(find_runs(arguments.runs), arguments.baseline)
    print_leaderboard(board)
    out = Path(arguments.out) if arguments.out else Path(arguments.runs[0]) / "report.html"
    page = write_report(board, out, command=report_command(arguments.runs, arguments.baseline))
    print(f"\nthe whole comparison: {page.resolve()}")
    return 0
