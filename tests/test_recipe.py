"""Recipes: one order of precedence, honest names, and one reading of the files with and without Hydra."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from zoo import plugin
from zoo.errors import ConfigError
from zoo.plugin import Plugin, catalogue, registered
from zoo.recipe import (
    SECTIONS,
    SLOTS,
    OptimizerConfig,
    Recipe,
    merge,
    read_recipe,
    read_scale,
    resolve,
    scales,
    split_changes,
)
from zoo.recipe_files import read_yaml
from zoo.registry import to_plain

RECIPES = sorted(path.stem for path in (plugin.conf_dir() / "model").glob("*.yaml"))


@pytest.fixture
def write_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """``write_recipe(text)`` makes ``toy`` a model of the catalogue."""
    root = tmp_path / "zoo_recipe_plugin"
    (root / "conf" / "model").mkdir(parents=True)
    (root / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    file = root / "conf" / "model" / "toy.yaml"
    file.write_text("# toy\n")
    with registered(Plugin(name="toy", conf="pkg://zoo_recipe_plugin/conf")):
        yield file.write_text
    sys.modules.pop("zoo_recipe_plugin", None)


# -- precedence ----------------------------------------------------------------------------------------------------


def test_preset_wins_over_class_defaults() -> None:
    config = resolve("clip-vit-l-14").parts["encoder"][1]
    default = type(config)()
    preset = catalogue()["encoder"].get("clip-vit-l-14").preset
    assert preset["width"] == 1024 != default.width
    assert config.width == 1024
    assert config.mean == default.mean


def test_body_wins_over_preset_and_default() -> None:
    recipe = resolve("llava")
    assert read_recipe("llava").body["encoder"]["layer"] == -2
    assert recipe.parts["encoder"][1].layer == -2
    assert catalogue()["encoder"].parse(recipe.parts["encoder"][0]).layer == -1


def test_scale_wins_over_preset_and_leaves_what_the_body_says() -> None:
    recipe, sizes = resolve("llava", scale="tiny"), read_scale("tiny").sizes
    encoder = recipe.parts["encoder"][1]
    assert encoder.width == sizes["width"] != resolve("llava").parts["encoder"][1].width
    assert encoder.layer == -2
    assert recipe.scale == "tiny"


def test_user_wins_over_scale() -> None:
    values = {"encoder": {"width": 192, "depth": 3}, "optimizer": {"lr": 0.5}}
    recipe = resolve("llava", values=values, scale="tiny")
    encoder, sizes = recipe.parts["encoder"][1], read_scale("tiny").sizes
    assert (encoder.width, encoder.depth) == (192, 3)
    assert encoder.heads == sizes["heads"]
    assert recipe.optimizer.lr == 0.5
    assert recipe.optimizer.betas == read_scale("tiny").optimizer["betas"]


def test_optimizer_precedence_reaches_the_stages() -> None:
    published, tiny = resolve("llava"), resolve("llava", scale="tiny")
    assert [published.stage_optimizer(i).lr for i in range(2)] == [2e-3, 2e-5]
    assert {tiny.stage_optimizer(i).lr for i in range(2)} == {read_scale("tiny").optimizer["lr"]}
    set_by_user = resolve("llava", values={"optimizer": {"lr": 0.25}})
    assert {set_by_user.stage_optimizer(i).lr for i in range(2)} == {0.25}
    stages = [{"name": "a", "optimizer": {"lr": 0.125}}, {"name": "b"}]
    staged = resolve("llava", values={"stages": stages}, scale="tiny")
    assert [staged.stage_optimizer(i).lr for i in range(2)] == [0.125, read_scale("tiny").optimizer["lr"]]


def test_sizes_that_fit_only_together_are_checked_after_all_are_set() -> None:
    recipe = resolve("clip", values={"encoder": {"width": 96, "heads": 6}}, scale="tiny")
    assert recipe.parts["encoder"][1].width == 96
    with pytest.raises(ConfigError, match="encoder: width = 100"):
        resolve("clip", values={"encoder": {"width": 100, "heads": 6}}, scale="tiny")


def test_body_of_a_replaced_part_keeps_what_the_new_one_has(write_recipe: Any) -> None:
    body = (plugin.conf_dir() / "model" / "llava.yaml").read_text()
    body = body.replace("wiring:\n", "connector:\n  layers: 3\nwiring:\n", 1)
    write_recipe(body.replace("connector: linear", "connector: pixel-shuffle"))
    assert resolve("toy").parts["connector"][1].layers == 3
    assert resolve("toy", choices={"connector": "linear"}).parts["connector"][0] == "linear"
    write_recipe(body)
    with pytest.raises(ConfigError, match="connector has no field 'layers'"):
        resolve("toy")


# -- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choices", "values", "name"),
    [
        ({}, {}, "llava"),
        ({"connector": "linear"}, {}, "llava"),
        ({"connector": "mlp"}, {}, "llava+connector=mlp"),
        ({"connector": "mlp"}, {"connector": {"depth": 3}}, "llava+connector=mlp+connector.depth=3"),
        ({"connector": "mlp"}, {"connector": {"depth": 2}}, "llava+connector=mlp"),
        ({}, {"encoder": {"width": 192}}, "llava+encoder.width=192"),
        (
            {},
            {"optimizer": {"lr": 0.0003, "betas": [0.9, 0.95]}},
            "llava+optimizer.betas=[0.9,0.95]+optimizer.lr=0.0003",
        ),
        ({}, {"stages": "joint"}, "llava+stages=joint"),
        ({}, {"objective": {"next-token": {"weight": 2.0}}}, "llava+objective.next-token.weight=2"),
        ({}, {"encoder": {"cls": True}}, "llava+encoder.cls=true"),
    ],
)
def test_name_shows_every_change_and_nothing_else(choices: dict[str, Any], values: dict[str, Any], name: str) -> None:
    assert resolve("llava", choices=choices, values=values, scale="tiny").name == name


def test_scale_is_no_change() -> None:
    assert resolve("llava", scale="tiny").name == resolve("llava").name == "llava"


# -- wrong input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "lava"}, "unknown model 'lava'; did you mean llava"),
        ({"scale": "tny"}, "unknown scale 'tny'; did you mean tiny"),
        ({"choices": {"connector": "mpl"}}, "unknown connector 'mpl'; did you mean mlp"),
        ({"choices": {"conector": "mlp"}}, "unknown option 'conector' of a recipe; did you mean connector"),
        ({"choices": {"objective": "next-tokn"}}, "unknown objective 'next-tokn'; did you mean next-token"),
        ({"choices": {"wiring": "brigde"}}, "unknown wiring 'brigde'; did you mean bridge"),
        ({"choices": {"text_encoder": "clip-text-512"}}, "llava has no text_encoder"),
        ({"values": {"text_encoder": {"width": 8}}}, "llava has no text_encoder"),
        ({"values": {"encoder": {"widht": 8}}}, "encoder has no field 'widht'"),
        ({"values": {"encoder": {"_target_": "os.system"}}}, "encoder has no field '_target_'"),
        ({"values": {"encoder": {"width": "wide"}}}, "encoder.width = 'wide'"),
        ({"values": {"optimizer": {"lr": -1.0}}}, "optimizer: lr = -1.0"),
        (
            {"values": {"objective": {"contrastive": {"weight": 1.0}}}},
            "objective.contrastive is set but the model trains",
        ),
        ({"values": {"stages": "both"}}, "expected 'joint' or a list of stages"),
        ({"values": {"stages": [{"name": "a", "share": 0.0}]}}, "share = 0.0 must be above 0"),
        ({"values": {"stages": [{"name": "a", "objectives": ["contrastive"]}]}}, "uses objective 'contrastive'"),
        ({"values": {"stages": [{"name": "a", "optimizer": {"rl": 1.0}}]}}, "stages.0.optimizer has no field 'rl'"),
        ({"values": {"stages": [{"trains": ["*"]}]}}, "stages.0 has no field 'trains' (Stage); did you mean train"),
    ],
)
def test_mistake_is_one_line_that_names_it(arguments: dict[str, Any], message: str) -> None:
    arguments = {"model": "llava", **arguments}
    with pytest.raises(ConfigError) as caught:
        resolve(arguments.pop("model"), **arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("- a\n- b\n", "holds a list"),
        ("a: [\n", "is not valid YAML"),
        ("wiring: {name: bridge}\nwiring: {name: towers}\n", "'wiring' stands twice"),
        ("!!python/object/apply:os.system ['true']\n", "is not valid YAML"),
        ("conector: {}\n", "unknown key 'conector'; did you mean connector"),
        ("encoder: {width: 64}\n", "sets encoder.width: sizes belong to the preset"),
        ("decoder: {tokenizer: x}\n", "sets decoder.tokenizer: sizes belong to the preset"),
        ("defaults: [base]\n", "may only hold 'override /GROUP: OPTION'"),
        ("defaults: [{override /trainer: gpu}]\n", "may only hold 'override /GROUP: OPTION'"),
        ("defaults: [{encoder: vit}]\n", "may only hold 'override /GROUP: OPTION'"),
        ("optimizer: {lr: '${oc.env:HOME}'}\n", "interpolation"),
        ("defaults: [{override /encoder: clip-vit-b-32}]\noptimizer: {lr: 1.0e-3}\n", "states no wiring"),
        ("wiring: {name: bridge}\n", "has no encoder; known"),
        ("wiring: {name: bridge}\nencoder: {_target_: os.system}\n", "encoder._target_ is refused"),
    ],
)
def test_recipe_file_outside_the_grammar_is_refused(text: str, message: str, write_recipe: Any) -> None:
    write_recipe(text)
    with pytest.raises(ConfigError) as caught:
        resolve("toy")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_recipe_with_a_target_is_refused(write_recipe: Any) -> None:
    body = (plugin.conf_dir() / "model" / "llava.yaml").read_text()
    write_recipe(body.replace("\nencoder:", "\nencoder:\n  _target_: os.system", 1))
    with pytest.raises(ConfigError, match=r"encoder\._target_ is refused"):
        resolve("toy")


def test_recipe_without_an_objective_is_refused(write_recipe: Any) -> None:
    body = (plugin.conf_dir() / "model" / "llava.yaml").read_text()
    write_recipe(body.replace("  - override /objective: next-token\n", ""))
    with pytest.raises(ConfigError, match="states no objective; known: "):
        resolve("toy")


def test_numbers_are_read_as_hydra_reads_them(write_recipe: Any) -> None:
    body = (plugin.conf_dir() / "model" / "llava.yaml").read_text()
    write_recipe(body.replace("lr: 2.0e-3\n  betas", "lr: 2e-3\n  betas"))
    assert read_recipe("toy").body["optimizer"]["lr"] == 2e-3
    assert resolve("toy").optimizer.lr == resolve("llava").optimizer.lr


# -- JSON ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("scale", [None, "tiny", "small"])
def test_round_trip_through_json(name: str, scale: str | None) -> None:
    recipe = resolve(name, scale=scale)
    plain = json.loads(json.dumps(recipe.to_plain()))
    assert Recipe.from_plain(plain) == recipe
    assert plain["changed"] == []


def test_round_trip_keeps_changes_and_their_name() -> None:
    recipe = resolve("llava", choices={"connector": "mlp"}, values={"connector": {"depth": 3}}, scale="tiny")
    again = Recipe.from_plain(json.loads(json.dumps(recipe.to_plain())))
    assert again == recipe
    assert again.name == "llava+connector=mlp+connector.depth=3"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "recipe format 2 is unknown"),
        ({"_target_": "os.system"}, "recipe._target_ is refused"),
        ({"connector": {"name": "mlp", "_target_": "os.system"}}, "recipe.connector._target_ is refused"),
        ({"connector": {"depth": 2}}, "connector needs a 'name'"),
        (
            {"connector": None},
            "has the parts encoder, decoder, but its wiring 'bridge' joins encoder, connector, decoder",
        ),
        ({"text_encoder": {"name": "clip-text-512"}}, "but its wiring 'bridge' joins"),
        ({"wiring": "bridge"}, "recipe.wiring"),
        ({"objective": ["next-token"]}, "recipe.objective"),
        ({"model": 7}, "recipe.model"),
        ({"stages": "joint"}, "recipe.stages"),
    ],
)
def test_foreign_or_damaged_plain_form_is_refused(change: dict[str, Any], message: str) -> None:
    plain = {**resolve("llava", scale="tiny").to_plain(), **change}
    with pytest.raises(ConfigError) as caught:
        Recipe.from_plain(plain)
    assert message in str(caught.value)


@pytest.mark.parametrize("key", ["wiring", "objective", "stages", "optimizer", "model", "scale", "encoder"])
def test_incomplete_plain_form_is_refused(key: str) -> None:
    plain = resolve("llava", scale="tiny").to_plain()
    del plain[key]
    with pytest.raises(ConfigError, match=key):
        Recipe.from_plain(plain)


# -- changes -------------------------------------------------------------------------------------------------------


def test_with_changes_parts_and_fields_and_keeps_the_rest() -> None:
    base = resolve("llava", values={"encoder": {"depth": 3}}, scale="tiny")
    new = base.with_(connector="mlp", decoder={"depth": 2}, **{"encoder.width": 96})
    assert new.parts["connector"][0] == "mlp"
    assert (new.parts["encoder"][1].width, new.parts["encoder"][1].depth) == (96, 3)
    assert new.parts["decoder"][1].depth == 2
    assert new.stages == base.stages
    assert new.name == "llava+encoder.depth=3+encoder.width=96+connector=mlp+decoder.depth=2"
    assert base.name == "llava+encoder.depth=3"


@pytest.mark.parametrize("name", RECIPES)
def test_with_another_scale_is_the_recipe_at_that_scale(name: str) -> None:
    assert resolve(name).with_(scale="tiny") == resolve(name, scale="tiny")
    assert resolve(name, scale="tiny").with_(scale="published") == resolve(name)
    assert resolve(name, scale="small").with_() == resolve(name, scale="small")


def test_with_another_scale_keeps_what_the_user_set() -> None:
    small = resolve("llava", values={"encoder": {"width": 192}}, scale="tiny").with_(scale="small")
    assert small.parts["encoder"][1].width == 192
    assert small.parts["encoder"][1].depth == read_scale("small").sizes["depth"]


def test_with_a_new_part_drops_the_fields_of_the_old_one() -> None:
    base = resolve("llava", choices={"connector": "mlp"}, values={"connector": {"depth": 3}}, scale="tiny")
    assert base.with_(connector="linear") == resolve("llava", scale="tiny")
    assert base.with_(connector="mlp") == base


def test_choices_are_told_from_values() -> None:
    choices, values = split_changes(
        {"connector": "mlp", "encoder.width": 96, "encoder": {"depth": 2}, "decoder": {"name": "gpt2", "depth": 1}}
    )
    assert choices == {"connector": "mlp", "decoder": "gpt2"}
    assert values == {"encoder": {"width": 96, "depth": 2}, "decoder": {"depth": 1}}
    with pytest.raises(ConfigError, match="unknown option 'conector' of a recipe; did you mean connector"):
        split_changes({"conector": "mlp"})


def test_merge_is_deep_and_leaves_its_arguments_alone() -> None:
    base, over = {"a": {"x": 1, "y": [1]}, "b": 2}, {"a": {"y": [2]}, "c": 3}
    assert merge(base, over) == {"a": {"x": 1, "y": [2]}, "b": 2, "c": 3}
    assert base == {"a": {"x": 1, "y": [1]}, "b": 2}


# -- the two readers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_reading_a_recipe_equals_composing_it_with_hydra(name: str) -> None:
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from zoo.api import own_hydra
    from zoo.cli.overrides import store_parts

    with own_hydra():
        store_parts()
        with initialize_config_dir(str(plugin.conf_dir()), version_base="1.3"):
            config = compose("train", overrides=[f"model={name}"], return_hydra_config=True)
            chosen = config.hydra.runtime.choices
            plain = {key: OmegaConf.to_container(config)[key] for key in config if key in SECTIONS}  # type: ignore[index]
    file = read_recipe(name)
    marked = [name for name, fields in (plain.get("objective") or {}).items() if fields.pop("name", None)]
    for group in (*SLOTS, "objective"):
        expected, found = file.choices.get(group), chosen.get(group)
        if group == "objective":  # Hydra keeps no record of a list of choices
            assert marked == ([expected] if isinstance(expected, str) else expected)
            continue
        assert found == expected, group
    for key, values in file.body.items():
        found = plain[key]
        if isinstance(values, dict):
            found = {field: found[field] for field in values}
            added = set(plain[key]) - set(values) - {"name"}
            assert not added or key == "objective", f"composing adds {added} to {key}"
        assert found == values
    for key in set(plain) - set(file.body):
        assert not plain[key] or key == "objective" or set(plain[key]) == {"name"}


@pytest.mark.parametrize("name", RECIPES)
def test_command_line_and_notebook_resolve_to_one_recipe(name: str) -> None:
    from zoo.cli.overrides import run_config

    assert run_config([f"model={name}", "scale=tiny"]).recipe == resolve(name, scale="tiny")


def test_command_line_takes_a_list_of_objectives() -> None:
    from zoo.cli.overrides import run_config

    recipe = run_config(["model=albef", "objective=[matching,masked-lm]", "scale=tiny"]).recipe
    assert list(recipe.objectives) == ["matching", "masked-lm"]
    assert recipe == resolve("albef", choices={"objective": ["matching", "masked-lm"]}, scale="tiny")


def test_command_line_and_notebook_agree_on_changes() -> None:
    from zoo.cli.overrides import run_config

    line = ["model=llava", "connector=mlp", "scale=tiny", "encoder.width=192", "optimizer.lr=2e-3", "stages=joint"]
    values = {"encoder": {"width": 192}, "optimizer": {"lr": 2e-3}, "stages": "joint"}
    assert run_config(line).recipe == resolve("llava", choices={"connector": "mlp"}, values=values, scale="tiny")


# -- the files that ship -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_says_what_it_is_and_resolves_at_every_scale(name: str) -> None:
    assert len(catalogue()["model"].get(name).summary) > 10
    for scale in scales():
        recipe = resolve(name, scale=scale)
        assert recipe.name == name
        assert set(recipe.parts) == set(recipe.wiring[1].slots)


def test_published_scale_changes_nothing() -> None:
    assert read_scale("published").sizes == {}
    assert read_scale("published").optimizer == {}
    assert resolve("clip") == resolve("clip", scale="published")


def test_scale_refuses_what_is_no_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "zoo_scale_plugin"
    (root / "conf" / "scale").mkdir(parents=True)
    (root / "__init__.py").write_text("")
    (root / "conf" / "scale" / "odd.yaml").write_text("sizes: {wdth: 8}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with registered(Plugin(name="odd", conf="pkg://zoo_scale_plugin/conf")):
        with pytest.raises(ConfigError, match="sets 'wdth', which is no standard size field; did you mean width"):
            resolve("llava", scale="odd")
        (root / "conf" / "scale" / "odd.yaml").write_text("sizes: {width: wide}\n")
        with pytest.raises(ConfigError, match="encoder 'clip-vit-l-14' does not take scale 'odd'"):
            resolve("llava", scale="odd")
        (root / "conf" / "scale" / "odd.yaml").write_text("sizes: {tokenizer: 8}\n")
        with pytest.raises(ConfigError, match=r"decoder\.tokenizer = 8"):
            resolve("llava", scale="odd")
        (root / "conf" / "scale" / "odd.yaml").write_text("size: {width: 8}\n")
        with pytest.raises(ConfigError, match="scale odd has no field 'size'"):
            resolve("llava", scale="odd")


@pytest.mark.parametrize(
    "values", [{"betas": [0.9]}, {"betas": [0.9, 1.0]}, {"lr": 0.0}, {"min_lr": 1.0}, {"warmup": -1.0}, {"clip": -1.0}]
)
def test_optimizer_refuses_impossible_values(values: dict[str, Any]) -> None:
    default = to_plain(OptimizerConfig())
    assert all(default[key] != value for key, value in values.items())
    with pytest.raises(ConfigError, match="optimizer"):
        resolve("llava", values={"optimizer": values})
    assert dataclasses.asdict(resolve("llava", values={"optimizer": {"clip": 0.0}}).optimizer)["clip"] == 0.0


def test_texts_that_begin_with_a_number_stay_texts(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("a: 1.18 times\nb: 1e-3\nc: 1.5\nd: -.5\ne: 2.x\n", encoding="utf-8")
    assert read_yaml(file) == {"a": "1.18 times", "b": 1e-3, "c": 1.5, "d": -0.5, "e": "2.x"}
