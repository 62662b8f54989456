"""Attention of bf16 runs on a CPU, in fp32.

torch 2.13's fused CPU attention takes three times as long in bf16 as in fp32, forwards and backwards (83 tokens, 4
heads of 32, one core), so that half of a small bf16 step went there. Sums inside are fp32 either way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_attend = F.scaled_dot_product_attention


@contextmanager
def full_precision_attention() -> Iterator[None]:
    """Inside, ``F.scaled_dot_product_attention`` of CPU tensors under autocast is computed in fp32 and returned in
    autocast's dtype, whoever calls it: the zoo's trunk, transformers, timm, ``nn.MultiheadAttention``. Without CPU
    autocast nothing is replaced.

    A ``TorchFunctionMode`` would do without replacing the function, and not be asked inside ``nn.MultiheadAttention``.
    """
    if not torch.is_autocast_enabled("cpu"):
        yield
        return
    before = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = _attended  # one function for ever: a compiled graph is guarded by it
    try:
        yield
    finally:
        F.scaled_dot_product_attention = before


def _attended(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if query.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return _attend(query, *args, **kwargs)
    with torch.autocast("cpu", enabled=False):
        out = _attend(query.float(), *map(_full, args), **{name: _full(value) for name, value in kwargs.items()})
    return out.to(torch.get_autocast_dtype("cpu"))


def _full(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.is_floating_point() else x
