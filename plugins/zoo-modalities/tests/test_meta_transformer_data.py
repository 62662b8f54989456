"""Meta-Transformer's data, task, recipes and claim, and what is refused in one line."""

from __future__ import annotations

import builtins
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from zoo_modalities.data.real import TABLES
from zoo_modalities.data.signal import Signal, signals_of
from zoo_modalities.meta_transformer.graphs import Graph
from zoo_modalities.meta_transformer.task import ModalityClassification, ModalityClassificationConfig

import zoo
from zoo.data.sample import Sample
from zoo.errors import ConfigError, DataError
from zoo.plugin import catalogue
from zoo.recipe import resolve

GENERATED = {
    "icon-points": "points",
    "spoken-digits": "audio",
    "materials": "hyperspectral",
    "xray-objects": "xray",
    "infrared-objects": "infrared",
    "processes": "time-series",
    "graph-families": "graph",
    "motions": "imu",
    "sentences": "",
}
REAL = ("digits", "breast-cancer", "wine", "iris")
SMALL = {"encoder.depth": 1, "encoder.width": 32, "encoder.heads": 2, "encoder.ffn": 64}


def source_of(name: str, **fields: Any) -> Any:
    return catalogue()["data"].parse(name, fields).build(64)


def values_of(sample: Sample, modality: str) -> np.ndarray:
    found = signals_of(sample)[modality]
    return found.edges if isinstance(found, Graph) else found.values


# -- sources -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GENERATED)
def test_generated_items_follow_from_their_id(name: str) -> None:
    small = {"train_items": 60, "val_items": 5, "test_items": 30}
    one, two = source_of(name, **small), source_of(name, **small)
    other = source_of(name, **small, seed=1)
    assert [len(one.ids(split)) for split in ("train", "val", "test")] == [60, 5, 30]
    samples = [one.sample(id) for id in one.ids("train")]
    assert {s.meta["label"] for s in samples} == set(one.labels)
    assert one.version != other.version
    modality = GENERATED[name]
    if not modality:
        texts = {split: {one.sample(i).texts for i in one.ids(split)} for split in ("train", "test")}
        assert not texts["train"] & texts["test"]
        assert samples[3].texts == two.sample("train-00003").texts
        return
    assert np.array_equal(values_of(samples[3], modality), values_of(two.sample("train-00003"), modality))
    differ = other.sample("train-00003")
    assert not np.array_equal(values_of(samples[3], modality), values_of(differ, modality))
    if modality != "graph":
        assert all(np.isfinite(values_of(s, modality)).all() for s in samples)
    with pytest.raises(DataError, match="has no item 'train-99999'"):
        one.sample("train-99999")


@pytest.mark.parametrize("name", REAL)
def test_real_rows_are_in_one_split_each(name: str) -> None:
    pytest.importorskip("sklearn")
    source = source_of(name)
    ids = [source.ids(split) for split in ("train", "val", "test")]
    assert sum(map(len, ids)) == {"digits": 1797, "breast-cancer": 569, "wine": 178, "iris": 150}[name]
    assert len(set().union(*ids)) == sum(map(len, ids))
    assert min(map(len, ids)) > 5
    assert {source.sample(i).meta["label"] for i in ids[0]} == set(source.labels)
    if name in TABLES:
        rows = np.stack([values_of(source.sample(i), "tabular") for i in ids[0]])
        np.testing.assert_allclose(rows.mean(0), 0, atol=1e-5)
        np.testing.assert_allclose(rows.std(0), 1, atol=1e-4)
    else:
        sample = source.sample(ids[0][0])
        assert sample.image.size == (8, 8)
        assert np.asarray(sample.image).mean() > 128, "dark on white"


def test_a_missing_package_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    import importlib

    def absent(name: str, package: str | None = None) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr(importlib, "import_module", absent)
    from zoo_modalities.data import real as rows

    for config in (rows.DigitsConfig(), rows.TableConfig(table="wine")):
        with pytest.raises(ConfigError, match=r"needs the package scikit-learn.*pip install scikit-learn") as error:
            config.build()
        assert "\n" not in str(error.value)


def test_points_lie_on_lifted_icons() -> None:
    source = source_of("icon-points", noise=0.0, tilt=0.0)
    sample = source.sample("train-00000")
    cloud, parts = values_of(sample, "points"), np.array(sample.meta["element_labels"])
    assert cloud.shape == (1024, 3)
    assert len(parts) == 1024
    front, back, side = (cloud[parts == name, 2] for name in ("front", "back", "side"))
    assert np.ptp(front) < 1e-6
    np.testing.assert_allclose(front[0], -back[0], atol=1e-6)
    assert np.abs(side).max() <= front[0] + 1e-6


# -- bad input ---------------------------------------------------------------------------------------------------------


def model(tokenizer: str, **changes: Any) -> Any:
    wiring = {"labels": ["a", "b"], **changes.pop("wiring", {})}
    return zoo.build("meta-transformer", data_tokenizer=tokenizer, scale="tiny", wiring=wiring, **SMALL, **changes)


def holding(name: str, item: Any) -> Sample:
    return Sample("it", meta={"label": "a", "modalities": {name: item}})


def cloud(place: tuple[int, int] | None = None, rows: int = 300, columns: int = 3) -> Signal:
    values = np.random.Generator(np.random.PCG64(0)).normal(size=(rows, columns)).astype(np.float32)
    if place is not None:
        values[place] = np.nan
    return Signal(values)


@pytest.mark.parametrize(
    ("tokenizer", "name", "item", "message"),
    [
        ("point-cloud", "points", cloud((7, 1)), r"sample 'it': points: the value at \(7, 1\) is nan"),
        ("point-cloud", "points", cloud(rows=200), "expected at least 256 rows of 3 coordinates"),
        ("point-cloud", "points", cloud(columns=4), r"shape \(300, 4\), expected at least 256 rows of 3"),
        ("point-cloud", "imu", cloud(), r"has no points \(modalities: imu\)"),
        ("audio", "audio", Signal(np.zeros(9000, np.float32), 8000.0), "8000 samples a second, the encoder"),
        ("audio", "audio", Signal(np.zeros(100, np.float32), 16000.0), "100 samples are too few"),
        ("infrared", "infrared", Signal(np.zeros((2, 8, 8), np.float32)), "2 channels, expected 1 or 3"),
        ("x-ray", "xray", Signal(np.full((8, 8), np.inf, np.float32)), "is inf"),
        ("hyperspectral", "hyperspectral", Signal(np.zeros((40, 7, 7), np.float32)), r"expected \(200, 7, 7\)"),
        ("time-series", "time-series", Signal(np.zeros((3, 96), np.float32)), "expected 2 axes, 7 rows"),
        ("time-series", "time-series", Signal(np.zeros((7, 90), np.float32)), "90 steps, expected 96"),
        ("imu", "imu", Signal(np.zeros((6, 2000), np.float32), 200.0), "200 samples a second, the encoder reads 400"),
        ("imu", "imu", Signal(np.zeros((6, 1000), np.float32), 400.0), "1000 samples are too few"),
        ("tabular", "tabular", Signal(np.zeros(7, np.float32)), "expected 1 axes, 30 rows"),
        ("video", "video", Signal(np.zeros((4, 8, 8, 4), np.uint8), 2.0), "4 channels, expected 3"),
        ("graph", "graph", Graph(np.zeros((2, 1), int), np.array([[0], [5]]), np.zeros((1, 1), int)), "end of an edge"),
        ("graph", "graph", Signal(np.zeros((2, 2), np.float32)), "a Signal, expected a zoo_modalities Graph"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_said_in_one_line(tokenizer: str, name: str, item: Any, message: str) -> None:
    module = model(tokenizer)
    with pytest.raises(DataError, match=message) as error:
        module.classify_samples([*module.example_samples(1), holding(name, item)])
    assert "\n" not in str(error.value)
    assert "'it'" in str(error.value)


def test_images_and_texts_that_are_missing_are_named() -> None:
    with pytest.raises(DataError, match="sample 'it' has no image"):
        model("image").classify_samples([Sample("it")])
    with pytest.raises(DataError, match="sample 'it' has no text"):
        model("text").classify_samples([Sample("it")])


def test_labels_that_do_not_fit_are_named() -> None:
    module = model("tabular", wiring={"labels": ["benign", "malignant"]})
    good = dataclasses.replace(
        module.example_samples(1)[0], meta={**module.example_samples(1)[0].meta, "label": "benig"}
    )
    with pytest.raises(DataError, match="'benig' is none of the 2 labels; did you mean benign"):
        module.processor([good])
    with pytest.raises(DataError, match="has no 'label'"):
        module.processor(module.example_samples(1))
    unnamed = zoo.build("meta-transformer", data_tokenizer="tabular", scale="tiny", wiring={"classes": 4}, **SMALL)
    with pytest.raises(ConfigError, match=r"set wiring\.labels"):
        _ = unnamed.processor


@pytest.mark.parametrize(
    ("choices", "values", "message"),
    [
        ({}, {"wiring": {"labels": ["a"]}}, "at least two"),
        ({}, {"wiring": {"labels": ["a", "b"], "labels_of": "iris"}}, "both set"),
        ({}, {"wiring": {"pool": "clss"}}, "did you mean cls"),
        ({"data_tokenizer": "point-cloud"}, {"data_tokenizer": {"neighbours": 5000}}, "no more neighbours than points"),
        ({"data_tokenizer": "time-series"}, {"data_tokenizer": {"patch": 4}}, "give both"),
        ({"data_tokenizer": "graph"}, {"data_tokenizer": {"eigenvectors": 0}}, "nodes need identifiers"),
        ({"data_tokenizer": "tabluar"}, {}, "did you mean tabular"),
    ],
)
def test_settings_that_cannot_work_are_refused(choices: dict[str, Any], values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve("meta-transformer", choices=choices, values=values)


def test_parts_that_do_not_fit_are_refused_when_joined() -> None:
    with pytest.raises(ConfigError, match="is not made of the zoo's own blocks"):
        zoo.build("meta-transformer", encoder="clip-vit-b-32", scale="tiny")
    with pytest.raises(ConfigError, match="reads a class token, and the tokenizer has none"):
        model("imu", wiring={"pool": "cls"})
    with pytest.raises(ConfigError, match="labels of data=openmoji are not fixed"):
        zoo.build("meta-transformer", scale="tiny", wiring={"labels_of": "openmoji"}, **SMALL)


# -- the task ----------------------------------------------------------------------------------------------------------


class Always:
    """Names what it is told to."""

    labels = ("malignant", "benign")

    def __init__(self, answers: dict[str, str]) -> None:
        self.answers = answers

    def classify_samples(self, samples: list[Sample]) -> torch.Tensor:
        chosen = torch.tensor([self.labels.index(self.answers[s.id]) for s in samples])
        return 4.0 * torch.nn.functional.one_hot(chosen, 2)

    def example_samples(self, count: int) -> list[Sample]:
        return []


def test_accuracy_stands_beside_the_majority() -> None:
    pytest.importorskip("sklearn")
    source = source_of("breast-cancer")
    ids = source.ids("test")
    truth = {i: source.sample(i).meta["label"] for i in ids}
    other = {"benign": "malignant", "malignant": "benign"}
    answers = {i: other[truth[i]] if n % 5 == 0 else truth[i] for n, i in enumerate(ids)}
    task = ModalityClassification(ModalityClassificationConfig())
    result = task.run(Always(answers), source, "test")
    wrong = len(ids[::5])
    assert result.metrics["accuracy"] == pytest.approx(1 - wrong / len(ids))
    benign = sum(label == "benign" for label in truth.values()) / len(ids)
    assert result.metrics["majority"] == pytest.approx(benign)  # the more frequent one in the training rows
    assert result.metrics["gain"] == pytest.approx(1 - wrong / len(ids) - benign)
    nats = np.log1p(np.exp(-4.0))
    assert result.metrics["log_loss"] == pytest.approx(nats + 4 * wrong / len(ids))
    by_class = [
        np.mean([answers[i] == truth[i] for i in ids if truth[i] == label]) for label in ("benign", "malignant")
    ]
    assert result.metrics["accuracy_by_class"] == pytest.approx(np.mean(by_class))
    for name, info in task.config.metrics.items():
        if info.numerator:
            below = sum(r[info.denominator] for r in result.items) if info.denominator else len(result.items)
            assert result.metrics[name] == pytest.approx(sum(r[info.numerator] for r in result.items) / below)
    assert len(result.samples) == 12


def test_the_task_refuses_other_labels() -> None:
    pytest.importorskip("sklearn")
    task = ModalityClassification(ModalityClassificationConfig())
    with pytest.raises(DataError, match="is none of the model's"):
        task.run(Always({}), source_of("iris"), "test")
    with pytest.raises(DataError, match="has no 'labl'; did you mean label"):
        ModalityClassification(ModalityClassificationConfig(label="labl")).run(Always({}), source_of("iris"), "test")


# -- learning, and the command line ------------------------------------------------------------------------------------


def test_a_frozen_random_encoder_learns_a_table(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    from zoo.cli import main

    small = [f"++encoder.{key}" for key in ("depth=1", "width=32", "heads=2", "ffn=64")]
    chosen = ["model=meta-transformer", "data_tokenizer=tabular", "data=wine", "wiring.labels_of=wine", "scale=tiny"]
    budget = ["++data_tokenizer.numeric=13", "batch_size=16", "budget.value=40", "optimizer.lr=5e-3"]
    tasks = ["evaluation.tasks={modality-classification:{}}", f"out={tmp_path}"]
    assert main(["train", *chosen, *small, *budget, *tasks]) == 0
    (run,) = tmp_path.rglob("metrics.json")
    import json

    found = json.loads(run.read_text())["modality-classification"]
    assert found["accuracy"] > found["majority"] + 0.1
    assert found["labels"] == 3
    again: Any = zoo.from_pretrained(run.parent / "weights")
    source = source_of("wine")
    samples = [source.sample(i) for i in source.ids("test")]
    named = [again.labels[i] for i in again.classify_samples(samples).argmax(1)]
    right = np.mean([name == s.meta["label"] for name, s in zip(named, samples, strict=True)])
    assert right == pytest.approx(found["accuracy"])


def test_the_experiment_names_all_twelve(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    from zoo.cli import main

    assert main(["compare", "experiment=meta-transformer", "scale=tiny", "seed=0", "--dry-run", f"out={tmp_path}"]) == 0
    shown = capsys.readouterr().out
    tokenizers = ("text", "point-cloud", "audio", "video", "infrared", "hyperspectral", "x-ray", "time-series")
    for name in (*tokenizers, "tabular", "imu", "graph"):
        assert f"data_tokenizer={name}" in shown
    assert not list(tmp_path.rglob("manifest.json"))
