from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import zoo
from tests.data.public.conftest import KARPATHY, karpathy_row, picture
from zoo.data.public.captions import Flickr30kConfig, KarpathyConfig
from zoo.data.sample import BlankImages, TextOnly, data_hash, read
from zoo.errors import ConfigError, DataError
from zoo.evaluation.run import evaluate
from zoo.plugin import catalogue

Write = Callable[[str, Any], Path]


def test_splits_order_captions_and_clusters(coco: Path, write: Write) -> None:
    write("coco/dataset_coco.json", KARPATHY)
    source = KarpathyConfig(root=str(coco)).build()
    assert source.ids("train") == ["102", "1", "2"]  # restval is train, in the order of the file
    assert (source.ids("val"), source.ids("test")) == (["103"], ["101", "104", "105"])
    sample = source.sample("104")
    assert sample.texts == tuple(f"A picture of number 104 told in way {c}." for c in range(5))  # the first five of six
    assert sample.meta["cluster"] == "104"
    assert sample.image is not None
    assert (sample.image.size, sample.image.mode) == (picture(104).size, "RGB")
    assert len(KarpathyConfig(root=str(coco), captions=0).build().sample("103").texts) == 7
    alone = KarpathyConfig(root=str(coco), text_only=True).build()
    assert isinstance(alone, TextOnly)
    assert alone.sample("104").texts == sample.texts


def test_the_thousands_of_the_test_split_follow_the_file(coco: Path, write: Write, monkeypatch: Any) -> None:
    monkeypatch.setattr("zoo.data.public.captions.FOLD", 2)
    write("coco/dataset_coco.json", KARPATHY)
    folds = [KarpathyConfig(root=str(coco), fold=n).build() for n in (1, 2)]
    assert [source.ids("test") for source in folds] == [["101", "104"], ["105"]]
    assert all(source.ids("train") == ["102", "1", "2"] for source in folds)
    with pytest.raises(ConfigError, match="1 to 5"):
        KarpathyConfig(root=str(coco), fold=6).build()


def test_flickr_lies_in_one_folder_or_below(tmp_path: Path, write: Write) -> None:
    rows = [
        {"sentids": [5 * n], "imgid": n, "sentences": [{"tokens": ["dog"], "raw": f"Dog {n}.", "imgid": n}],
         "split": split, "filename": f"{1000092795 + n}.jpg"}
        for n, split in enumerate(("train", "val", "test"))
    ]  # fmt: skip
    file = write("dataset_flickr30k.json", {"images": rows, "dataset": "flickr30k"})
    found = []
    for folder in ("flat", "above/flickr30k-images"):
        (tmp_path / folder).mkdir(parents=True)
        for n in range(3):
            picture(n).save(tmp_path / folder / f"{1000092795 + n}.jpg")
        found.append(Flickr30kConfig(root=str(tmp_path / folder.split("/")[0]), file=str(file)).build())
    assert [source.ids("test") for source in found] == [["1000092797"]] * 2
    assert data_hash(found[0], "test") == data_hash(found[1], "test")
    assert found[0].sample("1000092797").texts == ("Dog 2.",)


def test_versions_follow_texts_splits_and_pictures(coco: Path, write: Write) -> None:
    write("coco/dataset_coco.json", KARPATHY)
    first = KarpathyConfig(root=str(coco)).build().version
    assert KarpathyConfig(root=str(coco)).build().version == first
    changed = copy.deepcopy(KARPATHY)
    changed["images"][0]["sentences"][0]["raw"] = "Other."  # type: ignore[index]
    write("coco/other.json", changed)
    assert KarpathyConfig(root=str(coco), file="other.json").build().version != first
    picture(3).resize((90, 70)).save(coco / "val2014/COCO_val2014_000000000101.jpg")
    assert KarpathyConfig(root=str(coco)).build().version != first


def test_texts_are_read_without_pictures_and_missing_ones_are_counted(
    coco: Path, write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    write("coco/dataset_coco.json", KARPATHY)
    (coco / "val2014/COCO_val2014_000000000105.jpg").unlink()
    (coco / "val2014/COCO_val2014_000000000104.jpg").write_bytes(b"no picture")
    source = KarpathyConfig(root=str(coco), max_bad=1).build()
    assert source.ids("test") == ["101", "104"]
    assert "COCO_val2014_000000000105.jpg' is missing" in caplog.text
    assert source.text_sample("104").texts[0].startswith("A picture")  # type: ignore[attr-defined]
    assert [s.id for s in read(source, source.ids("test"))] == ["101"]
    with pytest.raises(DataError, match="more than max_bad=0") as error:
        KarpathyConfig(root=str(coco), max_bad=0).build()
    assert "\n" not in str(error.value)
    blank = KarpathyConfig(root=str(coco), blank_images=True).build()
    assert isinstance(blank, BlankImages)
    assert blank.sample("101").image.getextrema() == ((255, 255),) * 3  # type: ignore[union-attr]


ROW = karpathy_row(101, "test")
WRONG: list[tuple[Any, str]] = [
    ({"annotations": []}, "has no key 'images' (its keys: 'annotations')"),
    ([], "holds a list, no object with 'images'"),
    ({"images": {}}, "must be a list"),
    ("{", "cannot be read as JSON"),
    ({"images": [{k: v for k, v in ROW.items() if k != "split"}]}, "has no key 'split'"),
    ({"images": [{k: v for k, v in ROW.items() if k != "sentences"}]}, "has no key 'sentences'"),
    ({"images": [{**ROW, "split": "minival"}]}, "split must be one of train, restval, val, test, not 'minival'"),
    ({"images": [{**ROW, "sentences": [{"caption": "x"}]}]}, "a text as 'raw'"),
    ({"images": [ROW, ROW]}, "'101' is in the test split twice"),
    ({"images": [ROW, {**ROW, "split": "val"}]}, "the test and the val split; an image belongs to one"),
    ({"images": []}, "no usable rows"),
    ({"images": [{**ROW, "filename": "../x.jpg"}]}, "is refused"),
    ({"images": [{**ROW, "filepath": "../coco/val2014"}]}, "is refused"),
    ({"images": [{**ROW, "filepath": "val2017"}]}, "has no folder 'val2017' and no images"),
]


@pytest.mark.parametrize(("value", "reason"), WRONG)
def test_other_layouts_are_refused_in_one_line(coco: Path, write: Write, value: Any, reason: str) -> None:
    write("coco/d.json", value)
    with pytest.raises(DataError) as error:
        KarpathyConfig(root=str(coco), file="d.json", max_bad=0).build()
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_files_folders_and_splits(coco: Path, write: Write) -> None:
    write("coco/dataset_coco.json", KARPATHY)
    for fields, reason in (
        ({"root": ""}, "data.root=PATH"),
        ({"root": str(coco / "none")}, "the image folder"),
        ({"file": "dataset_coca.json"}, "'dataset_coca.json' does not exist in .*; did you mean dataset_coco.json"),
        ({"file": ""}, "data.file=PATH"),
        ({"splits": "train+tets"}, "unknown split 'tets'; did you mean test"),
        ({"captions": -1}, "data.captions"),
    ):
        with pytest.raises((ConfigError, DataError), match=reason) as error:
            KarpathyConfig(**{"root": str(coco), **fields}).build()  # type: ignore[arg-type]
        assert "\n" not in str(error.value)
    source = KarpathyConfig(root=str(coco)).build()
    with pytest.raises(ConfigError, match="unknown split 'tset'; did you mean test"):
        source.ids("tset")
    with pytest.raises(DataError, match="unknown sample '10'"):
        source.sample("10")


def test_splits_without_pictures_can_be_left_out(coco: Path, write: Write) -> None:
    write("coco/dataset_coco.json", KARPATHY)
    for path in (coco / "train2014").iterdir():
        path.unlink()
    (coco / "train2014").rmdir()
    with pytest.raises(
        DataError, match=r"has no folder 'train2014' and no images; set data\.root, or leave out splits"
    ):
        KarpathyConfig(root=str(coco)).build()
    source = KarpathyConfig(root=str(coco), splits="val+test").build()
    assert (source.ids("test"), source.ids("train")) == (["101", "104", "105"], [])
    moved = KarpathyConfig(root=str(coco / "val2014"), file=str(coco / "dataset_coco.json"), splits="test").build()
    assert moved.ids("test") == source.ids("test")  # root may be the folder itself


def test_a_link_to_the_folder_of_pictures_is_the_users_own(coco: Path, write: Write, tmp_path: Path) -> None:
    write("here/dataset_coco.json", KARPATHY)
    for name in ("train2014", "val2014"):
        (tmp_path / "here" / name).symlink_to(coco / name)
    assert KarpathyConfig(root=str(tmp_path / "here")).build().sample("101").image is not None


def test_retrieval_and_captioning_with_five_captions(coco: Path, write: Write, tmp_path: Path) -> None:
    write("coco/dataset_coco.json", KARPATHY)
    source = KarpathyConfig(root=str(coco)).build()
    retrieval = catalogue()["task"].parse("retrieval", {}, "retrieval").build()
    report = evaluate(zoo.build("clip", scale="tiny").model, source, "test", [retrieval], tmp_path / "clip")
    found = report["metrics"]["retrieval"]
    assert (found["images"], found["captions"]) == (3.0, 15.0)
    assert found["i2t_r10"] <= 1.0
    assert found["t2i_r5"] == 1.0  # three images
    captioning = catalogue()["task"].parse("captioning", {"max_new_tokens": 4}, "captioning").build()
    report = evaluate(zoo.build("llava", scale="tiny").model, source, "test", [captioning], tmp_path / "llava")
    found = report["metrics"]["captioning"]
    assert found["references"] == 15.0
    assert all(math.isfinite(value) for value in found.values())
    assert found["bits_per_byte"] > 0
