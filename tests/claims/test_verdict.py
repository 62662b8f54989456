"""Answers on scores that are made up: each of them for each kind of claim, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from zoo.claims.claim import Claim
from zoo.claims.measure import Measured, end_loss, over_seeds
from zoo.claims.on_page import claims_html
from zoo.claims.report import found, minutes, to_html, to_markdown
from zoo.claims.verdict import Answer, answers, decide, p_value, side
from zoo.compare.rundir import Run, find_runs
from zoo.compare.scaling import crossing
from zoo.compare.statistics import holm

Runs = Any  # of conftest.py
Make = Callable[..., Claim]


def answer(claim: Claim, runs: Runs) -> Answer:
    (one,) = answers([claim], "tiny", runs.out)
    return one


@pytest.mark.parametrize(
    ("baseline", "variant", "state"),
    [
        ((0.30, 0.31, 0.29), (0.50, 0.52, 0.51), "reproduced"),
        ((0.50, 0.52, 0.51), (0.30, 0.31, 0.29), "contradicted"),
        ((0.40, 0.41, 0.39), (0.40, 0.40, 0.41), "not at this scale"),
        ((0.30, 0.50, 0.40), (0.45, 0.42, 0.47), "not at this scale"),
        ((0.30,), (0.60,), "exploratory"),
    ],
)
def test_difference(make_claim: Make, runs: Runs, baseline: Any, variant: Any, state: str) -> None:
    claim = make_claim()
    runs.plan(claim, baseline=runs.arm("one", baseline), variant=runs.arm("two", variant))
    given = answer(claim, runs)
    assert given.state == state
    assert given.measured is not None
    low, high = given.measured.interval
    assert low <= given.measured.value <= high
    assert given.measured.value == pytest.approx(np.mean(variant) - np.mean(baseline), abs=0.06)
    text = found(given)
    assert ("over items, one seed" in text) == (state == "exploratory")
    assert ("would have found" in text) == (state == "not at this scale")
    assert "points" in text


def test_a_metric_where_less_is_better_counts_as_a_gain(make_claim: Make, runs: Runs) -> None:
    claim = make_claim(metric="caption-likelihood/bits_per_byte")
    given = {}
    for name, bits in (("one", 9.0), ("two", 7.0)):
        given[name] = {}
        for seed in range(3):
            folder = runs.run(name, seed, task="caption-likelihood", metrics={"bits_per_byte": bits / 8})
            luck = np.random.default_rng(seed).random(100)
            runs.items(runs.out / folder, bits + luck + 0.1 * seed, "caption-likelihood", "bits")
            file = runs.out / folder / "items" / "caption-likelihood.parquet"
            table = pq.read_table(file)
            pq.write_table(table.append_column("bytes", [[8.0] * 100]), file)
            given[name][str(seed)] = folder
    runs.plan(claim, baseline=given["one"], variant=given["two"])
    better = answer(claim, runs)
    assert better.measured is not None
    assert better.measured.value == pytest.approx(0.25)
    assert better.state == "reproduced"
    low, high = better.measured.interval
    assert low <= 0.25 <= high
    worse = make_claim("F11", metric="caption-likelihood/bits_per_byte", at_most=0.0)
    runs.plan(worse, baseline=given["one"], variant=given["two"])
    assert answer(worse, runs).state == "contradicted"


@pytest.mark.parametrize(
    ("variant", "bounds", "state"),
    [
        ((0.40, 0.41, 0.40), (-0.1, 0.1), "reproduced"),
        ((0.40, 0.41, 0.40), (-0.01, 0.01), "not at this scale"),
        ((0.70, 0.71, 0.70), (-0.1, 0.1), "contradicted"),
        ((0.40, 0.41, 0.40), (-0.1, None), "reproduced"),
        ((0.15, 0.14, 0.15), (-0.1, None), "contradicted"),
    ],
)
def test_equivalence_and_no_worse(make_claim: Make, runs: Runs, variant: Any, bounds: Any, state: str) -> None:
    claim = make_claim(at_least=bounds[0], at_most=bounds[1])
    runs.plan(claim, baseline=runs.arm("one", (0.40, 0.40, 0.41)), variant=runs.arm("two", variant))
    assert answer(claim, runs).state == state


@pytest.mark.parametrize(
    ("than", "state"),
    [
        (((0.40, 0.41, 0.40), (0.41, 0.41, 0.40)), "reproduced"),
        (((0.20, 0.21, 0.20), (0.80, 0.81, 0.80)), "contradicted"),
        (((0.30, 0.30, 0.31), (0.51, 0.50, 0.50)), "not at this scale"),
    ],
)
def test_interaction(make_claim: Make, runs: Runs, than: Any, state: str) -> None:
    claim = make_claim(
        kind="interaction", than={"baseline": {"c": ["wiring.augment=none"]}, "variant": {"d": ["wiring.match=false"]}}
    )
    runs.plan(
        claim,
        baseline=runs.arm("a", (0.30, 0.31, 0.30)),
        variant=runs.arm("b", (0.50, 0.51, 0.50)),
        than_baseline=runs.arm("c", than[0]),
        than_variant=runs.arm("d", than[1]),
    )
    given = answer(claim, runs)
    assert given.state == state
    assert given.measured is not None
    own, other = 0.20, np.mean(than[1]) - np.mean(than[0])
    assert given.measured.value == pytest.approx(own - other, abs=0.08)
    low, high = given.measured.interval
    assert low < given.measured.value < high


def test_interaction_has_the_interval_of_the_difference_where_the_other_change_does_nothing(
    make_claim: Make, runs: Runs
) -> None:
    a, b = runs.arm("a", (0.30, 0.33, 0.30)), runs.arm("b", (0.50, 0.49, 0.54))
    plain = make_claim("F10")
    runs.plan(plain, baseline=a, variant=b)
    same = make_claim("F11", kind="interaction", than={"baseline": {"c": ["a=1"]}, "variant": {"d": ["a=2"]}})
    c = runs.arm("c", (0.4, 0.4, 0.4))
    runs.plan(same, baseline=a, variant=b, than_baseline=c, than_variant=c)
    one, two = (given.measured for given in answers([plain, same], "tiny", runs.out))
    assert one is not None
    assert two is not None
    assert two.value == pytest.approx(one.value)
    assert two.interval == pytest.approx(one.interval, rel=1e-6)


@pytest.mark.parametrize(("most", "state"), [(1.3, "reproduced"), (1.1, "contradicted")])
def test_flops_are_counted_and_need_one_seed(make_claim: Make, runs: Runs, most: float, state: str) -> None:
    claim = make_claim(kind="cost", metric="flops", at_most=most)
    runs.plan(claim, baseline={"0": runs.run("a", 0, flops=1e12)}, variant={"0": runs.run("b", 0, flops=1.2e12)})
    given = answer(claim, runs)
    assert given.state == state
    assert found(given) == "1.2×, counted"


def test_seconds_are_measured(make_claim: Make, runs: Runs) -> None:
    claim = make_claim(kind="cost", metric="seconds", at_most=1.5)
    rng = np.random.default_rng(0)
    arms = {
        name: {str(s): runs.run(name, s, seconds=base * math.exp(0.02 * rng.normal())) for s in range(3)}
        for name, base in (("a", 60.0), ("b", 72.0))
    }
    runs.plan(claim, baseline=arms["a"], variant=arms["b"])
    given = answer(claim, runs)
    assert given.state == "reproduced"
    assert given.measured is not None
    assert given.measured.interval[0] < 1.2 < given.measured.interval[1]
    assert given.minutes == pytest.approx(3 * (60 + 72) / 60, rel=0.1)
    one = make_claim("F2", kind="cost", metric="seconds", at_most=1.5)
    runs.plan(one, baseline={"0": arms["a"]["0"]}, variant={"0": arms["b"]["0"]})
    assert answer(one, runs).state == "exploratory"


def points(runs: Runs, name: str, scores: dict[int, float], flops: float) -> dict[str, dict[str, str]]:
    """Budget -> seed -> run, whose score moves a little with the seed."""
    return {
        str(steps): {
            str(seed): runs.run(
                f"{name}-{steps}", seed, task="text-to-image", metrics={"score": score + 0.001 * (seed - 1)},
                flops=flops * steps, budget=f"b{steps}",
            )
            for seed in range(3)
        }
        for steps, score in scores.items()
    }  # fmt: skip


@pytest.mark.parametrize(
    ("scores", "state", "share"),
    [
        ({100: 0.10, 200: 0.30, 400: 0.40}, "reproduced", 0.5 * 150 / 200),
        ({100: 0.30, 200: 0.35, 400: 0.40}, "reproduced", 0.25),
        ({100: 0.05, 200: 0.10, 400: 0.15}, "contradicted", 1.0),
    ],
)
def test_parity_of_flops(make_claim: Make, runs: Runs, scores: dict[int, float], state: str, share: float) -> None:
    claim = make_claim(kind="parity", metric="text-to-image/score", along="flops", points=[100, 200, 400], at_most=0.6)
    baseline = points(runs, "a", {100: 0.05, 200: 0.10, 400: 0.20}, 1e9)
    runs.plan(claim, baseline=baseline, variant=points(runs, "b", scores, 1e9))
    given = answer(claim, runs)
    assert given.state == state
    assert given.measured is not None
    assert given.measured.value == pytest.approx(share, rel=0.1)
    assert given.measured.below == (scores[100] > 0.2)
    assert given.measured.above == (scores[400] < 0.2)
    assert (given.measured.interval[0] == 0) == given.measured.below
    assert (given.measured.interval[1] == math.inf) == given.measured.above


def test_parity_of_passes_reads_evaluations_at_several_steps(make_claim: Make, runs: Runs) -> None:
    steps = {"kind": "parity", "along": "passes", "points": [4, 8, 16], "at_most": 0.25}
    claim = make_claim("S1", metric="text-to-image/score", **steps)
    arms: dict[str, dict[str, str]] = {"a": {}, "b": {}}
    for seed in range(3):
        for name, curve in (("a", {"all": (64, 0.30)}), ("b", {"4": (4, 0.1), "8": (8, 0.29), "16": (16, 0.33)})):
            folder = runs.run(name, seed, task="text-to-image", metrics={"score": 0.3})
            arms[name][str(seed)] = folder
            for value, (passes, score) in curve.items():
                place = runs.out / folder / "eval" / f"steps={value}"
                place.mkdir(parents=True)
                content = {"text-to-image": {"passes": passes, "score": score + 0.002 * seed}}
                (place / "metrics.json").write_text(json.dumps(content))
    runs.plan(claim, baseline=arms["a"], variant=arms["b"])
    given = answer(claim, runs)
    assert given.state == "reproduced"
    assert given.measured is not None
    assert 8 / 64 < given.measured.value < 16 / 64
    missing = make_claim("S2", metric="text-to-image/gain", **steps)
    runs.plan(missing, baseline=arms["a"], variant=arms["b"])
    assert "was not measured at every point" in answer(missing, runs).reason


def test_crossing() -> None:
    curve = [(400.0, 0.4), (100.0, 0.1), (200.0, 0.2)]
    assert crossing(curve, 0.15, True)[0] == pytest.approx(math.sqrt(100 * 200))
    assert crossing(curve, 0.1, True) == (100.0, True, False)
    assert crossing(curve, 0.5, True) == (400.0, False, True)
    falling = [(100.0, 3.0), (200.0, 2.0)]
    assert crossing(falling, 2.0, False)[0] == pytest.approx(200.0)
    assert crossing(falling, 3.5, False) == (100.0, True, False)


FALLING = [5.0 - 0.03 * n for n in range(100)]
RISING = [*FALLING[:60], *[3.2 + 0.1 * n for n in range(40)]]
NOT_A_NUMBER = [*FALLING[:60], *[float("nan")] * 40]


@pytest.mark.parametrize(
    ("baseline", "variant", "state", "lost"),
    [
        (RISING, FALLING, "reproduced", "3 of 3 lost"),
        (NOT_A_NUMBER, FALLING, "reproduced", "3 of 3 lost"),
        (FALLING, RISING, "contradicted", "0 of 3 lost"),
        (FALLING, FALLING, "not at this scale", "0 of 3 lost"),
    ],
)
def test_divergence(make_claim: Make, runs: Runs, baseline: Any, variant: Any, state: str, lost: str) -> None:
    claim = make_claim("T13", kind="divergence", metric=None)
    rng = np.random.default_rng(0)
    arms = {
        name: {
            str(s): runs.run(name, s, losses=[x + 0.05 * rng.normal() for x in losses], status=status) for s in range(3)
        }
        for name, losses, status in (("a", baseline, "failed"), ("b", variant, "done"))
    }
    runs.plan(claim, baseline=arms["a"], variant=arms["b"])
    given = answer(claim, runs)
    assert given.state == state
    assert given.measured is not None
    assert given.measured.facts is not None
    assert lost in given.measured.facts["baseline"]


def test_a_run_without_a_loss_counts_with_its_first(runs: Runs) -> None:
    run = Run.read(runs.out / runs.run("a", 0, losses=NOT_A_NUMBER, status="failed"))
    assert end_loss(run) == (5.0, True)
    run = Run.read(runs.out / runs.run("b", 0, losses=FALLING))
    assert end_loss(run) == (pytest.approx(np.mean(FALLING[-10:])), False)


@pytest.mark.parametrize("kind", ["data", "evaluation", "budget", "order"])
def test_other_conditions_are_refused(make_claim: Make, runs: Runs, kind: str) -> None:
    claim = make_claim()
    variant = runs.arm("two", (0.8, 0.8), **{kind: "other"})
    runs.plan(claim, baseline=runs.arm("one", (0.2, 0.2)), variant=variant)
    given = answer(claim, runs)
    assert given.state == "refused"
    assert given.measured is None
    what = "other sample order" if kind == "order" else f"other {kind}"
    assert what in given.reason
    assert "experts" in given.reason
    assert "\n" not in given.reason


def test_divergence_refuses_other_data(make_claim: Make, runs: Runs) -> None:
    claim = make_claim("T13", kind="divergence", metric=None)
    one = {"0": runs.run("a", 0, losses=FALLING)}
    runs.plan(claim, baseline=one, variant={"0": runs.run("b", 0, losses=FALLING, data="other")})
    assert answer(claim, runs).reason == "refused: the arms differ in data"


@pytest.mark.parametrize(("spec", "state"), [("s", "reproduced"), ("t", "refused")])
def test_other_training_data_are_compared_on_common_data(make_claim: Make, runs: Runs, spec: str, state: str) -> None:
    claim = make_claim("F13", evaluate_on="openmoji")
    arms: dict[str, dict[str, str]] = {"one": {}, "two": {}}
    for name, rate in (("one", 0.3), ("two", 0.7)):
        for seed in range(2):
            folder = runs.run(name, seed, data=name, evaluation=name, order=name, metrics={"i2t_r1": 0.5})
            hits = np.random.default_rng(seed).random(400) < rate
            place = runs.out / folder / "eval" / "openmoji-test"
            runs.items(place, hits.astype(float), "retrieval", "i2t_hits_1", spec if name == "two" else "s")
            arms[name][str(seed)] = folder
    runs.plan(claim, baseline=arms["one"], variant=arms["two"])
    assert answer(claim, runs).state == state


def test_failed_and_missing_runs(make_claim: Make, runs: Runs) -> None:
    claim = make_claim()
    assert answer(claim, runs).state == "not yet run"
    broken = {"0": runs.run("two", 0, status="failed"), "1": "two/seed=1-none"}
    runs.plan(claim, baseline=runs.arm("one", (0.3, 0.3)), variant=broken)
    given = answer(claim, runs)
    assert given.state == "unfinished"
    assert "two (seed 0) failed" in given.reason
    assert (given.done, given.runs) == (2, 4)
    assert minutes(given) == "~15 + 3"


def test_seeds_that_one_arm_lacks_are_left_out(make_claim: Make, runs: Runs) -> None:
    claim = make_claim()
    runs.plan(claim, baseline=runs.arm("one", (0.3, 0.3, 0.3)), variant=runs.arm("two", (0.6, 0.6)))
    given = answer(claim, runs)
    assert given.measured is not None
    assert given.measured.seeds == 2


def test_a_claim_that_has_other_runs_since_is_not_yet_run(make_claim: Make, runs: Runs) -> None:
    claim = make_claim()
    runs.plan(claim, baseline=runs.arm("one", (0.3, 0.3)), variant=runs.arm("two", (0.6, 0.6)))
    assert answer(claim, runs).state != "not yet run"
    assert answer(make_claim(variant={"experts": ["trunk.depth=2"]}), runs).state == "not yet run"
    assert answers([claim], "small", runs.out)[0].state == "not yet run"


def test_seeds_are_added_to_a_plan(make_claim: Make, runs: Runs) -> None:
    claim = make_claim()
    one, two = runs.arm("one", (0.3, 0.3, 0.3)), runs.arm("two", (0.6, 0.6, 0.6))
    runs.plan(claim, baseline={"0": one["0"]}, variant={"0": two["0"]})
    assert answer(claim, runs).state == "exploratory"
    runs.plan(claim, baseline={k: one[k] for k in "12"}, variant={k: two[k] for k in "12"})
    assert answer(claim, runs).seeds == ("0", "1", "2")


def test_p_is_corrected_over_all_claims_of_the_report(make_claim: Make, runs: Runs) -> None:
    claims = {}
    measured = {}
    for n in range(8):  # Student's t of 6 to 7.4 with two degrees of freedom: p of 0.027 to 0.018
        half = math.sqrt(3) / (6 + 0.2 * n)
        claims[f"c{n}"] = make_claim(f"c{n}")
        measured[f"c{n}"] = Measured(over_seeds([1 - half, 1.0, 1 + half], "k"))
    alone = [p_value(m, (0.0, math.inf)) for m in measured.values()]
    found = decide(measured, claims)
    assert [p for _, p, _, _ in found.values()] == pytest.approx(holm(alone))
    assert {family for _, _, family, _ in found.values()} == {8}
    single = decide({"c0": measured["c0"]}, claims)["c0"]
    assert single[1] == pytest.approx(alone[0])
    assert single[3] < found["c0"][3]  # corrected for eight, only larger effects are found
    weak = [n for n, m in measured.items() if side(m, (0.0, math.inf)) == "within" and found[n][1] > 0.05]
    assert len(weak) == 8
    assert all(found[n][0] == "not at this scale" for n in weak)
    assert single[0] == "reproduced"


def test_student_over_seeds() -> None:
    estimate = over_seeds([1.0, 2.0, 3.0], "k")
    low, high = estimate.interval()
    half = 4.3027 / math.sqrt(3)  # t of two degrees of freedom
    assert (low, high) == (pytest.approx(2 - half, rel=0.01), pytest.approx(2 + half, rel=0.01))
    assert estimate.p == pytest.approx(0.0742, rel=0.03)
    assert over_seeds([1.0], "k").interval() == (1.0, 1.0)


def test_tables_hold_every_claim_and_escape_its_words(make_claim: Make, runs: Runs) -> None:
    one, two = make_claim(title="<b>experts | help</b>"), make_claim("F11")
    runs.plan(one, baseline=runs.arm("one", (0.3, 0.3)), variant=runs.arm("two", (0.8, 0.8)))
    given = answers([one, two], "tiny", runs.out)
    page, text = to_html(given, "tiny"), to_markdown(given, "tiny")
    assert "<b>" not in page
    assert "&lt;b&gt;experts | help" in page
    assert "experts \\| help" in text
    assert text.count("\n| F1") == 2
    assert "1 reproduced, 1 not yet run" in text
    assert "`zoo claims run F11 --scale tiny --seeds 0,1,2`" in text
    assert "zoo claims run F10" in page
    assert "78.81 → 80.13 (read in a copy)" in page


def test_a_page_shows_the_claims_whose_runs_are_on_it(make_claim: Make, runs: Runs, monkeypatch: Any) -> None:
    claim = make_claim()
    monkeypatch.setattr("zoo.claims.on_page.read_claims", lambda: [claim])
    one, two = runs.arm("one", (0.3, 0.3, 0.3)), runs.arm("two", (0.6, 0.6, 0.6))
    assert claims_html(find_runs([runs.out])) == ""  # nothing was claimed of them yet
    runs.plan(claim, baseline=one, variant=two)
    text = claims_html(find_runs([runs.out]))
    assert 'id="claim-F10"' in text
    assert "reproduced" in text
    assert claims_html(find_runs([runs.out / "one"])) == ""  # an arm is missing from the page
