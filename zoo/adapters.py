"""Low-rank adapters (LoRA, arXiv 2106.09685) beside the linear maps of a part, made by peft in place."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import ConfigError, MissingExtra, near
from zoo.part import PartConfig
from zoo.torchvision_ops import ensure

NAME = "default"
"""What peft calls the one adapter of a layer."""

_ADAPTER = re.compile(r"(^|\.)lora_(A|B)(\.|$)")
_BASE = ".base_layer."


@dataclass(frozen=True, kw_only=True)
class AdapterFields(PartConfig):
    """Fields of a part that can be trained through LoRA.

    Attributes:
        lora_rank: Rank of the adapters; 0 = none. With adapters the part's own weights never learn.
        lora_alpha: The adapters' output is multiplied by ``lora_alpha / lora_rank``.
        lora_dropout: Dropout on the adapters' input while training.
        lora_targets: Names, or ends of names, of the linear maps with adapters; empty = all of them inside the blocks.
    """

    lora_rank: int = 0
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    lora_targets: list[str] = field(default_factory=list)

    def check_adapters(self) -> None:
        """Raise ValueError for values outside their range."""
        if self.lora_rank < 0 or self.lora_alpha <= 0 or not 0 <= self.lora_dropout < 1:
            raise ValueError(
                f"lora_rank = {self.lora_rank}, lora_alpha = {self.lora_alpha}, lora_dropout = {self.lora_dropout}:"
                " expected lora_rank >= 0, lora_alpha > 0 and 0 <= lora_dropout < 1"
            )


def add_adapters(module: nn.Module, config: AdapterFields) -> None:
    """Put adapters beside linear maps of ``module``, in place; nothing happens at rank 0.

    An adapted map computes ``W x + b + (alpha / rank) B A x`` with A [rank, in] drawn at random and B [out, rank]
    zero (section 4.1), so that at first nothing changes.

    Raises:
        MissingExtra: peft is not installed.
        ConfigError: A target that no linear map of ``module`` ends with.
    """
    if not config.lora_rank:
        return
    names = targets(module, config.lora_targets)
    ensure()  # peft imports transformers, which imports torchvision
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError as error:
        raise MissingExtra("peft", "lora", f"lora_rank = {config.lora_rank}") from error
    library = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # peft divides by it, whole or not
        lora_dropout=config.lora_dropout,
        target_modules=names,
        bias="none",
        fan_in_fan_out=any(type(module.get_submodule(name)).__name__ == "Conv1D" for name in names),
    )
    inject_adapter_in_model(library, module, adapter_name=NAME)


def targets(module: nn.Module, ends: list[str]) -> list[str]:
    """Full names of the linear maps that ``ends`` choose: those inside repeated blocks when it is empty.

    Raises:
        ConfigError: One of ``ends`` fits no linear map.
    """
    linear = [name for name, child in module.named_modules() if _is_linear(child)]
    if not ends:
        return [name for name in linear if any(step.isdigit() for step in name.split("."))]
    for end in ends:
        if not any(_ends(name, end) for name in linear):
            known = {name.rpartition(".")[2] for name in linear}
            raise ConfigError(f"lora_targets names {end!r}, which no linear map has{near(end, known)}")
    return [name for name in linear if any(_ends(name, end) for end in ends)]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # GPT-2's linear map, transposed


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith("." + end)


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is an adapter's."""
    return _ADAPTER.search(name) is not None


def adapted(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and layer of every adapted linear map inside ``module``."""
    for name, child in module.named_modules():
        if hasattr(child, "base_layer") and hasattr(child, "lora_A"):
            yield name, child


@torch.no_grad()
def merged_state(module: nn.Module) -> dict[str, Tensor]:
    """The ``state_dict`` that ``module`` would have without adapters, ``W + (alpha / rank) B A`` in place of W.

    Tensors that no adapter touches are the module's own, not copies.
    """
    state = dict(module.state_dict())
    for name, layer in adapted(module):
        key = f"{name}.base_layer.weight"
        state[key] = state[key] + layer.get_delta_weight(NAME).to(state[key])
    return {name.replace(_BASE, "."): t for name, t in state.items() if not is_adapter(name)}


def fit_names(state: Mapping[str, Tensor], own: Mapping[str, Any]) -> dict[str, Tensor]:
    """Names of a checkpoint without adapters as a model with adapters has them; others are left as they are."""
    renamed = {f"{name.replace(_BASE, '.')}": name for name in own if _BASE in name}
    return {renamed.get(name, name): tensor for name, tensor in state.items()}
