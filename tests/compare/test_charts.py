"""The plots: what is drawn, that it takes the page's colours, and that drawing changes nothing else."""

from __future__ import annotations

import math
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from zoo.compare import charts, plotting
from zoo.compare.labels import Box, placed

SVG = "{http://www.w3.org/2000/svg}"


def tree(picture: str) -> ElementTree.Element:
    return ElementTree.fromstring(plotting.standalone(picture))


def tips(picture: str) -> list[str]:
    """What is told where the pointer rests; the first title is the chart's own."""
    return ["".join(t.itertext()) for t in tree(picture).iter(f"{SVG}title")][1:]


def texts(picture: str) -> list[str]:
    return ["".join(t.itertext()) for t in tree(picture).iter(f"{SVG}text")]


def points(count: int, **more: object) -> list[charts.Point]:
    return [
        charts.Point(x=1e12 * (n + 1), y=0.5 + 0.1 * math.sin(n), label=f"row {n}", series=n, **more)  # type: ignore[arg-type]
        for n in range(count)
    ]


def every_chart() -> list[str]:
    curve = charts.Line(points=[(n, 4 / (n + 1)) for n in range(300)], label="a run", series=0)
    trend = charts.Trend(points=[(8, 0.1), (64, 0.4)], hollow=[False, True], label="a<b", series=1)
    bar = charts.Bar(label="row", value=0.1, low=-0.1, high=0.3, series=2)
    return [
        charts.scatter(points(4), "x", "y", str, "scatter", True),
        charts.lines([curve], "x", "y", "lines"),
        charts.trends([trend], "x", "y", str, "trends", 0.5, "real"),
        charts.forest([bar], "x", "{:+.1f}".format, "forest"),
    ]


def test_charts_take_their_colours_from_the_page_and_load_nothing() -> None:
    template = (Path(charts.__file__).parent / "report.html.j2").read_text()
    for name, value in plotting.LIGHT.items():
        assert template.count(f"{name}: {value};") >= 1  # one palette
    for picture in every_chart():
        assert "var(--" in picture
        assert "#" not in picture.replace('href="#', "").replace("var(", "")  # no colour of its own
        assert "url(" not in picture
        assert "<style" not in picture
        assert "font-family" not in picture
        assert picture.startswith('<svg class="chart" viewBox="0 0 400 ')
        assert 'role="img" aria-label="' in picture
        assert "var(" not in plotting.standalone(picture)
        assert tree(picture).tag == f"{SVG}svg"


def test_the_same_chart_is_the_same_bytes() -> None:
    assert every_chart() == every_chart()


def test_drawing_changes_no_setting_and_needs_no_window() -> None:
    code = (
        "import sys; from zoo.compare import charts; assert 'matplotlib' not in sys.modules\n"
        "import matplotlib; names = [n for n in matplotlib.rcParams if n != 'backend']\n"  # reading it chooses
        "before = {n: matplotlib.rcParams[n] for n in names}\n"
        "points = [charts.Point(x=n, y=n, label=str(n), series=n) for n in range(3)]\n"
        "assert charts.scatter(points, 'x', 'y', str, 't', True)\n"
        "assert 'matplotlib.pyplot' not in sys.modules and 'torch' not in sys.modules\n"
        "changed = [n for n in names if matplotlib.rcParams[n] != before[n]]; assert not changed, changed"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_users_write_is_text() -> None:
    evil = "<script>alert(1)</script>\"'&$x_1$ var(--s0)"
    rows = [charts.Point(x=n, y=n, label=evil, series=n) for n in (1, 2)]
    picture = charts.scatter(rows, evil, evil, str, evil)
    assert "<script" not in picture
    assert any(evil[:25] in tip for tip in tips(picture))
    assert "$x_1$" in "".join(texts(picture))  # no formula


@pytest.mark.parametrize(
    ("higher", "expected"),
    [(True, ["cheap", "good", "best"]), (False, ["cheap", "worst"])],
)
def test_the_pareto_front(higher: bool, expected: list[str]) -> None:
    def point(label: str, x: float, y: float, front: bool = True) -> charts.Point:
        return charts.Point(x=x, y=y, label=label, series=0, front=front)

    rows = [
        point("beaten", 3, 0.4),
        point("good", 2, 0.5),
        point("cheap", 1, 0.3),
        point("as good, dearer", 4, 0.5),
        point("best", 5, 0.9),
        point("worst", 6, 0.1),
        point("foreign", 0.5, 1.0 if higher else 0.0, front=False),
    ]
    assert [p.label for p in charts.pareto(rows, higher)] == expected
    told = tips(charts.scatter(rows, "x", "y", str, "t", higher))
    assert [t.split(":")[0] for t in told if "on the front" in t] == [p.label for p in rows if p.label in expected]
    assert "on the front" not in charts.scatter(rows, "x", "y", str, "t", None)


def test_a_scatter_of_one_place_says_nothing() -> None:
    same = [charts.Point(x=5, y=n, label=str(n), series=n) for n in range(3)]
    assert charts.scatter(same, "x", "y", str, "t") == ""
    assert charts.scatter(points(1), "x", "y", str, "t") == ""
    assert charts.lines([charts.Line(points=[(0, 1)], label="", series=0)], "x", "y", "t") == ""
    assert charts.trends([], "x", "y", str, "t") == ""
    assert charts.forest([], "x", str, "t") == ""


def test_wide_ranges_get_a_logarithmic_axis() -> None:
    wide = [charts.Point(x=x, y=x, label="", series=0) for x in (1e9, 1e11, 1e13)]
    assert {"1 G", "10 G", "100 G", "1 T", "10 T"} <= set(texts(charts.scatter(wide, "x", "y", str, "t")))
    near = [charts.Point(x=x, y=x, label="", series=0) for x in (1e9, 4e9)]
    assert "2 G" in texts(charts.scatter(near, "x", "y", str, "t"))


def test_every_point_is_drawn_and_told() -> None:
    rows = points(40, low=0.3, high=0.7)
    picture = charts.scatter(rows, "x", "y", "{:.2f}".format, "t", True)
    assert [t.split(":")[0] for t in tips(picture)] == [p.label for p in rows]
    assert tips(picture)[0].startswith("row 0: 0.50 at 1 T")
    named = [t for t in texts(picture) if t.startswith("row ")]
    assert set(named) <= {p.label for p in charts.pareto(rows, True)}  # of many, the front's alone
    assert named


def test_a_trend_is_drawn_over_powers_of_two() -> None:
    curve = charts.Trend(points=[(8, 0.1), (64, 0.4)], hollow=[False, True], label="a<b", series=0)
    lone = charts.Trend(points=[(1024, 0.3)], hollow=[False], label="codes", series=1)
    picture = charts.trends([curve, lone], "passes", "score", str, "t", level=0.5, level_label="real")
    assert {"8", "16", "32", "64", "128", "256", "512", "1.02 k", "a<b", "codes", "real"} <= set(texts(picture))
    assert tips(picture) == ["a<b: 0.1 at 8", "a<b: 0.4 at 64", "codes: 0.3 at 1.02 k"]
    uses = [use.get("style") or "" for use in tree(picture).iter(f"{SVG}use")]
    filled = ["#2458d3", "#ffffff", "#c2410c"]
    assert [u.split(";")[0].removeprefix("fill: ") for u in uses if "fill" in u] == filled


def test_a_forest_keeps_long_names_apart_from_their_numbers() -> None:
    bars = [
        charts.Bar(label=name, value=0.1, low=-0.05, high=0.25, series=0, note=" ∗", hollow=True)
        for name in ("short", "a name that is much longer than the room beside its interval")
    ]
    picture = charts.forest(bars, "difference", "{:+.3f}".format, "t")
    found = {"".join(t.itertext()): float(t.get("y") or 0) for t in tree(picture).iter(f"{SVG}text")}
    interval = "+0.100 [-0.050, +0.250] ∗"
    assert interval in found
    long = next(text for text in found if text.startswith("a name"))
    assert long.endswith("…")
    assert found[interval] - found[long] > 10  # in a line of its own
    assert found["0"] > found[interval]
    alone = charts.forest(bars[:1], "difference", "{:+.3f}".format, "t")
    heights = [float(p.split('viewBox="0 0 400 ')[1].split('"')[0]) for p in (alone, picture)]
    assert heights == [8 + 40 + 44, 8 + 2 * 56 + 44]


def test_long_curves_are_thinned_and_an_explosion_does_not_flatten_the_rest() -> None:
    values = [(float(n), 1 + math.cos(n / 500)) for n in range(5000)]
    values[3000] = (3000.0, 1e9)
    picture = charts.lines([charts.Line(points=values, label="a run", series=0)], "x", "y", "t")
    assert len(picture) < 20_000
    assert "2" in texts(picture)
    assert tips(picture) == ["a run"]


def test_labels_do_not_lie_on_each_other() -> None:
    inside: Box = (58, 0, 398, 246)
    taken: list[Box] = []
    found = [placed(200 + n % 2, 100 + 3 * n, f"llava · variant {n}", taken, inside) for n in range(9)]
    assert sum(spot is not None for spot in found) >= 6
    for n, a in enumerate(taken):
        assert a[0] >= inside[0] - 1
        assert a[2] <= inside[2] + 1
        for b in taken[n + 1 :]:
            wide = min(a[2], b[2]) - max(a[0], b[0])
            high = min(a[3], b[3]) - max(a[1], b[1])
            assert wide <= 0 or high <= 0 or wide * high <= 30
    assert any(spot is not None and spot.leader is not None for spot in found)


def test_round_values_and_counts() -> None:
    assert plotting.round_values(0, 1, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert plotting.round_values(28e12, 69e12, 4) == pytest.approx([30e12, 40e12, 50e12, 60e12])
    assert plotting.compact(4.6e13) == "46 T"
    assert plotting.compact(38400) == "38.4 k"
    assert plotting.compact(-0.25) == "-0.25"
