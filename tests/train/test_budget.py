"""Budgets in five units: what they come to, what a run says it cost, and the clock across resumes."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from zoo.api import build_module
from zoo.budget import UNITS, BudgetConfig, Plan, divided, mean_positions, open_source, plan
from zoo.checkpoints import load_checkpoint
from zoo.cli.overrides import run_config
from zoo.compare.cost import with_cost
from zoo.compare.flops import count_recipe
from zoo.compare.rundir import Run
from zoo.curve import Curve, Meter, read_lines
from zoo.errors import ConfigError
from zoo.manifest import start_manifest
from zoo.module import schedule
from zoo.positions import positions, tokens_of_image
from zoo.recipe import OptimizerConfig
from zoo.resuming import Keeper
from zoo.run_config import RunConfig
from zoo.survival import Interrupted
from zoo.tracking import Tracker
from zoo.train import run

TINY = [
    "scale=tiny", "batch_size=16", "encoder.width=32", "encoder.depth=2", "encoder.ffn=64",
    "trainer.accelerator=cpu", "trainer.log_every=1", "trainer.checkpoint_every=2", "evaluation.split=val",
]  # fmt: skip
CLIP = ["model=clip", *TINY, "text_encoder.width=32", "text_encoder.depth=1", "text_encoder.ffn=64"]
LLAVA = ["model=llava", *TINY, "decoder.width=32", "decoder.depth=1", "decoder.ffn=64", "connector=mlp"]
QUICK = ["evaluation.tasks={retrieval: {items: 16}}"]
STAGES = "stages=[{name: align, train: [connector], share: 1}, {name: instruct, train: [connector, decoder], share: 3}]"


def prepared(folder: Path, *overrides: str) -> RunConfig:
    folder.mkdir(parents=True)
    config = run_config(overrides)
    config.write(folder / "run.yaml")
    return config


# -- what a budget comes to ----------------------------------------------------------------------------------------


def test_steps_and_samples_are_divided_by_shares() -> None:
    assert plan(run_config([*LLAVA, STAGES, "budget.value=10"])) == Plan(
        (3, 7)
    )  # of 2.5 and 7.5 the first is rounded up
    assert plan(run_config([*LLAVA, STAGES, "budget=samples", "budget.value=150"])).steps == (3, 7)  # 9.4 steps are 10
    assert divided(4, [1, 1, 1000], "x") == (1, 1, 2)
    with pytest.raises(ConfigError, match="1 steps cannot hold the 2 stages"):
        run_config([*LLAVA, STAGES, "budget.value=1"])


def test_flops_are_divided_by_what_a_step_of_each_stage_costs() -> None:
    config = run_config([*LLAVA, STAGES, "budget=flops", "budget.value=4e9"])
    align, instruct = (f.per_sample * 16 for f in count_recipe(config.recipe))
    assert instruct > 1.2 * align  # the decoder learns too
    found = plan(config)
    assert found.steps == (math.floor(1e9 / align), math.floor(3e9 / instruct))
    assert found.per_sample == (align / 16, instruct / 16)
    spent = found.steps[0] * align + found.steps[1] * instruct
    assert 4e9 - align - instruct < spent <= 4e9


def test_a_costlier_model_gets_fewer_steps_of_equal_flops_and_the_same_hash() -> None:
    few = run_config([*CLIP, "encoder.depth=5", "budget=flops", "budget.value=2e9"])
    many = run_config([*CLIP, "budget=flops", "budget.value=2e9"])
    ratio = plan(many).total / plan(few).total  # type: ignore[operator]
    costs = [count_recipe(c.recipe)[0].per_sample for c in (few, many)]
    assert ratio == pytest.approx(costs[0] / costs[1], rel=0.05)
    assert few.to_plain()["budget"] == many.to_plain()["budget"] == {"unit": "flops", "value": 2_000_000_000}


def test_tokens_are_those_of_the_samples_the_run_will_see() -> None:
    config = run_config([*CLIP, "budget=tokens", "budget.value=20000"])
    source = open_source(config)
    (mean,) = mean_positions(config, source=source)
    module = build_module(config.recipe, 0)
    from zoo.data.order import SampleOrder

    order = SampleOrder(source.ids("train"), 0).slice(0, 256)
    texts = [source.sample(d.id).texts[0] for d in order]
    words = sum(map(len, module.processor.tokenizer.encode(texts))) / 256
    assert tokens_of_image(module.model) == 17  # sixteen patches and the class token
    assert mean == pytest.approx(words + 2 + 17, abs=0.05)  # a start and an end
    assert plan(config).steps == (math.floor(20000 / (mean * 16)),)


def test_seconds_have_no_steps() -> None:
    found = plan(run_config([*LLAVA, STAGES, "budget=seconds", "budget.value=0.5"]))
    assert found == Plan((), (0.125, 0.375))
    assert found.total is None


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["budget=flop"], ["unknown budget 'flop'", "flops"]),
        (["budget.unit=hours", "budget.value=3"], ["hours", "seconds"]),
        (["budget=flops"], ["budget.value=N"]),
        (["budget=tokens", "budget.value=1.5"], ["whole number of tokens"]),
        (["budget.value=-3"], ["above 0"]),
        (["budget.value=.inf"], ["budget.value"]),
    ],
)
def test_mistakes_are_one_line(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        run_config([*CLIP, *overrides])
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("unit", ["flops", "tokens"])
def test_less_than_a_step_is_refused_with_the_least(unit: str) -> None:
    with pytest.raises(ConfigError, match="give at least") as error:
        plan(run_config([*CLIP, f"budget={unit}", "budget.value=7"]))
    least = float(str(error.value).rpartition(" ")[2])
    assert plan(run_config([*CLIP, f"budget={unit}", f"budget.value={math.ceil(least * 1.01)}"])).total == 1


def test_equal_numbers_are_equal_budgets() -> None:
    assert BudgetConfig(unit="flops", value=1e15) == BudgetConfig(unit="flops", value=10**15)
    assert run_config([*CLIP, "budget=flops", "budget.value=2e9"]).hash() == (
        run_config([*CLIP, "budget=flops", "budget.value=2000000000"]).hash()
    )
    assert sorted(UNITS) == sorted({"steps", "samples", "tokens", "flops", "seconds"})


def test_variants_of_an_equal_budget_share_their_conditions_whatever_they_take() -> None:
    found = []
    for depth in (2, 5):
        config = run_config([*CLIP, f"encoder.depth={depth}", "budget=flops", "budget.value=2e9"])
        source, module = open_source(config), build_module(config.recipe, 0)
        steps = plan(config)
        manifest = start_manifest(config, module, source, steps)
        found.append((steps.total, {key: manifest["hashes"][key] for key in ("data", "order", "budget")}))
        assert manifest["plan"]["steps"] == list(steps.steps)
    assert found[0][0] != found[1][0]
    assert found[0][1] == found[1][1]


# -- positions -----------------------------------------------------------------------------------------------------


def test_positions_of_text_and_images() -> None:
    bridge = build_module(run_config(LLAVA).recipe, 0)
    ids = torch.full((2, 20), 7)
    ids[:, :16] = bridge.model.image_token_id  # type: ignore[assignment]
    mask = torch.ones_like(ids).bool()
    mask[1, 18:] = False
    batch = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.zeros(2, 3, 64, 64)}
    assert positions(bridge.model, batch).tolist() == [4 + 2, 32]
    towers = build_module(run_config(CLIP).recipe, 0)
    batch = {"input_ids": ids, "attention_mask": mask, "image_tokens": torch.zeros(2, 17, 32)}
    assert positions(towers.model, batch).tolist() == [38, 34]
    slots = torch.zeros_like(mask)
    slots[0, 3:9] = True
    assert positions(object(), {"input_ids": ids, "attention_mask": mask, "image_slots": slots}).tolist() == [32, 6]


# -- learning rates under a clock ----------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [0.1, 0.0, 20])
def test_the_schedule_by_time_is_the_one_by_steps_at_an_even_pace(warmup: float) -> None:
    config = OptimizerConfig(lr=1.0, min_lr=0.1, warmup=warmup)
    for step in (1, 5, 50, 150, 199):
        share = step / 200
        assert schedule(step, step / share, config) == pytest.approx(schedule(step, 200, config))
    assert schedule(0, math.inf, config) == pytest.approx({0.1: 0.0, 0.0: 1.0, 20: 1 / 20}[warmup])


class Ticking:
    """A clock that advances by a fixed time whenever it is read."""

    def __init__(self, tick: float) -> None:
        self.now, self.tick = 0.0, tick

    def perf_counter(self) -> float:
        self.now += self.tick
        return self.now


def timed(folder: Path, monkeypatch: pytest.MonkeyPatch, tick: float = 1.0) -> dict[str, Any]:
    with monkeypatch.context() as patch:
        patch.setattr("zoo.curve.time", Ticking(tick))
        return run(folder)


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Keeper.on_train_batch_end

    def patched(self: Keeper, trainer: Any, *rest: Any) -> None:
        self.stop.asked = self.stop.asked or (signal.SIGINT if trainer.global_step == step else 0)
        original(self, trainer, *rest)

    monkeypatch.setattr(Keeper, "on_train_batch_end", patched)


BRIDGE_TASK = "evaluation.tasks={caption-likelihood: {items: 4}}"
SECONDS = [*LLAVA, STAGES, BRIDGE_TASK, "budget=seconds", "budget.value=12"]


def test_the_clock_ends_stages_at_a_step_border_and_counts_across_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step takes one second: three steps of the first stage, nine of the second, stopped or not."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    prepared(whole, *SECONDS)
    cost = timed(whole, monkeypatch)["cost"]
    assert (cost["steps"], cost["samples"], cost["seconds"]["training"]) == (12, 192, 12.0)
    lines = read_lines(whole / "curve.jsonl")
    assert [line["stage"] for line in lines] == ["align"] * 3 + ["instruct"] * 9
    # behind step k stands the rate of the next one, by the pace up to step k - 1; none is known of the first two
    config = run_config(SECONDS).recipe.optimizer
    rates = [line["lr"] / config.lr for line in lines[3:]]
    assert rates[0] == 0.0
    assert rates[1:] == [pytest.approx(schedule(step, 9, config)) for step in range(2, 10)]

    prepared(stopped, *SECONDS)
    with monkeypatch.context() as patch:
        stop_at(2, patch)
        with pytest.raises(Interrupted):
            timed(stopped, monkeypatch)
    assert load_checkpoint(stopped / "checkpoint")["zoo_meter"]["seconds"] == [2.0, 0.0]
    again = timed(stopped, monkeypatch)["cost"]
    assert again["steps"] == 12
    assert again["tokens"] == cost["tokens"]
    ours, theirs = (load_checkpoint(f / "checkpoint")["state_dict"] for f in (stopped, whole))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert read_lines(stopped / "curve.jsonl") == lines


# -- what a run says it cost ---------------------------------------------------------------------------------------


def test_every_unit_is_in_the_manifest_and_survives_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = [*LLAVA, STAGES, BRIDGE_TASK, "budget.value=8", "trainer.log_every=3", "trainer.accumulate=2"]
    config = prepared(tmp_path / "whole", *overrides)
    cost = run(tmp_path / "whole")["cost"]
    module = build_module(config.recipe, 0)
    source = open_source(config)
    from zoo.data.loader import loader
    from zoo.data.order import SampleOrder

    batches = loader(source, module.processor, SampleOrder(source.ids("train"), 0), 16, stop_step=8)
    text, image = sum(positions(module.model, b) for b in batches).tolist()  # type: ignore[union-attr]
    assert cost["tokens"] == {"text": text, "image": image, "total": text + image}
    assert image == 8 * 16 * 16
    flops = count_recipe(config.recipe)
    for part in ("frozen_forward", "trainable_forward", "backward"):
        assert cost["flops"][part] == 16 * sum(getattr(f, part) * n for f, n in zip(flops, (2, 6), strict=True))
    assert cost["flops"]["total"] == 16 * sum(f.per_sample * n for f, n in zip(flops, (2, 6), strict=True))
    assert cost["peak_memory_bytes"] > 1e8
    assert cost["seconds"]["wall"] > cost["seconds"]["training"] > 0
    assert cost["seconds"]["evaluation"] > 0

    prepared(tmp_path / "stopped", *overrides)
    with monkeypatch.context() as patch:
        stop_at(4, patch)  # of the second stage, between two lines of the curve
        with pytest.raises(Interrupted):
            run(tmp_path / "stopped")
    used = json.loads((tmp_path / "stopped" / "manifest.json").read_text())["wall_seconds"]
    again = run(tmp_path / "stopped")["cost"]
    assert {k: again[k] for k in ("steps", "samples", "tokens", "flops")} == {
        k: cost[k] for k in ("steps", "samples", "tokens", "flops")
    }
    assert again["seconds"]["wall"] > used + again["seconds"]["evaluation"]
    read = Run.read(tmp_path / "stopped")
    assert read.number("cost", "tokens", "image") == image


def test_manifests_of_before_are_read_as_the_same_mapping() -> None:
    old = {
        "steps": 3, "samples": 48, "tokens": 700, "seconds": 1.5, "samples_per_second": 32.0,
        "peak_memory_bytes": 9, "flops": {"total": 1e9, "per_sample": 2}, "evaluation_seconds": 0.5,
    }  # fmt: skip
    cost = with_cost(old)["cost"]
    assert (cost["flops"]["total"], cost["seconds"], cost["tokens"]) == (
        1e9, {"training": 1.5, "evaluation": 0.5}, {"total": 700},
    )  # fmt: skip
    assert with_cost({"status": "failed"}) == {"status": "failed"}


def test_a_curve_shows_the_meter(tmp_path: Path) -> None:
    meter = Meter(2)
    meter.load({"steps": [3, 1], "seconds": [2.0, 0.5], "positions": [10, 20]})
    assert meter.over(0, 3, None)
    assert not meter.over(1, 3, None)
    assert meter.over(0, None, 2.0)
    assert not meter.over(1, None, 2.0)
    assert Meter(2).to_plain() == {"steps": [0, 0], "seconds": [0.0, 0.0], "positions": [0, 0]}
    assert Curve(tmp_path / "c", 1, 0, 16, "s", meter, None, Tracker(), False).meter.positions == [10, 20]
