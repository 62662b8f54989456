"""What decides a task's numbers is in its hash: fields, prompt, decoding, batch, data, and precision of the weights."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import nn

from zoo.capabilities import GenerateText
from zoo.errors import ConfigError
from zoo.evaluation.run import evaluation_hash, weights_dtype
from zoo.plugin import catalogue

OWN = [name for name in catalogue()["task"].names() if catalogue()["task"].plugin(name) == "zoo"]
"""Plugins test their own."""


class Source:
    name, version = "icons", "1"

    def ids(self, split: str) -> list[str]:
        return ["a", "b"]


def config_of(name: str) -> Any:
    return catalogue()["task"].parse(name, {}, name)


def spec_of(config: Any, monkeypatch: pytest.MonkeyPatch, split: str = "test") -> dict[str, Any]:
    # judges are hashed by their weights, of which there are none here
    monkeypatch.setattr("zoo.evaluation.drawing.evaluator_hash", lambda path, task: f"hash of {path}")
    spec: dict[str, Any] = config.build().spec(Source(), split)
    return spec


@pytest.mark.parametrize("name", OWN)
def test_a_tasks_spec_names_what_decides_its_numbers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(name)
    task, spec = config.build(), spec_of(config, monkeypatch)
    assert {"task", "version", "config", "source", "split"} <= set(spec)
    written = {field.name for field in dataclasses.fields(config)}
    assert set(spec["config"]) <= written
    assert '"batch' in json.dumps(spec), "the batch is not hashed"
    if GenerateText in task.needs:
        assert "prompt" in spec["config"]
        assert "decoding" in spec or "decoding" in spec["config"], "how text is decoded is not hashed"
    assert spec_of(config, monkeypatch, "val") != spec


@pytest.mark.parametrize("name", OWN)
def test_every_plain_field_changes_the_hash(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(name)
    base = spec_of(config, monkeypatch)
    changed = 0
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        try:
            other = dataclasses.replace(config, **{field.name: value + 1 if isinstance(value, int) else value / 2})
        except ConfigError:  # another field would have to change with it
            continue
        changed += 1
        assert spec_of(other, monkeypatch) != base, field.name
    assert changed >= 1


def test_the_precision_of_the_weights_is_in_the_hash() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).to(torch.bfloat16))
    assert weights_dtype(model) == "bfloat16+float32"
    assert weights_dtype(model[:1]) == "float32"
    assert weights_dtype(object()) == "float32"
    tasks = [config_of("retrieval").build()]
    hashes = {evaluation_hash(tasks, Source(), "test", weights_dtype(m)) for m in (model, model[:1], model[1:])}
    assert len(hashes) == 3
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert weights_dtype(model[:1]) == "float32, products medium"
        assert weights_dtype(model[1:]) == "bfloat16"
    finally:
        torch.set_float32_matmul_precision(before)
