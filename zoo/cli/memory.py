"""``zoo show NAME --memory``: what a training step takes on each device."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from zoo.errors import ConfigError
from zoo.run_config import CHECKPOINTING

if TYPE_CHECKING:
    from zoo.compare.memory import Memory
    from zoo.recipe import Recipe

OPTIONS = ("--devices", "--strategy", "--batch-size", "--precision", "--accelerator", "--checkpointing")


def parse(argv: Sequence[str]) -> tuple[list[str], argparse.Namespace | None]:
    """Take the options of ``--memory`` out of the words behind ``zoo show``; None where it is not among them.

    Raises:
        ConfigError: An option without ``--memory``, or a number that is none.
    """
    words = list(argv)
    if "--memory" not in words:
        alone = next((word for word in words if word.split("=")[0] in OPTIONS), None)
        if alone is not None:
            raise ConfigError(f"{alone.split('=')[0]} belongs to --memory: add it")
        return words, None
    words.remove("--memory")
    parser = _Parser("zoo show NAME --memory", add_help=False, allow_abbrev=False)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--strategy", default=None)
    parser.add_argument("--batch-size", type=int, default=None)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--accelerator", default="gpu", choices=("gpu", "cpu"))
    parser.add_argument("--checkpointing", default="none", choices=CHECKPOINTING)
    found, rest = parser.parse_known_args(words)
    return rest, found


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise ConfigError(f"{self.prog}: {message}")


def show_memory(recipe: Recipe, options: argparse.Namespace) -> None:
    """Print a line a stage.

    Raises:
        ConfigError: A strategy that is unknown, or a batch that the devices do not divide.
    """
    from rich.console import Console
    from rich.table import Table

    from zoo.cli.overrides import BATCH_SIZE
    from zoo.compare.memory import predict_recipe
    from zoo.recipe import read_scale

    devices = options.devices
    strategy = options.strategy or "auto"
    if strategy == "auto":
        strategy = "single" if devices == 1 else "ddp"
    batch = options.batch_size or read_scale(recipe.scale).batch_size or BATCH_SIZE
    if devices < 1 or batch % devices:
        raise ConfigError(f"a batch of {batch} is not divided by {devices} devices: choose another --batch-size")
    stages = predict_recipe(
        recipe, batch // devices, options.precision, options.accelerator,
        devices=devices, strategy=strategy, checkpointing=options.checkpointing,
    )  # fmt: skip
    table = Table(box=None, padding=(0, 2, 0, 0))
    for head in ("stage", "parameters", "gradients", "optimizer", "activations", "peak a device"):
        table.add_column(head, justify="left" if head == "stage" else "right")
    for stage, memory in zip(recipe.stages, stages, strict=True):
        table.add_row(stage.name, *_row(memory))
    console = Console()
    many = f"{devices} device{'s' if devices > 1 else ''}, {strategy}"
    console.print(
        f"{recipe.name}: {many}, {batch // devices} samples a device and step, {options.precision}", highlight=False
    )
    console.print(table)
    console.print(
        "Counted on the meta device; kernels' workspaces, fragments and libraries come on top (about 0.5 GB a GPU).",
        style="dim",
    )


def _row(memory: Memory) -> list[str]:
    values = (memory.parameters, memory.gradients, memory.optimizer, memory.activations, memory.peak)
    return [_bytes(value) for value in values]


def _bytes(value: int) -> str:
    for size, unit in ((10**9, "GB"), (10**6, "MB")):
        if value >= size:
            return f"{value / size:.2f} {unit}" if value < 100 * size else f"{value / size:.0f} {unit}"
    return f"{value / 1000:.1f} kB"
