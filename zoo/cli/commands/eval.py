"""zoo eval: evaluate a finished run again, or a checkpoint on any data."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        "zoo eval",
        description="Evaluate a run or checkpoint. Results of a run go into its directory, others into --out.",
    )
    parser.add_argument("checkpoint", help="run directory, checkpoint folder, official file or hub id")
    parser.add_argument("--split", default=None, help="train, val or test (default: the run's, else test)")
    parser.add_argument("--tasks", default=None, help="comma-separated task names (default: the run's, else all)")
    parser.add_argument(
        "--task",
        action="append",
        default=[],
        metavar="NAME[,FIELD=VALUE...]",
        help="a task with its fields, e.g. text-to-image,evaluator=RUN,items=100; may be given several times",
    )
    parser.add_argument("--data", default=None, metavar="NAME[,FIELD=VALUE...]", help="e.g. folder,root=photos")
    parser.add_argument("--out", default=None, help="folder for metrics.json, items and samples")
    parser.add_argument("--model", help="recipe of an official file")
    arguments = parser.parse_args(argv)
    from rich.table import Table

    from zoo.cli.checkpoint import load
    from zoo.cli.progress import Bars
    from zoo.evaluation.run import evaluate
    from zoo.plugin import catalogue
    from zoo.run_config import EvaluationConfig, RunConfig

    folder = Path(arguments.checkpoint)
    run = RunConfig.read(folder / "run.yaml") if (folder / "run.yaml").is_file() else None
    tasks = run.evaluation.tasks if run else EvaluationConfig().tasks
    if arguments.tasks:
        tasks = {name: tasks.get(name, {}) for name in arguments.tasks.split(",")}
    if arguments.task:
        asked = [parse_data(text, "--task") for text in arguments.task]
        given = {fields.pop("name"): fields for fields in asked}
        kept = tasks if arguments.tasks else {}
        tasks = {**kept, **{name: {**tasks.get(name, {}), **fields} for name, fields in given.items()}}
    built = [catalogue()["task"].parse(name, fields, name).build() for name, fields in tasks.items()]
    data = parse_data(arguments.data) if arguments.data else dict(run.data) if run else {"name": "openmoji"}
    name = data.pop("name")
    config = catalogue()["data"].parse(name, data, "data")
    module = load(arguments.checkpoint, arguments.model)
    source = config.build(module.recipe.image_size)
    split = arguments.split or (run.evaluation.split if run else "test")
    out = Path(arguments.out) if arguments.out else (folder / "eval" / f"{name}-{split}" if run else None)
    with Bars(module.recipe.name) as bars:
        result = evaluate(
            module.model, source, split, built, out, lambda task, done, total: bars(task, done, total, {})
        )
    table = Table("task", "metric", "value", box=None)
    for task, metrics in result["metrics"].items():
        for metric, value in metrics.items():
            table.add_row(task, metric, f"{value:.4f}" if isinstance(value, float) else str(value))
    bars.console.print(table)
    for task, reason in result["skipped"].items():
        bars.console.print(f"{task}: skipped, {reason}", style="dim", markup=False)
    if out:
        bars.console.print(str(out / "metrics.json"), markup=False)
    return 0


def parse_data(text: str, option: str = "--data") -> dict[str, Any]:
    """``"folder,root=photos,max_bad=3"`` as a mapping; values are read as JSON where they can be.

    Raises:
        ConfigError: A field without ``=``.
    """
    from zoo.errors import ConfigError

    name, *fields = text.split(",")
    out: dict[str, Any] = {"name": name}
    for field in fields:
        key, equals, value = field.partition("=")
        if not equals:
            raise ConfigError(f"{option}: expected FIELD=VALUE, got {field!r}")
        try:
            out[key] = json.loads(value)
        except json.JSONDecodeError:
            out[key] = value
    return out
