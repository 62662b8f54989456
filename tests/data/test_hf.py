"""Hugging Face datasets: what the columns say, in an order that no reader changes, mapped and streamed alike."""

from __future__ import annotations

import io
import pickle
import re
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from zoo.data.hf import HfConfig, HfDataset
from zoo.data.images import ImageTransform
from zoo.data.loader import loader
from zoo.data.mixture import MixtureConfig
from zoo.data.order import share, training_order
from zoo.data.pack import Packing, pack
from zoo.data.processor import PairProcessor
from zoo.data.sample import BadSample
from zoo.data.text import OpenMojiBpeConfig
from zoo.errors import ConfigError, DataError, MissingExtra

MAPPED = pytest.param(
    False, marks=pytest.mark.skipif(find_spec("datasets") is None, reason="needs mmzoo[datasets]"), id="mapped"
)
BOTH = pytest.mark.parametrize("streaming", [MAPPED, pytest.param(True, id="streamed")])


def png(number: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (9, 7, 3), np.uint8)).save(out, "PNG")
    return out.getvalue()


def rows(first: int, count: int, **more: Any) -> pa.Table:
    """Rows as ``datasets`` writes images: a struct of bytes and path."""
    numbers = range(first, first + count)
    columns: dict[str, Any] = {
        "picture": [{"bytes": png(n), "path": f"{n}.png"} for n in numbers],
        "caption": [f"number {n}" for n in numbers],
        "more": [[f"the {n}th", ""] for n in numbers],
        "q": [f"which is {n}?" for n in numbers],
        "a": [[{"answer": str(n)}, {"answer": "it"}] for n in numbers],
        "key": [f"k{n}" for n in numbers],
    }
    return pa.table(columns | more)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "zoo"))
    if find_spec("datasets") is not None:
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "arrow"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four files of training, in row groups of five, and one each of validation and test."""
    root = tmp_path / "set" / "data"
    root.mkdir(parents=True)
    for number in range(4):
        pq.write_table(rows(10 * number, 10), root / f"train-0000{number}-of-00004.parquet", row_group_size=5)
    pq.write_table(rows(100, 3), root / "validation-00000-of-00001.parquet")
    pq.write_table(rows(200, 4), root / "test-00000-of-00001.parquet")
    return root.parent


COLUMNS: dict[str, Any] = {"image": "picture", "texts": "caption+more", "id": "key"}


def opened(folder: Path, streaming: bool, **fields: Any) -> HfDataset:
    source = HfConfig(**{"path": str(folder), "streaming": streaming} | COLUMNS | fields).build()
    assert isinstance(source, HfDataset)
    return source


@BOTH
def test_rows_are_samples(folder: Path, streaming: bool) -> None:
    source = opened(folder, streaming, question="q", answers="a", window=2)
    assert source.ids("train") == [f"k{n}" for n in range(40)]
    assert source.ids("val") == ["k100", "k101", "k102"]
    assert len(source.ids("test")) == 4
    for id in ("k0", "k17", "k39", "k202"):
        n = int(id[1:])
        sample = source.sample(id)
        assert sample.texts == (f"number {n}", f"the {n}th")
        assert sample.meta["turns"] == ((f"which is {n}?", str(n)),)
        assert sample.meta["questions"] == [{"question": f"which is {n}?", "answers": [str(n), "it"]}]
        assert sample.image is not None
        assert np.array_equal(np.asarray(sample.image), np.asarray(Image.open(io.BytesIO(png(n)))))
        assert source.text_sample(id).image is None
    copy = pickle.loads(pickle.dumps(source))
    assert copy.version == source.version
    assert copy.sample("k17").texts == source.sample("k17").texts
    numbered = opened(folder, streaming, id="")
    assert numbered.ids("val") == ["val/00000000", "val/00000001", "val/00000002"]
    assert numbered.sample("train/00000017").texts == source.sample("k17").texts


@BOTH
def test_every_reader_and_resume_reads_on_where_the_order_says(folder: Path, streaming: bool) -> None:
    source = opened(folder, streaming, window=2)
    order = training_order(source, 3)
    for world_size in (1, 2, 4):
        places = [
            p for step in range(5) for r in range(world_size) for p in order.slice(*share(step, 8, r, world_size))
        ]
        assert sorted(place.id for place in places) == sorted(source.ids("train"))
        assert places == order.slice(0, 40)
    processor = PairProcessor(ImageTransform(size=8), OpenMojiBpeConfig().build(), 24)

    def texts(**more: Any) -> list[str]:
        return [
            str(row.tolist()) for batch in loader(source, processor, order, 8, **more) for row in batch["input_ids"]
        ]

    whole = texts(stop_step=6)
    assert texts(start_step=2, stop_step=6, workers=2) == whole[16:]
    if streaming:  # nearly sequential: two row groups of five at a time
        group = {id: n // 5 for n, id in enumerate(source.ids("train"))}
        visited = [group[place.id] for place in order.slice(0, 40)]
        assert all(len(set(visited[at : at + 10])) == 2 for at in range(0, 40, 10))


@pytest.mark.skipif(find_spec("datasets") is None, reason="needs mmzoo[datasets]")
def test_saved_folders_arrow_files_and_images_of_the_library(folder: Path, tmp_path: Path) -> None:
    import datasets

    table = datasets.Dataset.from_list(
        [{"image": {"bytes": png(n), "path": None}, "text": f"row {n}"} for n in range(6)],
        features=datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")}),
    )
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": table, "validation": table}).save_to_disk(str(tmp_path / "two"))
    one = opened(tmp_path / "one", False, image="image", texts="text", id="", val_fraction=0.3, test_fraction=0.3)
    assert sum(len(one.ids(split)) for split in ("train", "val", "test")) == 6
    assert one.sample(one.ids("train")[0]).image is not None
    two = opened(tmp_path / "two", False, image="image", texts="text", id="")
    assert len(two.ids("val")) == len(two.ids("train")) == 6
    arrow = next((tmp_path / "one").glob("*.arrow"))
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "train.arrow").write_bytes(arrow.read_bytes())
    again = opened(tmp_path / "files", False, image="image", texts="text", id="", val_fraction=0.0, test_fraction=0.0)
    assert again.sample(again.ids("train")[3]).texts == ("row 3",)


def test_files_are_read_from_wherever_fsspec_reads() -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    with memory.open("/far/train-0.parquet", "wb") as file:
        pq.write_table(rows(0, 7), file, row_group_size=3)
    source = HfConfig(path="memory://far", streaming=True, val_fraction=0, test_fraction=0, **COLUMNS).build()
    assert source.sample("k5").texts[0] == "number 5"
    assert len(source.ids("train")) == 7


@BOTH
def test_bad_input_is_one_line(folder: Path, streaming: bool, tmp_path: Path) -> None:
    def refused(message: str, kind: type[Exception] = ConfigError, **fields: Any) -> None:
        with pytest.raises(kind, match=message) as caught:
            opened(folder, streaming, **fields)
        assert "\n" not in str(caught.value)

    refused(r"data.image = 'pictur' is no column of .*; did you mean picture", image="pictur")
    refused(r"data.id = 'zzz' is no column of .*; known: a, caption, key", id="zzz")
    refused(r"data.texts = 'captions' is no column", texts="captions")
    refused(
        r"has no split 'validatoin'; did you mean validation.*data.splits.val", DataError, splits={"val": "validatoin"}
    )
    refused(r"unknown split 'tset'; did you mean test", splits={"tset": "test"})
    refused("reads no column", image="", texts="")
    refused("belong together", question="q")
    refused("needs path", path="")
    refused(r"the id 'number' stands in row 0 and row 1", DataError, path=str(_constant(tmp_path)), id="caption")
    refused("no parquet or arrow files", DataError, path=str(_empty(tmp_path)))
    cells = [None, {"bytes": None, "path": "/etc/x.png"}, {"bytes": b"no", "path": ""}, {"bytes": png(3), "path": ""}]
    holes = rows(0, 4, picture=cells, caption=["a", "b", "c", None], more=[["x"], ["x"], ["x"], []])
    (tmp_path / "holes").mkdir()
    pq.write_table(holes, tmp_path / "holes" / "train.parquet")
    source = opened(tmp_path / "holes", streaming, val_fraction=0.0, test_fraction=0.0)
    for id, reason in (
        ("k0", "no image in 'picture'"), ("k1", "names the file '/etc/x.png' and does not hold the image"),
        ("k2", "cannot be read"), ("k3", "no text in 'caption' or 'more'"), ("k9", "no such row"),
    ):  # fmt: skip
        with pytest.raises(BadSample, match=re.escape(f"sample {id!r}: ") + f".*{reason}"):
            source.sample(id)
    assert source.text_sample("k0").texts == ("a", "x")


def _constant(tmp_path: Path) -> Path:
    (tmp_path / "constant").mkdir()
    pq.write_table(rows(0, 2, caption=["number", "number"]), tmp_path / "constant" / "train.parquet")
    return tmp_path / "constant"


def _empty(tmp_path: Path) -> Path:
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


def test_a_damaged_file_is_named(folder: Path) -> None:
    file = folder / "data" / "train-00002-of-00004.parquet"
    good = file.read_bytes()
    place = pq.ParquetFile(file).metadata.row_group(1).column(0).data_page_offset
    file.write_bytes(good[:place] + b"\xff" * 64 + good[place + 64 :])
    source = opened(folder, True, id="")
    assert source.sample("train/00000020").image is not None
    with pytest.raises(DataError, match=r"train-00002-of-00004.parquet, row group 1 is damaged"):
        source.sample("train/00000026")
    file.write_bytes(good[:200])
    with pytest.raises(DataError, match=r"train-00002-of-00004.parquet is no parquet file"):
        opened(folder, True)


def test_without_the_library_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"pip install 'mmzoo\[datasets\]'"):
        opened(folder, False)
    assert len(opened(folder, True).ids("train")) == 40


def test_a_mixture_of_shards_and_tables(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights 3 : 1 whatever the sizes, exact within one in each block, and the same places for every start."""
    for module in ("order", "mixture"):
        monkeypatch.setattr(f"zoo.data.{module}.HASHED", 200)  # places that a hash draws one by one
    pack(
        Packing(
            data={"name": "hf", "path": str(folder), "streaming": True, **COLUMNS}, out=tmp_path / "shards", samples=7
        )
    )
    config = MixtureConfig(
        sources={
            "shards": {"name": "shards", "root": str(tmp_path / "shards"), "window": 2},
            "table": {"name": "hf", "path": str(folder), "streaming": True, **COLUMNS},
        },
        balance="equal",
        factors={"shards": 3.0},
    )
    mixture: Any = config.build()
    order = mixture.order("train", 5)
    drawn = order.slice(0, 4 * order.block)
    for block in range(4):
        counted = Counter(d.id.partition("/")[0] for d in drawn[block * order.block : (block + 1) * order.block])
        assert abs(counted["shards"] - 0.75 * order.block) <= 1
    for name in ("shards", "table"):  # each source in its own order: all of it before any of it again
        own = [d.id for d in drawn if d.id.startswith(f"{name}/")]
        assert all(len(set(own[at : at + 40])) == 40 for at in range(0, len(own) - 40, 40))
    again = pickle.loads(pickle.dumps(mixture.order("train", 5)))
    assert again.slice(1000, 1100) == drawn[1000:1100]
    assert again.hash(10) == order.hash(10)
    assert again.hash(300) == order.hash(300) != mixture.order("train", 6).hash(300)
    assert mixture.sample(drawn[0].id).image is not None
