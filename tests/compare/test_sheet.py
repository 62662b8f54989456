"""Drawn images are shown: in the report beside what else a run wrote, and on a sheet of their own."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zoo.compare.report import make_report
from zoo.compare.sheet import CELL, write_sheet
from zoo.errors import RunError


def png(colour: tuple[int, int, int]) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def drawing(path: Path, blue: int, count: int = 4, picture: str = "") -> Path:
    """Give a fabricated run drawn images: item n is (n, 0, 0) really and (0, n, blue) as drawn."""
    samples = [
        {
            "id": f"icon-{n}",
            "image": png((40 * n, 0, 0)),
            "reference": f"name {n}",
            "output": "rank 1",
            "outputs": {
                "text-to-image": {
                    "picture": picture or png((0, 40 * n, blue)),
                    "text": f"icon number {n}",
                    "kind": "drawn",
                }
            },
        }
        for n in range(count)
    ]
    (path / "samples.json").write_text(json.dumps(samples))
    return path


def middle(image: Image.Image, colour: tuple[int, int, int]) -> tuple[float, float]:
    """Column and row of the middle of what has this colour."""
    rows, columns = np.nonzero((np.asarray(image.convert("RGB")) == colour).all(-1))
    assert len(rows) >= 0.9 * CELL * CELL, f"{colour} is nowhere on the sheet"
    return float(columns.mean()), float(rows.mean())


def test_a_sheet_has_a_row_for_each_run(make_run: Callable[..., Path], tmp_path: Path) -> None:
    runs = [drawing(make_run("first"), 100), drawing(make_run("second"), 200, count=4)]
    image = Image.open(write_sheet(runs, tmp_path / "new" / "sheet.png"))
    for n in range(1, 4):
        (real, top), (first, centre), (second, bottom) = (
            middle(image, colour) for colour in ((40 * n, 0, 0), (0, 40 * n, 100), (0, 40 * n, 200))
        )
        assert real == first == second
        assert top < centre < bottom
    assert middle(image, (40, 0, 0))[0] < middle(image, (80, 0, 0))[0] < middle(image, (120, 0, 0))[0]
    narrow = Image.open(write_sheet(runs, tmp_path / "other.png", labels=["a", "b"], columns=2))
    assert narrow.size[0] < image.size[0]
    assert (0, 120, 100) not in {colour for _, colour in narrow.getcolors(1 << 20)}
    drawing(runs[1], 200, count=2)  # what both have drawn
    assert Image.open(write_sheet(runs, tmp_path / "fewer.png")).size[0] == narrow.size[0]


def test_what_makes_no_sheet(make_run: Callable[..., Path], tmp_path: Path) -> None:
    plain, first = make_run("plain"), drawing(make_run("first"), 1)
    with pytest.raises(RunError, match="has drawn no images"):
        write_sheet([first, plain], tmp_path / "s.png")
    with pytest.raises(RunError, match="3 labels for 1 runs"):
        write_sheet([first], tmp_path / "s.png", labels=["a", "b", "c"])
    broken = drawing(make_run("broken"), 1, picture="no base64!")
    with pytest.raises(RunError, match="has drawn no images"):
        write_sheet([broken], tmp_path / "s.png")
    other = make_run("other")
    drawing(other, 1)
    samples = json.loads((other / "samples.json").read_text())
    (other / "samples.json").write_text(json.dumps([{**s, "id": "x" + s["id"]} for s in samples]))
    with pytest.raises(RunError, match="no text was drawn by all"):
        write_sheet([first, other], tmp_path / "s.png")
    assert not list(tmp_path.glob("s.png*"))


def test_the_report_shows_what_was_drawn(make_run: Callable[..., Path], tmp_path: Path) -> None:
    drawing(make_run("first"), 100)
    drawing(make_run("second"), 200, picture='"><script>alert(3)</script>')
    page = make_report([tmp_path / "outputs"], tmp_path / "r").read_text()
    assert page.count('class="drawn"') == 4
    for n in range(4):
        assert f'title="picture for: icon number {n}" src="data:image/png;base64,{png((0, 40 * n, 100))}"' in page
    assert "alert(3)" not in page
