"""The page, the CSV and the Markdown, from fabricated runs; and the page in a browser where there is one."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import pytest

from zoo.compare import charts
from zoo.compare.leaderboard import build_leaderboard
from zoo.compare.report import make_report
from zoo.compare.rundir import find_runs
from zoo.compare.tables import duration, print_leaderboard, short_labels
from zoo.errors import RunError

NOW = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)
VOID = {"meta", "img", "wbr", "br", "hr", "link", "input"}
EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"


class Page(HTMLParser):
    """Collects elements and text, and checks that tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {k: v or "" for k, v in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {k: v or "" for k, v in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attrs for name, attrs in self.elements if name == tag]


def read(path: Path) -> tuple[str, Page]:
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    return text, page


def test_the_demo_page(demo: Path, tmp_path: Path) -> None:
    out = make_report([demo], tmp_path / "report", now=NOW)
    assert out == tmp_path / "report" / "report.html"
    text, page = read(out)
    words = "".join(page.words)
    assert "4 models compared on openmoji" in words
    assert "2026-01-02 03:04 UTC" in words
    overview = text[text.index('class="sortable"') : text.index("Every metric, task by task")]
    assert overview.count('<th scope="row"') == 5
    assert overview.count("control: blank images") == 1
    assert overview.count("exploratory: 1 seed") == 5
    assert "⚠" not in overview
    assert "300 steps" in words
    assert "CC BY-SA 4.0" in words
    assert "zoo train model=clip scale=tiny seed=0" in words
    assert "zoo report" in words
    assert "0123456789ab" in words
    assert "Example CPU" in words
    assert len(page.all("img")) == 12
    assert len([a for a in page.all("svg") if a["class"] == "mask"]) == 5
    labels = [a["aria-label"] for a in page.all("svg") if a["class"] == "chart"]
    assert "bits/byte ↓ against training FLOPs" in labels
    assert "bits/byte ↓ against parameters" in labels
    assert "contrastive while training" in labels
    assert "next_token while training" in labels
    assert "bits/byte ↓: differences" in labels


def test_the_page_loads_nothing(demo: Path, tmp_path: Path) -> None:
    text, page = read(make_report([demo], tmp_path / "r.html", now=NOW))
    for tag, attributes in page.elements:
        assert tag not in {"link", "iframe", "object", "embed", "base", "form"}
        for name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            assert attributes.get(name, "data:").startswith("data:image/png;base64,") or name not in attributes
        assert not any(name.startswith("on") for name in attributes)
    assert "@import" not in text
    assert "url(" not in text
    assert "default-src 'none'" in text
    assert len(page.all("script")) == 1


def test_best_values_and_flags_are_marked(make_run: Callable[..., Path], tmp_path: Path) -> None:
    make_run("llava+connector=linear", quality=0.3)
    make_run("llava+connector=mlp", quality=0.6)
    hashes = {"data": "0ther" * 4, "order": "0rde0" * 8, "evaluation": "e7a1" * 4, "budget": "b4d9" * 4}
    make_run("zz-foreign", quality=0.95, manifest={"hashes": hashes})
    make_run("aa-broken", status="failed", manifest={"error": "the loss is not finite"})
    text, page = read(make_report([tmp_path / "outputs"], tmp_path / "r", now=NOW))
    rows = {
        m[1]: m[0] for m in re.finditer(r'<tr class="[^"]*">\s*<th scope="row" data-v="([^"]*)">.*?</tr>', text, re.S)
    }
    best = re.compile(r'class="\s*(?:edge)?\s*best"')
    overview = text[text.index('class="sortable"') : text.index("Every metric, task by task")]
    marked = [r for r in re.findall(r"<tr class=.*?</tr>", overview, re.S) if best.search(r)]
    assert len(marked) == 1
    assert 'data-v="llava+connector=mlp"' in marked[0]
    assert "zz-foreign" in rows
    foreign = next(r for r in re.findall(r"<tr class=.*?</tr>", overview, re.S) if "zz-foreign" in r)
    assert "flagged" in foreign
    assert "⚠ other data (0ther0th, not da7ada7a)" in foreign
    words = "".join(page.words)
    assert "aa-broken (seed 0) is not in the table: failed: the loss is not finite" in words


def test_what_users_write_is_escaped(make_run: Callable[..., Path], tmp_path: Path) -> None:
    path = make_run(
        "evil",
        manifest={
            "name": EVIL,
            "command": EVIL,
            "licence": EVIL,
            "layout": EVIL,
            "versions": {EVIL: EVIL},
            "hardware": EVIL,
            "error": EVIL,
            "scale": EVIL,
            "hashes": {"data": EVIL},
            "parts": [{"path": EVIL, "name": EVIL, "parameters": 5, "trained": True}, {"path": 3, "parameters": "x"}],
        },
        config={"data": {"name": EVIL}, "budget": {"unit": EVIL, "value": EVIL}, "evaluation": {"split": EVIL}},
    )
    make_run("plain")
    picture = '"><script>alert(3)</script>'
    (path / "samples.json").write_text(
        json.dumps([{"id": EVIL, "image": picture, "reference": EVIL, "output": [EVIL, 3]}, {"id": 4}, "x"])
    )
    metrics = json.loads((path / "metrics.json").read_text())
    (path / "metrics.json").write_text(json.dumps({**metrics, EVIL: {EVIL: 0.5}}))
    with (path / "curve.jsonl").open("a") as file:
        for step in (400, 401):
            file.write(json.dumps({"step": step, EVIL: 1.0 + step}) + "\n")
    text, page = read(make_report([tmp_path / "outputs"], tmp_path / "r", now=NOW))
    assert len(page.all("script")) == 1
    assert all(a.get("src", "").startswith("data:image/png;base64,iVBOR") for a in page.all("img"))
    assert not any("onerror" in attributes for _, attributes in page.elements)
    assert "alert(2)" in "".join(page.words)  # it is there, as text
    assert "alert(3)" not in text
    markdown = (tmp_path / "r" / "report.md").read_text()
    assert "<script" not in markdown


def test_csv_and_markdown(demo: Path, tmp_path: Path) -> None:
    page = make_report([demo], tmp_path / "r.html", now=NOW)
    rows = list(csv.DictReader(page.with_suffix(".csv").read_text().splitlines()))
    assert [r["name"] for r in rows][:2] == ["clip", "llava+connector=linear"]
    measured = json.loads(next(demo.glob("clip/*/metrics.json")).read_text())
    assert float(rows[0]["retrieval/i2t_r1"]) == measured["retrieval"]["i2t_r1"]
    assert rows[0]["caption-likelihood/bits_per_byte"] == ""
    assert float(rows[1]["training_flops"]) == 4.4e13
    assert rows[-1]["control"] == "1"
    markdown = page.with_suffix(".md").read_text().splitlines()
    assert len([line for line in markdown if line.startswith("| ")]) == 2 + 5
    assert len({line.count(" | ") for line in markdown if line.startswith("| ") and "---" not in line}) == 1
    assert any("**" in line and "connector=mlp" in line for line in markdown)


def test_seeds_are_shown_as_mean_and_spread(make_run: Callable[..., Path], tmp_path: Path) -> None:
    for seed in range(3):
        make_run("llava", seed, quality=0.4 + 0.05 * seed)
    text, _ = read(make_report([tmp_path / "outputs"], tmp_path / "r", now=NOW))
    assert "3 seeds" in text
    assert re.search(r"0\.\d{3} ± 0\.\d{3}", text)
    assert "exploratory" not in text


def test_a_page_without_a_finished_run(make_run: Callable[..., Path], tmp_path: Path) -> None:
    make_run("clip", status="running")
    _, page = read(make_report([tmp_path / "outputs"], tmp_path / "r", now=NOW))
    assert "No finished run yet" in "".join(page.words)


def test_broken_pieces_do_not_stop_the_report(demo: Path, tmp_path: Path) -> None:
    files = ["manifest.json", "curve.jsonl", "samples.json", "run.yaml", "items/naming.parquet"]
    for run, name in zip(sorted(p.parent for p in demo.rglob("manifest.json")), files, strict=True):
        (run / name).write_text("{broken")
    _, page = read(make_report([demo], tmp_path / "r", now=NOW))
    words = "".join(page.words)
    assert "manifest.json is not JSON" in words
    assert "samples.json is not JSON" in words


def test_an_unwritable_place_is_one_clear_line(demo: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write the report"):
        make_report([demo], tmp_path / "file" / "r")


def test_the_terminal_leaderboard(demo: Path) -> None:
    from rich.console import Console

    board = build_leaderboard(find_runs([demo]))
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_leaderboard(board, console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "caption-likelihood" in text
    for row in board.rows:
        for column in board.columns:
            if column.key in row.cells:
                assert column.text(row.cells[column.key].mean) in text
    assert "exploratory" in text
    assert set(short_labels(board.rows).values()) == {
        "clip",
        "llava · linear",
        "llava · mlp",
        "llava · qformer",
        "control · llava · mlp",
    }


def test_reading_and_reporting_need_no_torch(demo: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from zoo.compare.report import make_report; "
        f"make_report([{str(demo)!r}], {str(tmp_path / 'r')!r}); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_ticks_are_round_and_inside() -> None:
    assert charts.ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert charts.ticks(28e12, 69e12, 4) == [30e12, 40e12, 50e12, 60e12]
    assert charts.ticks(3, 3) == [3]
    assert charts.compact(4.6e13) == "46 T"
    assert charts.compact(38400) == "38.4 k"
    assert charts.compact(-0.25) == "-0.25"
    assert duration(185.2) == "3 min 05 s"


def test_labels_do_not_lie_on_each_other() -> None:
    points = [
        charts.Point(x=4.0e13 + n % 2 * 1e11, y=0.5 + 0.002 * n, label=f"llava · variant {n}", series=n)
        for n in range(6)
    ]
    picture = charts.scatter(points, "x", "y", lambda v: f"{v:.2f}", "t")
    found = re.findall(r'class="label" x="([-\d.]+)" y="([-\d.]+)"( text-anchor="end")?', picture)
    wide = 17 * charts.CHARACTER
    lefts = [float(x) - (wide if end else 0) for x, _, end in found]
    boxes = [(left, float(y) - 9, left + wide, float(y)) for left, (_, y, _) in zip(lefts, found, strict=True)]
    assert len(boxes) == 6
    for n, a in enumerate(boxes):
        assert a[0] >= 0
        assert a[2] <= charts.WIDTH
        for b in boxes[n + 1 :]:
            assert min(a[2], b[2]) <= max(a[0], b[0]) or min(a[3], b[3]) <= max(a[1], b[1])


def test_a_mask_is_drawn_cell_by_cell() -> None:
    picture = charts.mask_picture(["■■·", "■·■"], "t")
    assert 'd="M0 0h2v1h-2zM0 1h1v1h-1zM2 1h1v1h-1z"' in picture


BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)


@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
def test_in_a_browser(demo: Path, tmp_path: Path) -> None:
    """The script runs (a click sorts the table), nothing is wider than a phone, and the console stays empty."""
    page = make_report([demo], tmp_path / "report.html", now=NOW)
    probe = """<script>
    const table = document.querySelector("table.sortable");
    const key = () => [...table.tBodies[0].rows].map(r => r.children[0].dataset.v);
    const heads = table.querySelectorAll("thead tr:last-child th");
    const column = [...heads].findIndex(h => h.textContent.includes("bits/byte"));
    heads[column].querySelector("button").click(); heads[column].querySelector("button").click();
    const wide = [...document.querySelectorAll("body *")].filter(e => !e.closest(".scroll, pre, svg") &&
      e.getBoundingClientRect().right > document.documentElement.clientWidth + 1).map(e => e.className || e.tagName);
    document.title = JSON.stringify({order: key(), sort: heads[column].getAttribute("aria-sort"), wide});
    </script></body>"""
    page.write_text(page.read_text().replace("</body>", probe))
    command = [
        str(BROWSER),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=500,900",
        "--virtual-time-budget=2000",
        "--dump-dom",
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r"<title>(\{.*?\})</title>", done.stdout)
    assert found is not None, done.stderr[-500:]
    result = json.loads(found[1])
    assert result["sort"] == "ascending"
    assert result["wide"] == []
    assert result["order"][:2] == ["llava+connector=mlp", "llava+connector=linear"]
    assert result["order"][-1] == "clip"  # it has no such value
    assert "Refused to" not in done.stderr
