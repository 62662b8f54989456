"""zoo claims: what papers say of architectures, as comparisons: listed, run, and answered."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str]) -> int:
    """Returns 0 when all that was asked for is done, 2 when a claim's run failed, 130 when interrupted."""
    parser = argparse.ArgumentParser("zoo claims", description="Claims of papers about architectures, as comparisons.")
    commands = parser.add_subparsers(dest="command", required=True)
    listed = commands.add_parser("list", help="every claim: the paper's numbers, runs, minutes, state")
    run = commands.add_parser(
        "run",
        help="train and evaluate what claims compare, then answer",
        description="Train and evaluate what claims compare. What is done is not repeated, what was interrupted goes"
        " on, and a claim that fails does not keep the others from running.",
    )
    report = commands.add_parser("report", help="reproduced, not at this scale or contradicted, with the interval")
    for command in (listed, run, report):
        several = "*" if command is not run else "+"
        command.add_argument("names", nargs=several, metavar="NAME", help="of a claim (T8-linear), or an id (T8)")
        command.add_argument("--scale", default="tiny", help="of all runs (tiny)")
        command.add_argument("--out", default="outputs", metavar="FOLDER", help="where run directories are (outputs)")
    run.add_argument("--seeds", default="0,1,2", help="training seeds (0,1,2); one is exploratory")
    run.add_argument("--dry-run", action="store_true", help="print the runs with their expected minutes, and stop")
    run.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="settings", help="of every run; other runs then"
    )
    report.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    report.add_argument("--html", metavar="FILE", help="write a page with the table")
    arguments = parser.parse_args(argv)
    out = Path(arguments.out)
    if arguments.command == "list":
        return _list(arguments.names, arguments.scale, out)
    if arguments.command == "report":
        return _report(arguments.names, arguments.scale, out, arguments.markdown, arguments.html)
    return _run(arguments, out)


def _list(names: Sequence[str], scale: str, out: Path) -> int:
    from zoo.claims.claim import read_claims
    from zoo.claims.report import print_list
    from zoo.claims.verdict import answers

    print_list(answers(read_claims(list(names)), scale, out))
    return 0


def _report(names: Sequence[str], scale: str, out: Path, as_markdown: bool, page: str | None) -> int:
    from zoo.claims.claim import read_claims
    from zoo.claims.report import print_answers, to_markdown, write_page
    from zoo.claims.verdict import answers

    given = answers(read_claims(list(names)), scale, out)
    if page:
        print(write_page(given, scale, Path(page)))
    if as_markdown:
        print(to_markdown(given, scale), end="")
    elif not page:
        print_answers(given, scale)
    return 0


def _run(arguments: argparse.Namespace, out: Path) -> int:
    from zoo.claims.claim import read_claims
    from zoo.claims.report import print_answers
    from zoo.claims.verdict import answers
    from zoo.cli.claim_runs import Resolver, check, run, show
    from zoo.errors import ConfigError

    try:
        seeds = [int(text) for text in arguments.seeds.split(",")]
    except ValueError:
        raise ConfigError(f"--seeds {arguments.seeds}: expected numbers, as in 0,1,2") from None
    if len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ConfigError(f"--seeds {arguments.seeds}: expected different seeds of 0 or more")
    claims = read_claims(arguments.names)
    resolver = Resolver(arguments.scale, seeds, out, arguments.settings)
    found = [resolver.claim(claim) for claim in claims]  # all that can be wrong is found before the first run
    if arguments.dry_run:
        show(found)
        return 0
    check(found)
    failed, interrupted = run(found, arguments.scale, out, arguments.settings)
    if interrupted:
        print("interrupted; the same command goes on from there")
        return 130
    print()
    print_answers(answers(claims, arguments.scale, out), arguments.scale)
    for name, error in failed.items():
        print(f"claim {name} failed: {error}")
    return 2 if failed else 0
