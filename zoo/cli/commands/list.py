"""zoo list: every name there is, without importing what it stands for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    from fnmatch import fnmatchcase

    from rich.console import Console
    from rich.table import Table

    from zoo.errors import ConfigError, near
    from zoo.plugin import catalogue
    from zoo.registry import KINDS

    parser = argparse.ArgumentParser("zoo list", description="Names of models and parts. Without KIND: the models.")
    parser.add_argument("kind", nargs="?", default="model", help=f"one of {', '.join(KINDS)}, scale, or all")
    parser.add_argument("pattern", nargs="?", default="*", help="shell pattern, e.g. 'clip*'")
    parser.add_argument("--plain", action="store_true", help="names only, one a line")
    parser.add_argument("--table", action="store_true", help="what the models are: how they draw, read, learn; sizes")
    parser.add_argument("--scale", default=None, help="with --table: the size, e.g. tiny (default: as published)")
    parser.add_argument(
        "--out", default=None, metavar="FILE", help="with --table: write it there; .md, .csv or .tex says how"
    )
    arguments = parser.parse_args(argv)
    if not arguments.table and (arguments.out or arguments.scale):
        raise ConfigError("--out and --scale belong to --table: add it")
    kind = arguments.kind.replace("-", "_")
    kind = kind if kind in KINDS else kind.removesuffix("s")
    pattern = arguments.pattern
    if "*" in kind or (kind not in (*KINDS, "all", "scale") and arguments.pattern == "*" and "*" in arguments.kind):
        kind, pattern = "model", arguments.kind
    if arguments.table and pattern == "*" and kind not in (*KINDS, "all", "scale"):
        kind, pattern = "model", arguments.kind
    if kind == "scale" and not arguments.table:
        from zoo.recipe import scales

        print("\n".join(sorted(scales())))
        return 0
    if kind not in (*KINDS, "all"):
        raise ConfigError(f"unknown kind {arguments.kind!r}{near(arguments.kind, (*KINDS, 'scale', 'all'))}")
    if arguments.table:
        if kind != "model":
            raise ConfigError(f"--table is of models, not of {kind}: zoo list --table 'PATTERN'")
        return describe(pattern, arguments.scale, arguments.out)
    kinds = KINDS if kind == "all" else (kind,)
    catalog = catalogue()
    if arguments.plain:
        print("\n".join(c.name for k in kinds for c in catalog[k] if fnmatchcase(c.name, pattern)))
        return 0
    console = Console()
    for k in kinds:
        table = Table(title=f"{k}: {KINDS[k]}", title_justify="left", box=None, padding=(0, 2, 0, 0))
        table.add_column("name", style="bold")
        table.add_column("")
        table.add_column("from", style="dim")
        for component in catalog[k]:
            if fnmatchcase(component.name, pattern):
                owner = catalog[k].plugin(component.name)
                table.add_row(component.name, component.summary, "" if owner == "zoo" else owner)
        console.print(table)
    for broken in catalog.broken:
        Console(stderr=True).print(
            f"plugin {broken.name} is broken: {broken.reason} (zoo doctor)", style="yellow", markup=False
        )
    return 0


def describe(pattern: str, scale: str | None, out: str | None) -> int:
    """Print the characteristics of the models that match a pattern, or write them to a file."""
    import os
    from pathlib import Path

    from rich.console import Console

    from zoo.api import list_models
    from zoo.compare import characteristics_table as table
    from zoo.compare.characteristics import of_recipes
    from zoo.errors import ConfigError, RunError, near
    from zoo.recipe import scales

    formats = {".md": table.to_markdown, ".csv": table.to_csv, ".tex": table.to_latex}
    if out is not None and Path(out).suffix not in formats:
        raise ConfigError(f"--out {out} must end in one of {', '.join(formats)}")
    if scale is not None and scale not in scales():
        raise ConfigError(f"unknown scale {scale!r}{near(scale, scales())}")
    names = list_models(pattern)
    if not names:
        raise ConfigError(f"no model matches {pattern!r}{near(pattern, list_models())}")
    errors = Console(stderr=True)
    with errors.status(f"building {len(names)} recipes without weights", spinner="dots"):
        found, failed = of_recipes(names, scale)
    for name, why in failed.items():
        errors.print(f"{name} is left out: {why}", style="yellow", markup=False)
    if out is None:
        table.print_table(found)
        return 0
    try:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(out).with_name(Path(out).name + ".tmp")
        temporary.write_text(formats[Path(out).suffix](found), encoding="utf-8")
        os.replace(temporary, out)
    except OSError as error:
        raise RunError(f"cannot write {out}: {error.strerror or error}; choose another place") from error
    print(f"{len(found)} models: {out}")
    return 0
