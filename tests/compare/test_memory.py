"""Predicted memory against what torch's own allocator reports, and how strategies share it."""

from __future__ import annotations

import pytest
import torch

from zoo.api import build_module
from zoo.cli import main
from zoo.compare.memory import Memory, Units, in_blocks, measure_recipe, predict_recipe, shared, units_of
from zoo.errors import ConfigError
from zoo.recipe import resolve

GB = 10**9


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
    recipe = resolve(name, scale="tiny")
    predicted = predict_recipe(recipe, batch_size, precision, "cpu")[0].peak
    assert predicted == pytest.approx(measure_recipe(recipe, batch_size, precision), rel=0.1)


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
    units = Units(whole=8, beside=4, block=5, whole_trained=0, block_trained=3)
    split = shared(whole, 8, "fsdp", units)
    assert (split.parameters, split.gradients, split.optimizer) == (9 + 8 + 4 + 10, 5, 10)
    assert split.activations == 30
    with pytest.raises(ConfigError, match="strategy = 'fsdb'; did you mean fsdp"):
        shared(whole, 8, "fsdb")
    with pytest.raises(ConfigError, match="single is one device, not 8"):
        shared(whole, 8, "single")


def test_gradients_of_blocks_are_divided_as_they_come() -> None:
    (alone,) = predict_recipe(resolve("clip", scale="tiny"), 32)
    (two,) = predict_recipe(resolve("clip", scale="tiny"), 32, devices=2, strategy="fsdp")
    (many,) = predict_recipe(resolve("clip", scale="tiny"), 32, devices=64, strategy="fsdp")
    assert alone.gradients / 2 <= two.gradients < alone.gradients / 1.9
    assert many.gradients < alone.gradients / 30
    assert many.peak < two.peak < alone.peak
    assert many.activations > 0.9 * alone.activations  # of a batch that is as large


def test_units_are_what_fsdp_gathers() -> None:
    """LLaVA-7B: 32 frozen layers of one size; embeddings, head and norms stand beside them."""
    with torch.device("meta"):
        module = build_module(resolve("llava"), 0)
    module.set_stage(0)
    units = units_of(module)
    layer = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    assert units.block == 4 * layer
    assert units.block_trained == 0
    assert units_of(module, "bf16").block == 2 * layer
    tables = 4 * 2 * 4096 * module.model.decoder_config.vocab_size
    assert tables < units.beside < 1.1 * tables
    assert units.whole < 1e6
    learns = [p for p in module.parameters() if p.requires_grad]
    assert sum(p.numel() for p in learns) == 1024 * 4096 + 4096  # the connector, which is in no block
    assert not set(learns) & set(in_blocks(module))


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
