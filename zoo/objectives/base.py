"""What an objective is: a model's outputs in, one loss and a report out."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from zoo.objectives.momentum import Momentum


def full_precision(x: Tensor) -> AbstractContextManager[None]:
    """Run a block without autocast on the device of ``x``: losses are computed in fp32 whatever the model's
    precision.
    """
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)  # "meta" has no autocast


def over_ranks(count: Tensor) -> tuple[Tensor, Tensor]:
    """How many of something all ranks have, and what a rank divides its own sum by for a mean over all of them.

    Distributed wrappers average what the ranks compute, so that the second is the first, or 1 where that is 0, over the
    number of ranks: less than 1 where few ranks have any.

    Args:
        count: Of this rank, any shape; all ranks must ask.

    Returns:
        The total, of the dtype of ``count``, and the divisor, float32.
    """
    total = count.clone()
    ranks = 1
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total)
        ranks = dist.get_world_size()
    return total, total.float().clamp(min=1) / ranks


class Objective(nn.Module):
    """Base of objectives.

    Attributes:
        learns: The kind of learning, a word for tables of models: ``contrastive``, ``matching``, ``masked``,
            ``autoregressive``, ``diffusion``, ``flow``, ``reconstruction``, ...; empty = none of a name.
        needs: Outputs of the wiring it reads; checked against ``Model.provides`` when the module is built.
        momentum_rate: Decay of the momentum copy it learns from; None = it needs none.
        momentum: The run's copy, see ``zoo.objectives.momentum``; None where no objective needs one. It belongs to the
            module that trains, and is no submodule here.
        parts: Equal parts that it cuts a batch into; a batch that they divide costs what a large one costs a sample.
        reads_losses: It is called after the others, and its outputs hold ``loss``, their weighted sum.
    """

    learns: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()
    momentum_rate: float | None = None
    momentum: Momentum | None = None
    parts: int = 1
    reads_losses: bool = False

    def prepare(self, model: Any, momentum: Momentum | None) -> None:
        """Called once, when model and objectives are joined, before training: make buffers of the model's sizes."""
        self.__dict__["momentum"] = momentum

    def open(self, model: Any) -> None:
        """Read what it needs from disk; called before a run begins, and by ``forward`` where nobody did.

        Raises:
            ZooError: It is not there, or is something else.
        """

    # -- what an objective learns itself, with an optimizer of its own (zoo.own_optimizers): a discriminator ----------

    def own_optimizer(self) -> torch.optim.Optimizer | None:
        """A new optimizer of the parameters that are the objective's own; None = it has none.

        Such parameters have no gradient but during ``own_loss``, belong to no saved model, and are in checkpoints.
        """
        return None

    def own_loss(self) -> tuple[Tensor | None, dict[str, Tensor]]:
        """What its own parameters learn from, after each backward pass of the model's loss: a scalar on what the last
        ``forward`` kept, or None where there is nothing to learn yet; and scalars to log, the same ones always.
        """
        return None, {}

    def own_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Called after each optimizer step of the model, the gradients being those of all ranks."""
        optimizer.step()
        optimizer.zero_grad()

    def forward(
        self, model: Any, batch: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the scalar loss (mean over the local batch's items or targets) and scalars to log, detached."""
        raise TypeError(f"{type(self).__name__} defines no forward")

    def after_forward(self) -> None:
        """Called at the end of every forward pass in training, e.g. to enqueue its features."""

    def after_step(self, model: Any) -> None:
        """Called after every optimizer step, e.g. to clamp a temperature."""
