"""What an objective is: a model's outputs in, one loss and a report out."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


def full_precision(x: Tensor) -> AbstractContextManager[None]:
    """Run a block without autocast on the device of ``x``: losses are computed in fp32 whatever the model's
    precision.
    """
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)  # "meta" has no autocast


class Objective(nn.Module):
    """Base of objectives.

    Attributes:
        needs: Outputs of the wiring it reads; checked against ``Model.provides`` when the module is built.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def forward(
        self, model: Any, batch: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the scalar loss (mean over the local batch's items or targets) and scalars to log, detached."""
        raise TypeError(f"{type(self).__name__} defines no forward")

    def after_step(self, model: Any) -> None:
        """Called after every optimizer step, e.g. to clamp a temperature."""
