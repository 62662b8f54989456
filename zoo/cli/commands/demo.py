"""zoo demo: CLIP, three connectors and a blind control on real images, at equal data order and budget, then the
report.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

COMMANDS = (
    ("model=clip",),
    ("model=llava", "connector=linear,mlp,qformer", "-m"),
    ("model=llava", "data.blank_images=true"),
)
"""The control is trained and evaluated on blank images: what a caption's likelihood owes to language alone."""


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("zoo demo", description=__doc__)
    parser.add_argument("--out", default="outputs/demo", help="folder of the runs and the page")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=None, help="optimizer steps of every run")
    arguments = parser.parse_args(argv)
    from zoo.cli.commands.report import main as report
    from zoo.cli.commands.train import train

    common = ["experiment=demo", "scale=tiny", f"seed={arguments.seed}", f"out={arguments.out}"]
    if arguments.steps:
        common.append(f"budget.value={arguments.steps}")
    for command in COMMANDS:
        outcomes = train([*command, *common])
        if any(o.status == "interrupted" for o in outcomes):
            return 130
        if any(o.status == "failed" for o in outcomes):
            return 2
    return report([arguments.out])
