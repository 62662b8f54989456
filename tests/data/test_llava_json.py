from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from zoo.data.llava_json import LlavaJson, LlavaJsonConfig
from zoo.data.sample import BlankImages, data_hash, read
from zoo.errors import ConfigError, DataError


def say(*turns: str) -> list[dict[str, str]]:
    return [{"from": "gpt" if n % 2 else "human", "value": text} for n, text in enumerate(turns)]


def row(id: Any, image: Any = "a/0.png", *turns: str) -> dict[str, Any]:
    return {"id": id, "image": image, "conversations": say(*(turns or ("<image>\nWhat is it?", "A cup.")))}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    for number in range(6):
        (folder / "a").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (10 + number, 8), (40 * number, 9, 9)).save(folder / f"a/{number}.png")
    return folder


def make(folder: Path, rows: Any, name: str = "data.json", **fields: Any) -> LlavaJson:
    text = rows if isinstance(rows, str) else json.dumps(rows)
    (folder.parent / name).write_text(text, encoding="utf-8")
    fields = {"val_fraction": 0.0, "test_fraction": 0.0, "max_bad": 0, "root": str(folder), **fields}
    return LlavaJsonConfig(file=str(folder.parent / name), **fields).open(None)


def test_rows_become_dialogues_with_their_image(root: Path) -> None:
    rows = [
        row("x", "a/1.png", "What?\n<image>", "A cup.", "Which colour?", "Red."),
        {"id": 7, "conversations": say("Say hello.", "Hello.")},
        row("two", ["a/2.png", "a/3.png"], "<image> and <image>: alike?", "No."),
    ]
    source = make(root, rows)
    assert source.ids("train") == ["x", "7", "two"]
    sample = source.sample("x")
    assert sample.image is not None
    assert (sample.image.size, sample.image.mode) == ((11, 8), "RGB")
    assert sample.meta["turns"] == (("What?\n<image>", "A cup."), ("Which colour?", "Red."))
    assert sample.texts == ("A cup.", "Red.")
    assert sample.meta["cluster"] == "a/1.png"
    assert source.sample("7").image is None
    assert [i.size[0] for i in source.sample("two").meta["images"]] == [12, 13]
    assert "images" not in sample.meta


def test_jsonl_is_the_same_data(root: Path) -> None:
    rows = [row(str(n), f"a/{n}.png") for n in range(4)]
    a, b = make(root, rows), make(root, "\n".join(map(json.dumps, rows)) + "\n\n", "data.jsonl")
    assert a.ids("train") == b.ids("train")
    assert data_hash(a, "train") == data_hash(b, "train")
    changed = make(root, [*rows[:3], row("3", "a/3.png", "<image>?", "Other.")])
    assert data_hash(changed, "train") != data_hash(a, "train")


def test_repeated_ids_are_told_apart_and_missing_ones_made(root: Path) -> None:
    rows = [row("x", "a/1.png"), row("x", "a/1.png", "<image>?", "Two."), row("x#2"), {**row(0), "id": None}]
    source = make(root, rows)
    assert source.ids("train") == ["x", "x#2", "x#2#2", "data.json[3]"]
    assert source.sample("x#2").texts == ("Two.",)


def test_all_conversations_about_an_image_are_in_one_split(root: Path) -> None:
    rows = [row(f"{n}-{k}", f"a/{n}.png") for n in range(6) for k in range(5)]
    source = make(root, rows, val_fraction=0.3, test_fraction=0.3)
    split = {i.split("-")[0]: set() for s in ("train", "val", "test") for i in source.ids(s)}  # type: ignore[var-annotated]
    for s in ("train", "val", "test"):
        for i in source.ids(s):
            split[i.split("-")[0]].add(s)
    assert all(len(found) == 1 for found in split.values())
    assert len({next(iter(found)) for found in split.values()}) > 1


def test_a_first_turn_of_the_model_is_dropped_and_other_names_of_speakers_are_read(root: Path) -> None:
    turns = [{"from": "gpt", "value": "Hi."}, *say("<image>?", "A cup.")]
    other = [{"from": "user", "value": "<image>?"}, {"from": "assistant", "value": "A cup."}]
    source = make(root, [{"id": n, "image": "a/0.png", "conversations": c} for n, c in enumerate((turns, other))])
    assert [source.sample(i).meta["turns"] for i in source.ids("train")] == [(("<image>?", "A cup."),)] * 2


BAD = [
    (row("b", "a/none.png"), "the image 'a/none.png' is missing"),
    (row("b", 3), "image must be a path"),
    (row("b", "a/0.png", "No place?", "A cup."), "1 images and 0 <image>"),
    (row("b", "a/0.png", "<image><image>", "A cup."), "1 images and 2 <image>"),
    ({"id": "b", "conversations": say("<image>?", "A cup.")}, "0 images and 1 <image>"),
    (row("b", "a/0.png", "<image>?", "A <image>."), "stands in an answer"),
    (row("b", "a/0.png", "<image>?"), "take turns"),
    (row("b", "a/0.png", "<image>?", " "), "an answer is empty"),
    ({"id": "b", "conversations": []}, "must be a list of turns"),
    ({"id": "b", "conversations": [{"from": "humna", "value": "x"}]}, "unknown speaker 'humna'; did you mean human"),
    ({"id": "b", "conversations": [{"from": "human"}]}, "from and value"),
    ({"id": "b", "conversations": [*say("x", "y"), *say("z", "w")][::2]}, "take turns"),
    ("text", "a row must be an object"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD)
def test_bad_rows_are_skipped_up_to_the_limit(
    root: Path, bad: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    source = make(root, [row("good"), bad], max_bad=1)
    assert source.ids("train") == ["good"]
    assert reason in caplog.text
    assert "data.json[1]" in caplog.text
    with pytest.raises(DataError, match="more than max_bad=0") as error:
        make(root, [row("good"), bad])
    assert "\n" not in str(error.value)
    assert reason in str(error.value)


@pytest.mark.parametrize("path", ["/etc/passwd", "../x.png", "a/../../x.png", "C:\\x.png"])
def test_paths_out_of_the_folder_are_refused(root: Path, path: str) -> None:
    with pytest.raises(DataError, match="is refused"):
        make(root, [row("x", path)], max_bad=10)


def test_links_out_of_the_folder_are_refused(root: Path, tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(DataError, match="a link that leads out"):
        make(root, [row("x", "link.png")], max_bad=10)


def test_files_that_cannot_be_used(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.file=PATH"):
        LlavaJsonConfig().open(None)
    with pytest.raises(DataError, match="does not exist"):
        LlavaJsonConfig(file=str(root / "none.json")).open(None)
    with pytest.raises(DataError, match=r"the image folder .* does not exist"):
        make(root, [row("x")], root=str(root / "none"))
    with pytest.raises(ConfigError, match=r"set data\.root"):
        make(root, [row("x")], root="")
    with pytest.raises(DataError, match="is not JSON"):
        make(root, "{")
    with pytest.raises(DataError, match="must hold a list of rows, not a dict"):
        make(root, "{}")
    with pytest.raises(DataError, match="no usable rows"):
        make(root, [])
    with pytest.raises(ConfigError, match="leave something"):
        make(root, [row("x")], val_fraction=0.5, test_fraction=0.5)
    assert make(root, [{"id": "t", "conversations": say("Hi", "Ho")}], root="").sample("t").image is None


def test_damaged_images_are_skipped_and_blank_ones_are_blank(root: Path) -> None:
    (root / "a/0.png").write_bytes(b"no image")
    rows = [row("x"), row("y", ["a/1.png", "a/2.png"], "<image><image>?", "No.")]
    source = make(root, rows, max_bad=1)
    assert [s.id for s in read(source, source.ids("train"))] == ["y"]
    blank = BlankImages(source).sample("y")
    assert [i.getextrema() for i in (blank.image, *blank.meta["images"])] == [((255, 255),) * 3] * 3
    assert source.image_stamp("y") != source.image_stamp("x")
