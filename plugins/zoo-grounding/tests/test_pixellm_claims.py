"""PixelLM's claims: read, resolved, and never printed with a number that nobody found."""

from __future__ import annotations

import pytest

from zoo.claims.claim import Claim, read_claims
from zoo.plugin import catalogue
from zoo.recipe_files import read_yaml


@pytest.fixture(scope="module")
def claims() -> dict[str, Claim]:
    found = {claim.name: claim for claim in read_claims()}
    return {name: found[name] for name in ("P1", "P2", "P2-giou", "P3")}


def test_numbers_that_were_not_found_are_never_shown(claims: dict[str, Claim]) -> None:
    assert claims["P2"].paper == "MUSE val cIoU 7B 46.1 → 50.7; MUSE val cIoU 13B 50.2 → 54.1 (read in a copy)"
    for name in ("P1", "P3"):
        assert "direction only" in claims[name].paper
        assert all(said.baseline is None and said.variant is None for said in claims[name].config.paper)
    assert all(claim.config.minutes > 0 for claim in claims.values())


def test_arms_differ_in_what_is_claimed_alone(claims: dict[str, Claim]) -> None:
    for name in ("P2", "P2-giou", "P3"):
        arms = {role: arm.overrides for role, arm in claims[name].arms.items()}
        assert arms == {"baseline": ("model=lisa",), "variant": ("model=pixellm",)}
    assert claims["P1"].arms["baseline"].overrides == ("model=lisa", "data.questions=name")
    measured = catalogue()["data"].parse(claims["P1"].config.evaluate_on)
    folder = next(
        folder for folder in catalogue().conf_dirs if (folder / "experiment" / "claims-grounding.yaml").is_file()
    )
    trained = read_yaml(folder / "experiment" / "claims-grounding.yaml")["data"]
    assert {key: getattr(measured, key) for key in trained} == trained
