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
    parser.add_argument(
        "--sweep",
        default=None,
        metavar="FIELD=VALUE,...",
        help="evaluate once a value, e.g. steps=8,16,32; each goes into eval/FIELD=VALUE, and zoo report draws them",
    )
    parser.add_argument("--data", default=None, metavar="NAME[,FIELD=VALUE...]", help="e.g. folder,root=photos")
    parser.add_argument("--out", default=None, help="folder for metrics.json, items and samples")
    parser.add_argument("--model", help="recipe of an official file")
    arguments = parser.parse_args(argv)
    from zoo.cli.checkpoint import load
    from zoo.evaluation.sweep import Sweep, write_sweep
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
    sweep = Sweep.parse(arguments.sweep) if arguments.sweep else None
    parse = catalogue()["task"].parse
    if sweep:
        tasks = sweep.tasks(tasks, catalogue()["task"].config_class)
        for value in sweep.values:  # all of them are checked before the first is evaluated
            built = [parse(name, {**fields, sweep.field: value}, name).build() for name, fields in tasks.items()]
    built = [parse(name, fields, name).build() for name, fields in tasks.items()]
    data = parse_data(arguments.data) if arguments.data else dict(run.data) if run else {"name": "openmoji"}
    name = data.pop("name")
    config = catalogue()["data"].parse(name, data, "data")
    module = load(arguments.checkpoint, arguments.model)
    source = config.build(module.recipe.image_size)
    split = arguments.split or (run.evaluation.split if run else "test")
    home = Path(arguments.out) if arguments.out else folder / "eval" if run else None
    if not sweep:
        out = home if arguments.out else home and home / f"{name}-{split}"
        _evaluate(module, source, split, built, out)
        return 0
    conditions = {task.name: task.spec_hash(source, split) for task in built}
    for label, changed in sweep.jobs(module.model):
        now = [parse(name, {**fields, **changed}, name).build() for name, fields in tasks.items()]
        out = home and home / label
        done = _evaluate(module, source, split, now, out, label)
        if out and done:
            write_sweep(out, sweep.field, changed.get(sweep.field), conditions, done)
    return 0


def _evaluate(
    module: Any, source: Any, split: str, tasks: Sequence[Any], out: Path | None, title: str = ""
) -> list[str]:
    """Evaluate, print what was found, and return the tasks that were measured."""
    from rich.table import Table

    from zoo.cli.progress import Bars
    from zoo.evaluation.run import evaluate

    with Bars(module.recipe.name) as bars:
        result = evaluate(
            module.model, source, split, tasks, out, lambda task, done, total: bars(task, done, total, {})
        )
    table = Table("task", "metric", "value", box=None, title=title or None, title_justify="left")
    for task, metrics in result["metrics"].items():
        for metric, value in metrics.items():
            table.add_row(task, metric, f"{value:.4f}" if isinstance(value, float) else str(value))
    bars.console.print(table)
    for task, reason in result["skipped"].items():
        bars.console.print(f"{task}: skipped, {reason}", style="dim", markup=False)
    if out:
        bars.console.print(str(out / "metrics.json"), markup=False)
    return list(result["metrics"])


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
