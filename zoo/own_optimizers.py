"""Objectives that learn themselves, beside the model: a discriminator and its optimizer.

The model's optimizer stays the only one that Lightning knows: it counts the steps. After every backward pass of the
model's loss an objective's own parameters get the gradient of its ``own_loss``, and after the model's step they take
theirs (the order of the VQGAN: generator, then discriminator, on the same batch). Between those passes they have no
gradient, so that neither the model's optimizer nor a distributed wrapper sees them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from zoo.objectives.base import Objective


class OwnOptimizers:
    """The optimizers of objectives that have one, by the objectives' names."""

    def __init__(self, objectives: Mapping[str, Any]) -> None:
        self.objectives = cast("Mapping[str, Objective]", objectives)
        made = {name: objective.own_optimizer() for name, objective in self.objectives.items()}
        self.optimizers = {name: optimizer for name, optimizer in made.items() if optimizer is not None}

    def backward(self, active: Iterable[str], share: float = 1.0) -> dict[str, Tensor]:
        """Add the gradients of the active objectives' own losses.

        Args:
            share: Factor of the losses: one over the batches whose gradients are added up before a step.

        Returns:
            What they report, each name prefixed by the objective's.
        """
        report: dict[str, Tensor] = {}
        for name in active:
            if name not in self.optimizers:
                continue
            with learning(self.optimizers[name]):
                loss, values = self.objectives[name].own_loss()
                if loss is not None:
                    (loss * share).backward()  # type: ignore[no-untyped-call]
            report |= {f"{name}/{key}": value for key, value in values.items()}
        return report

    def step(self, active: Iterable[str]) -> None:
        """Let the active objectives take their steps, on the mean of all ranks' gradients."""
        for name in active:
            if name not in self.optimizers:
                continue
            optimizer = self.optimizers[name]
            if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
                for parameter in parameters_of(optimizer):
                    if parameter.grad is not None:
                        dist.all_reduce(parameter.grad)
                        parameter.grad /= dist.get_world_size()
            self.objectives[name].own_step(optimizer)

    def state_dict(self) -> dict[str, Any]:
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` returned; objectives it does not know begin anew."""
        for name, optimizer in self.optimizers.items():
            if name in state:
                optimizer.load_state_dict(dict(state[name]))


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@contextmanager
def learning(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Let an optimizer's parameters have gradients."""
    parameters = parameters_of(optimizer)
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
