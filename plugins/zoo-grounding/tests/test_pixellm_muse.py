"""MUSE: its released JSON read, and questions with several masks written from COCO's annotations and from scenes."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from zoo_grounding.muse import MuseConfig
from zoo_grounding.muse_command import main
from zoo_grounding.muse_generated import MuseCocoConfig, MuseScenesConfig
from zoo_grounding.muse_task import MuseTaskConfig
from zoo_grounding.muse_templates import KINDS, SEG, Instance, parse_kinds, triples

from zoo.capabilities import MaskedText
from zoo.data.scenes_layout import Stream
from zoo.errors import ConfigError, DataError

WIDTH, HEIGHT = 20, 10


def polygon(left: int, top: int, right: int, bottom: int) -> list[list[float]]:
    return [[left, top, right, top, right, bottom, left, bottom]]


def runs(left: int, top: int, right: int, bottom: int) -> dict[str, Any]:
    """The same rectangle as run lengths, down the columns."""
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[top:bottom, left:right] = True
    pieces = [(inside, len(list(run))) for inside, run in groupby(mask.T.reshape(-1).tolist())]
    counts = [length for _, length in pieces]
    return {"size": [HEIGHT, WIDTH], "counts": [0, *counts] if pieces[0][0] else counts}


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Two images of COCO's layout with boxes of cats, dogs and chairs; one in polygons, one in runs."""
    from PIL import Image

    (tmp_path / "val2017").mkdir()
    images, annotations = [], []
    boxes = {
        1: [(1, (0, 0, 4, 4)), (1, (6, 0, 9, 3)), (2, (12, 0, 14, 2)), (3, (0, 6, 8, 10))],
        2: [(2, (0, 0, 3, 3)), (3, (10, 2, 18, 9)), (1, (5, 5, 6, 6))],
    }
    for number, own in boxes.items():
        name = f"{number:012d}.jpg"
        Image.new("RGB", (WIDTH, HEIGHT), (40 * number, 10, 20)).save(tmp_path / "val2017" / name)
        images.append({"id": number, "file_name": name, "height": HEIGHT, "width": WIDTH})
        for category, (left, top, right, bottom) in own:
            area = (right - left) * (bottom - top)
            row: dict[str, Any] = {"id": len(annotations), "image_id": number, "category_id": category, "iscrowd": 0}
            row["segmentation"] = (polygon if number == 1 else runs)(left, top, right, bottom)
            if number == 1:
                row |= {"bbox": [left, top, right - left, bottom - top], "area": area}
            annotations.append(row)
    annotations.append({"id": 99, "image_id": 1, "category_id": 2, "iscrowd": 1, "segmentation": runs(0, 0, 9, 9)})
    categories = [
        {"id": 1, "name": "cat", "supercategory": "animal"},
        {"id": 2, "name": "dog", "supercategory": "animal"},
        {"id": 3, "name": "chair", "supercategory": "furniture"},
    ]
    whole = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "instances_val2017.json").write_text(json.dumps(whole))
    return tmp_path


def generated(coco: Path, **fields: Any) -> Any:
    fields = {"questions": 4, "min_area": 0.0, **fields}
    return MuseCocoConfig(root=str(coco), test="instances_val2017.json", splits="test", **fields).build()


# -- templates ---------------------------------------------------------------------------------------------------------

THINGS = (
    Instance("cat", "animal", (0, 0, 4, 4), 16),
    Instance("cat", "animal", (6, 0, 9, 3), 9),
    Instance("dog", "animal", (12, 0, 14, 2), 4),
    Instance("chair", "furniture", (0, 6, 8, 10), 32),
)


def test_every_triple_is_true_and_follows_from_its_stream() -> None:
    kinds: set[str] = set()
    for seed in range(60):
        made = triples(THINGS, Stream("t", seed), KINDS, 4, (1, 4))
        assert made == triples(THINGS, Stream("t", seed), KINDS, 4, (1, 4))
        assert len({t.question for t in made}) == len(made) == 4
        for one in made:
            kinds.add(one.kind)
            names = [THINGS[place].name for place in one.targets]
            assert one.answer.count(SEG) == len(names) == len(set(one.targets))
            at = -1
            for name in dict.fromkeys(names):  # in order of mention
                assert (at := one.answer.index(name, at + 1)) >= 0
            if one.kind == "names":
                assert sorted(one.targets) == [i for i, t in enumerate(THINGS) if t.name in one.question]
            if one.kind == "every":
                assert one.targets == (0, 1)
            if one.kind == "group":
                group = "animal" if "animal" in one.question else "furniture"
                assert sorted(one.targets) == [i for i, t in enumerate(THINGS) if t.group == group]
            if one.kind in ("largest", "smallest"):
                order = sorted(range(4), key=lambda i: THINGS[i].area, reverse=one.kind == "largest")
                assert list(one.targets) == order[: len(one.targets)]
            if one.kind == "all":
                assert sorted(one.targets) == [0, 1, 2, 3]
    assert kinds == set(KINDS)
    beside = [t for s in range(80) for t in triples(THINGS, Stream(s), ("beside",), 3, (1, 4))]
    found = {
        (t.question.split(" the ")[0].split()[-1], t.question.rstrip("?.").split()[-1]): sorted(t.targets)
        for t in beside
    }
    assert found[("above", "chair")] == [0, 1, 2]
    assert found[("of", "dog")] == [0, 1, 3]  # left of the dog


def test_bounds_of_targets_and_unknown_kinds() -> None:
    for seed in range(20):
        assert all(len(t.targets) in (2, 3) for t in triples(THINGS, Stream(seed), KINDS, 5, (2, 3)))
    assert parse_kinds("largest+names") == ("names", "largest")
    assert parse_kinds("any") == KINDS
    with pytest.raises(ConfigError, match=r"unknown kind 'name'.*did you mean names"):
        parse_kinds("name")


# -- COCO --------------------------------------------------------------------------------------------------------------


def test_questions_about_coco(coco: Path) -> None:
    source = generated(coco)
    ids = source.ids("test")
    assert ids == generated(coco).ids("test")
    assert source.version == generated(coco).version
    assert source.version != generated(coco, seed=1).version
    assert {id.split("/")[0] for id in ids} == {"000000000001.jpg", "000000000002.jpg"}
    rectangles = {1: {"cat": [(0, 0, 4, 4), (6, 0, 9, 3)], "dog": [(12, 0, 14, 2)], "chair": [(0, 6, 8, 10)]}}
    rectangles[2] = {"dog": [(0, 0, 3, 3)], "chair": [(10, 2, 18, 9)], "cat": [(5, 5, 6, 6)]}
    for id in ids:
        sample = source.sample(id)
        ((_, answer),) = sample.meta["turns"]
        names, masks = sample.meta["targets"], sample.meta["masks"]
        assert answer.count(SEG) == len(names) == len(masks)
        known = rectangles[int(id.split(".")[0])]
        for name, mask in zip(names, masks, strict=True):
            assert mask.shape == (HEIGHT, WIDTH)
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            assert tuple(map(int, box)) in known[name]
            assert mask.sum() == (box[2] - box[0]) * (box[3] - box[1])
        assert "masks" not in source.text_sample(id).meta
        assert np.array_equal(source.masks(id), np.stack(masks))
        assert sample.meta["cluster"] == id.split("/")[0]
        assert source.image_stamp(id)


def test_small_instances_and_crowds_are_left_out(coco: Path) -> None:
    everything = generated(coco, ask="all", targets="1..20")
    counts = [len(everything.text_sample(id).meta["targets"]) for id in everything.ids("test")]
    assert sorted(set(counts)) == [3, 4]  # without the crowd
    large = generated(coco, ask="all", targets="1..20", min_area=0.04)
    assert [len(large.text_sample(id).meta["targets"]) for id in large.ids("test")][-1] == 2


def test_the_command_writes_what_the_reader_reads(coco: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = coco / "muse.json"
    given = ["--root", str(coco), "--instances", "instances_val2017.json", "--out", str(out), "--questions", "4"]
    assert main([*given, "--min-area", "0"]) == 0
    assert "2 images" in capsys.readouterr().out
    rows = json.loads(out.read_text())
    assert {"questions", "answers", "text_answers", "ann_list", "height", "width", "file_name"} <= set(rows[0])
    written = generated(coco)
    (coco / "train2014").mkdir()
    for path in (coco / "val2017").iterdir():  # a file name alone is one of train2014, in the release
        (coco / "train2014" / path.name).write_bytes(path.read_bytes())
    read = MuseConfig(root=str(coco), test=str(out), request=False, splits="test").build()
    assert len(read.ids("test")) == len(written.ids("test"))
    for ours, theirs in zip(read.ids("test"), written.ids("test"), strict=True):
        one, other = read.sample(ours), written.sample(theirs)
        assert one.meta["turns"] == other.meta["turns"]
        assert np.array_equal(np.stack(one.meta["masks"]), np.stack(other.meta["masks"]))
    with pytest.raises(ConfigError, match=r"the folder .* does not exist"):
        main([*given[:-4], "--out", str(coco / "nowhere" / "x.json")])


# -- MUSE's own files --------------------------------------------------------------------------------------------------


def muse_rows() -> list[dict[str, Any]]:
    cat = {
        "segmentation": polygon(0, 0, 4, 4),
        "category_name": "cat",
        "rephrased_name": "tabby cat",
        "bbox": [0, 0, 4, 4],
    }
    dog = {"segmentation": runs(10, 2, 18, 9), "category_name": "dog"}
    return [
        {
            "coco_url": "http://images.cocodataset.org/val2017/000000000001.jpg",
            "height": HEIGHT,
            "width": WIDTH,
            "ann_list": [cat, dog],
            "questions": ["Who lives here?", "Which one barks?"],
            "answers": [[cat, dog], [dog]],
            "text_answers": ["a tabby cat {seg} and a dog {seg} live here", None],
        }
    ]


def read(coco: Path, rows: Any, **fields: Any) -> Any:
    (coco / "muse_val.json").write_text(json.dumps(rows))
    return MuseConfig(root=str(coco), val="muse_val.json", **fields).build()


def test_released_layout(coco: Path) -> None:
    source = read(coco, muse_rows())
    assert source.ids("val") == ["val2017/000000000001.jpg/0", "val2017/000000000001.jpg/1"]
    first, second = (source.sample(id) for id in source.ids("val"))
    ((question, answer),) = first.meta["turns"]
    assert question.startswith("Who lives here? Please ")
    assert question.endswith("segmentation mask.")
    assert answer == "a tabby cat {seg} and a dog {seg} live here"
    assert first.meta["targets"] == ["tabby cat", "dog"]
    assert [int(mask.sum()) for mask in first.meta["masks"]] == [16, 56]
    assert second.meta["turns"][0][1] == "dog is {seg}."
    assert first.meta["cluster"] == second.meta["cluster"]
    assert (
        read(coco, muse_rows(), request=False).text_sample(source.ids("val")[0]).meta["turns"][0][0]
        == "Who lives here?"
    )
    without = muse_rows()
    del without[0]["text_answers"]
    answers = {read(coco, without).text_sample(id).meta["turns"][0][1] for id in source.ids("val")}
    assert all(answer.count(SEG) in (1, 2) for answer in answers)


def test_wrong_rows_are_counted_and_named(coco: Path) -> None:
    for change, message in (
        ({"text_answers": ["one {seg}", None]}, r"must have \{seg\} once for each of 2 targets"),
        ({"answers": [[]]}, "lists of one length"),
        ({"answers": [[{"category_name": "cat"}], []]}, "a list of targets with a segmentation"),
        ({"questions": ["", "x"]}, "a question must be a text"),
    ):
        rows = muse_rows()
        rows[0].update(change)
        with pytest.raises(DataError, match=message):
            read(coco, rows, max_bad=0)
    with pytest.raises(DataError, match="has no key 'questions'"):
        read(coco, [{"file_name": "x.jpg"}])
    with pytest.raises(ConfigError, match=r"needs data\.train=, data.val= or data.test=FILE"):
        MuseConfig(root=str(coco)).build()
    bad = muse_rows()
    bad[0]["answers"][1][0] = {"segmentation": {"size": [3, 3], "counts": [9]}, "category_name": "dog"}
    source = read(coco, bad)
    with pytest.raises(DataError, match="a mask cannot be read"):
        source.sample(source.ids("val")[1])


# -- scenes ------------------------------------------------------------------------------------------------------------


def test_scenes_are_asked_about_with_several_targets() -> None:
    config = MuseScenesConfig(
        icons="train", kinds=12, objects="2..4", targets="1..3", train_scenes=60, val_scenes=5, test_scenes=5
    )
    source, again = config.build(32), config.build(32)
    assert source.ids("train") == source.scenes.ids("train")
    several = 0
    for id in source.ids("train"):
        sample = source.sample(id)
        assert sample.meta["turns"] == again.text_sample(id).meta["turns"]
        ((_, answer),) = sample.meta["turns"]
        names, masks = sample.meta["targets"], sample.meta["masks"]
        assert answer.count(SEG) == len(names) == len(masks) <= 3
        several += len(names) > 1
        for name, mask, place in zip(names, masks, sample.meta["target_objects"], strict=True):
            assert sample.meta["objects"][place]["name"] == name
            assert np.array_equal(mask, source.masks(id)[place])
        assert sample.image is not None
        assert sample.image.size == (32, 32)
    assert several > 15
    assert source.version != config.build(32).scenes.version
    with pytest.raises(ConfigError, match="unknown kind 'everything'"):
        MuseScenesConfig(ask="everything", kinds=12).build(32)


# -- the task ----------------------------------------------------------------------------------------------------------


class Answering:
    """A model that draws the wanted masks in the opposite order, and leaves out or adds one by the id."""

    def __init__(self, source: Any) -> None:
        self.wanted = {
            source.sample(id).meta["turns"][0][0]: source.sample(id).meta["masks"] for id in source.ids("test")
        }
        self.less = False

    def segment(self, images: Any, prompts: Any, max_new_tokens: int = 64) -> list[MaskedText]:
        out = []
        for question in prompts:
            masks = [torch.from_numpy(mask) for mask in self.wanted[question]][::-1]
            masks = masks[1:] if self.less else masks
            stacked = torch.stack(masks) if masks else torch.zeros(0, HEIGHT, WIDTH, dtype=torch.bool)
            out.append(MaskedText("", stacked, tuple("x" for _ in masks), tuple(1.0 for _ in masks)))
        return out


def test_task_pairs_masks_at_best_and_punishes_what_is_missing(coco: Path) -> None:
    source = generated(coco, questions=1)
    model = Answering(source)
    task = MuseTaskConfig(items=0).build()
    right = task.run(model, source, "test")
    assert right.metrics["giou"] == right.metrics["ciou"] == right.metrics["count_right"] == 1.0
    counts = [len(source.text_sample(id).meta["targets"]) for id in source.ids("test")]
    assert right.metrics["targets"] == sum(counts)
    model.less = True
    less = task.run(model, source, "test")
    assert less.metrics["giou"] == pytest.approx(np.mean([(n - 1) / n for n in counts]))
    assert less.metrics["count_right"] == 0.0
    assert less.metrics["ciou"] < 1
    assert {row["item"] for row in less.items} == {f"{id}/0" for id in source.ids("test")}
