"""What a wiring builds: a plain ``nn.Module`` that joins parts, declares its outputs, and offers capabilities."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo.layout import Layout


class Model(nn.Module):
    """Base of models.

    Attributes:
        provides: Names of the outputs ``forward`` returns; objectives are checked against it.
    """

    provides: ClassVar[frozenset[str]] = frozenset()

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One forward pass over what ``processor`` made; returns what ``provides`` names."""
        raise TypeError(f"{type(self).__name__} defines no forward")

    @property
    def processor(self) -> Any:
        """The ``zoo.data.processor`` object that turns samples into ``forward``'s batch; made on first use."""
        raise TypeError(f"{type(self).__name__} defines no processor")

    def layouts(self) -> dict[str, Layout]:
        """Name -> layout of each sequence the model attends over, for one item of typical length."""
        return {}

    def example_batch(self, batch_size: int = 1) -> dict[str, Tensor]:
        """A batch of the right shapes and dtypes on the model's own device, which may be "meta", for counting FLOPs."""
        raise TypeError(f"{type(self).__name__} defines no example_batch")

    def parts(self) -> dict[str, nn.Module]:
        """Path -> module of the top-level parts, in the order tokens pass through them."""
        return dict(self.named_children())

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device
