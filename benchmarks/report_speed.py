"""How long `zoo report` takes over many runs, and which part of it.

    python benchmarks/report_speed.py                                  # 201 runs: 67 recipes of 3 seeds, 1,000 items
    python benchmarks/report_speed.py --recipes 10 --seeds 2 --profile 25
    python benchmarks/report_speed.py --keep /tmp/many-runs            # leaves the runs and the report there

Run directories are made up as docs/architecture.md describes them: per-item scores of all metrics of three tasks (two
items an image), loss curves, samples with pictures, manifests. Then the parts of the command are timed one by one, in a
process that has imported what it needs, with one warm-up over three recipes.
"""

from __future__ import annotations

import argparse
import base64
import cProfile
import io
import json
import pstats
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image
from rich.console import Console

from zoo.compare.leaderboard import build_leaderboard
from zoo.compare.report import write_report
from zoo.compare.rundir import find_runs
from zoo.compare.tables import print_leaderboard
from zoo.evaluation.catalogue import METRICS

TASKS = ("question-answering", "caption-likelihood", "retrieval")


def make_runs(root: Path, recipes: int, seeds: int, items: int, samples: int = 12) -> int:
    """Write ``recipes`` times ``seeds`` run directories below ``root`` and return how many there are."""
    ids = [f"item-{n:06d}" for n in range(items)]
    clusters = [f"image-{n // 2:06d}" for n in range(items)]
    counting = denominators(items)
    rng = np.random.default_rng(0)
    hard = rng.random(items)
    pictures = [png(rng) for _ in range(samples)]
    for recipe in range(recipes):
        name = f"llava+connector=variant-{recipe:03d}" if recipe else "llava+connector=baseline"
        quality = 0.4 + 0.2 * rng.random()
        for seed in range(seeds):
            path = root / name / f"seed={seed}-{recipe * seeds + seed:08x}"
            (path / "items").mkdir(parents=True)
            level = quality + 0.02 * rng.normal()
            metrics: dict[str, dict[str, float]] = {}
            for task in TASKS:
                known = [info for info in METRICS[task].values() if info.numerator]
                columns = {info.denominator: counting[info.denominator] for info in known if info.denominator}
                for info in known:
                    below = counting.get(info.denominator, np.ones(items))
                    columns.setdefault(info.numerator, (rng.random(items) * 0.3 + level > hard) * below)
                metrics[task] = {
                    metric: float(columns[info.numerator].sum() / columns.get(info.denominator, np.ones(items)).sum())
                    for metric, info in METRICS[task].items()
                    if info in known
                }
                table = pa.table({"item": ids, "cluster": clusters, **columns})
                pq.write_table(table, path / "items" / f"{task}.parquet")
            write(path, name, recipe, seed, metrics, pictures)
    return recipes * seeds


def denominators(items: int) -> dict[str, np.ndarray]:
    """Every denominator of the tasks, the same for all runs: a third of the items count in a column of kinds."""
    rng = np.random.default_rng(1)
    names = {info.denominator for task in TASKS for info in METRICS[task].values() if info.denominator}
    return {name: (rng.random(items) < 1 / 3).astype(float) for name in sorted(names)} | {
        "bytes": rng.integers(10, 60, size=items).astype(float),
        "captions": np.full(items, 2.0),
    }


def png(rng: np.random.Generator) -> str:
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, size=(12, 12, 3), dtype=np.uint8)).resize((72, 72)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def write(
    path: Path, name: str, recipe: int, seed: int, metrics: dict[str, dict[str, float]], pictures: list[str]
) -> None:
    """Write the small files of a run."""
    config = {
        "format": 1,
        "recipe": {"model": "llava", "scale": "tiny", "changed": [name]},
        "data": {"name": "scenes", "seed": 0},
        "batch_size": 128,
        "seed": seed,
        "budget": {"unit": "steps", "value": 300},
        "evaluation": {"split": "test", "tasks": {task: {} for task in TASKS}},
    }
    (path / "run.yaml").write_text(yaml.safe_dump(config))
    parameters = 1_500_000 + 10_000 * recipe
    manifest = {
        "format": 1,
        "name": name,
        "model": "llava",
        "scale": "tiny",
        "changed": [name],
        "seed": seed,
        "control": False,
        "status": "done",
        "error": None,
        "command": f"zoo train model=llava connector=variant-{recipe} seed={seed}",
        "versions": {"python": "3.11", "torch": "2.13"},
        "git": {"commit": "0" * 40, "dirty": False},
        "hardware": {"cpu": "example", "cores": 2},
        "parts": [
            {"path": "encoder", "name": "vit", "parameters": parameters // 2, "trained": False},
            {"path": "connector", "name": f"variant-{recipe}", "parameters": parameters // 10, "trained": True},
            {"path": "decoder", "name": "trunk-lm", "parameters": parameters // 3, "trained": True},
        ],
        "parameters": {"total": parameters, "trainable": parameters // 2},
        "flops": {"frozen_forward": 1e7, "trainable_forward": 3e7, "backward": 6e7, "per_sample": 1e8},
        "cost": {
            "steps": 300,
            "samples": 38400,
            "tokens": {"text": 400_000, "image": 100_000, "total": 500_000},
            "flops": {"total": 4e12 + 1e10 * recipe},
            "seconds": {"training": 90.0 + recipe, "evaluation": 20.0, "wall": 115.0 + recipe},
            "samples_per_second": 400.0,
            "peak_memory_bytes": 900_000_000,
        },
        "characteristics": {
            "understands": True,
            "writes": "autoregressive",
            "learns": ["autoregressive"],
            "images": "continuous",
            "attention": "causal",
            "parameters": parameters,
            "visual_tokens": 16,
        },
        "budget": {"unit": "steps", "value": 300},
        "batch_size": 128,
        "hashes": {"data": "da7a" * 16, "order": f"0{seed}" * 8, "evaluation": "e7" * 8, "budget": "b4" * 8},
        "layout": "caption\nimage (4) | text",
    }
    (path / "manifest.json").write_text(json.dumps(manifest))
    (path / "metrics.json").write_text(json.dumps(metrics))
    points = range(1, 301, 10)
    lines = [{"step": s, "samples": 128 * s, "seconds": s / 3, "loss": 4 * 0.99**s, "next_token": 1.0} for s in points]
    (path / "curve.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = [
        {"id": f"item-{n:06d}", "image": picture, "reference": "a red heart", "output": f"a heart {recipe} {seed}"}
        for n, picture in enumerate(pictures)
    ]
    (path / "samples.json").write_text(json.dumps(shown))


def timed(parts: dict[str, tuple[float, float]], name: str, part: Callable[[], Any]) -> Any:
    """Run ``part`` and keep its wall and processor time."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = part()
    parts[name] = time.perf_counter() - wall, time.process_time() - cpu
    return result


def report(folder: Path) -> dict[str, tuple[float, float]]:
    """Do what ``zoo report FOLDER`` does; return the time of each part."""
    parts: dict[str, tuple[float, float]] = {}
    runs = timed(parts, "reading run directories", lambda: find_runs([folder]))
    board = timed(parts, "leaderboard: scores, intervals, corrections", lambda: build_leaderboard(runs))
    console = Console(file=io.StringIO(), width=160)
    timed(parts, "table in the terminal", lambda: print_leaderboard(board, console))
    page = timed(parts, "page and tables", lambda: write_report(board, folder / "report.html"))
    print(f"{len(runs)} runs, {len(board.rows)} rows, {len(board.columns)} columns,", end=" ")
    print(f"page of {page.stat().st_size / 2**20:.1f} MiB")
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", type=int, default=67)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--keep", type=Path, help="write the runs here and leave them; runs that are there are read")
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="the N functions that take longest as well")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        small, large = Path(temporary) / "small", arguments.keep or Path(temporary) / "large"
        make_runs(small, 3, 2, 50)
        report(small)
        if not any(large.glob("*/*/manifest.json")):
            make_runs(large, arguments.recipes, arguments.seeds, arguments.items)
        profile = cProfile.Profile(time.process_time)
        if arguments.profile:
            profile.enable()
        parts = report(large)
        profile.disable()
    whole = [sum(times) for times in zip(*parts.values(), strict=True)]
    print("\n| part | seconds | of one core | share |\n| --- | --- | --- | --- |")
    for name, (wall, cpu) in parts.items():
        print(f"| {name} | {wall:.1f} | {cpu:.1f} | {100 * cpu / whole[1]:.0f} % |")
    print(f"| all | {whole[0]:.1f} | {whole[1]:.1f} | |")
    if arguments.profile:
        pstats.Stats(profile).sort_stats("cumulative").print_stats(arguments.profile)


if __name__ == "__main__":
    main()
