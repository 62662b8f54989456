"""Tasks between modalities: their numbers by hand, chance, and what is refused; and the plugin's contracts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from zoo_modalities.data.signal import Signal
from zoo_modalities.evaluation.emergent import EmergentClassificationConfig, EmergentRetrievalConfig

from zoo.data.sample import Sample
from zoo.errors import ConfigError, DataError
from zoo.evaluation.run import evaluate
from zoo.plugin import catalogue
from zoo.testing import check_component, check_imports, check_light, check_published, check_recipe

ROOT = Path(__file__).parents[1]


class Angles:
    """A model whose space is a circle: texts and sounds are angles in degrees; sounds of ``wrong`` are turned."""

    modalities = ("image", "text", "audio")

    def __init__(self, wrong: Mapping[float, float] | None = None) -> None:
        self.wrong = dict(wrong or {})

    def embed(self, modality: str, items: Sequence[Any]) -> Tensor:
        angles = [
            float(item.split()[-1]) if modality == "text" else self.wrong.get(float(item.values[0]), item.values[0])
            for item in items
        ]
        radians = torch.deg2rad(torch.tensor(angles, dtype=torch.float32))
        return torch.stack([radians.cos(), radians.sin()], -1)


@dataclass
class Circle:
    name: str = "circle"
    version: str = "1"
    licence: str = ""
    max_bad: int = 0
    angles: tuple[float, ...] = (0.0, 40.0, 80.0, 120.0, 160.0)
    sounds: bool = True
    kinds: Mapping[float, str] = field(
        default_factory=lambda: {0.0: "at 0", 40.0: "at 0", 80.0: "at 80", 120.0: "at 80"}
    )

    def ids(self, split: str) -> list[str]:
        return [f"{angle:g}" for angle in self.angles]

    def sample(self, id: str) -> Sample:
        angle = float(id)
        meta: dict[str, Any] = {"modalities": {"audio": Signal(np.array([angle]))} if self.sounds else {}}
        if angle in self.kinds:
            meta["kind"] = self.kinds[angle]
        return Sample(id, None, (f"at {id}",), meta)


def test_retrieval_by_hand() -> None:
    task = EmergentRetrievalConfig(pairs="audio-text+text-audio").build()
    perfect = task.run(Angles(), Circle(), "test")
    assert perfect.metrics["audio_text_r1"] == perfect.metrics["text_audio_r1"] == 1
    assert perfect.metrics["chance_r1"] == 0.2
    assert perfect.metrics["chance_r10"] == 1
    # 0 sounds like 90: 80, 120 (30 off), 40 (50 off), 160 are nearer than 0, which comes last
    turned = task.run(Angles({0.0: 90.0}), Circle(), "test")
    ranks = {row["item"]: (row["audio_text_rank"], row["text_audio_rank"]) for row in turned.items}
    assert ranks["0"] == (5, 3)  # the text 0 is nearest to 40, then 80, then 90
    assert {rank for id, (rank, _) in ranks.items() if id != "0"} == {1}
    assert turned.metrics["audio_text_r1"] == pytest.approx(0.8)
    assert turned.metrics["audio_text_r5"] == 1
    assert turned.metrics["audio_text_median_rank"] == 1
    assert sum(row["audio_text_hits_1"] for row in turned.items) == 4
    same = task.run(Angles(dict.fromkeys(Circle().angles, 10.0)), Circle(), "test")
    assert same.metrics["text_audio_r1"] == 0  # equal scores count against the model
    assert turned.samples[0]["kind"] == "nearest captions"


def test_classification_by_hand() -> None:
    task = EmergentClassificationConfig(label="kind").build()
    result = task.run(Angles({40.0: 70.0}), Circle(), "test")  # one of "at 0" is nearer to 80; 160 has no kind
    assert result.metrics["items"] == 4
    assert result.metrics["classes"] == 2
    assert result.metrics["majority"] == 0.5
    assert result.metrics["top1"] == 0.75
    assert result.metrics["top1_by_class"] == pytest.approx(0.75)
    assert {row["item"]: row["output"] for row in result.items}["40"] == "at 80"
    with pytest.raises(DataError, match=r"label = 'kinds' has 0 classes.*did you mean kind"):
        EmergentClassificationConfig(label="kinds").build().run(Angles(), Circle(), "test")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EmergentRetrievalConfig(pairs="audio"), "pairs such as audio-text"),
        (lambda: EmergentRetrievalConfig(pairs="audio-audio"), "two modalities"),
        (lambda: EmergentRetrievalConfig(pairs="audi-text"), "did you mean audio"),
        (lambda: EmergentRetrievalConfig(items=-1), "at least 0"),
        (lambda: EmergentClassificationConfig(modality="text"), "texts are classes"),
        (lambda: EmergentClassificationConfig(templates="a"), "with {} in each"),
    ],
)
def test_wrong_fields_are_one_line(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_what_is_missing_is_said() -> None:
    task = EmergentRetrievalConfig().build()
    with pytest.raises(DataError, match="item 0 of circle has no audio"):
        task.run(Angles(), Circle(sounds=False), "test")
    with pytest.raises(ConfigError, match="embeds no 'depth'"):
        EmergentRetrievalConfig(pairs="depth-text").build().run(Angles(), Circle(), "test")
    assert EmergentRetrievalConfig().build().missing(object()) == ("embed",)


def test_runs_keep_scores_of_items(tmp_path: Path) -> None:
    """Every metric with a numerator follows from the columns that a run writes."""
    import pyarrow.parquet as pq

    tasks = [EmergentRetrievalConfig(pairs="audio-text").build(), EmergentClassificationConfig(label="kind").build()]
    report = evaluate(Angles({40.0: 170.0}), Circle(), "test", tasks, tmp_path)
    for task in tasks:
        table = pq.read_table(tmp_path / "items" / f"{task.name}.parquet").to_pydict()
        for name, info in task.config.metrics.items():
            if info.numerator and name in report["metrics"][task.name]:
                below = sum(table[info.denominator]) if info.denominator else len(table["item"])
                assert report["metrics"][task.name][name] == pytest.approx(sum(table[info.numerator]) / below)


# -- the plugin ----------------------------------------------------------------------------------------------------


def test_the_manifest_is_light_and_imports_are_public() -> None:
    check_light("zoo_modalities", str(ROOT))
    check_imports(ROOT / "zoo_modalities")
    assert catalogue()["modality_encoder"].plugin("imagebind-audio") == "zoo-modalities"


IMAGEBIND = [
    ("encoder", "imagebind-vision"),
    ("encoder", "imagebind-vision-huge"),
    ("text_encoder", "imagebind-text"),
    ("text_encoder", "imagebind-text-huge"),
    *(("modality_encoder", f"imagebind-{name}") for name in ("audio", "depth", "thermal", "imu")),
    ("wiring", "bind"),
    ("objective", "bind-contrastive"),
    ("data", "openmoji-modalities"),
    ("task", "emergent-retrieval"),
    ("task", "emergent-classification"),
    ("checkpoint", "imagebind"),
]


@pytest.mark.parametrize(("kind", "name"), IMAGEBIND)
def test_part_keeps_its_contract(kind: str, name: str) -> None:
    assert catalogue()[kind].get(name).summary
    check_component(kind, name)


def test_recipes_keep_their_contract() -> None:
    """At tiny scale, where both are the same, and at their published sizes."""
    check_recipe("imagebind")
    for name in ("imagebind", "imagebind-huge"):
        assert catalogue()["model"].plugin(name) == "zoo-modalities"
        check_published(name)


def test_the_experiment_runs_from_the_command_line(tmp_path: Path) -> None:
    """Towers first, then audio and depth on them, then retrieval of a pair that was never trained: a few steps."""
    import json

    from zoo.cli import main

    small = ["budget.value=2", "batch_size=4", "first.towers.budget.value=1", "first.towers.batch_size=4"]
    tasks = ["evaluation.tasks={emergent-retrieval:{items:12,pairs:audio-text+depth-text}}"]
    command = ["train", "experiment=imagebind", "scale=tiny", "seed=0", *small, *tasks, f"out={tmp_path / 'out'}"]
    assert main([*command, f"hydra.sweep.dir={tmp_path}/hydra"]) == 0
    found = {p.parts[-3].split("+")[0]: p.parent for p in (tmp_path / "out").rglob("metrics.json")}
    assert set(found) == {"clip", "imagebind"}
    metrics = json.loads((found["imagebind"] / "metrics.json").read_text())["emergent-retrieval"]
    assert metrics["chance_r1"] == pytest.approx(1 / 12)
    assert 0 <= metrics["audio_text_r1"] <= 1
    parts = json.loads((found["imagebind"] / "manifest.json").read_text())["parts"]
    trained = {
        part["path"]: part["trained"] for part in parts if part["path"] in ("encoder", "encoders", "text_encoder")
    }
    assert trained == {"encoder": False, "encoders": True, "text_encoder": False}
    init = json.loads((found["imagebind"] / "init.json").read_text())
    assert "encoders" in str(init)
