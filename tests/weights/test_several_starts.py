"""Starting from several runs: what each gives, who wins, how a command and an experiment name them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import zoo
from zoo.cli.experiments import placed, references
from zoo.cli.overrides import with_quotes
from zoo.errors import ConfigError, WeightsError
from zoo.run_config import starts
from zoo.weights import save


def test_several_starts(tmp_path: Path) -> None:
    """A later one wins where two have a tensor; what none has is new, and what is not wanted is said."""
    folders = []
    for seed, name in enumerate(("clip", "kl-tokenizer", "clip")):
        made = zoo.build(name, scale="tiny", seed=seed + 5)
        folders.append(tmp_path / f"{seed}")
        save(made, made.recipe, folders[-1])
    first, second, third = folders
    codes, last = (zoo.from_pretrained(path).model for path in (second, third))
    shared = {name: tensor for name, tensor in codes.state_dict().items() if name.startswith("image_tokenizer.")}
    drawn = zoo.build("transfusion", scale="tiny", init=[second, second]).model.state_dict()
    assert shared
    assert all(torch.equal(drawn[name], tensor) for name, tensor in shared.items())
    both = zoo.build("clip", scale="tiny", init=f"{first} + {third}")
    own = both.model.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in last.state_dict().items())
    assert both.load_report.new == []
    assert both.load_report.source == f"{first} + {third}"
    with pytest.raises(WeightsError, match="no tensor of one name"):
        zoo.build("clip", scale="tiny", init=[first, second])


def test_names_of_several() -> None:
    assert starts("a/b + c") == ["a/b", "c"]
    assert starts("") == []
    assert starts("blip2+connector=mlp/seed=0-1") == ["blip2+connector=mlp/seed=0-1"]
    assert references({"init": "@eye + @codes", "evaluation": {"x": "@judge"}}) == ["eye", "codes", "judge"]
    assert placed("@eye + outputs/x", {"eye": "outputs/e"}) == "outputs/e + outputs/x"
    with pytest.raises(ConfigError, match="'@codes'"):
        placed("@eye + @codes", {"eye": "outputs/e"})
    assert with_quotes(["init=a + b"]) == ["init='a + b'"]
