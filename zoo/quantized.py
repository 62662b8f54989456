"""Frozen linear maps held in 8 or 4 bits by bitsandbytes (arXiv 2208.07339; NF4: arXiv 2305.14314, section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoo.adapters import targets
from zoo.errors import ConfigError, MissingExtra, near
from zoo.part import PartConfig

KINDS = ("none", "int8", "nf4")

_HELD = ("Int8Params", "Params4bit")
"""Classes of bitsandbytes for parameters that become integers on an accelerator."""


@dataclass(frozen=True, kw_only=True)
class QuantizeFields(PartConfig):
    """Fields of a part whose frozen weights can be held in fewer bits.

    Attributes:
        quantize: ``none``, ``int8`` or ``nf4``: how the linear maps of the blocks are held on a CUDA device. They
            cannot learn; adapters beside them can (QLoRA).
    """

    quantize: str = "none"

    def check_quantize(self) -> None:
        """Raise ValueError for an unknown kind."""
        if self.quantize not in KINDS:
            raise ValueError(f"quantize = {self.quantize!r}{near(self.quantize, KINDS)}")


def quantize(module: nn.Module, config: QuantizeFields) -> None:
    """Exchange the linear maps of the blocks of ``module``, in place, for ones that quantise when moved to the device.

    Until then, and in every ``state_dict``, their weights are ordinary ones, so that checkpoints load and are saved as
    without quantisation. On the meta device nothing is exchanged: the shapes are the same.

    Raises:
        ConfigError: No CUDA device, or no linear map that bitsandbytes knows.
        MissingExtra: bitsandbytes is not installed.
    """
    if config.quantize == "none" or torch.get_default_device().type == "meta":
        return
    if not torch.cuda.is_available():
        raise ConfigError(
            f"quantize = {config.quantize!r} needs a CUDA device, and torch sees none: leave it at none, or run where"
            " there is one"
        )
    exchange(module, config.quantize)


def exchange(module: nn.Module, kind: str) -> None:
    """``quantize`` wherever bitsandbytes runs."""
    try:
        import bitsandbytes  # type: ignore[import-not-found,unused-ignore]  # an extra
    except ModuleNotFoundError as error:
        raise MissingExtra("bitsandbytes", "quantized", f"quantize = {kind!r}") from error
    names = [name for name in targets(module, []) if isinstance(module.get_submodule(name), nn.Linear)]
    if not names:
        raise ConfigError(
            f"quantize = {kind!r}: {type(module).__name__} has no nn.Linear in its blocks; set it to none"
        )
    for name in names:
        old: Any = module.get_submodule(name)
        bias = old.bias is not None
        new: Any
        if kind == "nf4":
            new = bitsandbytes.nn.Linear4bit(old.in_features, old.out_features, bias, quant_type="nf4")
        else:
            new = bitsandbytes.nn.Linear8bitLt(old.in_features, old.out_features, bias, has_fp16_weights=False)
        new.load_state_dict(old.state_dict())
        new.requires_grad_(False)
        new.register_state_dict_post_hook(_save_plain)
        new.register_load_state_dict_pre_hook(_load_plain)
        module.set_submodule(name, new)


def is_quantized(parameter: Tensor) -> bool:
    """Whether a parameter is, or will be on the device, held in fewer bits."""
    return type(parameter).__name__ in _HELD


def dequantized(layer: Any) -> Tensor:
    """The weight [out, in] that a quantised layer computes with, as floating point; before it has moved, its weight."""
    weight: Any = layer.weight
    plain: Tensor
    if weight.is_floating_point():
        plain = weight.detach()
        return plain
    from bitsandbytes import functional  # type: ignore[import-not-found,unused-ignore]

    if type(weight).__name__ == "Params4bit":
        plain = functional.dequantize_4bit(weight.data, weight.quant_state)
    else:
        scale = weight.SCB if weight.SCB is not None else layer.state.SCB  # the first forward pass moves it
        plain = functional.int8_vectorwise_dequant(weight.data, scale)
    return plain


def _save_plain(layer: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """What the quantised form needs beside the weight stays out of checkpoints: it follows from the weight."""
    for name in [n for n in state if n.startswith((f"{prefix}weight.", f"{prefix}SCB", f"{prefix}weight_format"))]:
        del state[name]
    state[f"{prefix}weight"] = dequantized(layer)


def _load_plain(layer: Any, state: dict[str, Any], prefix: str, *unused: Any) -> None:
    """Quantise an ordinary weight where the layer's own is quantised already: a run that is resumed."""
    name = f"{prefix}weight"
    given, own = state.get(name), layer.weight
    if given is None or own.is_floating_point() or not given.is_floating_point():
        return
    kind = type(own)
    more: Mapping[str, Any] = {"quant_type": "nf4"} if kind.__name__ == "Params4bit" else {"has_fp16_weights": False}
    layer.weight = kind(given.detach().clone().cpu(), requires_grad=False, **more).to(own.device)
    state[name] = layer.weight.data
