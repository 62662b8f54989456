"""The page and its tables, from fabricated runs. What a browser makes of the page is in test_page.py."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import pytest

from zoo.compare.leaderboard import build_leaderboard
from zoo.compare.report import make_report
from zoo.compare.rundir import find_runs
from zoo.compare.tables import duration, print_leaderboard, short_labels
from zoo.errors import RunError

NOW = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)
VOID = {"meta", "img", "wbr", "br", "hr", "link", "input"}
FACTS = {
    "understands": True,
    "draws": "masked",
    "learns": ["masked", "autoregressive"],
    "images": "discrete",
    "attention": "text causal, image full; one sequence",
    "stages": [
        {"name": "align", "trained": ["decoder"], "frozen": ["image_tokenizer"], "parameters": 5},
        {"name": "tune", "trained": ["decoder", "image_tokenizer"], "frozen": [], "parameters": 7},
    ],
    "parameters": 1_300_000,
    "visual_tokens": 256,
    "drawing_passes": 18,
}
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
    assert "bits/byte ↓ against visual tokens an image" in labels
    assert any(label.startswith("bits/byte ↓: differences, 95 % intervals over items") for label in labels)
    assert all(a["role"] == "img" and a["aria-label"] for a in page.all("svg"))
    assert all(a["alt"].strip() for a in page.all("img"))


def test_the_page_loads_nothing(demo: Path, tmp_path: Path) -> None:
    text, page = read(make_report([demo], tmp_path / "r.html", now=NOW))
    for tag, attributes in page.elements:
        assert tag not in {"link", "iframe", "object", "embed", "base", "form"}
        for name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            assert attributes.get(name, "#").startswith(("data:image/png;base64,", "#"))
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
    assert "⚠ not comparable: other data" in foreign
    assert "other data (0ther0th, not da7ada7a)" in foreign
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
    markdown = page.with_suffix(".md").read_text().partition("## Models")[0].splitlines()
    assert len([line for line in markdown if line.startswith("| ")]) == 2 + 5
    assert len({line.count(" | ") for line in markdown if line.startswith("| ") and "---" not in line}) == 1
    assert any("**" in line and "connector=mlp" in line for line in markdown)


def test_seeds_are_shown_as_mean_and_spread(make_run: Callable[..., Path], tmp_path: Path) -> None:
    for seed in range(3):
        make_run("llava", seed, quality=0.4 + 0.05 * seed)
    text, _ = read(make_report([tmp_path / "outputs"], tmp_path / "r", now=NOW))
    assert "3 seeds" in text
    assert re.search(r"0\.\d{3} ± 0\.\d{3}", text)
    assert "exploratory: 1 seed" not in text


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


def test_durations() -> None:
    assert duration(185.2) == "3 min 05 s"
    assert duration(9.44) == "9.44 s"
    assert duration(7200) == "2 h 00 min"


def test_labels_leave_out_what_all_rows_share(make_run: Callable[..., Path], tmp_path: Path) -> None:
    for name in ("llava+connector=mlp+stages=joint", "llava+connector=qformer+stages=joint", "clip+stages=joint"):
        make_run(name)
    labels = short_labels(build_leaderboard(find_runs([tmp_path / "outputs"])).rows)
    assert set(labels.values()) == {"llava · mlp", "llava · qformer", "clip"}


def test_a_difference_says_what_stands_behind_it(make_run: Callable[..., Path], tmp_path: Path) -> None:
    for seed in range(3):
        make_run("llava+connector=linear", seed, quality=0.3)
        make_run("llava+connector=mlp", seed, quality=0.6)
    make_run("llava+connector=qformer", 0, quality=0.6)
    page = make_report([tmp_path / "outputs"], tmp_path / "r", baseline="llava+connector=linear", now=NOW)
    text, parsed = read(page)
    rows = {(r["name"], r["metric"]): r for r in csv.DictReader((page.parent / "report-differences.csv").open())}
    (clear, lone) = (rows[f"llava+connector={part}", "bits_per_byte"] for part in ("mlp", "qformer"))
    assert (clear["seeds"], clear["exploratory"], clear["clear"]) == ("3", "0", "1")
    assert (lone["exploratory"], lone["clear"]) == ("1", "0")
    assert float(clear["low"]) <= float(clear["mean"]) <= float(clear["high"]) < 0
    assert float(clear["p"]) <= float(clear["p_adjusted"]) < 0.05
    titles = [a["title"] for a in parsed.all("span") if a.get("class") == "diff"]
    assert any("after Holm over" in t and "interval over 3 seeds and items" in t for t in titles)
    assert any("interval over items only (one seed)" in t for t in titles)
    assert re.search(r'<span class="star">∗</span>', text)
    assert re.search(r'<span class="star">◦</span>', text)
    markdown = page.with_suffix(".md").read_text()
    assert "∗ clear: p below 0.05 after Holm" in markdown
    assert "◦ exploratory: one seed" in markdown


def test_the_latex_tables(make_run: Callable[..., Path], tmp_path: Path) -> None:
    for seed in range(2):
        make_run("llava+connector=linear", seed, quality=0.3)
        make_run("llava+data.path=a_b&c%{}~^#$", seed, quality=0.6)
    make_run("zz-foreign", manifest={"hashes": {"data": "other"}})
    page = make_report([tmp_path / "outputs"], tmp_path / "r", baseline="llava+connector=linear", now=NOW)
    text = page.with_suffix(".tex").read_text()
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    name = r"a\_b\&c\%\{\}\textasciitilde{}\textasciicircum{}\#\$"
    assert name in body
    for rule in ("toprule", "midrule", "bottomrule", "begin{table}", "end{tabular}"):
        assert body.count(f"\\{rule}") == body.count(r"\begin{tabular}") == 4  # two tasks, costs, characteristics
    assert not re.search(r"(?<!\\)[%#]|[^\x00-\x7f]", body)
    assert body.count("{") == body.count("}")
    table = body[body.index(r"\begin{tabular}") : body.index(r"\end{tabular}")]
    lines = [line for line in table.splitlines() if line.endswith(r" \\")]
    assert len({re.sub(r"\\&", "", line).count("&") for line in lines}) == 1
    assert re.search(r"\\textbf\{0\.\d{3} \$\\pm\$ 0\.\d{3}\}", table)
    assert re.search(r"\\scriptsize \$-\$0\.\d{3} \[\$-\$0\.\d{3}, \$-\$0\.\d{3}\]", table)
    assert r"zz-foreign $\dagger$" in table
    assert "is not comparable with" in body


def test_the_characteristics_are_shown_from_manifests(make_run: Callable[..., Path], tmp_path: Path) -> None:
    for name in ("show-o", "show-o+data.blank_images=true"):
        make_run(name, manifest={"characteristics": FACTS})
    make_run("unknown", manifest={"characteristics": {"parameters": "many"}})
    page = make_report([tmp_path / "outputs"], tmp_path / "r", now=NOW)
    text, _ = read(page)
    table = text[text.index('class="sortable described"') :]
    table = table[: table.index("</table>")]
    assert table.count('<th scope="row"') == 2
    for words in (
        "masked, autoregressive",
        "discrete",
        "text causal, image full; one sequence",
        '<td data-v="256">256',
    ):
        assert words in table
    assert "align: decoder (image tokenizer); tune: all" in table
    described = list(csv.DictReader((page.parent / "report-characteristics.csv").open()))
    assert [r["model"] for r in described] == ["show-o", "show-o+data.blank_images=true"]
    assert described[0]["drawing_passes"] == "18"
    assert "| show-o | ✓ | masked | – |" in page.with_suffix(".md").read_text()
    assert "align: trained" in text  # the wiring's chips


def test_every_manifest_is_in_the_page(demo: Path, tmp_path: Path, make_run: Callable[..., Path]) -> None:
    make_run("aa-broken", status="failed", manifest={"error": "the loss is not finite"})
    _, page = read(make_report([demo], tmp_path / "r", now=NOW))
    words = "".join(page.words)
    assert "The manifest of every run (6)" in words
    assert words.count('"versions": {"python": "3.11.7"') == 6
    assert '"error": "the loss is not finite"' in words


def test_masks_and_pictures_stand_side_by_side(make_run: Callable[..., Path], tmp_path: Path) -> None:
    for part in ("mlp", "qformer"):
        run = make_run(f"llava+connector={part}")
        samples = json.loads((run / "samples.json").read_text())
        picture = samples[0]["image"]
        samples[0]["outputs"] = {"segmentation": {"mask": picture, "reference_mask": picture, "text": "the <b>dog</b>"}}
        (run / "samples.json").write_text(json.dumps(samples))
    _, page = read(make_report([tmp_path / "outputs"], tmp_path / "r", now=NOW))
    drawn = [a for a in page.all("img") if a.get("class") == "drawn"]
    assert [a["alt"] for a in drawn] == [
        f"{key} of llava · {part} for: the <b>dog</b>"
        for part in ("mlp", "qformer")
        for key in ("mask", "reference mask")
    ]


def test_what_all_rows_share_is_said_once(make_run: Callable[..., Path], tmp_path: Path) -> None:
    for connector in ("mlp", "linear"):
        make_run(f"llava+connector={connector}+stages=joint", quality=0.3)
    text, _ = read(make_report([tmp_path / "outputs"], tmp_path / "r", now=NOW))
    assert 'All rows share <span class="change">stages=joint</span>, which their names leave out.' in text
    table = text[text.index('class="sortable"') :]
    first = table[table.index('<span class="name">') :].split("</th>")[0]
    assert "connector=" in first
    assert "stages=" not in first
