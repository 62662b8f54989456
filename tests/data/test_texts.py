"""Plain texts of the user's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from zoo.data.sample import data_hash, read
from zoo.data.texts import Texts, TextsConfig
from zoo.errors import ConfigError, DataError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "books"
    (folder / "more").mkdir(parents=True)
    (folder / "a.txt").write_text(
        "\n\nFirst line,\n  second line.\n\nAnother one.\n\n\n\nLast, without an end", "utf-8"
    )
    rows = [json.dumps({"text": f"row {n}", "other": [f"o{n}", "p"]}) for n in range(200)]
    (folder / "more" / "b.jsonl").write_text("\n".join([*rows[:100], "", *rows[100:]]) + "\n", "utf-8")
    (folder / "notes.md").write_text("not read")
    return folder


def make(root: Path, **fields: Any) -> Texts:
    return TextsConfig(root=str(root), **fields).open(None)


def test_paragraphs_and_lines_with_their_places(root: Path) -> None:
    source = make(root)
    every = {id for split in ("train", "val", "test") for id in source.ids(split)}
    assert len(every) == 203
    assert source.sample("a.txt:3").texts == ("First line, second line.",)
    assert source.sample("a.txt:6").texts == ("Another one.",)
    assert source.sample("a.txt:10").texts == ("Last, without an end",)
    assert source.sample("more/b.jsonl:1").texts == ("row 0",)
    assert source.sample("more/b.jsonl:102").texts == ("row 100",)
    assert source.sample("a.txt:3").image is None
    assert make(root, text_column="other").sample("more/b.jsonl:1").texts == ("o0", "p")
    assert len(list(read(source, source.ids("train")))) == len(source.ids("train"))


def test_one_file_is_enough_and_equal_texts_share_a_split(root: Path) -> None:
    source = make(root / "more" / "b.jsonl", val_fraction=0.2, test_fraction=0.3)
    assert 25 < len(source.ids("val")) < 55
    assert 40 < len(source.ids("test")) < 80
    (root / "c.txt").write_text("\n\n".join(f"row {n}" for n in range(200)), "utf-8")
    both = make(root, val_fraction=0.2, test_fraction=0.3)
    where = {id: split for split in ("train", "val", "test") for id in both.ids(split)}
    split_of = {both.sample(id).texts[0]: split for id, split in where.items() if id.startswith("c.txt")}
    assert all(split_of[both.sample(id).texts[0]] == split for id, split in where.items() if id.startswith("more"))


def test_the_version_follows_the_content(root: Path) -> None:
    before = data_hash(make(root), "train")
    assert data_hash(make(root), "train") == before
    (root / "a.txt").write_text("Other words.", "utf-8")
    assert data_hash(make(root), "train") != before


def test_bad_lines_are_counted(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"text": "good"}\nnonsense\n{"text": 3}\n[1]\n{"text": ""}\n{"text": []}\n', "utf-8")
    source = make(file)
    assert len(source.bad) == 5
    assert sum(len(source.ids(split)) for split in ("train", "val", "test")) == 1
    with pytest.raises(DataError, match=r"more than max_bad=2; the first is 'x.jsonl:2' \(not JSON"):
        make(file, max_bad=2)


def test_mistakes_are_one_line(root: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    latin = tmp_path / "latin.txt"
    latin.write_bytes("caf\xe9".encode("latin-1"))
    for path, fields, error, message in (
        (root, {"val_fraction": 0.6, "test_fraction": 0.4}, ConfigError, "must leave something to train on"),
        (root.parent / "bookz", {}, DataError, "did you mean books?"),
        (root / "notes.md", {}, DataError, "expected files ending in .jsonl or .txt"),
        (empty, {}, DataError, "no usable texts"),
        (latin, {}, DataError, "expected UTF-8 text"),
    ):
        with pytest.raises(error, match=message.replace("?", r"\?")):
            make(path, **fields)
    with pytest.raises(ConfigError, match=r"data\.root=PATH"):
        TextsConfig().open(None)
    with pytest.raises(DataError, match=r"unknown text 'a\.txt:4'; did you mean"):
        make(root).sample("a.txt:4")
