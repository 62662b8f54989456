"""zoo plugin new NAME: a working plugin to start from."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("zoo plugin", description="Write the skeleton of a plugin.")
    commands = parser.add_subparsers(dest="command", required=True)
    new = commands.add_parser("new", help="write a plugin that installs, registers a connector and passes its tests")
    new.add_argument("name", help="e.g. my-parts; the package becomes my_parts")
    new.add_argument("--folder", default=".", help="where to put it")
    arguments = parser.parse_args(argv)
    from zoo.cli.new_plugin import new_plugin

    folder = new_plugin(arguments.name, Path(arguments.folder))
    print(f"{folder}: now run pip install -e {folder} and pytest {folder}")
    return 0
