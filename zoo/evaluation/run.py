"""Evaluating a model on several tasks and writing what a run directory keeps of it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.capabilities import capabilities_of
from zoo.errors import RunError
from zoo.evaluation.naming import name_of
from zoo.evaluation.task import Progress, SourceLike, Task, TaskResult, choose_ids, digest, sample_ids, thumbnail


def evaluation_hash(tasks: Sequence[Task], source: SourceLike, split: str, dtype: str = "float32") -> str:
    """Return the hash that two runs must share to be compared: every task's spec and the dtype of the weights.

    It covers the tasks that were asked for, whether or not a model can do them, so that models of different
    capabilities evaluated by one command agree.
    """
    return _hash({task.name: task.spec(source, split) for task in tasks}, dtype)


def _hash(specs: Mapping[str, Mapping[str, Any]], dtype: str) -> str:
    return digest({"tasks": sorted(map(digest, specs.values())), "dtype": dtype})


def evaluate(
    model: Any,
    source: SourceLike,
    split: str,
    tasks: Sequence[Task],
    out_dir: Path | str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run every task whose capabilities ``model`` offers; write metrics.json, items/<task>.parquet and samples.json.

    Args:
        out_dir: the run directory; files are replaced whole, never left half written. ``None`` writes nothing.
        progress: called as ``progress(task, done, total)`` after each batch.

    Returns:
        ``{"metrics": {task: {metric: value}}, "hash": str, "conditions": {"dtype", "tasks": {task: spec}} (what the
        hash is of), "specs": {task: hash}, "skipped": {task: why}, "capabilities": (...), "results": {task:
        TaskResult}, "samples": [...]}``.

    Raises:
        RunError: two tasks share a name, or the directory cannot be written.
        DataError: the split cannot be evaluated.
    """
    names = [task.name for task in tasks]
    if len(set(names)) != len(names):
        raise RunError(f"the tasks {', '.join(names)} contain one twice; a run keeps one result a task")
    if out_dir is not None:
        _check_writable(Path(out_dir))  # before the long work
    check_tasks(tasks)
    results: dict[str, TaskResult] = {}
    skipped: dict[str, str] = {}
    for task in tasks:
        missing = task.missing(model)
        if missing:
            skipped[task.name] = f"the model does not offer {', '.join(missing)}"
            continue
        results[task.name] = task.run(model, source, split, progress)
    samples = _samples(results, source, split)
    dtype, specs = weights_dtype(model), {task.name: task.spec(source, split) for task in tasks}
    report = {
        "metrics": {name: result.metrics for name, result in results.items()},
        "hash": _hash(specs, dtype),
        "conditions": {"dtype": dtype, "tasks": specs},
        "specs": {name: digest(spec) for name, spec in specs.items()},
        "skipped": skipped,
        "capabilities": capabilities_of(model),
        "results": results,
        "samples": samples,
    }
    if out_dir is not None:
        write_results(Path(out_dir), results, samples)
    return report


def check_tasks(tasks: Sequence[Task]) -> None:
    """Let every task that leans on files look for them, before any long work.

    Raises:
        ConfigError: something is missing, such as the evaluator of generated images.
    """
    for task in tasks:
        check = getattr(getattr(task, "config", None), "check", None)
        if callable(check):
            check()


def write_results(out_dir: Path, results: dict[str, TaskResult], samples: list[dict[str, Any]]) -> None:
    """Write metrics.json, items/<task>.parquet and samples.json into a run directory.

    Raises:
        RunError: the disk is full or the directory cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        (out_dir / "items").mkdir(parents=True, exist_ok=True)
        for name, result in results.items():
            columns: dict[str, None] = {key: None for row in result.items for key in row}
            table = pa.table({key: [row.get(key) for row in result.items] for key in columns})
            table = table.replace_schema_metadata({"spec_hash": result.spec_hash, "task": name})
            path = out_dir / "items" / f"{name}.parquet"
            pq.write_table(table, path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)
        _write_json(out_dir / "samples.json", samples)
        _write_json(out_dir / "metrics.json", {name: result.metrics for name, result in results.items()})
    except OSError as error:
        raise RunError(
            f"cannot write the results to {out_dir}: {error.strerror or error}; free space or choose another"
        ) from error


def _write_json(path: Path, value: Any) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, ensure_ascii=False, indent=1, allow_nan=True) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _check_writable(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".write-probe"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise RunError(
            f"cannot write to {path}: {error.strerror or error}; choose a folder you can write to"
        ) from error


def weights_dtype(model: Any) -> str:
    """Return the precision a model is evaluated in: the dtypes of its weights, as ``float32`` or ``bfloat16+float32``,
    and what matrix products of fp32 are rounded to where that is less. Models without weights count as float32."""
    import torch

    parameters = getattr(model, "parameters", None)
    dtypes = {p.dtype for p in parameters()} if callable(parameters) else set()
    name = "+".join(sorted(str(d).removeprefix("torch.") for d in dtypes)) or "float32"
    products = torch.get_float32_matmul_precision()
    return name if products == "highest" or torch.float32 not in dtypes else f"{name}, products {products}"


def _samples(results: dict[str, TaskResult], source: SourceLike, split: str) -> list[dict[str, Any]]:
    """Merge what each task shows of an item: written text first, then the nearest captions, then likelihoods."""
    outputs: dict[str, dict[str, dict[str, Any]]] = {}
    for name, result in results.items():
        for entry in result.samples:
            outputs.setdefault(entry["id"], {})[name] = {key: value for key, value in entry.items() if key != "id"}
    merged = []
    for item in sample_ids([i for i in choose_ids(source, split, 0) if i in outputs]):
        sample = source.sample(item)
        shown = outputs[item]
        main = max(
            shown.values(), key=lambda entry: _PREFERENCE.index(entry["kind"]) if entry["kind"] in _PREFERENCE else -1
        )
        merged.append(
            {
                "id": item,
                "image": thumbnail(sample.image) if sample.image is not None else "",
                "reference": name_of(sample),
                "output": main["output"],
                "outputs": shown,
            }
        )
    return merged


_PREFERENCE = ("drawn scene", "drawn", "likelihood", "answers", "likeliest names", "nearest captions", "written")
"""Which kind of output says most about a model, last wins."""
