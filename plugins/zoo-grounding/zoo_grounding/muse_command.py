"""``zoo muse``: MUSE's JSON, written from COCO's annotations."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from zoo.errors import ConfigError


def main(arguments: Sequence[str]) -> int:
    """Write questions, answers and masks about the images of one file of annotations; returns the exit status.

    Raises:
        ZooError: A wrong value, or files that cannot be read; nothing is written then.
    """
    parser = argparse.ArgumentParser(prog="zoo muse", description=__doc__)
    parser.add_argument("--root", required=True, help="the folder that is or holds the images")
    parser.add_argument("--instances", required=True, help="COCO's annotations, as instances_val2017.json")
    parser.add_argument("--out", required=True, help="the file to write, for data=muse and the released loader")
    parser.add_argument("--ask", default="any", help="any, or kinds joined by +: names, every, group, largest, ...")
    parser.add_argument("--questions", type=int, default=3, help="questions about an image, at most")
    parser.add_argument("--targets", default="1..5", help="targets of an answer, a number or a range")
    parser.add_argument("--min-area", type=float, default=0.002, help="smaller instances are left out, of the image")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(list(arguments))
    out = Path(given.out).expanduser()
    if not out.parent.is_dir():
        raise ConfigError(f"--out {given.out!r}: the folder {str(out.parent)!r} does not exist")
    from zoo_grounding.muse_generated import MuseCocoConfig, muse_rows

    config = MuseCocoConfig(
        root=given.root, test=given.instances, splits="test", ask=given.ask, questions=given.questions,
        targets=given.targets, min_area=given.min_area, seed=given.seed,
    )  # fmt: skip
    rows = list(muse_rows(config.open(None), given.instances, "test"))
    out.write_text(json.dumps(rows), encoding="utf-8")
    questions = sum(len(row["questions"]) for row in rows)
    targets = sum(len(answer) for row in rows for answer in row["answers"])
    print(f"{out}: {len(rows)} images, {questions} questions, {targets} targets")
    return 0
