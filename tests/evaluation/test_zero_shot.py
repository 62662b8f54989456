"""Classification by texts: ensembles of templates, and accuracy beside torchmetrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import ConfigError, DataError
from zoo.evaluation.catalogue import METRICS
from zoo.evaluation.zero_shot import TEMPLATES, ZeroShotConfig, class_vectors


class Texts:
    """Embeds any text at a place of its own."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        self.batches.append(len(texts))
        rows = [torch.randn(6, generator=torch.Generator().manual_seed(sum(map(ord, text)))) for text in texts]
        return F.normalize(torch.stack(rows), dim=-1)


def test_a_class_is_the_mean_of_unit_vectors() -> None:
    model = Texts()
    found = class_vectors(model, ["cat", "dog"], ("a {}", "the {} here", "{}"), size=4)
    assert model.batches == [4, 2]
    for row, name in enumerate(("cat", "dog")):
        own = Texts().embed_texts([f"a {name}", f"the {name} here", name])
        torch.testing.assert_close(found[row], F.normalize(own.mean(0), dim=-1))
    single = class_vectors(Texts(), ["cat"], TEMPLATES["plain"], size=4)
    torch.testing.assert_close(single, Texts().embed_texts(["cat"]))
    assert len(TEMPLATES["simple"]) == 7
    assert all(own.count("{}") == 1 for patterns in TEMPLATES.values() for own in patterns)


def labelled(make_source: Any, count: int = 40, classes: int = 8) -> Any:
    """The first ``classes`` squares name one class each; every tenth square has none."""
    source = make_source(count=count)
    original = source.sample

    def sample(id: str) -> Any:
        found = original(id)
        n = int(id[-3:])
        found.meta = {} if n % 10 == 9 else {"kind": f"square {n % classes}"}
        return found

    source.sample = sample
    return source


class Towers:
    """Squares near their class, with mistakes."""

    def __init__(self, towers: Any, classes: int = 8) -> None:
        self.inner, self.classes = towers(noise=0.0, width=8), classes
        self.noise = 0.7 * torch.randn(256, 8, generator=torch.Generator().manual_seed(3))

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        return self.inner.embed_texts(texts)

    def embed_images(self, images: Sequence[Any]) -> Tensor:
        greys = torch.tensor([image.getpixel((0, 0))[0] for image in images])
        return F.normalize(self.inner.embed_texts([f"square {g % self.classes}" for g in greys]) + self.noise[greys])


def test_accuracy_is_torchmetrics_where_there_are_no_ties(make_source: Any, towers: Any) -> None:
    from torchmetrics.classification import MulticlassAccuracy

    source, model = labelled(make_source), Towers(towers)
    result = ZeroShotConfig(label="kind", batch_size=7).build().run(model, source, "test")
    assert result.metrics["classes"] == 8
    assert result.metrics["left_out"] == 4
    assert result.metrics["images"] == 36
    classes = [f"square {n}" for n in range(8)]
    samples = [source.sample(i) for i in source.ids("test") if source.sample(i).meta]
    scores = model.embed_images([s.image for s in samples]) @ model.embed_texts(classes).T
    labels = torch.tensor([classes.index(s.meta["kind"]) for s in samples])
    for name, options in (("top1", {"top_k": 1}), ("top5", {"top_k": 5}), ("top1_by_class", {"average": "macro"})):
        theirs = MulticlassAccuracy(num_classes=8, **{"average": "micro", **options})
        assert result.metrics[name] == pytest.approx(float(theirs(scores, labels)), rel=1e-6)
    assert 0 < result.metrics["top1"] < result.metrics["top5"] < 1
    assert result.metrics["top1"] != pytest.approx(result.metrics["top1_by_class"])
    for name, info in METRICS["zero-shot"].items():
        below = sum(r[info.denominator] for r in result.items) if info.denominator else len(result.items)
        assert sum(r[info.numerator] for r in result.items) / below == pytest.approx(result.metrics[name])


def test_ties_count_against_the_model(make_source: Any, towers: Any) -> None:
    result = ZeroShotConfig().build().run(towers(constant=True), make_source(), "test")
    assert result.metrics["top1"] == result.metrics["top5"] == 0.0
    assert result.metrics["classes"] == 40  # without a label of its own a sample's name is its text


def test_few_classes_have_no_top5_and_items_do_not_change_them(make_source: Any, towers: Any) -> None:
    source = labelled(make_source, classes=4)
    few = ZeroShotConfig(label="kind", items=6).build().run(Towers(towers, 4), source, "test")
    assert "top5" not in few.metrics
    assert few.metrics["classes"] == 4
    assert few.metrics["images"] <= 6
    everything = ZeroShotConfig(label="kind").build().run(Towers(towers, 4), source, "test")
    rows = {row["item"]: row["rank"] for row in everything.items}
    assert all(rows[row["item"]] == row["rank"] for row in few.items)


def test_what_cannot_be_asked(make_source: Any, towers: Any) -> None:
    with pytest.raises(ConfigError, match="expected plain, icons, simple"):
        ZeroShotConfig(templates="imagenet")
    assert ZeroShotConfig(templates="a {} | the {}").patterns == ("a {}", "the {}")
    with pytest.raises(DataError, match=r"'knid' has 0 classes.*\(kind\)"):
        ZeroShotConfig(label="knid").build().run(towers(), labelled(make_source), "test")
    hashes = {ZeroShotConfig(templates=t).build().spec_hash(make_source(), "test") for t in ("plain", "icons", "{}.")}
    assert len(hashes) == 3
