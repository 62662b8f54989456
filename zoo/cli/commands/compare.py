"""zoo compare: a sweep, its evaluation and its report in one command; or the report of runs that are there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from zoo.errors import ConfigError, RunError

USAGE = """usage: zoo compare experiment=NAME scale=SCALE [KEY=VALUE ...] [--baseline NAME] [--out FILE]
       zoo compare RUN RUN ... [--baseline NAME] [--out FILE]

  zoo compare experiment=understanding scale=tiny       every run of the experiment, then one page about them
  zoo compare experiment=connectors scale=tiny          likewise; first the eye that they share
  zoo compare model=clip,albef seed=0,1,2 scale=tiny    any sweep that zoo train -m takes
  zoo compare outputs/clip* outputs/albef*              the page alone, of runs that are there

  --baseline NAME    the run that differences are taken to
  --out FILE         the page (default: OUT/EXPERIMENT.html, OUT/compare.html)
  --dry-run          print the resolved runs and stop

All that is wrong with a variant's configuration is said before the first run starts. One that fails later is named
here and in the page, and the others go on; the exit status is then 2. The same command goes on where it was stopped
or killed, and repeats nothing that is done. Settings are those of zoo train (zoo train --help)."""


def main(argv: Sequence[str]) -> int:
    """Returns 0 when every run is in the page, 2 when one failed, 130 when interrupted (no page is then written)."""
    if not argv or "-h" in argv or "--help" in argv:
        print(USAGE)
        return 0
    given, options = split_options(argv)
    runs = [text for text in given if Path(text).exists()]
    settings = [text for text in given if text not in runs and is_setting(text)]
    missing = [text for text in given if text not in runs and text not in settings and not text.startswith("-")]
    if missing:
        raise RunError(f"{missing[0]} does not exist: give run directories, or settings as KEY=VALUE")
    if runs and settings:
        raise ConfigError(f"{runs[0]} is a run and {settings[0]} a setting: give runs to report, or settings to train")
    if runs:
        report(runs, options.get("--out") or str(report_home(runs) / "compare.html"), options.get("--baseline"), argv)
        return 0
    return compare(given, options, argv)


def compare(given: Sequence[str], options: dict[str, str], argv: Sequence[str]) -> int:
    """Train and evaluate what is not done yet, then report exactly these runs."""
    from zoo.cli.commands.train import exit_status, train

    flags = [text for text in given if text.startswith("-")]
    outcomes = train([*given, *([] if {"-m", "--multirun"} & set(flags) else ["-m"])])
    if not outcomes:  # --dry-run
        return 0
    done = sum(outcome.status == "done" for outcome in outcomes)
    print(f"{done} of {len(outcomes)} runs are done")
    if any(outcome.status == "interrupted" for outcome in outcomes):
        print("interrupted; the same command goes on from there")
        return 130
    for outcome in outcomes:
        if outcome.status != "done":
            print(f"{outcome.status}: {outcome.folder}: {outcome.error}")
    page = options.get("--out") or str(default_page(given))
    report([str(outcome.folder) for outcome in outcomes], page, options.get("--baseline"), argv)
    return exit_status(outcomes)


def report(runs: Sequence[str], out: str, baseline: str | None, argv: Sequence[str]) -> None:
    """Print the leaderboard of runs and write their page."""
    import shlex

    from zoo.compare.leaderboard import build_leaderboard
    from zoo.compare.report import write_report
    from zoo.compare.rundir import find_runs
    from zoo.compare.tables import print_leaderboard

    board = build_leaderboard(find_runs(runs), baseline)
    print_leaderboard(board)
    page = write_report(board, out, command=shlex.join(["zoo", "compare", *argv]))
    print(f"\nthe whole comparison: {page.resolve()}")


def split_options(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Tell ``--baseline NAME`` and ``--out FILE`` from what zoo train takes.

    Raises:
        ConfigError: An option without its value.
    """
    given: list[str] = []
    options: dict[str, str] = {}
    texts = iter(argv)
    for text in texts:
        name, equals, value = text.partition("=")
        if name not in ("--baseline", "--out"):
            given.append(text)
            continue
        options[name] = value if equals else next(texts, "")
        if not options[name]:
            raise ConfigError(f"{name} needs a value")
    return given, options


def is_setting(text: str) -> bool:
    """Whether this is KEY=VALUE; paths of runs hold a ``=`` too, behind a ``/``."""
    key, equals, _ = text.partition("=")
    return bool(equals) and ("/" not in key or key.lstrip("+").startswith("hydra/"))


def report_home(runs: Sequence[str]) -> Path:
    """The folder of the page: that of the runs, or the one they lie in together."""
    import os

    folders = [Path(run) if Path(run).is_dir() else Path(run).parent for run in runs]
    common = Path(os.path.commonpath([folder.resolve() for folder in folders]))
    return common if len(folders) > 1 or not (common / "manifest.json").is_file() else folders[0]


def default_page(given: Sequence[str]) -> Path:
    """``OUT/EXPERIMENT.html``."""
    values = dict(text.lstrip("+").split("=", 1) for text in given if is_setting(text))
    return Path(values.get("out", "outputs")) / f"{values.get('experiment', 'compare').replace(',', '+')}.html"
