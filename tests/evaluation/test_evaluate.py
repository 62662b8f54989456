"""Dispatch on capabilities, and what a run directory gets."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from zoo.capabilities import EmbedImages, GenerateText, ScoreText, ScoreTexts, capabilities_of
from zoo.errors import RunError
from zoo.evaluation.likelihood import CaptionLikelihoodConfig
from zoo.evaluation.naming import NamingConfig
from zoo.evaluation.retrieval import RetrievalConfig
from zoo.evaluation.run import evaluate, evaluation_hash


def all_tasks() -> list[Any]:
    return [RetrievalConfig().build(), CaptionLikelihoodConfig().build(), NamingConfig(candidates=10).build()]


def test_capabilities(towers: Any, writer: Any) -> None:
    assert capabilities_of(towers()) == ("embed_images", "embed_texts")
    assert capabilities_of(writer()) == ("score_text", "generate_text")
    assert capabilities_of(object()) == ()
    assert isinstance(towers(), EmbedImages)
    assert not isinstance(towers(), GenerateText)
    assert isinstance(writer(), ScoreText)
    assert not isinstance(writer(), ScoreTexts)


def test_two_towers(make_source: Any, towers: Any, tmp_path: Path) -> None:
    report = evaluate(towers(noise=0.8), make_source(), "test", all_tasks(), tmp_path)
    assert set(report["metrics"]) == {"retrieval", "naming"}
    assert report["skipped"] == {"caption-likelihood": "the model does not offer score_text"}
    assert json.loads((tmp_path / "metrics.json").read_text()) == report["metrics"]
    assert sorted(p.name for p in (tmp_path / "items").iterdir()) == ["naming.parquet", "retrieval.parquet"]
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_writer(make_source: Any, writer: Any, tmp_path: Path) -> None:
    report = evaluate(writer(), make_source(clusters=4), "test", all_tasks(), tmp_path)
    assert set(report["metrics"]) == {"caption-likelihood", "naming"}
    assert set(report["skipped"]) == {"retrieval"}
    table = pq.read_table(tmp_path / "items" / "caption-likelihood.parquet")
    assert {"item", "cluster", "nll", "bits", "bytes"} <= set(table.column_names)
    assert table.num_rows == 40
    assert table.schema.metadata[b"spec_hash"].decode() == report["specs"]["caption-likelihood"]
    samples = json.loads((tmp_path / "samples.json").read_text())
    assert len(samples) == 12
    for sample in samples:
        n = int(sample["id"].split("-")[1])
        assert sample["reference"] == f"the square {n}"
        assert sample["output"] == (f"Square {n}." if n % 2 == 0 else "a circle")
        picture = Image.open(io.BytesIO(base64.b64decode(sample["image"], validate=True)))
        assert picture.format == "PNG"
        assert picture.getpixel((0, 0)) == (n, 2 * n, 255 - n)


def test_models_of_different_kinds_share_one_hash(make_source: Any, towers: Any, writer: Any) -> None:
    source = make_source()
    tasks = all_tasks()
    both = {evaluate(model, source, "test", tasks)["hash"] for model in (towers(), writer())}
    assert both == {evaluation_hash(tasks, source, "test")}


def test_the_hash_tells_what_matters(make_source: Any) -> None:
    source = make_source()
    base = evaluation_hash([NamingConfig().build()], source, "test")
    others = [
        evaluation_hash([NamingConfig(prompt="this is").build()], source, "test"),
        evaluation_hash([NamingConfig(items=50).build()], source, "test"),
        evaluation_hash([NamingConfig(batch_size=1).build()], source, "test"),
        evaluation_hash([NamingConfig().build()], source, "val"),
        evaluation_hash([NamingConfig().build()], source, "test", dtype="bfloat16"),
        evaluation_hash([NamingConfig().build(), RetrievalConfig().build()], source, "test"),
    ]
    assert len({base, *others}) == 7
    assert base == evaluation_hash([NamingConfig().build()], make_source(), "test")


def test_the_output_folder_is_checked_before_the_work(make_source: Any, towers: Any, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    model = towers()
    with pytest.raises(RunError, match="cannot write to"):
        evaluate(model, make_source(), "test", all_tasks(), blocked / "run")
    assert model.batches == []
    with pytest.raises(RunError, match="contain one twice"):
        evaluate(model, make_source(), "test", [RetrievalConfig().build()] * 2)
