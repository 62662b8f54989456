from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from zoo.data.folder import Folder, FolderConfig
from zoo.data.images import ImageTransform
from zoo.data.loader import StepLoader, loader, to_device
from zoo.data.openmoji import OpenMoji
from zoo.data.order import SampleOrder
from zoo.data.processor import PairProcessor, PromptProcessor
from zoo.data.sample import Sample
from zoo.data.text import OpenMojiBpeConfig
from zoo.errors import ConfigError, DataError

BPE = OpenMojiBpeConfig().build()


def take(steps: StepLoader, count: int) -> list[dict[str, Tensor]]:
    return list(itertools.islice(iter(steps), count))


def assert_equal(one: list[dict[str, Tensor]], two: list[dict[str, Tensor]]) -> None:
    assert len(one) == len(two) > 0
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


@pytest.fixture
def parts(icons: OpenMoji) -> tuple[OpenMoji, PairProcessor, SampleOrder]:
    processor = PairProcessor(ImageTransform(size=16, augment="shift"), BPE, 24)
    return icons, processor, SampleOrder(icons.ids("val"), seed=4)


def test_workers_ranks_and_resumes_see_the_same(parts: tuple[OpenMoji, PairProcessor, SampleOrder]) -> None:
    whole = take(loader(*parts, 48), 6)  # 200 icons: the fifth step crosses into the second epoch
    for workers in (1, 2):
        assert_equal(take(loader(*parts, 48, workers=workers), 6), whole)
    assert_equal(take(loader(*parts, 48, start_step=3), 3), whole[3:])
    assert_equal(take(loader(*parts, 48, start_step=4, workers=2), 2), whole[4:])
    ranks = [take(loader(*parts, 48, rank=r, world_size=2), 6) for r in range(2)]
    joined = [{k: torch.cat([a[k], b[k]]) for k in a} for a, b in zip(*ranks, strict=True)]
    assert_equal(joined, whole)
    assert not torch.equal(whole[0]["pixel_values"], whole[1]["pixel_values"])


def test_what_is_seen_is_the_order(icons: OpenMoji) -> None:
    order = SampleOrder(icons.ids("test"), seed=9)
    processor = PairProcessor(ImageTransform(size=16), BPE, 64)
    seen = [BPE.decode(row.tolist()) for b in take(loader(icons, processor, order, 30), 3) for row in b["input_ids"]]
    assert seen == [icons.text(d.id) for d in order.slice(0, 90)]


def test_the_second_draw_is_augmented_otherwise_and_evaluation_is_not(
    parts: tuple[OpenMoji, PairProcessor, SampleOrder],
) -> None:
    source, processor, _ = parts
    still = SampleOrder(source.ids("val"), shuffle=False)
    first, second = take(loader(source, processor, still, 200), 2)
    torch.testing.assert_close(first["input_ids"], second["input_ids"])
    assert not torch.equal(first["pixel_values"], second["pixel_values"])
    assert_equal(*([b] for b in take(loader(source, processor, still, 200, train=False), 2)))


def test_a_loader_with_an_end_has_a_length(parts: tuple[OpenMoji, PairProcessor, SampleOrder]) -> None:
    steps = loader(*parts, 20, start_step=2, stop_step=5)
    assert len(steps) == 3
    assert len(list(steps)) == 3
    with pytest.raises(TypeError, match="no end"):
        len(loader(*parts, 20))
    with pytest.raises(ConfigError, match="multiple of 3"):
        loader(*parts, 20, world_size=3)
    with pytest.raises(ConfigError, match="workers=-1"):
        loader(*parts, 20, workers=-1)


def test_the_fast_path_equals_the_path_of_samples(icons: OpenMoji) -> None:
    class Slow:
        """The same icons without their arrays."""

        name, version, licence, max_bad = icons.name, icons.version, icons.licence, 0

        def ids(self, split: str) -> list[str]:
            return icons.ids(split)

        def sample(self, id: str) -> Sample:
            return icons.sample(id)

    order = SampleOrder(icons.ids("val"), seed=1)
    for processor in (
        PairProcessor(ImageTransform(size=16, augment="shift-flip"), BPE, 24),
        PromptProcessor(ImageTransform(size=12, augment="random-resized-crop"), BPE, "plain", 4),
    ):
        assert_equal(take(loader(icons, processor, order, 16), 2), take(loader(Slow(), processor, order, 16), 2))


class Ids:
    """A processor that shows which samples it was given."""

    transform: Any = None
    tokenizer: Any = None

    def __call__(
        self,
        samples: Sequence[Sample],
        train: bool = False,
        draws: Sequence[int] | None = None,
        pixels: NDArray[np.uint8] | None = None,
    ) -> dict[str, Tensor]:
        return {"ids": torch.tensor([int(s.id) for s in samples]), "draws": torch.tensor(draws)}

    def encode_images(self, images: Sequence[Any]) -> Tensor:
        raise NotImplementedError


@pytest.fixture
def damaged(tmp_path: Path) -> Folder:
    rows = []
    for i in range(40):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i}.png")
        rows.append(json.dumps({"image": f"{i}.png", "caption": f"c{i}", "key": str(i)}))
    (tmp_path / "captions.jsonl").write_text("\n".join(rows))
    for i in (3, 17, 18):
        (tmp_path / f"{i}.png").write_bytes(b"damaged")
    config = FolderConfig(
        root=str(tmp_path), captions="captions.jsonl", id_column="key", val_fraction=0, test_fraction=0, max_bad=3
    )
    return config.open(None)


def test_damaged_samples_are_replaced_by_rule_whatever_the_workers(
    damaged: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    order = SampleOrder(damaged.ids("train"), seed=0)
    steps = loader(damaged, Ids(), order, 10)
    whole = take(steps, 8)
    seen = torch.stack([b["ids"] for b in whole])
    assert sorted(steps.bad.reasons) == ["17", "18", "3"]
    assert caplog.text.count("skipped sample") == 3
    assert not set(seen.flatten().tolist()) & {3, 17, 18}
    places = [int(d.id) for d in order.slice(0, 160)]
    for position, id in enumerate(seen.flatten().tolist()):
        expected = next(places[p] for p in range(position, 160, 10) if places[p] not in (3, 17, 18))
        assert id == expected
    for workers in (1, 2):
        other = loader(damaged, Ids(), order, 10, workers=workers)
        assert_equal(take(other, 8), whole)
    halves = [take(loader(damaged, Ids(), order, 10, rank=r, world_size=2, start_step=2), 6) for r in range(2)]
    assert_equal([{k: torch.cat([a[k], b[k]]) for k in a} for a, b in zip(*halves, strict=True)], whole[2:])


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_damaged_samples_end_with_one_line(damaged: Folder, workers: int) -> None:
    damaged.max_bad = 2
    order = SampleOrder(damaged.ids("train"), seed=0)
    with pytest.raises(DataError, match="3 samples cannot be read, more than max_bad=2") as caught:
        take(loader(damaged, Ids(), order, 10, workers=workers), 8)
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_the_processor_keep_their_line(damaged: Folder, workers: int) -> None:
    processor = PairProcessor(ImageTransform(size=8), BPE, 3, truncate=False)
    with pytest.raises(DataError, match="more than context_length=3") as caught:
        take(loader(damaged, processor, SampleOrder(damaged.ids("train")), 10, workers=workers), 1)
    assert "Traceback" not in str(caught.value)
    assert "worker" not in str(caught.value)


def test_nothing_readable_is_an_error(damaged: Folder, tmp_path: Path) -> None:
    for path in tmp_path.glob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="more than max_bad=3"):
        take(loader(damaged, Ids(), SampleOrder(damaged.ids("train")), 10), 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinning needs CUDA")
def test_batches_are_pinned_when_asked(parts: tuple[OpenMoji, PairProcessor, SampleOrder]) -> None:
    (batch,) = take(loader(*parts, 8, pin_memory=True), 1)
    assert all(value.is_pinned() for value in batch.values())


def test_to_device_moves_every_tensor() -> None:
    moved = to_device({"a": torch.ones(2), "b": torch.zeros(1)}, torch.device("meta"))
    assert [v.device.type for v in moved.values()] == ["meta", "meta"]
