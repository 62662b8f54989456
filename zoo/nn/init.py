"""Initialisations that systems start a trunk with, beside the default one."""

from __future__ import annotations

import torch
from torch import nn

from zoo.errors import ConfigError
from zoo.nn.attention import Attention
from zoo.nn.block import FFN, Block
from zoo.nn.experts import Experts
from zoo.nn.trunk import Trunk


def start_std(width: int) -> float:
    """Standard deviation of the initial matrices: BERT's and ViT's 0.02, which suits their widths, and width^-1/2 below
    512, where branches of 0.02 would add almost nothing to learn from."""
    return 0.02 if width >= 512 else width**-0.5


@torch.no_grad()
def copy_expert_(trunk: Trunk, source: int, target: int) -> None:
    """Let the expert ``target`` start as the expert ``source`` in every routed unit that has both.

    The Q-Former's query FFN is copied from its text FFN, CogVLM's visual experts from the language model's weights.

    Raises:
        ConfigError: nothing is routed, or no unit has both experts.
    """
    copied = 0
    for module in trunk.modules():
        if isinstance(module, Experts) and max(source, target) < len(module):
            module[target].load_state_dict(module[source].state_dict())
            copied += 1
    if not copied:
        raise ConfigError(
            f"no routed unit of the trunk has the experts {source} and {target}; routed is {trunk.config.routed}"
        )


def share_(trunk: Trunk, of: Trunk, units: tuple[str, ...] = ("cross", "cross_norm", "ffn", "ffn_norm")) -> None:
    """Let every layer of ``trunk`` use the units of the same layer of ``of``: one module under two names.

    BLIP's decoder shares everything with its encoder but self-attention and its norm (arXiv 2201.12086, section 3.1).

    Raises:
        ConfigError: the trunks differ in depth or a unit is missing.
    """
    if len(trunk.layers) != len(of.layers):
        raise ConfigError(f"a trunk of {len(trunk.layers)} layers cannot share with one of {len(of.layers)}")
    for mine, other in zip(trunk.layers, of.layers, strict=True):
        for unit in units:
            if getattr(mine, unit, None) is None or getattr(other, unit, None) is None:
                raise ConfigError(f"no unit {unit!r} in both layers; the blocks are {trunk.config.layers}")
            setattr(mine, unit, getattr(other, unit))


@torch.no_grad()
def init_clip_(trunk: Trunk) -> None:
    """Standard deviations by width and depth, as the released CLIP text transformer and OpenCLIP towers start.

    q, k, v: width^-.5; attention output and the last FFN matrix: width^-.5·(2·depth)^-.5; the other FFN matrices:
    (2·width)^-.5 (openai/CLIP, model.py, initialize_parameters).
    """
    width, depth = trunk.config.width, trunk.config.depth
    into, out = width**-0.5, width**-0.5 * (2 * depth) ** -0.5
    for module in trunk.modules():
        if isinstance(module, Attention):
            for part, std in ((module.q, into), (module.k, into), (module.v, into), (module.out, out)):
                _normal(part, std)
        elif isinstance(module, FFN):
            _normal(module.up, (2 * width) ** -0.5)
            _normal(module.down, out)
            if module.gate is not None:
                _normal(module.gate, (2 * width) ** -0.5)


@torch.no_grad()
def init_xavier_(trunk: Trunk) -> None:
    """Xavier-uniform matrices and zero biases (ImageBind's trunks); a learned key/value starts xavier-normal."""
    for module in trunk.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, Block) and isinstance(module.attn, Attention) and module.attn.bias_k is not None:
            for parameter in (module.attn.bias_k, module.attn.bias_v):
                if parameter is not None:
                    nn.init.xavier_normal_(parameter.view(1, -1))


def _normal(part: nn.Module, std: float) -> None:
    for module in part.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=std)
