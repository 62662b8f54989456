from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data.public.conftest import coco_name, picture, picture_bytes
from zoo.data.public.masks import mask_of
from zoo.data.public.refcoco import RefcocoConfig
from zoo.errors import ConfigError, DataError
from zoo.evaluation.run import evaluate
from zoo.plugin import catalogue

Write = Callable[[str, Any], Path]
GOLDEN = Path(__file__).parents[2] / "goldens/data/coco_masks.json"


def test_masks_are_those_of_pycocotools() -> None:
    cases = json.loads(GOLDEN.read_text())["cases"]
    assert len(cases) > 12
    for case in cases:
        height, width = case["height"], case["width"]
        found = mask_of(case["segmentation"], height, width)
        assert found.shape == (height, width)
        assert found.sum() == case["area"]
        if case["rows"]:
            assert ["".join(map(str, row)) for row in found.astype(int).tolist()] == case["rows"]
        again = mask_of({"size": [height, width], "counts": case["counts"]}, height, width)
        assert (again == found).all()
        if isinstance(case["counts"], str):
            assert (mask_of({"size": [height, width], "counts": case["counts"].encode()}, height, width) == found).all()


def test_masks_that_cannot_be_read() -> None:
    for segmentation, reason in (
        ([], "polygons or runs"),
        ("x", "polygons or runs"),
        ([[1.0, 2.0, 3.0, 4.0]], "at least three corners"),
        ([[1.0, 2.0, 3.0, 4.0, 5.0, float("nan")]], "at least three corners"),
        ({"size": [4, 6], "counts": [3, 20]}, "do not fill"),
        ({"size": [6, 4], "counts": [24]}, "of size"),
        ({"size": [4, 6], "counts": "0\x7f"}, "no sign"),
        ({"size": [4, 6], "counts": "P"}, "end within a number"),
    ):
        with pytest.raises(ValueError, match=reason):
            mask_of(segmentation, 4, 6)


SQUARES = [[2.0, 2.0, 10.0, 2.0, 10.0, 9.0, 2.0, 9.0], [12.0, 3.0, 15.0, 3.0, 15.0, 6.0, 12.0, 6.0]]


def ref(n: int, image: int, split: str, ann: int) -> dict[str, Any]:
    """One of REFER's references, as its pickle holds them."""
    said = [f"The {word} one" for word in ("left", "red")]
    sentences = [
        {"tokens": s.lower().split(), "raw": s, "sent_id": 2 * n + k, "sent": s.lower()} for k, s in enumerate(said)
    ]
    name = coco_name("train2014", image).replace(".jpg", f"_{n}.jpg")
    return {"sent_ids": [2 * n, 2 * n + 1], "file_name": name,
            "ann_id": ann, "ref_id": n, "image_id": image, "split": split, "sentences": sentences,
            "category_id": 1}  # fmt: skip


def instances(refs: list[dict[str, Any]]) -> dict[str, Any]:
    """COCO's instances.json for them; the second reference's mask is stored as runs."""
    annotations = []
    for place, r in enumerate(refs):
        width, height = picture(r["image_id"]).size
        runs = {"size": [height, width], "counts": [height, 3, width * height - height - 3]}
        annotations.append(
            {"segmentation": runs if place == 1 else SQUARES, "area": 56.0, "iscrowd": int(place == 1),
             "image_id": r["image_id"], "bbox": [2.0, 2.0, 13.0, 7.0], "category_id": 1, "id": r["ann_id"]}
        )  # fmt: skip
    images = [
        {"id": i, "file_name": coco_name("train2014", i), "width": picture(i).width, "height": picture(i).height}
        for i in {r["image_id"] for r in refs}
    ]
    return {"info": {}, "images": images, "annotations": annotations, "categories": [{"id": 1, "name": "person"}]}


REFS = [ref(0, 1, "testA", 500), ref(1, 1, "testA", 501), ref(2, 2, "train", 502), ref(3, 3, "testB", 503),
        ref(4, 4, "val", 504)]  # fmt: skip


@pytest.fixture
def refer(coco: Path, write: Write) -> dict[str, Any]:
    write("coco/refs.json", REFS)
    write("coco/instances.json", instances(REFS))
    return {"root": str(coco), "file": "refs.json", "instances": "instances.json", "max_bad": 0}


def test_references_with_their_boxes_and_masks(refer: dict[str, Any]) -> None:
    source = RefcocoConfig(**refer).build()
    assert [source.ids(split) for split in ("train", "val", "test")] == [["2"], ["4"], ["1"]]
    sample = source.sample("1")
    assert sample.texts == ("the left one", "the red one") * 2
    assert sample.meta["referred"][3] == {"text": "the red one", "box": [2.0, 2.0, 15.0, 9.0], "ref": "1"}
    masks = source.masks("1")  # type: ignore[attr-defined]
    width, height = picture(1).size
    assert masks.shape == (4, height, width)
    assert (masks[0] == mask_of(SQUARES, height, width)).all()
    assert (masks[0].sum(), masks[2].sum()) == (56 + 9, 3)
    assert masks[2][:3, 1].all()  # runs go down the columns
    half = source.masks("1", width // 2)  # type: ignore[attr-defined]
    assert half.shape[2] == width // 2
    assert 0.6 < half[0].mean() / masks[0].mean() < 1.5
    assert RefcocoConfig(**{**refer, "test": "testB"}).build().ids("test") == ["3"]
    other = [{**r, "ann_id": 500} for r in REFS]
    (Path(refer["root"]) / "refs2.json").write_text(json.dumps(other))
    assert RefcocoConfig(**{**refer, "file": "refs2.json"}).build().version != source.version


def parquet(path: Path, images: list[int], group: int = 2) -> None:
    """Rows as lmms-lab's RefCOCO: one a reference, with its picture."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"question_id": str(700 + n), "image": {"bytes": picture_bytes(i), "path": f"{n}.jpg"},
         "question": "Please carefully observe the area", "answer": [f"thing {n}", f"object {n}"],
         "segmentation": SQUARES[n % 2], "bbox": [2.0, 2.0, 8.0, 7.0], "iscrowd": 0,
         "file_name": coco_name("train2014", i).replace(".jpg", f"_{n}.jpg")}
        for n, i in enumerate(images)
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)


def test_parquet_rows_bring_their_pictures(coco: Path, tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    parquet(folder / "val-00000-of-00001.parquet", [4, 5, 4])
    parquet(folder / "testA-00000-of-00002.parquet", [6, 7, 8])
    parquet(folder / "testA-00001-of-00002.parquet", [9])
    source = RefcocoConfig(file=str(folder)).build()
    assert [source.ids(split) for split in ("train", "val", "test")] == [[], ["4", "5"], ["6", "7", "8", "9"]]
    assert source.sample("4").texts == ("thing 0", "object 0", "thing 2", "object 2")
    for id in ("8", "4", "9", "6"):  # row groups in any order
        image = source.sample(id).image
        assert image is not None
        assert image.size == picture(int(id)).size
        assert abs(image.getpixel((3, 3))[0] - int(id)) < 6  # type: ignore[index]
        assert source.masks(id).shape[1:] == image.size[::-1]  # type: ignore[attr-defined]
    assert source.masks("4")[2].sum() == 56  # type: ignore[attr-defined]
    assert source.image_stamp("9") != source.image_stamp("6")  # type: ignore[attr-defined]
    from_files = RefcocoConfig(file=str(folder), root=str(coco)).build()
    assert from_files.sample("7").image.size == picture(7).size  # type: ignore[union-attr]
    assert RefcocoConfig(file=str(folder), test="testA", splits="test").build().ids("val") == []


class Segments:
    """A model whose masks are the whole image, or for one text nothing."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def segment_images(self, images: Any, texts: Any) -> list[torch.Tensor]:
        self.asked += texts
        return [
            torch.ones(i.height, i.width, dtype=torch.bool) & (t != "the red one")
            for i, t in zip(images, texts, strict=True)
        ]


def test_every_expression_is_a_target_of_its_own(refer: dict[str, Any], tmp_path: Path) -> None:
    source = RefcocoConfig(**refer).build()
    task = catalogue()["task"].parse("segmentation", {"batch_size": 3}, "segmentation").build()
    model = Segments()
    found = evaluate(model, source, "test", [task], tmp_path)["metrics"]["segmentation"]
    assert model.asked == ["the left one", "the red one"] * 2  # as they are, and equal ones not joined
    width, height = picture(1).size
    area = width * height
    assert found["targets"] == 4
    assert found["giou"] == pytest.approx((65 / area + 3 / area) / 4)
    assert found["ciou"] == pytest.approx((65 + 3) / (2 * area + 65 + 3))


def test_refcoco_layouts(refer: dict[str, Any], write: Write, tmp_path: Path) -> None:
    def fails(reason: str, refs: Any = REFS, **fields: Any) -> None:
        write("coco/refs.json", refs)
        with pytest.raises((ConfigError, DataError), match=reason) as error:
            RefcocoConfig(**{**refer, **fields}).build()
        assert "\n" not in str(error.value)

    fails("set data.instances=instances.json", instances="")
    fails("holds a dict, no list of references", {"refs": REFS})
    fails("has no key 'split'", [{k: v for k, v in REFS[0].items() if k != "split"}])
    fails("the annotation 9 is not among the instances", [{**REFS[0], "ann_id": 9}])
    fails("split must be one of", [{**REFS[0], "split": "minitest"}])
    fails("the expressions must be a list of texts", [{**REFS[0], "sentences": [{"tokens": []}]}])
    fails(
        "the image 'COCO_train2014_000000000001.jpg' is in the test and the val split", [REFS[0], ref(9, 1, "val", 500)]
    )
    fails("there is no partition 'test'; the files have testA, testB, train, val; set data.test=testA", test="test")
    fails("expected test, testA or testB", test="testC")
    fails("'none.json' does not exist", file="none.json")
    fails("data.file=PATH", file="")
    fails("no object with 'annotations'|has no key 'annotations'", instances="refs.json")
    write("coco/refs.p", "x")
    fails("cannot be read as JSON", file="refs.p")
    own = [{**r, "bbox": [1, 1, 4, 4], "segmentation": SQUARES} for r in REFS]
    write("coco/own.json", own)
    assert RefcocoConfig(root=refer["root"], file="own.json").build().sample("1").meta["referred"][0]["box"] == [
        1,
        1,
        5,
        5,
    ]
    (tmp_path / "val-0.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        RefcocoConfig(file=str(tmp_path / "val-0.parquet")).build()
    parquet(tmp_path / "dev-0.parquet", [4])
    with pytest.raises(DataError, match="does not begin with one of"):
        RefcocoConfig(file=str(tmp_path / "dev-0.parquet")).build()
