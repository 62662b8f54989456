"""Power laws over training FLOPs and the compute at which one family reaches another's score, on made-up runs whose
laws are known."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from zoo.claims.on_page import claims_html
from zoo.compare.leaderboard import build_leaderboard
from zoo.compare.report import make_report
from zoo.compare.rundir import find_runs
from zoo.compare.scaling import Family, Spent, crossing, families, fit, front_of, parity
from zoo.compare.scaling_section import sections

SEEDS = ("0", "1", "2")


AT = (1e11, 3e11, 1e12, 3e12, 1e13)


def family(name: str, a: float, b: float, noise: float = 0.0, higher: bool = False) -> Family:
    """Scores a FLOPs^b with a factor e^noise of each seed's and point's own."""
    stream = np.random.default_rng(3)
    points = [
        Spent(c, {s: a * c**b * math.exp(noise * stream.standard_normal()) for s in SEEDS}, 1e6, f"{c:.0e}") for c in AT
    ]
    return Family(name, tuple(points), higher)


@pytest.mark.parametrize(("b", "higher"), [(-0.2, False), (0.15, True)])
def test_an_exact_law_is_found(b: float, higher: bool) -> None:
    law = family("x", 40.0, b, higher=higher).law
    assert law is not None
    assert law.b == pytest.approx(b, abs=1e-9)
    assert math.exp(law.log_a) == pytest.approx(40.0)
    assert law.score(5e11) == pytest.approx(40.0 * 5e11**b)
    assert law.low == pytest.approx(b, abs=1e-6)
    assert law.high == pytest.approx(b, abs=1e-6)


def test_the_interval_holds_the_law_about_as_often_as_it_says() -> None:
    held = 0
    stream = np.random.default_rng(0)
    for _ in range(120):
        points = []
        for c in AT:
            own = 0.02 * stream.standard_normal()  # what no seed shares
            points.append(
                Spent(c, {s: 30 * c**-0.2 * math.exp(own + 0.02 * stream.standard_normal()) for s in SEEDS}, 1e6)
            )
        law = fit(points, False, draws=400)
        assert law is not None
        held += law.low <= -0.2 <= law.high
    assert held / 120 >= 0.9


def test_parity_is_the_ratio_of_the_laws() -> None:
    base, half = family("base", 30.0, -0.2), family("half", 30.0 * 0.5**0.2, -0.2)  # needs half of the FLOPs everywhere
    found = parity(half, base)
    assert found is not None
    assert found.ratio == pytest.approx(0.5)
    assert found.low == pytest.approx(0.5)
    assert found.high == pytest.approx(0.5)
    assert not found.beyond
    assert float(found.measured) == pytest.approx(0.5, rel=0.05)  # along straight lines between the points
    behind = parity(base, half)
    assert behind is not None
    assert behind.ratio == pytest.approx(2.0)
    assert behind.beyond  # twice the most that was measured
    assert behind.measured.startswith("≥ ")


def test_noise_widens_the_interval_around_the_ratio() -> None:
    found = parity(family("half", 30.0 * 0.5**0.2, -0.2, 0.01), family("base", 30.0, -0.2, 0.01))
    assert found is not None
    assert found.low < 0.5 < found.high
    assert 0.2 < found.low < found.high < 1.2


def test_a_family_that_goes_the_other_way_never_gets_there() -> None:
    found = parity(family("worse", 1.0, +0.05), family("base", 30.0, -0.2))
    assert found is None or math.isnan(found.ratio)


def test_the_front_leaves_out_what_a_cheaper_point_reaches() -> None:
    points = [Spent(c, {"0": s}, 1.0) for c, s in ((1, 0.9), (2, 0.95), (3, 0.5), (3, 0.6), (9, 0.5), (10, 0.4))]
    assert [(p.flops, p.score) for p in front_of(points, False)] == [(1, 0.9), (3, 0.5), (10, 0.4)]
    assert [(p.flops, p.score) for p in front_of(points, True)] == [(1, 0.9), (2, 0.95)]
    assert fit(points[:2], False) is None
    assert crossing([(1, 0.9), (10, 0.5)], 0.7, False)[0] == pytest.approx(math.sqrt(10))


@pytest.fixture
def grid(make_run: Callable[..., Path], tmp_path: Path) -> Path:
    """Two families of two sizes and two budgets each, two seeds; and a run that is no family."""
    for model, gain in (("coca", 0.3), ("clip", 0.0)):
        for size in (64, 128):
            for steps in (100, 300):
                for seed in (0, 1):
                    quality = 0.2 + gain + 0.05 * (size == 128) + 0.1 * (steps == 300) + 0.004 * seed
                    make_run(
                        f"{model}+encoder.width={size}+{steps}",
                        seed,
                        quality=quality,
                        towers=True,
                        flops=1e6 * size * size * steps,
                        manifest={
                            "name": f"{model}+encoder.width={size}+wiring.share=2",
                            "model": model,
                            "hashes": {"data": "d", "evaluation": "e", "order": f"o{seed}", "budget": f"b{steps}"},
                        },
                        config={"budget": {"unit": "steps", "value": steps}},
                    )
    make_run("albef", 0, quality=0.9)
    return tmp_path / "outputs"


def test_families_are_found_among_runs(grid: Path) -> None:
    found = families(find_runs([grid]), "retrieval", "i2t_r1", True)
    assert [f.name for f in found] == ["clip+wiring.share=2", "coca+wiring.share=2"]
    assert [len(f.points) for f in found] == [4, 4]
    assert set(found[0].points[0].scores) == {"0", "1"}
    runs = ((64, 100), (64, 300), (128, 100), (128, 300))
    assert [p.flops for p in found[0].points] == [1e6 * side * side * steps for side, steps in runs]
    assert "scale tiny, encoder.width=64, 300 steps" in [p.label for p in found[0].points]


def test_scales_of_one_name_are_points_of_their_own(make_run: Callable[..., Path], tmp_path: Path) -> None:
    for place, scale in enumerate(("micro", "tiny", "mini")):
        for steps in (100, 300):
            hashes = {"data": "d", "evaluation": "e", "order": "o", "budget": f"b{steps}", "recipe": scale}
            make_run(
                f"clip+{scale}{steps}",
                0,
                quality=0.2 + 0.1 * place,
                towers=True,
                flops=1e10 * 4**place * steps,
                manifest={"name": "clip", "scale": scale, "hashes": hashes},
            )
    (found,) = families(find_runs([tmp_path / "outputs"]), "retrieval", "i2t_r1", True)
    assert found.name == "clip"
    assert [p.flops for p in found.points] == sorted(1e10 * 4**n * steps for n in range(3) for steps in (100, 300))
    assert all(len(point.scores) == 1 for point in found.points)


def test_the_report_has_a_section(grid: Path, tmp_path: Path) -> None:
    board = build_leaderboard(find_runs([grid]))
    made = {s.column.task: s for s in sections(board)}
    lines = made["retrieval"].lines
    assert {line[0] for line in lines} == {"clip+wiring.share=2", "coca+wiring.share=2"}
    assert sum(line[7] == "baseline" for line in lines) == 1
    page = make_report([grid], tmp_path / "page.html")
    text = page.read_text()
    assert 'id="scaling"' in text
    assert "over training FLOPs, with power laws" in text
    assert "## Scaling: retrieval" in page.with_suffix(".md").read_text()


def test_runs_without_several_budgets_have_no_section(make_run: Callable[..., Path], tmp_path: Path) -> None:
    make_run("llava+connector=mlp", quality=0.3)
    make_run("llava+connector=linear", quality=0.6)
    text = make_report([tmp_path / "outputs"], tmp_path / "page.html").read_text()
    assert 'id="scaling"' not in text
    assert 'id="claims"' not in text
    assert claims_html(find_runs([tmp_path / "outputs"])) == ""


def test_the_page_says_what_it_does_not_draw(make_run: Callable[..., Path], tmp_path: Path) -> None:
    path = make_run("llava+connector=mlp", quality=0.3)
    with (path / "curve.jsonl").open("a") as file:
        for step in (400, 500):
            line = {
                "step": step,
                "samples": step * 128,
                "loss": 1.0,
                **{f"extra{n:02}/x": 1.0 / step for n in range(14)},
            }
            file.write(json.dumps(line) + "\n")
    text = make_report([tmp_path / "outputs"], tmp_path / "page.html").read_text()
    assert "Not drawn: extra11/x, extra12/x, extra13/x" in text
