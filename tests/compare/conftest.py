"""Fabricated run directories, as docs/architecture.md describes them."""

from __future__ import annotations

import base64
import io
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image, ImageDraw

LAYOUT = """caption
7 tokens, 0 pads, attention: table. Rows read columns:
           image  text
image (4)  all    past
text (3)   past   past

image      ■■■■···
           ■■■■···
           ■■■■···
           ■■■■···
text       ■■■■■··
           ■■■■■■·
           ■■■■■■■"""

COLORS = ("crimson", "royalblue", "seagreen", "orange", "purple", "teal")


def png(n: int) -> str:
    image = Image.new("RGB", (72, 72), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse((8, 8, 64, 64), fill=COLORS[n % len(COLORS)])
    draw.rectangle((20 + n, 30, 50, 44), fill="gold")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def fabricate(
    root: Path,
    name: str,
    seed: int = 0,
    *,
    quality: float = 0.5,
    towers: bool = False,
    control: bool = False,
    status: str = "done",
    flops: float = 4e13,
    parameters: int = 1_200_000,
    items: int = 60,
    config: dict[str, Any] | None = None,
    manifest: dict[str, Any] | None = None,
) -> Path:
    """Write one run directory whose per-item scores give its metrics, and return it."""
    rng = random.Random(f"{name}/{seed}")
    hardness = [random.Random(n).random() for n in range(items)]
    path = root / name / f"seed={seed}-{rng.randrange(16**8):08x}"
    (path / "items").mkdir(parents=True)
    resolved = {
        "format": 1,
        "recipe": {"model": name.split("+")[0], "scale": "tiny", "changed": [name]},
        "data": {"name": "openmoji", "split_scheme": "random", **({"blank_images": True} if control else {})},
        "batch_size": 128,
        "seed": seed,
        "budget": {"unit": "steps", "value": 300},
        "trainer": {"precision": "fp32", "devices": 1, "log_every": 10},
        "evaluation": {"split": "test", "tasks": {"retrieval": {}, "caption-likelihood": {}, "naming": {}}},
        **(config or {}),
    }
    (path / "run.yaml").write_text(yaml.safe_dump(resolved))
    parts = [
        {"path": "encoder", "name": "vit", "parameters": parameters // 2, "trained": True},
        {"path": "text_encoder", "name": "text-transformer", "parameters": parameters // 3, "trained": True}
        if towers
        else {"path": "connector", "name": name.rpartition("=")[2], "parameters": parameters // 12, "trained": True},
    ]
    if not towers:
        parts.append({"path": "decoder", "name": "trunk-lm", "parameters": parameters // 3, "trained": False})
    values: dict[str, Any] = {
        "format": 1,
        "name": name,
        "model": name.split("+")[0],
        "scale": "tiny",
        "changed": [],
        "seed": seed,
        "control": control,
        "status": status,
        "error": None,
        "command": f"zoo train model={name.split('+')[0]} scale=tiny seed={seed}",
        "versions": {"python": "3.11.7", "torch": "2.13.0+cpu", "lightning": "2.6.6"},
        "git": {"commit": "0123456789abcdef0123456789abcdef01234567", "dirty": False},
        "hardware": {"platform": "Linux-6.1", "cpu": "Example CPU @ 2.0 GHz", "cores": 2, "threads": 2},
        "licence": "Icons: OpenMoji (https://openmoji.org), CC BY-SA 4.0",
        "parts": parts,
        "parameters": {"total": parameters, "trainable": sum(p["parameters"] for p in parts if p["trained"])},
        "flops": {"frozen_forward": 1e7, "trainable_forward": 3e7, "backward": 6e7, "per_sample": 1e8, "total": flops},
        "steps": 300,
        "samples": 38400,
        "tokens": 512000,
        "seconds": 95.0 + 10 * quality,
        "samples_per_second": 400.0 - 50 * quality,
        "peak_memory_bytes": 900_000_000,
        "budget": {"unit": "steps", "value": 300},
        "batch_size": 128,
        "hashes": {
            "data": "da7a" * 16,
            "order": f"0rde{seed}" * 8,
            "evaluation": "e7a1" * 4,
            "budget": "b4d9" * 4,
            "recipe": "ec1be",
        },
        "layout": LAYOUT,
        "characteristics": {
            "understands": True,
            "learns": ["contrastive"] if towers else ["autoregressive"],
            "images": "continuous",
            "attention": "causal",
            "parameters": parameters,
            "visual_tokens": parameters // 100_000,
        },
        **(manifest or {}),
    }
    (path / "manifest.json").write_text(json.dumps(values))
    objective = "contrastive" if towers else "next_token"
    with (path / "curve.jsonl").open("w") as file:
        for step in range(1, 301, 10):
            loss = 4 * math.exp(-step / (60 + 100 * quality)) + 1.5 - quality + rng.gauss(0, 0.05)
            line = {
                "step": step,
                "samples": step * 128,
                "seconds": step / 3,
                "stage": "train",
                "lr": 1e-3,
                "loss": loss,
            }
            file.write(json.dumps({**line, objective: loss}) + "\n")
    if status != "done":
        return path

    metrics: dict[str, dict[str, float]] = {}
    ids = [f"icon-{n}" for n in range(items)]

    def write(task: str, columns: dict[str, list[Any]]) -> None:
        table = pa.table({"item": ids, "cluster": [f"c{n // 2}" for n in range(items)], **columns})
        pq.write_table(table, path / "items" / f"{task}.parquet")

    if towers:
        ranks = [1 if quality + rng.gauss(0, 0.2) > h else rng.randint(2, 20) for h in hardness]
        columns = {f"{way}_hits_{k}": [float(r <= k) for r in ranks] for way in ("i2t", "t2i") for k in (1, 5, 10)}
        write("retrieval", {**columns, "captions": [1] * items})
        metrics["retrieval"] = {
            **{f"{w}_r{k}": sum(columns[f"{w}_hits_{k}"]) / items for w in ("i2t", "t2i") for k in (1, 5, 10)},
            "i2t_median_rank": float(sorted(ranks)[items // 2]),
            "t2i_median_rank": float(sorted(ranks)[items // 2]),
            "images": float(items),
        }
    else:
        lengths = [8 + n % 9 for n in range(items)]
        bits = [
            b * (1.2 - 0.8 * quality + 0.3 * h + rng.gauss(0, 0.03)) for b, h in zip(lengths, hardness, strict=True)
        ]
        write("caption-likelihood", {"bits": bits, "bytes": lengths})
        metrics["caption-likelihood"] = {"bits_per_byte": sum(bits) / sum(lengths), "bytes": float(sum(lengths))}
    top = [float(quality + rng.gauss(0, 0.2) > h) for h in hardness]
    write("naming", {"top1": top, "reciprocal_rank": [1.0 if t else 0.2 for t in top]})
    metrics["naming"] = {"top1": sum(top) / items, "mrr": sum(1.0 if t else 0.2 for t in top) / items}
    (path / "metrics.json").write_text(json.dumps(metrics))
    part = name.rpartition("=")[2]
    samples = [
        {
            "id": f"icon-{n}",
            "image": png(n),
            "reference": f"name of icon {n}",
            "output": ["red heart", "smiling face", f"icon {n}"]
            if towers
            else [f"name of icon {n}", f"{part} shows icon {n}"][n % 2],
            "outputs": {"naming": {"kind": "written", "rank": 1 + n % 3, "output": "x"}},
        }
        for n in range(12)
    ]
    (path / "samples.json").write_text(json.dumps(samples))
    return path


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """``make_run(name, seed=0, ...)`` writes a run below ``tmp_path / "outputs"``."""

    def make(name: str, seed: int = 0, **options: Any) -> Path:
        return fabricate(tmp_path / "outputs", name, seed, **options)

    return make


@pytest.fixture
def demo(make_run: Callable[..., Path], tmp_path: Path) -> Path:
    """The runs of the demo, one seed each, with their control."""
    make_run("clip", quality=0.55, towers=True, flops=3.1e13, parameters=1_480_000)
    make_run("llava+connector=linear", quality=0.45, flops=4.4e13, parameters=1_610_000)
    make_run("llava+connector=mlp", quality=0.6, flops=4.6e13, parameters=1_660_000)
    make_run("llava+connector=qformer", quality=0.4, flops=6.9e13, parameters=2_230_000)
    make_run(
        "llava+connector=mlp+data.blank_images=true", quality=0.1, control=True, flops=4.6e13, parameters=1_660_000
    )
    return tmp_path / "outputs"
