"""FlexAttention where it pays, scaled_dot_product_attention elsewhere: the one place that chooses.

A dense mask costs T x T numbers a row of the batch, and its scores are all computed. FlexAttention is given the rule
of the layout instead (``Layout.mask_mod``) and leaves out blocks of 128 x 128 that nobody reads: documents of a packed
sequence, the future of causal text. Both give the same numbers: 1e-5 in fp32, 2e-2 in bf16 (the largest difference
over the largest value).
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zoo.errors import ConfigError, near
from zoo.layout import Layout
from zoo.nn.config import TrunkConfig

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

KERNELS = ("auto", "sdpa", "flex")
"""What a trunk's ``kernel`` may be. ``auto``: FlexAttention on CUDA, for masks of ``FROM`` rows or more; ``sdpa``: a
dense mask always; ``flex``: FlexAttention wherever it can compute what is asked for."""

FROM = 1024
"""Rows from which ``auto`` builds a block mask: eight blocks a side. Fewer leave little to skip."""

LEAST_HEAD = 16
"""The narrowest head that FlexAttention's kernels read."""


def use_kernel(model: nn.Module, kernel: str) -> int:
    """Set the kernel of every trunk in a model; how many there are.

    Raises:
        ConfigError: An unknown kernel.
    """
    from zoo.nn.trunk import Trunk

    if kernel not in KERNELS:
        raise ConfigError(f"unknown attention kernel {kernel!r}{near(kernel, KERNELS)}")
    trunks = [module for module in model.modules() if isinstance(module, Trunk)]
    for trunk in trunks:
        trunk.kernel = kernel
    return len(trunks)


def chosen(kernel: str, config: TrunkConfig, layout: Layout, x: Tensor, cached: bool, training: bool) -> bool:
    """Whether rows ``x`` [B, T, D] are to be read by FlexAttention.

    Never where no mask is needed (SDPA's own fast kernels), where rows are written over a cache, or where it cannot:
    a learned key or relative bias, attention dropout, heads narrower than 16, gradients on anything but CUDA.
    """
    if kernel == "sdpa" or layout.kind != "table" or cached or layout.length != x.shape[1]:
        return False
    if config.bias_kv or config.rel_rows or (training and config.attention_dropout) or config.head < LEAST_HEAD:
        return False
    if x.device.type != "cuda":
        return kernel == "flex" and x.device.type == "cpu" and not torch.is_grad_enabled()
    return kernel == "flex" or layout.length >= FROM


def block_mask(layout: Layout) -> BlockMask:
    """The layout's block mask, made by a compiled function on CUDA: uncompiled it would pass through the dense mask."""
    alone = torch.compiler.is_compiling() or layout.segment.device.type != "cuda"
    return layout.block_mask(make=None if alone else _compiled("create_block_mask"))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, grouped: bool) -> Tensor:
    """Attention of queries [B, heads, T, head] over keys and values [B, kv heads, K, head] under a block mask.

    On CUDA through a compiled kernel; on a CPU unfused, for comparison alone.
    """
    from torch.nn.attention.flex_attention import flex_attention

    device = q.device.type
    if torch.is_autocast_enabled(device):  # SDPA is on autocast's list, FlexAttention is not
        q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))
    run: Any = flex_attention
    if device == "cuda" and not torch.compiler.is_compiling():
        run = _compiled("flex_attention")
    out: Tensor = run(q, k, v, block_mask=mask, enable_gqa=grouped)
    return out


@cache
def _compiled(name: str) -> Any:
    """A function of ``torch.nn.attention.flex_attention``, compiled once a process."""
    from torch.nn.attention import flex_attention

    return torch.compile(getattr(flex_attention, name))
