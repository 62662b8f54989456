"""Packing any source into shards, and reading shards in any order, by any number of readers, after any stop."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from zoo.cli import main
from zoo.data.images import ImageTransform
from zoo.data.loader import loader
from zoo.data.order import SampleOrder, share, training_order
from zoo.data.pack import Packing, pack
from zoo.data.processor import PairProcessor
from zoo.data.sample import BadSample, Sample, Source
from zoo.data.shard_samples import key_of, members_of, read_members, sample_of, tar_bytes
from zoo.data.shards import LIST, Shards, ShardsConfig, index_path
from zoo.data.text import OpenMojiBpeConfig
from zoo.data.window import WindowOrder
from zoo.errors import ConfigError, DataError

SCENES = {"name": "openmoji-scenes", "icons": "train", "kinds": 12, "objects": 1}
SPLITS = ("val", "test")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 60 images with captions, of which some share a caption file row."""
    root = tmp_path_factory.mktemp("images")
    stream = np.random.default_rng(0)
    rows = []
    for n in range(60):
        Image.fromarray(stream.integers(0, 256, (9, 7, 3), dtype=np.uint8)).save(root / f"{n:02}.png")
        rows.append({"image": f"{n:02}.png", "caption": [f"number {n}", f"the {n}th ä"], "split": "train"})
    for row in rows[50:]:
        row["split"] = "val" if int(row["image"][:2]) < 55 else "test"  # type: ignore[index]
    (root / "captions.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return root


def plan(folder: Path, out: Path, **fields: Any) -> Packing:
    data = {"name": "folder", "root": str(folder), "captions": "captions.jsonl", "split_column": "split"}
    return Packing(data=data, out=out, samples=7, **fields)


def contents(source: Source, split: str) -> list[tuple[Any, ...]]:
    found = [source.sample(id) for id in source.ids(split)]
    return [(s.id, s.texts, None if s.image is None else np.asarray(s.image).tolist()) for s in found]


def test_what_is_packed_is_read_again(folder: Path, tmp_path: Path) -> None:
    said = pack(plan(folder, tmp_path / "out"))
    assert [s["samples"] for s in said["shards"]] == [7] * 7 + [1, 5, 5]
    assert not list((tmp_path / "out").glob("*.partial*"))
    shards, source = ShardsConfig(root=str(tmp_path / "out"), verify=True).build(), plan(folder, tmp_path).open()
    assert isinstance(shards, Source)
    for split in ("train", "val", "test"):
        assert shards.ids(split) == source.ids(split)
        assert contents(shards, split) == contents(source, split)
    assert shards.name == "folder"
    assert shards.licence == source.licence
    assert isinstance(training_order(shards, 0), SampleOrder)
    again = pickle.loads(pickle.dumps(shards))
    assert contents(again, "val") == contents(shards, "val")


def test_meta_arrays_and_several_images_survive(tmp_path: Path) -> None:
    image = Image.new("RGB", (3, 2), "red")
    masks = (np.eye(3, dtype=np.uint8), np.arange(4.0, dtype=np.float32))
    meta = {"turns": (("what?", "a cat"),), "masks": masks, "count": np.int64(3), "images": (image, image.rotate(90))}
    sample = Sample("x/1", image, ("two", "texts"), meta)
    found = sample_of(read_members(tar_bytes("00", members_of(sample)), "x/1"), "x/1", 10**6)
    assert (found.id, found.texts) == ("x/1", ("two", "texts"))
    assert found.meta["turns"] == (("what?", "a cat"),)
    assert found.meta["count"] == 3
    for mask, wanted in zip(found.meta["masks"], masks, strict=True):
        assert mask.dtype == wanted.dtype
        assert mask.tolist() == wanted.tolist()
    assert [i.tobytes() for i in found.meta["images"]] == [i.tobytes() for i in meta["images"]]
    with pytest.raises(DataError, match=r"sample 'x': meta\['f'\] holds a function, which a shard cannot"):
        members_of(Sample("x", None, (), {"f": key_of}))


def test_scenes_are_packed_with_their_questions(tmp_path: Path) -> None:
    pack(Packing(data=SCENES, out=tmp_path / "out", splits=("val",), samples=1000, image_size=64))
    shards = ShardsConfig(root=str(tmp_path / "out")).build()
    source = Packing(data=SCENES, out=tmp_path, image_size=64).open()
    for id in source.ids("val")[:20]:
        mine, theirs = shards.sample(id), source.sample(id)
        assert mine.texts == theirs.texts
        assert mine.meta["turns"] == tuple(tuple(turn) for turn in theirs.meta["turns"])
        assert mine.image is not None
        assert theirs.image is not None
        assert mine.image.tobytes() == theirs.image.convert("RGB").tobytes()


def test_bytes_do_not_depend_on_the_workers(folder: Path, tmp_path: Path) -> None:
    one, three = pack(plan(folder, tmp_path / "one")), pack(plan(folder, tmp_path / "three", workers=3))
    assert one == three
    for shard in one["shards"]:
        assert (tmp_path / "one" / shard["file"]).read_bytes() == (tmp_path / "three" / shard["file"]).read_bytes()


def test_packing_goes_on_after_a_stop(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"

    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(plan(folder, out), stop)
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert kept
    assert not (out / LIST).exists()
    (out / "train-000000.tar").write_bytes(b"cut")  # as if by a full disk
    said = pack(plan(folder, out))
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert {name for name in kept if after[name] != kept[name]} == {"train-000000.tar"}
    assert said == pack(plan(folder, tmp_path / "whole"))
    assert contents(ShardsConfig(root=str(out), verify=True).build(), "train")


def test_another_source_is_not_added_to_a_folder(folder: Path, tmp_path: Path) -> None:
    pack(plan(folder, tmp_path / "out"))
    with pytest.raises(DataError, match="holds shards of something else"):
        pack(plan(folder, tmp_path / "out", image_format="jpeg"))


def test_jpeg_is_close_and_another_version(folder: Path, tmp_path: Path) -> None:
    pack(plan(folder, tmp_path / "png"))
    pack(plan(folder, tmp_path / "jpeg", image_format="jpeg"))
    png, jpeg = (ShardsConfig(root=str(tmp_path / name)).build() for name in ("png", "jpeg"))
    assert png.version != jpeg.version
    one, other = (np.asarray(s.sample("03.png").image, np.float64) for s in (png, jpeg))
    assert 0 < abs(one - other).mean() < 25


# -- shards from elsewhere ---------------------------------------------------------------------------------------------


def foreign(root: Path, count: int = 30) -> None:
    """As img2dataset and others write them: image and .txt, or a .json with a caption."""
    root.mkdir(parents=True)
    for number in range(2):
        with tarfile.open(root / f"{number:05}.tar", "w") as tar:
            for n in range(count):
                picture = io.BytesIO()
                Image.new("RGB", (4, 4), (n, number, 0)).save(picture, "JPEG" if n % 2 else "PNG")
                text = ("txt", f"item {number}-{n}".encode()) if n % 3 else ("json", json.dumps({"caption": f"item {number}-{n}", "u": 1}).encode())  # fmt: skip # noqa: E501
                for suffix, content in (("jpg" if n % 2 else "png", picture.getvalue()), text):
                    info = tarfile.TarInfo(f"{n:04}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def test_shards_from_elsewhere_are_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign(tmp_path / "web")
    source = ShardsConfig(root=str(tmp_path / "web")).build()
    ids = [id for split in ("train", "val", "test") for id in source.ids(split)]
    assert len(ids) == len(set(ids)) == 60
    assert min(len(source.ids(split)) for split in ("train", "val", "test")) > 0
    for id in ids:
        sample = source.sample(id)
        assert sample.texts == (f"item {int(id.split('/')[0])}-{int(id.split('/')[1])}",)
        assert sample.image is not None
    monkeypatch.setattr("zoo.data.shards.scan", lambda path: pytest.fail("listed twice"))
    assert ShardsConfig(root=str(tmp_path / "web")).build().ids("train") == source.ids("train")


def test_webdataset_reads_ours_and_we_read_webdatasets(folder: Path, tmp_path: Path) -> None:
    wds = pytest.importorskip("webdataset", reason="needs webdataset")
    said = pack(plan(folder, tmp_path / "out"))
    theirs = []
    for shard in said["shards"]:
        for item in wds.WebDataset(str(tmp_path / "out" / shard["file"]), shardshuffle=False, empty_check=False):
            theirs.append((json.loads(item["json"])["id"], item["png"][:4]))
    ours = ShardsConfig(root=str(tmp_path / "out")).build()
    assert [id for id, _ in theirs] == [id for split in ("train", "val", "test") for id in ours.ids(split)]
    assert {magic for _, magic in theirs} == {b"\x89PNG"}
    (tmp_path / "w").mkdir()
    with wds.TarWriter(str(tmp_path / "w" / "train-0.tar")) as writer:
        for n in range(5):
            writer.write({"__key__": f"k{n}", "png": Image.new("RGB", (2, 2), (n, 0, 0)), "txt": f"text {n}"})
    source = ShardsConfig(root=str(tmp_path / "w")).build()
    assert source.ids("train") == [f"train-0/k{n}" for n in range(5)]
    assert source.sample("train-0/k3").texts == ("text 3",)


# -- order -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def packed(folder: Path, tmp_path: Path) -> Path:
    pack(plan(folder, tmp_path / "packed"))
    return tmp_path / "packed"


@pytest.mark.parametrize("window", [0, 1, 3])
def test_an_epoch_has_every_sample_once_whatever_the_readers(packed: Path, window: int) -> None:
    source = ShardsConfig(root=str(packed), window=window).build()
    order = training_order(source, 3)
    seen = []
    for world_size in (1, 2, 5):
        places = []
        for step in range(5):  # 50 samples in batches of 10
            for rank in range(world_size):
                places += order.slice(*share(step, 10, rank, world_size))
        seen.append(places)
        assert sorted(place.id for place in places) == sorted(source.ids("train"))
    assert seen[0] == seen[1] == seen[2]
    assert training_order(ShardsConfig(root=str(packed), window=window).build(), 3).slice(20, 70) == order.slice(20, 70)
    assert order.slice(0, 50) != order.slice(50, 100)
    assert training_order(source, 4).slice(0, 50) != order.slice(0, 50)


def test_a_window_keeps_to_its_shards(packed: Path) -> None:
    source = ShardsConfig(root=str(packed), window=2).build()
    order = training_order(source, 0)
    assert isinstance(order, WindowOrder)
    shard = {id: n for n, s in enumerate(source._shards) for id in s.ids}  # type: ignore[attr-defined]
    for epoch in range(3):
        visited = [shard[place.id] for place in order.slice(50 * epoch, 50 * (epoch + 1))]
        first = {n: visited.index(n) for n in set(visited)}
        last = {n: len(visited) - 1 - visited[::-1].index(n) for n in set(visited)}
        assert all(sum(first[m] <= place <= last[m] for m in first) <= 2 for place in range(50))
        assert len(set(visited[:10])) > 1  # and mixes those it has open
    assert order.hash(50) != SampleOrder(source.ids("train"), 0).hash(50)


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_damage_is_named(packed: Path) -> None:
    shard = packed / "train-000002.tar"
    good = shard.read_bytes()
    places = np.load(index_path(shard))["places"]
    damaged = bytearray(good)
    damaged[places[1][0] : places[1][0] + 1024] = os.urandom(1024)
    shard.write_bytes(damaged)
    source = ShardsConfig(root=str(packed)).build()
    assert isinstance(source, Shards)
    ids = source._shards[2].ids
    source.sample(ids[0])
    with pytest.raises(BadSample, match=r"sample .*: damaged \(.*\), in the shard train-000002.tar"):
        source.sample(ids[1])
    source.sample(ids[2])
    with pytest.raises(DataError, match=r"the shard train-000002.tar is damaged \(its checksum is another\)"):
        ShardsConfig(root=str(packed), verify=True).build()
    shard.write_bytes(good[:-600])
    with pytest.raises(DataError, match=r"train-000002.tar has \d+ bytes and should have \d+: it is cut short"):
        ShardsConfig(root=str(packed)).build()
    shard.unlink()
    with pytest.raises(DataError, match=r"the shard train-000002.tar .* is missing"):
        ShardsConfig(root=str(packed)).build()


def test_readers_of_a_damaged_shard_skip_what_they_may_and_then_stop(packed: Path, folder: Path) -> None:
    shard = packed / "train-000002.tar"
    places = np.load(index_path(shard))["places"]
    damaged = bytearray(shard.read_bytes())
    for row in (1, 2):
        damaged[places[row][0] : places[row][0] + 512] = b"x" * 512
    shard.write_bytes(damaged)
    bad = Shards(ShardsConfig(root=str(packed)))._shards[2].ids[1:3]

    def seen(max_bad: int) -> list[str]:
        source = ShardsConfig(root=str(packed), max_bad=max_bad).build()
        order = SampleOrder(source.ids("train"), 0)
        processor = PairProcessor(ImageTransform(size=8), OpenMojiBpeConfig().build(), 24)
        steps = loader(source, processor, order, 10, stop_step=5, workers=2)
        return [str(row.tolist()) for batch in steps for row in batch["input_ids"]]

    assert len(seen(max_bad=2)) == 50
    with pytest.raises(DataError, match=rf"2 samples cannot be read.*({bad[0]}|{bad[1]}).*shard train-000002.tar"):
        seen(max_bad=1)


def test_fewer_shards_than_readers(tmp_path: Path, folder: Path) -> None:
    """One shard and eight readers: four ranks of two workers each; every sample is read once an epoch."""
    pack(Packing(data=plan(folder, tmp_path).data, out=tmp_path / "one", samples=1000, splits=("train",)))
    source = ShardsConfig(root=str(tmp_path / "one")).build()
    assert isinstance(source, Shards)
    assert len(source._shards) == 1
    order = SampleOrder(source.ids("train"), 0)
    processor = PairProcessor(ImageTransform(size=8), OpenMojiBpeConfig().build(), 24)

    def texts(**readers: int) -> list[str]:
        batches = loader(source, processor, order, 20, stop_step=5, **readers)
        return [str(row[row != processor.tokenizer.pad_id].tolist()) for b in batches for row in b["input_ids"]]

    found = [text for rank in range(4) for text in texts(rank=rank, world_size=4, workers=2)]
    assert sorted(found) == sorted(texts())
    assert len(found) == 100


def test_bad_settings_are_one_line(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="needs root"):
        ShardsConfig().build()
    with pytest.raises(DataError, match="does not exist"):
        ShardsConfig(root=str(tmp_path / "no")).build()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no samples in the shards"):
        ShardsConfig(root=str(tmp_path / "empty")).build()
    (tmp_path / "empty" / "a.tar").write_bytes(b"nonsense" * 200)
    with pytest.raises(DataError, match=r"the shard a.tar cannot be read .*expected an uncompressed tar"):
        ShardsConfig(root=str(tmp_path / "empty")).build()
    with pytest.raises(ConfigError, match="image format 'jpg'; did you mean jpeg"):
        plan(folder, tmp_path, image_format="jpg")
    foreign(tmp_path / "web", 2)
    with pytest.raises(ConfigError, match="verify needs checksums"):
        ShardsConfig(root=str(tmp_path / "web"), verify=True).build()
    assert main(["data", "pack", "openmojj", "--out", str(tmp_path / "o")]) == 2
    assert "unknown data 'openmojj'; did you mean openmoji" in capsys.readouterr().err


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = f"folder,root={folder},captions=captions.jsonl,split_column=split"
    assert main(["data", "pack", data, "--out", str(tmp_path / "o"), "--samples", "25", "--workers", "2"]) == 0
    out = capsys.readouterr().out
    assert "60 samples in 4 shards" in out
    assert "zoo train data=shards" in out
