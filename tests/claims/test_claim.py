"""Claim files: what is refused, what is shown of the paper, and that every one of ours is whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from zoo.claims.claim import Claim, Stated, claim_files, load_claim, read_claim, read_claims
from zoo.claims.report import expected_runs, quantity
from zoo.claims.verdict import answers
from zoo.errors import ConfigError
from zoo.plugin import Plugin, registered

Make = Callable[..., Claim]

UNREAD = {
    "F6": ("71.4", "73.29", "93.96", "96.55"),
    "F7": ("73.29", "73.81"),
    "F8": ("73.81", "74.06", "74.42", "74.54"),
}
"""Claims of ours whose numbers were not found in the paper, and these numbers."""


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kind": "diference"}, "unknown kind 'diference'; did you mean difference"),
        ({"metric": "retreival/i2t_r1"}, "must be TASK/METRIC; did you mean retrieval"),
        ({"metric": "retrieval/i2t_r2"}, "task 'retrieval' has no metric 'i2t_r2'"),
        ({"metric": "text-to-image/kernel"}, "has no scores of single items"),
        ({"metric": "retrieval/i2t_median_rank"}, "has no scores of single items"),
        ({"metric": "captioning/words"}, "has no better and no worse"),
        ({"baseline": {}}, "baseline must be one label and its overrides"),
        ({"variant": {"experts": ["trunk.pair_layers"]}}, "'trunk.pair_layers' must be KEY=VALUE"),
        ({"shared": ["trunk.pair_layers=1"]}, "baseline sets trunk.pair_layers twice"),
        ({"variant": {"experts": ["seed=3"]}}, "variant sets seed"),
        ({"at_least": 2, "at_most": 1}, "at_least = 2 is above at_most = 1"),
        ({"kind": "interaction"}, "has than with a baseline and a variant"),
        ({"than": {"other": {"a": []}}}, "than.other: expected baseline and variant"),
        ({"kind": "parity", "at_most": 0.5}, "kind parity, and no other, has along and points"),
        ({"kind": "parity", "along": "flops", "points": [100, 200]}, "give at_most or at_least"),
        ({"kind": "parity", "along": "time", "points": [1, 2], "at_most": 1}, "along is flops or passes"),
        ({"kind": "parity", "along": "flops", "points": [100], "at_most": 1}, "points are two or more"),
        ({"kind": "cost", "at_most": 2}, "kind cost counts flops, seconds, memory"),
        ({"kind": "divergence"}, "has no metric"),
        ({"paper": [{"metric": "x", "checked": "maybe"}]}, "checked = 'maybe' must be yes, via or no"),
        ({"titel": "x"}, "has no field 'titel'"),
        ({"minutes": "five"}, "minutes = 'five'"),
        ({"variant": {"_target_": ["a=b"]}}, "_target_ is refused"),
    ],
)
def test_one_line_says_what_is_wrong(body: dict[str, Any], changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_claim("F10", {**body, **changes})
    assert said in str(error.value)
    assert "F10" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_number_that_was_not_read_is_not_kept() -> None:
    stated = Stated(metric="VQA", baseline=71.4, variant=73.29, checked="no")
    assert (stated.baseline, stated.variant) == (None, None)
    assert stated.text == "VQA"
    assert "71.4" not in repr(stated)


def test_yes_and_no_are_read_as_yaml_writes_them(make_claim: Make) -> None:
    claim = make_claim(
        paper=[
            {"metric": "FID", "baseline": 61.3, "variant": 20.3, "checked": True},
            {"metric": "CIDEr", "baseline": 12.7, "variant": 16.0, "checked": False},
            {"metric": "NLVR2", "variant": 80.13, "checked": "via"},
        ]
    )
    assert claim.paper == "FID 61.3 → 20.3; NLVR2 80.13 (read in a copy); CIDEr (direction only)"
    assert make_claim(paper=[]).paper == "direction only"


@pytest.mark.parametrize("name", sorted(UNREAD))
def test_unread_numbers_are_shown_nowhere(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from zoo.claims.report import print_answers, print_list, to_html, to_markdown

    given = answers([read_claim(name)], "tiny", tmp_path)
    print_answers(given, "tiny")
    print_list(given)
    shown = capsys.readouterr().out + to_markdown(given, "tiny") + to_html(given, "tiny") + repr(given)
    assert read_claim(name).config.title.split()[0] in shown
    for number in UNREAD[name]:
        assert number not in shown


def test_claims_of_the_list_are_here() -> None:
    claims = read_claims()
    assert len({claim.id for claim in claims}) >= 30
    wanted = (
        *("F1", "F6", "F8", "F10", "F13", "B2", "B3", "B5", "B7", "B11", "B12"),
        *("S1", "S4", "T1", "T6", "T7", "T8", "T11", "T13", "tokens"),
    )
    assert set(wanted) <= {claim.id for claim in claims}
    for claim in claims:
        assert claim.config.minutes > 0, claim.name
        assert quantity(claim)
        assert expected_runs(claim) >= 6


def test_ids_choose_all_of_their_claims_and_names_one() -> None:
    assert [claim.name for claim in read_claims(["T8"])] == ["T8-less", "T8-linear", "T8-unet"]
    assert [claim.name for claim in read_claims(["T8-unet", "T6"])] == ["T8-unet", "T6"]
    names = list(claim_files())
    assert names.index("T6") < names.index("T10") < names.index("T13")
    with pytest.raises(ConfigError, match="unknown claim 'T66'; did you mean"):
        read_claims(["T66"])


def test_bounds(make_claim: Make) -> None:
    assert make_claim().bounds == (0.0, float("inf"))
    assert make_claim(at_most=0.0).bounds == (-float("inf"), 0.0)
    assert make_claim(at_least=-0.02, at_most=0.02).bounds == (-0.02, 0.02)
    assert quantity(make_claim(at_least=-0.02, at_most=0.02)) == "gain in retrieval/i2t_r1 in −2.0 .. +2.0"


def test_the_digest_follows_the_runs_and_not_the_words(make_claim: Make) -> None:
    claim = make_claim()
    assert make_claim(title="other", at_least=0.1, note="n", minutes=9.0).digest() == claim.digest()
    assert make_claim(variant={"experts": ["trunk.pair_layers=1"]}).digest() != claim.digest()
    assert make_claim(experiment="claims-coca").digest() != claim.digest()


def test_a_plugins_broken_claim_is_said_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = tmp_path / "zoo_broken_claims"
    (package / "conf" / "claim").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "conf" / "claim" / "X1.yaml").write_text("title: no more than a title\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with registered(Plugin(name="broken-claims", conf="pkg://zoo_broken_claims/conf")):
        names = [claim.name for claim in read_claims()]
        assert "F2" in names
        assert "X1" not in names
        assert "left out: claim X1" in capsys.readouterr().err
        with pytest.raises(ConfigError, match="claim X1"):
            read_claims(["X1"])
