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
    arguments = parser.parse_args(argv)
    kind = arguments.kind.replace("-", "_")
    kind = kind if kind in KINDS else kind.removesuffix("s")
    pattern = arguments.pattern
    if "*" in kind or (kind not in (*KINDS, "all", "scale") and arguments.pattern == "*" and "*" in arguments.kind):
        kind, pattern = "model", arguments.kind
    if kind == "scale":
        from zoo.recipe import scales

        print("\n".join(sorted(scales())))
        return 0
    if kind not in (*KINDS, "all"):
        raise ConfigError(f"unknown kind {arguments.kind!r}{near(arguments.kind, (*KINDS, 'scale', 'all'))}")
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
