"""Kinds of components that plugins alone bring so far: encoders of further modalities, readers of released files."""

from __future__ import annotations

import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoo import testing
from zoo.encoders.base import Encoder, ModalityEncoderConfig
from zoo.part import Features
from zoo.plugin import Plugin, registered
from zoo.recipe import Recipe, resolve
from zoo.registry import Component
from zoo.weights.formats import Official, file_format
from zoo.weights.keymaps import KeyMap, rename


class Pulse(Encoder):
    def __init__(self, fault: str) -> None:
        super().__init__()
        self.width, self.pooled_width, self.tokens = 4, 4, 3 + (fault == "tokens")
        self.proj = nn.Linear(2, 4)
        self.fault = fault

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Features:
        tokens = self.proj(x.transpose(1, 2))  # [B, 3, 4]
        if self.fault == "batch":
            tokens = tokens - tokens.mean(0, keepdim=True)
        return Features(tokens, None, None if self.fault == "pooled" else tokens.mean(1))


@dataclass(frozen=True, kw_only=True)
class PulseConfig(ModalityEncoderConfig):
    modality: str = "pulse"
    fault: str = ""

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (2, 3)

    def build(self) -> Pulse:
        return Pulse(self.fault)


def from_state(recipe: Recipe, state: Mapping[str, Any]) -> Official:
    return Official(recipe=recipe, keymap=KeyMap(rename("theirs", "ours")), form="theirs")


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> None:
    made = types.ModuleType("zoo_pulse")
    made.Config, made.from_state = PulseConfig, from_state  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "zoo_pulse", made)


def pulse(**preset: Any) -> Plugin:
    component = Component(
        kind="modality_encoder", name="pulse", ref="zoo_pulse:Config", preset=preset, summary="reads a pulse"
    )
    return Plugin(name="pulse", components=(component,))


@pytest.mark.usefixtures("module")
def test_an_encoder_of_another_modality_keeps_its_contract() -> None:
    with registered(pulse()):
        testing.check_component("modality_encoder", "pulse")
        testing.check_plugin(pulse())
    x = torch.randn(2, 2, 3)
    features = PulseConfig().build()(x)
    torch.testing.assert_close(features.pooled, features.tokens.mean(1))


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize(
    ("preset", "message"),
    [
        ({"fault": "tokens"}, "expected \\(3, 4, 4\\)"),
        ({"fault": "pooled"}, "pooled is None"),
        ({"fault": "batch"}, "depends on what shares its batch|tokens differ"),
        ({"modality": ""}, "does not say which modality"),
    ],
)
def test_the_contract_finds_a_broken_promise(preset: dict[str, Any], message: str) -> None:
    with registered(pulse(**preset)), pytest.raises(AssertionError, match=message):
        testing.check_component("modality_encoder", "pulse")


@pytest.mark.usefixtures("module")
def test_a_plugin_reads_the_files_of_a_recipe() -> None:
    recipe = resolve("transfusion", scale="tiny")
    assert file_format(recipe, {}) is None

    def plugin(name: str, ref: str) -> Plugin:
        component = Component(kind="checkpoint", name=name, ref=ref, summary="reads theirs")
        return Plugin(name="files", components=(component,))

    with registered(plugin("transfusion", "zoo_pulse:from_state")):
        official = file_format(recipe, {})
        assert official is not None
        assert official.form == "theirs"
        assert official.recipe is recipe
        testing.check_component("checkpoint", "transfusion")
    for wrong, message in (
        (("no-model", "zoo_pulse:from_state"), "no recipe"),
        (("transfusion", "zoo_pulse:gone"), "gone"),
    ):
        with registered(plugin(*wrong)), pytest.raises(AssertionError, match=message):
            testing.check_component("checkpoint", wrong[0])
