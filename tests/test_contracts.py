"""Every part and recipe of the catalogue keeps the contracts that plugins are held to."""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from zoo import plugin, testing
from zoo.builtin import PLUGIN
from zoo.connectors.base import Connector, ConnectorConfig
from zoo.part import Features
from zoo.plugin import Plugin, catalogue, registered
from zoo.registry import Component
from zoo.testing.plugins import CHECKS

OWN_TESTS = {("decoder", "smollm2-135m"), ("tokenizer", "smollm2"), ("objective", "perceptual")}
"""What needs trained weights: tests/decoders/test_smollm2.py and tests/objectives/test_perceptual.py hold them to their
contract."""

BUILTIN = [(c.kind, c.name) for c in PLUGIN.components if c.kind != "model" and (c.kind, c.name) not in OWN_TESTS]
RECIPES = sorted(path.stem for path in (plugin.conf_dir() / "model").glob("*.yaml"))


@pytest.mark.parametrize(("kind", "name"), BUILTIN)
def test_part_keeps_its_contract(kind: str, name: str) -> None:
    assert name in catalogue()[kind]
    testing.check_component(kind, name)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_keeps_its_contract_at_tiny_scale(name: str) -> None:
    assert name in catalogue()["model"]
    testing.check_recipe(name)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_builds_and_trains_at_its_published_size_on_meta(name: str) -> None:
    assert name in catalogue()["model"]
    testing.check_published(name)


def test_every_part_says_what_it_is() -> None:
    silent = [(c.kind, c.name) for registry in catalogue().registries.values() for c in registry if not c.summary]
    assert not silent


# The contracts themselves: each broken promise is found.


class Broken(Connector):
    """A connector that breaks the promise called ``fault``."""

    def __init__(self, in_width: int, in_tokens: int, out_width: int, fault: str) -> None:
        super().__init__()
        self.width = out_width + (fault == "width")
        self.tokens = in_tokens + (fault == "tokens")
        self.fault = fault
        self.proj = nn.Linear(in_width, out_width)
        self.unused = nn.Parameter(self.proj.weight.detach().clone()) if fault == "gradient" else None
        self.norm = nn.BatchNorm1d(out_width, track_running_stats=False) if fault == "batch" else nn.Identity()
        self.hidden = [nn.Linear(out_width, out_width)] if fault == "state" else []

    def forward(self, features: Features, text: Features | None = None) -> Features:
        x = self.proj(features.tokens)  # [B, N, D]
        if self.fault == "mask":
            x = x + x.mean(1, keepdim=True)
        if self.fault == "constant":
            x = x * 0 + self.proj.bias
        if self.fault == "noise":
            x = nn.functional.dropout(x, 0.5)
        for layer in self.hidden:
            x = layer(x)
        x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        return Features(x, mask=features.mask, grid=features.grid)


def broken_config(fault: str) -> type[ConnectorConfig]:
    @dataclass(frozen=True, kw_only=True)
    class BrokenConfig(ConnectorConfig):
        def build(self, *, in_width: int, in_tokens: int, out_width: int) -> Broken:
            if fault == "random":
                torch.random.seed()
            return Broken(in_width, in_tokens, out_width, fault)

    return BrokenConfig


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("width", "width"),
        ("tokens", "shape"),
        ("gradient", "no gradient reaches unused"),
        ("batch", "depends on what shares its batch"),
        ("state", "after a state_dict round trip"),
        ("mask", "masked tokens reach the output"),
        ("constant", "two different inputs give the same tokens"),
        ("noise", "different tokens"),
        ("random", "built twice from one seed"),
    ],
)
def test_contract_finds_a_broken_promise(fault: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("zoo_broken_parts")
    module.Config = broken_config(fault)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "zoo_broken_parts", module)
    component = Component(kind="connector", name="broken", ref="zoo_broken_parts:Config", summary="breaks a promise")
    with registered(Plugin(name="broken", components=(component,))), pytest.raises(AssertionError, match=message):
        testing.check_connector("broken")


def test_sound_connector_passes_the_same_check(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("zoo_sound_parts")
    module.Config = broken_config("")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "zoo_sound_parts", module)
    component = Component(kind="connector", name="sound", ref="zoo_sound_parts:Config", summary="keeps every promise")
    plugin = Plugin(name="sound", components=(component,))
    testing.check_plugin(plugin)
    assert "sound" not in catalogue()["connector"]  # it was there for the check only


def test_manifest_that_imports_torch_is_found(tmp_path: Path) -> None:
    (tmp_path / "heavy_manifest.py").write_text("import torch\n")
    with pytest.raises(AssertionError, match="imports torch"):
        testing.check_light("heavy_manifest", str(tmp_path))


def test_every_kind_of_part_has_a_contract() -> None:
    parts = {"encoder", "text_encoder", "modality_encoder", "connector", "decoder", "trunk", "patch_codec"}
    parts |= {"denoiser", "output_connector", "mask_decoder", "data_tokenizer", "objective", "model"}
    assert parts == set(CHECKS)
