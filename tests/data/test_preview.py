from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.cli import main
from zoo.data.openmoji import OpenMoji
from zoo.data.preview import CELL, GAP, sheet
from zoo.data.sample import Sample
from zoo.errors import ConfigError, DataError


class Two:
    """One sample with two pictures and a dialogue, one with text alone."""

    name, version, licence, max_bad = "two", "1", "CC0-1.0", 0

    def ids(self, split: str) -> list[str]:
        return ["a", "b"]

    def sample(self, id: str) -> Sample:
        red, blue = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (500, 500), "blue")
        if id == "b":
            return Sample(id, None, ("only words",), {"turns": [("Hello?", "only words")]})
        return Sample(id, red, ("x",), {"images": (red, blue), "turns": [("<image>\n<image>: alike?", "no")]})


def test_a_sheet_shows_pictures_and_texts() -> None:
    page = np.asarray(sheet(Two(), ["a", "b"], columns=2))
    cell = page[GAP : GAP + CELL, GAP : GAP + CELL]
    assert (cell[: CELL // 2, : CELL // 2] == (255, 0, 0)).all()
    assert (cell[1 : CELL // 2 - 1, CELL // 2 + 1 : -1] == (0, 0, 255)).all()
    below = page[GAP + CELL + 2 :]
    assert (below[:, : GAP + CELL] < 128).any()
    assert (below[:, GAP + CELL :] < 128).any()
    with pytest.raises(DataError, match="nothing to show"):
        sheet(Two(), [])


def test_samples_of_a_source_in_order(icons: OpenMoji) -> None:
    ids = icons.ids("test")[:5]
    page = np.asarray(sheet(icons, ids, columns=2))
    assert page.shape[1] == 2 * (CELL + GAP) + GAP
    cell = page[GAP : GAP + CELL, GAP : GAP + CELL]
    native = Image.fromarray(icons.images(ids[:1])[0]).resize((CELL, CELL), Image.Resampling.NEAREST)
    assert np.array_equal(cell[1:-1, 1:-1], np.asarray(native)[1:-1, 1:-1])


def test_the_command_writes_it_or_says_why_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for n in range(12):
        Image.new("RGB", (20, 10), (20 * n, 0, 0)).save(photos / f"{n}.png")
    out = tmp_path / "sheet.png"
    assert main(["data", "preview", f"folder,root={photos}", "--count", "2", "--out", str(out)]) == 0
    assert Image.open(out).width > 2 * CELL
    assert "2 of " in capsys.readouterr().out
    for wrong in (["--count", "0"], ["--out", str(tmp_path / "no/x.png")], ["--out", "x.jpg"], ["--split", "tset"]):
        assert main(["data", "preview", f"folder,root={photos}", *wrong]) == 2
        assert capsys.readouterr().err.count("\n") == 1


# -- labelled sheets -----------------------------------------------------------------------------------------------


def test_a_labelled_sheet_places_rows_columns_and_notes(tmp_path: Path) -> None:
    from zoo.data.sheet import GAP as SPACE
    from zoo.data.sheet import MARGIN, labelled_sheet, wrapped

    red, blue = Image.new("RGB", (8, 8), "red"), torch.zeros(3, 4, 4)
    blue[2] = 1.0
    path = tmp_path / "green.png"
    Image.new("RGB", (300, 300), (0, 255, 0)).save(path)
    plain = np.asarray(labelled_sheet([[red, blue], [path, None]], cell=40))
    assert plain.shape == (2 * 40 + SPACE + 2 * MARGIN, 2 * 40 + SPACE + 2 * MARGIN, 3)
    first, second = slice(MARGIN, MARGIN + 40), slice(MARGIN + 40 + SPACE, MARGIN + 80 + SPACE)
    for rows, columns, colour in (
        (first, first, (255, 0, 0)),
        (first, second, (0, 0, 255)),
        (second, first, (0, 255, 0)),
        (second, second, (255, 255, 255)),
    ):
        assert (plain[rows, columns][:-1, :-1] == colour).all()
    named = labelled_sheet([[red, blue]], ["a row"], ["one", "two"], [["below", ""]], cell=40, left=60)
    assert named.width == plain.shape[1] + 60 + SPACE
    assert named.height > 40 + 2 * MARGIN + 2 * 14
    dark = (np.asarray(named) < 100).all(2)
    assert dark[:, MARGIN : MARGIN + 60].any()
    assert dark[-MARGIN - 16 :, MARGIN + 60 + SPACE :].any()
    assert wrapped("word " * 60, 60, 3)[-1].endswith("...")
    for wrong in (([],), ([[red]], ["a", "b"]), ([[red]], [], ["a", "b"]), ([[torch.zeros(4, 4)]],)):
        with pytest.raises(ConfigError):
            labelled_sheet(*wrong)
