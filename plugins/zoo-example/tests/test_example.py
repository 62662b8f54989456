"""The plugin as a user meets it: installed, or only importable."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import zoo
from zoo.errors import ConfigError
from zoo.part import Features
from zoo.plugin import Catalogue, Plugin, catalogue
from zoo.recipe import resolve
from zoo.testing import check_light, check_plugin, check_recipe
from zoo.testing.installed import importable, in_catalogue

ROOT = Path(__file__).parents[1]


importable("example", ROOT)


@pytest.fixture(autouse=True)
def found() -> Iterator[Catalogue]:
    """The catalogue with this plugin in it, from its entry point where it is installed."""
    with in_catalogue("example", "zoo_example") as found:
        yield found


def plugin() -> Plugin:
    from zoo_example import PLUGIN

    return PLUGIN


def test_plugin_keeps_the_contracts(found: Catalogue) -> None:
    assert found["connector"].plugin("gated-mlp") == "zoo-example"
    assert found["model"].plugin("llava-gated") == "zoo-example"
    check_plugin(plugin())


def test_manifest_imports_nothing_heavy() -> None:
    assert "zoo_example" in sys.modules or plugin()
    check_light("zoo_example", str(ROOT))


def test_connector_computes_its_formula() -> None:
    config = catalogue()["connector"].parse("gated-mlp", {"expansion": 2.0})
    module = config.build(in_width=6, in_tokens=5, out_width=4)
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(9))
    state = module.state_dict()
    assert state["gate.weight"].shape == (8, 6)
    n = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    n = n * state["norm.weight"] + state["norm.bias"]
    gate, up = n @ state["gate.weight"].T, n @ state["up.weight"].T
    expected = (gate / (1 + (-gate).exp()) * up) @ state["down.weight"].T + state["down.bias"]
    torch.testing.assert_close(module(Features(x)).tokens, expected)


def test_fields_are_checked() -> None:
    with pytest.raises(ConfigError, match="expansion = 0"):
        resolve("llava", choices={"connector": "gated-mlp"}, values={"connector": {"expansion": 0.0}})
    with pytest.raises(ConfigError, match="did you mean expansion"):
        resolve("llava", choices={"connector": "gated-mlp"}, values={"connector": {"expansoin": 2.0}})


def test_recipe_is_llava_with_this_connector() -> None:
    own, swapped = resolve("llava-gated"), resolve("llava", choices={"connector": "gated-mlp"})
    assert own.parts == swapped.parts
    assert own.stages == swapped.stages
    assert own.optimizer == swapped.optimizer
    assert own.name == "llava-gated"
    assert swapped.name == "llava+connector=gated-mlp"


@pytest.mark.parametrize("name", ["linear", "gated-mlp"])
def test_sweep_by_name(name: str) -> None:
    recipe = resolve("llava", choices={"connector": name}, scale="tiny")
    assert recipe.parts["connector"][0] == name
    check_recipe("llava", choices={"connector": name})


def test_swapping_it_in_changes_no_other_weight() -> None:
    one = zoo.build("llava", connector="linear", scale="tiny", seed=3).model.state_dict()
    two = zoo.build("llava", connector="gated-mlp", scale="tiny", seed=3).model.state_dict()
    common = [key for key in one if not key.startswith("connector.")]
    assert common == [key for key in two if not key.startswith("connector.")]
    assert all(torch.equal(one[key], two[key]) for key in common)
    assert {key for key in two if key.startswith("connector.")} != {key for key in one if key.startswith("connector.")}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of twelve small pictures with captions."""
    from PIL import Image

    root = tmp_path / "pictures"
    root.mkdir()
    lines = []
    for index in range(12):
        Image.new("RGB", (64, 64), (20 * index, 255 - 20 * index, 40)).save(root / f"{index}.png")
        split = "test" if index >= 8 else "train"
        lines.append(json.dumps({"image": f"{index}.png", "caption": f"colour {index}", "split": split}))
    (root / "captions.jsonl").write_text("\n".join(lines))
    return root


def test_command_line_sweeps_over_it(tmp_path: Path, pictures: Path) -> None:
    from zoo.cli import main

    sweep = ["-m", "model=llava", "connector=linear,gated-mlp", "scale=tiny", "stages=joint", "budget.value=2"]
    data = ["data=folder", f"data.root={pictures}", "data.captions=captions.jsonl", "data.split_column=split"]
    small = ["batch_size=4", "evaluation.tasks=[caption-likelihood]"]
    out = tmp_path / "outputs"
    assert main(["train", *sweep, *data, *small, f"out={out}", f"hydra.sweep.dir={tmp_path}/hydra"]) == 0
    runs = {manifest.parts[-3]: json.loads(manifest.read_text()) for manifest in out.rglob("manifest.json")}
    assert sorted(runs) == ["llava+connector=gated-mlp+stages=joint", "llava+stages=joint"]
    assert all(run["status"] == "done" for run in runs.values())
    parts = {part["path"]: part["name"] for part in runs["llava+connector=gated-mlp+stages=joint"]["parts"]}
    assert parts["connector"] == "gated-mlp"
