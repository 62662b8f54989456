"""Outputs that are computed when they are first asked for, so that a stage pays only for what its objectives read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor


class LazyOutputs(Mapping[str, Tensor]):
    """What a model's ``forward`` returns: names known at once, tensors made on first use, each once.

    They are made under the gradient and autocast modes in which the forward pass was called, whoever asks for them.

    Args:
        makers: Name -> function of this mapping.
        device_type: Where the model runs, for autocast.
    """

    def __init__(self, makers: Mapping[str, Callable[[LazyOutputs], Tensor]], device_type: str) -> None:
        self._makers = makers
        self._made: dict[str, Tensor] = {}
        self._gradients = torch.is_grad_enabled()
        self._device_type = device_type if device_type != "meta" else "cpu"  # "meta" has no autocast
        self._autocast = torch.is_autocast_enabled(self._device_type)
        self._dtype = torch.get_autocast_dtype(self._device_type)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._made:
            maker = self._makers[name]
            with (
                torch.set_grad_enabled(self._gradients),
                torch.autocast(self._device_type, self._dtype, enabled=self._autocast),
            ):
                self._made[name] = maker(self)
        return self._made[name]

    def and_also(self, makers: Mapping[str, Callable[[LazyOutputs], Tensor]]) -> LazyOutputs:
        """These outputs and more, made under the same modes."""
        self._makers = {**self._makers, **makers}
        return self

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)
