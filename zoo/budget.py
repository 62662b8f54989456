"""How long a run trains: a budget in one of five units, and the steps of each stage that it comes to.

A stage's share is a share of the budget in its own unit: of steps, of tokens, of floating point operations, of time.
Every unit but ``seconds`` becomes a number of steps before the first one is taken, so that learning-rate schedules and
the order of samples are known in advance; a budget in seconds ends at the first step border behind its time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zoo.errors import ConfigError
from zoo.part import PartConfig

if TYPE_CHECKING:
    from zoo.compare.flops import Flops
    from zoo.data.sample import Source
    from zoo.module import ZooModule
    from zoo.run_config import RunConfig

UNITS = {
    "steps": "optimizer steps",
    "samples": "samples, rounded up to whole steps",
    "tokens": "positions of text and images that the model reads, pads left out",
    "flops": "floating point operations of training, forward and backward, as zoo show counts them",
    "seconds": "seconds of training by the clock, data loading included",
}
"""Unit -> what is counted."""

COUNTED = 256
"""Samples of the run's own order whose mean length stands for all, where a budget counts tokens."""

BATCH = 32
"""Of them at a time."""


@dataclass(frozen=True, kw_only=True)
class BudgetConfig(PartConfig):
    """How long to train, over all stages.

    Attributes:
        unit: ``steps``, ``samples``, ``tokens``, ``flops`` or ``seconds``: see ``UNITS``.
        value: How many of them; whole numbers, but for seconds.
    """

    unit: str = "steps"
    value: int | float = 300

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ValueError(f"unit = {self.unit!r} must be {', '.join(list(UNITS)[:-1])} or {list(UNITS)[-1]}")
        if not 0 < self.value < math.inf:
            raise ValueError(f"value = {self.value} must be above 0")
        if self.value == int(self.value):  # 1e15 is the same budget as 1000000000000000
            object.__setattr__(self, "value", int(self.value))
        elif self.unit != "seconds":
            raise ValueError(f"value = {self.value} must be a whole number of {self.unit}")

    @property
    def fixed_order(self) -> bool:
        """Whether the places of the order that are read follow from the budget and the batch size alone."""
        return self.unit in ("steps", "samples")


@dataclass(frozen=True)
class Plan:
    """What a budget comes to for one run.

    Attributes:
        steps: Of each stage; empty where the clock ends them.
        seconds: Of each stage, where the clock ends them; else empty.
        per_sample: What a sample of each stage costs in the budget's unit; empty of steps, samples and seconds.
    """

    steps: tuple[int, ...]
    seconds: tuple[float, ...] = ()
    per_sample: tuple[float, ...] = ()

    @property
    def total(self) -> int | None:
        """Steps in all; None where the clock decides."""
        return None if self.seconds else sum(self.steps)

    @property
    def stages(self) -> int:
        return len(self.seconds or self.steps)

    def to_plain(self) -> dict[str, Any]:
        return {
            key: list(value)
            for key, value in (("steps", self.steps), ("seconds", self.seconds), ("per_sample", self.per_sample))
            if value
        }


def plan(
    config: RunConfig,
    module: ZooModule | None = None,
    source: Source | None = None,
    flops: Sequence[Flops] | None = None,
) -> Plan:
    """The steps, or seconds, of each stage of a run: the same from the same configuration and data, on any machine.

    Args:
        module: The run's module, or None to build one (on the meta device for ``flops``; for ``tokens`` it reads a few
            samples); its stage is the first one again afterwards.
        source: The run's data; None to open it where ``tokens`` are counted.
        flops: Of a sample of each stage, where they were counted already.

    Raises:
        ConfigError: The budget does not hold a step of every stage.
        DataError: Samples that cannot be read.
    """
    budget, shares = config.budget, [stage.share for stage in config.recipe.stages]
    parts = [share / sum(shares) for share in shares]
    if budget.unit == "seconds":
        return Plan((), tuple(part * budget.value for part in parts))
    if budget.fixed_order:
        total = budget.value if budget.unit == "steps" else math.ceil(budget.value / config.batch_size)
        return Plan(divided(int(total), shares, config.recipe.name))
    if budget.unit == "flops":
        if flops is None:
            from zoo.compare.flops import count_recipe

            flops = count_recipe(config.recipe)
        costs = tuple(float(f.per_sample) for f in flops)
    else:
        costs = mean_positions(config, module, source)
    steps = tuple(
        int(part * budget.value / (cost * config.batch_size)) for part, cost in zip(parts, costs, strict=True)
    )
    for stage, count, part, cost in zip(config.recipe.stages, steps, parts, costs, strict=True):
        if count < 1:
            raise ConfigError(
                f"budget.value = {budget.value:.4g} {budget.unit} leaves stage {stage.name!r} of {config.recipe.name}"
                f" {part * budget.value:.3g}, less than one step of {config.batch_size} samples at {cost:.3g} each:"
                f" give at least {math.ceil(cost * config.batch_size / part):.3g}"
            )
    return Plan(steps, per_sample=costs)


def divided(total: int, shares: Sequence[float], name: str) -> tuple[int, ...]:
    """``total`` steps divided by shares (largest remainder), at least one each.

    Raises:
        ConfigError: Fewer steps than shares.
    """
    if total < len(shares):
        raise ConfigError(f"a budget of {total} steps cannot hold the {len(shares)} stages of {name}")
    exact = [total * share / sum(shares) for share in shares]
    steps = [max(1, int(x)) for x in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: int(exact[i]) - exact[i])
    for i in by_remainder[: max(0, total - sum(steps))]:
        steps[i] += 1
    while sum(steps) > total:
        steps[steps.index(max(steps))] -= 1
    return tuple(steps)


def mean_positions(
    config: RunConfig, module: ZooModule | None = None, source: Source | None = None
) -> tuple[float, ...]:
    """Positions of a training sample in each stage: the mean over the first ``COUNTED`` places of the run's order, each
    as its draw in training is."""
    from zoo.api import build_module
    from zoo.data.loader import loader
    from zoo.data.order import training_order
    from zoo.positions import positions

    if source is None:
        source = open_source(config)
    if module is None:
        import torch

        with torch.device("meta"):
            module = build_module(config.recipe, config.seed)
    order = training_order(source, config.seed)
    means = []
    for stage in range(len(config.recipe.stages)):
        module.set_stage(stage)
        batches = loader(source, module.processor, order, BATCH, stop_step=COUNTED // BATCH)
        means.append(sum(int(positions(module.model, batch).sum()) for batch in batches) / COUNTED)
    module.set_stage(0)
    return tuple(means)


def open_source(config: RunConfig) -> Source:
    """The data of a run."""
    from zoo.plugin import catalogue

    values = {key: value for key, value in config.data.items() if key != "name"}
    source: Source = catalogue()["data"].parse(config.data["name"], values, "data").build(config.recipe.image_size)
    return source
