"""Every task of texts, classes and masks on untrained models at tiny scale: finite numbers, and files as stated."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import zoo
from zoo.data.openmoji import OpenMojiConfig
from zoo.data.scenes import ScenesConfig
from zoo.evaluation.catalogue import METRICS
from zoo.evaluation.run import evaluate
from zoo.plugin import catalogue

SCENES: dict[str, dict[str, Any]] = {
    "captioning": {"items": 3, "max_new_tokens": 4},
    "pope": {"items": 2, "pairs": 1, "max_new_tokens": 3},
    "question-answering": {"items": 2, "questions": 1, "max_new_tokens": 3},
    "language-modelling": {"items": 3, "texts": "first"},
    "inpainting": {"items": 2, "mask": "object", "steps": 2},
    "segmentation": {"items": 2},
}
ICONS: dict[str, dict[str, Any]] = {
    "zero-shot": {"items": 4, "label": "skin_tone", "templates": "{} | {} skin tone"},
    "compositional": {"items": 4, "fields": {"naming": {"candidates": 4, "max_new_tokens": 3}}},
}


def measured(model: str, source: Any, tasks: dict[str, dict[str, Any]], folder: Path) -> dict[str, Any]:
    import pyarrow.parquet as pq

    built = [catalogue()["task"].parse(name, fields, name).build() for name, fields in tasks.items()]
    report = evaluate(zoo.build(model, scale="tiny").model, source, "test", built, folder)
    assert json.loads((folder / "metrics.json").read_text()).keys() == report["metrics"].keys()
    for name, metrics in report["metrics"].items():
        assert all(math.isfinite(value) for value in metrics.values()), (name, metrics)
        assert set(METRICS[name]) & set(metrics)
        rows = pq.read_table(folder / "items" / f"{name}.parquet").to_pylist()
        assert len({row["item"] for row in rows}) == len(rows) > 0
        for metric, info in METRICS[name].items():  # what the bootstrap does
            if metric in metrics and info.numerator:
                below = sum(r[info.denominator] for r in rows) if info.denominator else len(rows)
                expected = sum(r[info.numerator] for r in rows) / below if below else 0.0
                assert metrics[metric] == pytest.approx(expected, abs=1e-6), (name, metric)
    return report


def test_tasks_on_scenes(tmp_path: Path) -> None:
    source = ScenesConfig(test_scenes=12, objects="1..3", kinds=8).open(64)
    llava = measured("llava", source, SCENES, tmp_path / "llava")
    assert set(llava["metrics"]) == {"captioning", "pope", "question-answering", "language-modelling"}
    assert set(llava["skipped"]) == {"inpainting", "segmentation"}
    assert "bits_per_byte" in llava["metrics"]["captioning"]
    show_o = measured("show-o", source, SCENES, tmp_path / "show-o")
    assert set(show_o["skipped"]) == {"segmentation"}
    assert show_o["hash"] == llava["hash"]


def test_tasks_on_icons(tmp_path: Path) -> None:
    source = OpenMojiConfig(split_scheme="compositional").open(64)
    clip = measured("clip", source, ICONS, tmp_path / "clip")
    assert clip["metrics"]["zero-shot"]["classes"] == 6
    assert "retrieval_i2t_r1_gap" in clip["metrics"]["compositional"]
    llava = measured("llava", source, ICONS, tmp_path / "llava")
    assert set(llava["metrics"]) == {"compositional"}
    assert "naming_exact_match_gap" in llava["metrics"]["compositional"]
    assert "zero-shot" in llava["skipped"]
