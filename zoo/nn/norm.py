"""Norms, activations, and the matrices between them, each initialised once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.nn.config import Norm


def make_norm(kind: Norm, width: int, eps: float) -> nn.Module:
    """Return LayerNorm or RMSNorm over the last ``width`` values, gain 1 and bias 0."""
    return nn.LayerNorm(width, eps=eps) if kind == "layer" else nn.RMSNorm(width, eps=eps)


class HeadNorm(nn.Module):
    """Norm over each head with its own gain and bias (Chameleon's QK-norm): ``[..., heads, dim]`` to the same."""

    def __init__(self, kind: Norm, heads: int, dim: int, eps: float) -> None:
        super().__init__()
        self.kind, self.eps = kind, eps
        self.weight = nn.Parameter(torch.ones(heads, dim))
        self.bias = nn.Parameter(torch.zeros(heads, dim)) if kind == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return F.rms_norm(x, x.shape[-1:], eps=self.eps) * self.weight
        return F.layer_norm(x, x.shape[-1:], eps=self.eps) * self.weight + self.bias


class Linear(nn.Linear):
    """A linear layer that starts as a normal of ``std`` cut off at two of them, bias 0 (BERT's initialisation).

    It draws once, from torch's global generator; ``nn.Linear`` would draw its own start first.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = True, *, std: float = 0.02) -> None:
        self.std = std
        super().__init__(inputs, outputs, bias)

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.weight, std=self.std, a=-2 * self.std, b=2 * self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


def quick_gelu(x: Tensor) -> Tensor:
    """x·sigmoid(1.702 x), as the released CLIP computes it."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
    "silu": F.silu,
    "relu": F.relu,
}
