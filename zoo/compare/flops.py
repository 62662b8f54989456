"""FLOPs of one sample, counted by torch on the meta device: no memory, no time, any published size."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from zoo.own_optimizers import OwnOptimizers

if TYPE_CHECKING:
    from zoo.module import ZooModule
    from zoo.recipe import Recipe


@dataclass(frozen=True)
class Flops:
    """Floating point operations of one training sample; a multiply-add counts as two.

    Attributes:
        frozen_forward: Forward through modules none of whose parameters learn.
        trainable_forward: The rest of the forward pass.
        backward: The backward pass, which needs no weight gradients of frozen modules, and what objectives learn
            themselves.
    """

    frozen_forward: int
    trainable_forward: int
    backward: int

    @property
    def forward(self) -> int:
        return self.frozen_forward + self.trainable_forward

    @property
    def per_sample(self) -> int:
        return self.forward + self.backward

    def to_plain(self) -> dict[str, int]:
        return {**asdict(self), "per_sample": self.per_sample}


BATCH = 2
"""Least samples counted at once: a contrastive loss compares at least two; the count is divided again."""


def samples(module: ZooModule) -> int:
    """Samples to count at once: as few as the current objectives' parts of a batch divide."""
    return math.lcm(BATCH, *(module.objectives[name].parts for name in module.active))  # type: ignore[arg-type]


def count(module: ZooModule, cached: bool = False) -> Flops:
    """Count the current stage of a module whose parameters are on the meta device.

    Args:
        cached: The frozen encoder's tokens (or image tokenizer's codes, latents) come from a cache, so that a step has
            no forward pass of it.

    Matrix products, convolutions and attention are counted, as ``torch.utils.flop_counter`` defines them; norms,
    activations and
    other elementwise work are not (about 1 % at published widths). A sequence counts at the length of
    ``example_batch``.
    """
    size = samples(module)
    batch = module.model.example_batch(size)
    if cached:
        from zoo.frozen_features import without_pixels

        batch = without_pixels(module.model, batch)
    was = module.training
    module.train()
    forward = FlopCounterMode(display=False)
    with forward:
        loss, _ = module.losses(batch)
    both = forward.get_total_flops()
    frozen = sum(_of(forward, module.model, path) for path in frozen_paths(module.model))
    backward = FlopCounterMode(display=False)
    with backward:
        loss.backward()  # type: ignore[no-untyped-call]
        OwnOptimizers(dict(module.objectives.items())).backward(module.active)  # what a discriminator costs
    module.zero_grad(set_to_none=True)
    module.train(was)
    return Flops(frozen // size, (both - frozen) // size, backward.get_total_flops() // size)


def count_recipe(recipe: Recipe, cached: bool = False) -> list[Flops]:
    """FLOPs of one sample in each stage of a recipe; ``cached`` as in ``count``."""
    from zoo.api import build_module

    with torch.device("meta"):
        module = build_module(recipe, seed=0)
    flops = []
    for stage in range(len(recipe.stages)):
        module.set_stage(stage)
        flops.append(count(module, cached))
    return flops


def frozen_paths(model: nn.Module) -> list[str]:
    """Paths of the largest modules none of whose parameters learn."""
    paths: list[str] = []
    for path, module in model.named_modules():
        parameters = list(module.parameters())
        inside = any(path.startswith(p + ".") for p in paths)
        if path and parameters and not inside and not any(p.requires_grad for p in parameters):
            paths.append(path)
    return paths


def _of(counter: FlopCounterMode, model: nn.Module, path: str) -> int:
    """FLOPs inside the module at ``path``: its own forward, or its children's where they ran outside of it (a head)."""
    counts = counter.get_flop_counts().get(f"{type(model).__name__}.{path}", {})
    inside = sum(_of(counter, model, f"{path}.{name}") for name, _ in model.get_submodule(path).named_children())
    return max(int(sum(counts.values())), inside)
