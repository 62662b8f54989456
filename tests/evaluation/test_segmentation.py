"""gIoU and cIoU by hand, and the task on masks whose overlap is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from zoo.capabilities import SegmentImages, capabilities_of
from zoo.data.sample import Sample
from zoo.errors import ConfigError, DataError
from zoo.evaluation.catalogue import METRICS
from zoo.evaluation.run import evaluate
from zoo.evaluation.segmentation import SegmentationConfig
from zoo.evaluation.segmentation_metrics import CIoU, GIoU


def masks(*rows: str) -> Tensor:
    """[N, 1, W] of lines of 0 and 1."""
    return torch.tensor([[[c == "1" for c in row]] for row in rows])


FOUND = masks("110000", "111111", "000000", "000001", "000000")
WANTED = masks("011000", "111111", "000000", "000000", "111100")
"""Overlaps 1/3, 6/6, 0/0 (counts 1), 0/1, 0/4."""


def test_by_hand() -> None:
    giou, ciou = GIoU(), CIoU()
    for part in (slice(0, 2), slice(2, 5)):
        giou.update(FOUND[part], WANTED[part])
        ciou.update(FOUND[part], WANTED[part])
    assert float(giou.compute()) == pytest.approx((1 / 3 + 1 + 1 + 0 + 0) / 5)
    assert float(ciou.compute()) == pytest.approx(7 / 14)


def test_states_are_sums_over_processes() -> None:
    for kind in (GIoU, CIoU):
        whole, ranks = kind(), [kind(), kind()]
        whole.update(FOUND, WANTED)
        for metric, part in zip(ranks, (slice(0, 1), slice(1, 5)), strict=True):
            metric.update(FOUND[part], WANTED[part])
        assert len(whole.metric_state) == 2
        assert all(value.ndim == 0 for value in whole.metric_state.values())
        for key in whole.metric_state:
            torch.testing.assert_close(sum(m.metric_state[key] for m in ranks), whole.metric_state[key])


def test_empty_targets() -> None:
    empty = torch.zeros(2, 3, 3, dtype=torch.bool)
    giou, ciou = GIoU(), CIoU()
    giou.update(empty, empty)
    ciou.update(empty, empty)
    assert float(giou.compute()) == float(ciou.compute()) == 1.0
    with pytest.raises(ValueError, match="bool"):
        giou.update(empty.float(), empty)
    with pytest.raises(ValueError, match="one shape"):
        giou.update(empty[:, :2], empty)


class Stripes:
    """Images of 6 x 4 pixels with a mask for each object; two objects of one name are one target."""

    name, version, licence, max_bad = "stripes", "1", "CC0-1.0", 0

    def ids(self, split: str) -> list[str]:
        return [f"p-{n}" for n in range(6)] if split == "test" else []

    def sample(self, id: str) -> Sample:
        n = int(id[2:])
        names = ["bar", "bar", f"rod{n % 3}"]
        objects = [{"name": name} for name in names]
        return Sample(id, Image.new("RGB", (6, 4), (n, 0, 0)), ("stripes",), {"objects": objects})

    def masks(self, id: str, size: int) -> Any:
        assert size == 6
        found = torch.zeros(3, 4, 6, dtype=torch.bool)
        for row in range(3):
            found[row, row] = True
        return found.numpy()


class Finds:
    """Finds the first bar only, every rod exactly, and nothing of what is not there unless it ``invents``."""

    def __init__(self, invents: bool = False) -> None:
        self.invents, self.batches = invents, list[int]()

    def segment_images(self, images: Sequence[Any], texts: Sequence[str]) -> list[Tensor]:
        self.batches.append(len(texts))
        out = []
        for image, text in zip(images, texts, strict=True):
            mask = torch.zeros(4, 6, dtype=torch.bool)
            if text == "the bar":
                mask[0] = True
            elif text == f"the rod{image.getpixel((0, 0))[0] % 3}":
                mask[2] = True
            elif self.invents:
                mask[3] = True
            out.append(mask)
        return out


def test_the_task_by_hand() -> None:
    model = Finds()
    assert isinstance(model, SegmentImages)
    assert capabilities_of(model) == ("segment_images",)
    result = SegmentationConfig(batch_size=4).build().run(model, Stripes(), "test")
    assert model.batches == [4, 4, 4, 4, 2]  # bar, rod and an absent rod of each of 6 images
    assert result.metrics["targets"] == 18
    assert result.metrics["giou"] == pytest.approx((0.5 + 1 + 1) / 3)
    assert result.metrics["ciou"] == pytest.approx((6 + 6) / (12 + 6))
    assert result.metrics["giou_present"] == pytest.approx(0.75)
    assert result.metrics["absent_right"] == 1.0
    for name, info in METRICS["segmentation"].items():
        below = sum(r[info.denominator] for r in result.items) if info.denominator else len(result.items)
        assert sum(r[info.numerator] for r in result.items) / below == pytest.approx(result.metrics[name])
    for row in result.items:
        if row["absent"]:
            assert row["text"] != f"the rod{int(row['sample'][2:]) % 3}"
    invents = SegmentationConfig().build().run(Finds(invents=True), Stripes(), "test")
    assert invents.metrics["absent_right"] == 0.0
    assert invents.metrics["giou"] == pytest.approx(0.5)
    none = SegmentationConfig(absent=0).build().run(Finds(), Stripes(), "test")
    assert none.metrics["targets"] == 12
    assert "absent_right" not in none.metrics
    report = evaluate(Finds(), Stripes(), "test", [SegmentationConfig().build()])
    shown = report["samples"][0]["outputs"]["segmentation"]
    assert shown["picture"]
    assert shown["mask wanted"]


def test_what_cannot_be_segmented() -> None:
    with pytest.raises(ConfigError, match="object"):
        SegmentationConfig(query="segment it")

    class Bare(Stripes):
        masks: Any = None

    with pytest.raises(DataError, match="has no masks"):
        SegmentationConfig().build().run(Finds(), Bare(), "test")

    class Wrong(Finds):
        def segment_images(self, images: Any, texts: Any) -> Any:
            return [mask.T for mask in super().segment_images(images, texts)]

    with pytest.raises(ConfigError, match=r"mask of \(6, 4\).*image of \(4, 6\)"):
        SegmentationConfig().build().run(Wrong(), Stripes(), "test")

    class Few(Finds):
        def segment_images(self, images: Any, texts: Any) -> Any:
            return super().segment_images(images, texts)[1:]

    with pytest.raises(ConfigError, match="17 masks for 18 texts"):
        SegmentationConfig().build().run(Few(), Stripes(), "test")


def test_masks_of_scenes_are_those_of_their_objects() -> None:
    from zoo.data.scenes import ScenesConfig

    source = ScenesConfig(test_scenes=12, objects="2", questions="none", kinds=8).open(32)

    class Knows:
        """Answers with the whole box of the named object."""

        def segment_images(self, images: Sequence[Any], texts: Sequence[str]) -> list[Tensor]:
            out = []
            for text in texts:
                mask = torch.zeros(32, 32, dtype=torch.bool)
                for box in boxes.get(text.removeprefix("the "), ()):
                    mask[box[1] : box[3], box[0] : box[2]] = True
                out.append(mask)
            return out

    for id in source.ids("test"):
        boxes: dict[str, list[Any]] = {}
        for o in source.sample(id).meta["objects"]:
            boxes.setdefault(o["name"], []).append(o["box"])

        class One:
            name, version, max_bad, masks, sample = source.name, source.version, 0, source.masks, source.sample

            def ids(self, split: str, id: str = id) -> list[str]:
                return [id]

        result = SegmentationConfig(absent=0).build().run(Knows(), One(), "test")  # type: ignore[arg-type]
        for row in result.items:
            assert 0.2 < row["iou"] <= 1  # an icon fills much of its box and nothing lies outside
            own = sum((b[2] - b[0]) * (b[3] - b[1]) for b in boxes[row["text"].removeprefix("the ")])
            assert row["union"] == own
