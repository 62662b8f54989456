from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zoo.cli import main
from zoo.data.openmoji import OpenMoji
from zoo.data.preview import CELL, GAP, sheet
from zoo.data.sample import Sample
from zoo.errors import DataError


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
