"""Names of parts, and strict typing of what is written under them."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from zoo.errors import ConfigError, MissingExtra, ZooError, near
from zoo.part import PartConfig
from zoo.registry import KINDS, Component, Registry, parse, to_plain


@dataclass(frozen=True, kw_only=True)
class ToyConfig(PartConfig):
    width: int = 64
    rate: float = 0.5
    deep: bool = False
    kind: Literal["a", "b"] = "a"
    sizes: list[int] = field(default_factory=lambda: [1, 2])
    options: dict[str, Any] = field(default_factory=dict)
    label: str | None = None

    def __post_init__(self) -> None:
        if self.width % 2:
            raise ValueError(f"width = {self.width} must be even")


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    module = types.ModuleType("zoo_toy_parts")
    module.ToyConfig, module.plain = ToyConfig, dict  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "zoo_toy_parts", module)
    registry = Registry("connector")
    registry.add(Component(kind="connector", name="toy", ref="zoo_toy_parts:ToyConfig"))
    registry.add(Component(kind="connector", name="toy-large", ref="zoo_toy_parts:ToyConfig", preset={"width": 128}))
    return registry


def test_names_are_sorted_and_known(registry: Registry) -> None:
    assert registry.names() == ["toy", "toy-large"]
    assert [component.name for component in registry] == ["toy", "toy-large"]
    assert "toy" in registry
    assert "toys" not in registry
    assert registry.plugin("toy") == "zoo"


def test_duplicate_name_is_refused_with_both_owners(registry: Registry) -> None:
    with pytest.raises(ConfigError, match=r"'toy' of plugin 'other' is already registered by 'zoo'"):
        registry.add(Component(kind="connector", name="toy", ref="elsewhere:Config"), "other")
    assert registry.get("toy").ref == "zoo_toy_parts:ToyConfig"


@pytest.mark.parametrize("name", ["", "Toy", "a b", "a/b", "../a", "a=b", "-a", "naïve", "a,b", "a\n"])
def test_malformed_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="must be lower-case"):
        Registry("connector").add(Component(kind="connector", name=name))


def test_component_of_another_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="of kind 'decoder', expected 'connector'"):
        Registry("connector").add(Component(kind="decoder", name="toy"))


def test_unknown_name_suggests_near_ones(registry: Registry) -> None:
    with pytest.raises(ConfigError, match=r"unknown connector 'tpy'; did you mean toy"):
        registry.get("tpy")
    with pytest.raises(ConfigError, match=r"unknown connector 'zzzz'; known: toy, toy-large"):
        registry.parse("zzzz")


def test_near_prefers_typos_then_infixes_then_a_short_list() -> None:
    assert near("lava", ["llava", "clip"]) == "; did you mean llava?"
    assert near("l", ["xlarge-vision", "clip-text"]) == "; did you mean clip-text or xlarge-vision?"
    assert near("zzz", ["b", "a"]) == "; known: a, b"
    assert near("zzz", [f"name-{i}" for i in range(40)]) == ""
    assert near("zzz", []) == ""


def test_values_win_over_the_preset_and_the_preset_over_defaults(registry: Registry) -> None:
    assert registry.parse("toy").width == 64
    assert registry.parse("toy-large").width == 128
    assert registry.parse("toy-large", {"width": 32}).width == 32
    assert registry.parse("toy-large", {"rate": 1}).rate == 1.0
    assert isinstance(registry.parse("toy", {"rate": 1}).rate, float)


@pytest.mark.parametrize(
    ("values", "path", "reason"),
    [
        ({"width": "64"}, "connector.width = '64'", "integer"),
        ({"width": 64.5}, "connector.width = 64.5", "integer"),
        ({"width": True}, "connector.width = True", "integer"),
        ({"width": None}, "connector.width = None", "integer"),
        ({"rate": "fast"}, "connector.rate = 'fast'", "number"),
        ({"deep": 1}, "connector.deep = 1", "boolean"),
        ({"kind": "c"}, "connector.kind = 'c'", "'a' or 'b'"),
        ({"sizes": 3}, "connector.sizes = 3", "array"),
        ({"sizes": [1, "2"]}, "connector.sizes.1 = '2'", "integer"),
        ({"options": [1]}, "connector.options = [1]", ""),
        ({"label": 7}, "connector.label = 7", "string"),
        ({"width": 63}, "connector: width = 63 must be even", ""),
        ({"label": object}, "connector holds a value that is no plain", ""),
    ],
)
def test_wrong_type_is_one_line_with_path_value_and_expectation(
    registry: Registry, values: dict[str, Any], path: str, reason: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        registry.parse("toy", values)
    message = str(caught.value)
    assert message.startswith(path)
    assert reason in message
    assert "\n" not in message
    assert "pydantic" not in message


@pytest.mark.parametrize(("key", "hint"), [("widht", "did you mean width?"), ("_target_", "has no field '_target_'")])
def test_unknown_field_is_refused(registry: Registry, key: str, hint: str) -> None:
    with pytest.raises(ConfigError, match="connector has no field") as caught:
        registry.parse("toy", {key: "os.system"})
    assert hint in str(caught.value)


def test_plain_form_is_json_and_parses_back(registry: Registry) -> None:
    config = registry.parse("toy", {"sizes": [3], "options": {"a": [1, {"b": None}]}, "rate": 2, "label": "ü"})
    plain = to_plain(config)
    assert json.loads(json.dumps(plain)) == plain
    assert parse(ToyConfig, plain, "x") == config
    plain["sizes"].append(4)
    assert config.sizes == [3]


@pytest.mark.parametrize(
    ("ref", "reason"),
    [
        ("zoo_no_such_module:Config", "cannot be imported"),
        ("zoo_toy_parts:Missing", "cannot be imported"),
        ("zoo_toy_parts:plain", "is not a dataclass"),
        ("zoo_toy_parts", "has no Config class"),
        ("", "has no Config class"),
    ],
)
def test_reference_that_does_not_resolve(registry: Registry, ref: str, reason: str) -> None:
    registry.add(Component(kind="connector", name="lost", ref=ref))
    with pytest.raises(ConfigError, match=reason):
        registry.config_class("lost")


def test_missing_package_is_named_with_the_extra_that_brings_it(registry: Registry) -> None:
    registry.add(Component(kind="connector", name="heavy", ref="zoo_no_such_package:Config", extra="video"))
    with pytest.raises(MissingExtra, match=r"zoo_no_such_package.*pip install 'mmzoo\[video\]'"):
        registry.config_class("heavy")


def test_module_that_raises_anything_is_one_line(registry: Registry, tmp_path: Any, monkeypatch: Any) -> None:
    (tmp_path / "zoo_raises.py").write_text("raise RuntimeError('first\\nsecond')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry.add(Component(kind="connector", name="raises", ref="zoo_raises:Config"))
    with pytest.raises(ConfigError, match="cannot be imported: first second"):
        registry.parse("raises")


def test_errors_are_one_line_and_every_kind_has_a_description() -> None:
    assert str(ZooError("a\n  b\tc")) == "a b c"
    assert all(KINDS.values())
