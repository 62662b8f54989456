"""Predicted memory against what torch's own allocator reports, and how strategies share it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from zoo.api import build_module
from zoo.cli import main
from zoo.compare.memory import Memory, predict_recipe, shared
from zoo.errors import ConfigError
from zoo.nn.cpu_attention import full_precision_attention
from zoo.recipe import resolve

GB = 10**9


def measured(name: str, batch_size: int, bf16: bool) -> int:
    """Peak bytes of a second step, in Lightning's order (forward, zero the gradients, backward, step): what stands
    before it, and the largest sum of what the allocator hands out and takes back."""
    module = build_module(resolve(name, scale="tiny"), seed=0)
    module.set_stage(0)
    module.train()
    batch = module.model.example_batch(batch_size)
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step() -> None:
        with full_precision_attention(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss, _ = module.losses(batch)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        del loss
        optimizer.step()

    step()
    standing: list[Any] = [*module.parameters(), *module.buffers(), *batch.values()]
    standing += [p.grad for p in trained if p.grad is not None]
    standing += [value for state in optimizer.state.values() for value in state.values()]
    held = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in standing}.values())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    now = most = 0
    results: Any = profiler.profiler
    for event in results.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return held + most


@pytest.mark.parametrize(
    ("name", "batch_size", "precision"),
    [
        ("clip", 32, "fp32"),
        ("coca", 32, "bf16"),
        ("llava", 16, "fp32"),
        ("blip2-opt", 16, "bf16"),
        ("vlmo", 16, "fp32"),
        ("transfusion", 16, "bf16"),
    ],
)
def test_predicted_memory_is_what_a_step_takes(name: str, batch_size: int, precision: str) -> None:
    predicted = predict_recipe(resolve(name, scale="tiny"), batch_size, precision, "cpu")[0].peak
    assert predicted == pytest.approx(measured(name, batch_size, precision == "bf16"), rel=0.1)


def test_what_is_frozen_has_no_gradients_and_no_moments() -> None:
    aligned, instructed = predict_recipe(resolve("llava"), 1)
    assert aligned.parameters == instructed.parameters
    assert aligned.gradients == 4 * (1024 * 4096 + 4096)  # the projection alone
    assert aligned.optimizer == 2 * aligned.gradients
    assert instructed.gradients > 25 * GB  # Vicuna-7B in fp32
    assert instructed.peak > instructed.parameters + instructed.gradients + instructed.optimizer


def test_a_larger_batch_takes_more_activations_only() -> None:
    recipe = resolve("clip", scale="tiny")
    (one,), (four,) = predict_recipe(recipe, 8), predict_recipe(recipe, 32)
    assert (four.parameters, four.gradients, four.optimizer) == (one.parameters, one.gradients, one.optimizer)
    assert 3.5 < four.activations / one.activations < 4.6
    (half,) = predict_recipe(recipe, 32, "bf16")
    assert 0.4 < half.activations / four.activations < 0.9
    (averaged,) = predict_recipe(recipe, 8, ema=True)
    assert averaged.parameters == 2 * one.parameters


def test_strategies() -> None:
    whole = Memory(parameters=80, gradients=40, optimizer=80, activations=30, step=40)
    assert whole.peak == 240
    assert shared(whole, 1, "single") == whole
    assert shared(whole, 8, "ddp").gradients == 80
    split = shared(whole, 8, "fsdp", largest=5, largest_trained=3)
    assert (split.parameters, split.gradients, split.optimizer) == (20, 8, 10)
    assert split.activations == 30
    with pytest.raises(ConfigError, match="strategy = 'fsdb'; did you mean fsdp"):
        shared(whole, 8, "fsdb")
    with pytest.raises(ConfigError, match="single is one device, not 8"):
        shared(whole, 8, "single")


def test_the_command_says_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "llava", "scale=tiny", "--memory", "--devices", "8", "--strategy", "fsdp"]) == 0
    text = capsys.readouterr().out
    assert "8 devices, fsdp" in text
    for word in ("align", "instruct", "parameters", "gradients", "optimizer", "activations", "peak"):
        assert word in text
    assert main(["show", "llava", "--memory", "--strategy", "fsdb"]) == 2
    assert "did you mean fsdp" in capsys.readouterr().err
    assert main(["show", "llava", "--devices", "8"]) == 2
    assert "--devices belongs to --memory" in capsys.readouterr().err
