"""Connectors of equal size: a reference's parameters within five per cent by one width, or a line that says why not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from zoo.api import build_module
from zoo.cli.match import nearest
from zoo.cli.overrides import run_config
from zoo.errors import ConfigError
from zoo.recipe import Recipe, resolve

TINY = ["model=llava", "scale=tiny", "stages=joint"]
LARGE = [*TINY, "match=parameters", "match.reference=qformer"]


def connector(recipe: Recipe) -> int:
    with torch.device("meta"):
        module: Any = build_module(recipe, 0)
    return sum(p.numel() for p in module.model.connector.parameters())


@pytest.mark.parametrize("visual_tokens", [0, 4])
@pytest.mark.parametrize(
    ("name", "width"), [("mlp", "hidden"), ("perceiver-resampler", "ffn"), ("pixel-shuffle", "hidden")]
)
def test_a_connector_gets_the_references_parameters(name: str, width: str, visual_tokens: int) -> None:
    asked = [f"connector={name}", f"wiring.visual_tokens={visual_tokens}"]
    plain, matched = run_config([*TINY, *asked]), run_config([*LARGE, *asked])
    reference = run_config([*LARGE, "connector=qformer", f"wiring.visual_tokens={visual_tokens}"])
    target = connector(reference.recipe)
    assert reference.recipe == run_config([*TINY, "connector=qformer", *asked[1:]]).recipe  # itself unchanged
    assert abs(connector(plain.recipe) - target) > 0.05 * target
    assert abs(connector(matched.recipe) - target) <= 0.05 * target
    changed = dict(matched.recipe.changed)
    assert changed.pop(f"connector.{width}") == str(getattr(matched.recipe.parts["connector"][1], width))
    assert changed == dict(plain.recipe.changed)  # one field, and its name shows it
    assert matched.hash() != plain.hash()


def test_one_that_is_near_enough_stays_as_it_is() -> None:
    asked = [*TINY, "connector=mlp", "match=parameters", "match.reference=mlp"]
    assert run_config(asked).recipe == run_config([*TINY, "connector=mlp"]).recipe
    wide = ["connector=mlp", "match=parameters", "match.reference=qformer", "match.tolerance=0.999"]
    assert run_config([*TINY, *wide]).recipe == run_config([*TINY, "connector=mlp"]).recipe


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([*LARGE, "connector=linear"], ["linear", "declares no width", "match.reference=linear"]),
        ([*TINY, "connector=qformer", "match=parameters", "match.reference=mlp"], ["qformer", "ffn = 1", "% off"]),
        ([*LARGE, "connector=mlp", "connector.hidden=9"], ["connector.hidden", "so do you"]),
        ([*TINY, "match=parameters"], ["match.reference=CONNECTOR"]),
        ([*TINY, "match=parameters", "match.reference=qfromer"], ["qfromer", "qformer"]),
        ([*LARGE, "match.tolerance=2"], ["tolerance"]),
        (["model=clip", "scale=tiny", "match=parameters", "match.reference=mlp"], ["clip", "none"]),
    ],
)
def test_what_cannot_be_matched_is_one_line(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        run_config(overrides)
    assert all(word in str(error.value) for word in words), error.value


def test_a_new_width_at_its_default_changes_no_hash_of_before() -> None:
    recipe = resolve("llava", choices={"connector": "mlp"}, scale="tiny")
    assert "hidden" not in recipe.to_plain()["connector"]
    wide = recipe.with_(connector={"hidden": 64})
    assert wide.to_plain()["connector"]["hidden"] == 64
    assert Recipe.from_plain(wide.to_plain()) == wide
    assert connector(wide) == (128 * 64 + 64) + (64 * 128 + 128)
    assert connector(recipe) == 2 * (128 * 128 + 128)


def test_the_nearest_width() -> None:
    assert nearest(lambda n: 3 * n + 1, 100) == 33
    assert nearest(lambda n: 1000 + n, 5) == 1
    assert nearest(lambda n: 10 * n, 14) == 1
    assert nearest(lambda n: 10 * n, 16) == 2
