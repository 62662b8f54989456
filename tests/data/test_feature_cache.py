"""Rows on disk: whole after a crash, written once by several processes, bounded, and never torn."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from zoo.data.feature_cache import (
    RECORD_BYTES,
    CachedFeatures,
    CachedImage,
    FeatureStore,
    RowTransform,
    weights_hash,
    with_images,
)
from zoo.data.images import ImageTransform
from zoo.data.processor import images_of
from zoo.data.sample import Sample
from zoo.errors import ConfigError, DataError, RunError

SHAPE = (3, 5)
GB = 10**9


def opened(root: Path, name: str = "a", dtype: torch.dtype = torch.float32) -> FeatureStore:
    return FeatureStore(root, {"encoder": name}, SHAPE, dtype)


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def row(number: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(number))


def put(store: FeatureStore, numbers: range) -> None:
    with store.filling():
        store.reserve(len(numbers), GB)
        store.append([key(n) for n in numbers], torch.stack([row(n) for n in numbers]))


def rows_of(store: FeatureStore, numbers: range) -> torch.Tensor:
    found = [store.row(key(n)) for n in numbers]
    assert None not in found
    return store.read([n for n in found if n is not None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_written_is_read_again_in_any_process(dtype: torch.dtype, tmp_path: Path) -> None:
    store = opened(tmp_path, dtype=dtype)
    put(store, range(7))
    put(store, range(5, 12))  # some are there already
    assert len(store) == 12
    expected = torch.stack([row(n) for n in range(12)]).to(dtype)
    assert torch.equal(rows_of(store, range(12)), expected)
    assert torch.equal(rows_of(opened(tmp_path, dtype=dtype), range(12)), expected)
    assert torch.equal(rows_of(pickle.loads(pickle.dumps(store)), range(12)), expected)  # as a data worker gets it
    some = store.read([2, -1, 0])  # -1: no image
    assert torch.equal(some, torch.stack([expected[2], torch.zeros(SHAPE, dtype=dtype), expected[0]]))
    assert key(99) not in store
    assert store.row(key(99)) is None


def test_sets_are_told_apart_by_what_they_are_of(tmp_path: Path) -> None:
    names = {opened(tmp_path, "a").name, opened(tmp_path, "b").name, opened(tmp_path, "a", torch.float16).name}
    assert len(names) == 3
    assert opened(tmp_path, "a").name in names


@pytest.mark.parametrize("lost", [1, 11, 23, 24, 25, 70])
def test_a_torn_index_loses_only_the_rows_it_tore(lost: int, tmp_path: Path) -> None:
    store = opened(tmp_path)
    put(store, range(6))
    index = store.folder / "index.bin"
    index.write_bytes(index.read_bytes()[:-lost])
    again = opened(tmp_path)
    left = 6 - -(-lost // RECORD_BYTES)
    assert len(again) == left
    put(again, range(6))
    assert torch.equal(rows_of(again, range(6)), torch.stack([row(n) for n in range(6)]))
    assert index.stat().st_size == 6 * RECORD_BYTES


def test_bytes_that_no_record_speaks_of_are_overwritten(tmp_path: Path) -> None:
    store = opened(tmp_path)
    put(store, range(4))
    with (store.folder / "tokens.bin").open("ab") as file:
        file.write(b"half a row")
    again = opened(tmp_path)
    put(again, range(9))
    assert torch.equal(rows_of(again, range(9)), torch.stack([row(n) for n in range(9)]))


def test_changed_bytes_are_refused_when_first_read(tmp_path: Path) -> None:
    store = opened(tmp_path)
    put(store, range(4))
    with (store.folder / "tokens.bin").open("r+b") as file:
        file.seek(2 * store.row_bytes + 7)
        file.write(b"\xff\x00\xff")
    again = opened(tmp_path)
    assert torch.equal(again.read([0, 1, 3]), torch.stack([row(n) for n in (0, 1, 3)]))
    with pytest.raises(DataError, match="are damaged: delete the folder") as caught:
        again.read([1, 2])
    assert "\n" not in str(caught.value)


WRITER = """
import sys, torch
sys.path.insert(0, {here!r})
from pathlib import Path
from tests.data.test_feature_cache import opened, put
store = opened(Path({root!r}))
n = len(store)
print("go", flush=True)
while True:
    put(store, range(n, n + 3))
    n += 3
"""


def test_killed_while_writing_again_and_again(tmp_path: Path) -> None:
    code = WRITER.format(here=os.getcwd(), root=str(tmp_path))
    for attempt in range(4):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"go\n"
        time.sleep(0.05 + 0.037 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        store = opened(tmp_path)
        count = len(store)
        assert count > 0
        assert torch.equal(rows_of(store, range(count)), torch.stack([row(n) for n in range(count)]))
        put(store, range(count, count + 2))  # and the lock is free
        store.close()


def write(root: str, first: int) -> None:
    store = opened(Path(root))
    for start in range(first, 200, 10):
        put(store, range(start, min(200, start + 10)))
        count = len(store)
        got = store.read(range(count))
        numbers = [int.from_bytes(k, "big") for k, _ in sorted(store._rows.items(), key=lambda item: item[1])]
        assert torch.equal(got, torch.stack([row(n) for n in numbers]))


def test_two_processes_at_once_write_every_row_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=write, args=(str(tmp_path), first)) for first in (0, 4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    store = opened(tmp_path)
    assert len(store) == 200
    assert (store.folder / "index.bin").stat().st_size == 200 * RECORD_BYTES
    assert torch.equal(rows_of(store, range(200)), torch.stack([row(n) for n in range(200)]))


def test_the_bound_removes_sets_that_no_run_uses_oldest_first(tmp_path: Path) -> None:
    stores = {name: opened(tmp_path, name) for name in "abc"}
    for place, store in enumerate(stores.values()):
        put(store, range(100))
        os.utime(store.folder / "about.json", (1000 + place, 1000 + place))
    for name in "ac":
        stores[name].close()
    (tmp_path / "0123456789abcdef").mkdir()  # not a set of ours
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "index.bin").write_bytes(b"mine")
    each = sum(file.stat().st_size for file in stores["a"].folder.iterdir())
    row_bytes = stores["a"].row_bytes
    limit = 3 * each + 80 * row_bytes  # not enough for three of them and another hundred rows
    new = opened(tmp_path, "d")
    with new.filling():
        new.reserve(100, limit)
    assert [store.folder.exists() for store in stores.values()] == [False, True, True]
    with new.filling(), pytest.raises(ConfigError, match="that other runs are using take") as caught:
        new.reserve(2 * each // row_bytes + 81, limit)
    assert "\n" not in str(caught.value)
    assert [store.folder.exists() for store in stores.values()] == [False, True, False]  # b is in use
    with new.filling(), pytest.raises(ConfigError, match=r"raise it, or leave trainer\.cache_features off"):
        new.reserve(limit // row_bytes + 1, limit)
    assert (tmp_path / "pictures" / "index.bin").read_bytes() == b"mine"
    assert torch.equal(rows_of(stores["b"], range(100)), torch.stack([row(n) for n in range(100)]))


def test_no_room_and_no_permission_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import zoo.data.feature_cache as module

    store = opened(tmp_path)

    class Usage:
        free = 100

    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "disk_usage", lambda path: Usage)
        with store.filling(), pytest.raises(RunError, match="GB free, the cached features need"):
            store.reserve(100, GB)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"trainer\.cache_dir=FOLDER") as caught:
        opened(tmp_path / "file")
    assert "\n" not in str(caught.value)


def test_row_numbers_travel_as_pixels() -> None:
    transform = RowTransform()
    numbers = [0, 1, 7, (1 << 20) - 1, 1 << 20, (1 << 20) + 5, 40_000_003]
    pixels = transform([CachedImage(n) for n in numbers])
    assert pixels.shape == (7, 3, 1, 1)
    padded = torch.zeros(9, 3, 1, 1)  # as processors do where a sample has no image
    padded[[0, 1, 2, 4, 5, 7, 8]] = pixels
    assert transform.rows(padded) == [0, 1, 7, -1, (1 << 20) - 1, 1 << 20, -1, (1 << 20) + 5, 40_000_003]


def test_samples_with_no_one_and_several_images() -> None:
    one = Sample("one", image=CachedImage(3))  # type: ignore[arg-type]
    several = Sample("several", meta={"images": ["a", "b"], "other": 1})
    assert images_of(Sample("none")) == []
    assert images_of(one) == [CachedImage(3)]
    assert images_of(several) == ["a", "b"]
    marked = with_images(several, [CachedImage(1), CachedImage(2)])
    assert images_of(marked) == [CachedImage(1), CachedImage(2)]
    assert marked.meta["other"] == 1
    assert with_images(one, []).image is None


class Rows:
    """A processor that hands on what the transform made."""

    def __init__(self) -> None:
        self.transform = ImageTransform(size=8)
        self.tokenizer = None

    def __call__(self, samples: list[Sample], train: bool, draws: list[int]) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.transform([s.image for s in samples if s.image is not None])}


def test_a_batch_holds_tokens_in_place_of_pixels(tmp_path: Path) -> None:
    stamps = {"x": "1", "y": "1"}
    store = opened(tmp_path, dtype=torch.float16)
    features = CachedFeatures(store, torch.float32, stamps.__getitem__)
    with store.filling():
        store.reserve(2, GB)
        store.append([features.key("x"), features.key("y")], torch.stack([row(0), row(1)]))
    assert features.knows("x")
    assert (features.count("x"), features.count("y")) == (1, 1)
    original = Rows()
    processor = features.over(original)  # type: ignore[arg-type]
    assert isinstance(original.transform, ImageTransform)  # evaluation goes on with it
    batch = features.tokens(processor([features.mark(Sample(id), known=True) for id in "yx"], True, [0, 0]))
    assert batch.keys() == {"image_tokens"}
    assert batch["image_tokens"].dtype == torch.float32
    assert torch.equal(batch["image_tokens"], torch.stack([row(1), row(0)]).half().float())
    stamps["x"] = "2"  # the file was replaced
    assert not features.knows("x")
    with pytest.raises(DataError, match=r"features of sample 'x' are not in .*: run again"):
        features.mark(Sample("x"), known=True)


def test_the_hash_of_weights_sees_every_byte() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    first = weights_hash(module)
    assert weights_hash(module) == first
    with torch.no_grad():
        module[1].running_mean[2] = 1e-7  # a buffer counts
    second = weights_hash(module)
    assert second != first
    assert weights_hash(module.half()) not in (first, second)
