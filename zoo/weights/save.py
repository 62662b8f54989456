"""Writing a checkpoint: recipe.json, model.safetensors and the tokenizer, all of them or none."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from zoo.errors import ConfigError, WeightsError
from zoo.recipe import Recipe

RECIPE, WEIGHTS, TOKENIZER, INSTRUCTION = "recipe.json", "model.safetensors", "tokenizer", "instruction"


def save(model: nn.Module, recipe: Recipe, folder: str | Path) -> Path:
    """Write a checkpoint that ``zoo.from_pretrained(folder)`` reads.

    Everything is written beside ``folder`` first and moved there in one rename; a checkpoint that stood there is
    replaced only then. Tensors that share storage (tied embeddings) are written once.

    Args:
        model: A wiring's model, or a LightningModule that holds it as ``.model``.

    Raises:
        WeightsError: The place cannot be written, or holds something that is no checkpoint.
    """
    network = (
        model.model if isinstance(getattr(model, "model", None), nn.Module) and hasattr(model, "recipe") else model
    )
    target = Path(folder).expanduser().absolute()
    _check_place(target)
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        temporary.chmod(0o777 & ~_umask())
        _write(network, recipe, temporary)
        _swap(temporary, target)
    except OSError as error:
        raise WeightsError(
            f"the checkpoint cannot be written to {str(target)!r} ({error.strerror or error}): "
            "free space, or choose another folder"
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


def save_merged(module: Any, folder: str | Path) -> Path:
    """Write a checkpoint without adapters: each adapted weight is ``W + (alpha / rank) B A`` (LoRA, section 4.1).

    Args:
        module: What ``zoo.build`` or ``zoo.from_pretrained`` returned, with adapters in some part.

    Raises:
        ConfigError: It has no adapters.
        WeightsError: As ``save``.
    """
    import torch

    from zoo.adapters import is_adapter, merged_state

    recipe: Recipe = module.recipe
    slots = {name.split(".")[0] for name in module.model.state_dict() if is_adapter(name)}
    if not slots:
        raise ConfigError(f"{recipe.name} has no adapters to merge: save it as it is")
    changes: dict[str, Any] = {slot: {"lora_rank": 0, "quantize": "none"} for slot in sorted(slots)}
    plain = recipe.with_(**changes)
    with torch.device("meta"):
        network: nn.Module = plain.wiring[1].build(plain.parts, 0)
    network.load_state_dict(merged_state(module.model), assign=True)
    if hasattr(type(network), "tokenizer"):
        setattr(network, "tokenizer", module.model.tokenizer)  # noqa: B010  what has a tokenizer takes one
    return save(network, plain, folder)


def _write(network: Any, recipe: Recipe, folder: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(unique(network.state_dict()), folder / WEIGHTS, metadata={"format": "pt"})
    except SafetensorError as error:  # how the library reports a full disk
        raise OSError(str(error)) from error
    if hasattr(network, "tokenizer"):
        network.tokenizer.save(folder / TOKENIZER)
    if getattr(network, "instruction_tokenizer", None) is not None:  # of a connector that reads the instruction
        network.instruction_tokenizer.save(folder / TOKENIZER / INSTRUCTION)
    (folder / RECIPE).write_text(json.dumps(recipe.to_plain(), indent=2) + "\n", encoding="utf-8")


def unique(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a state dict on the CPU, those that are one tensor under several names under the first name
    only."""
    seen: dict[tuple[Any, ...], str] = {}
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and seen.setdefault(place, name) != name:
            continue
        out[name] = tensor.detach().cpu().contiguous()
        if (
            out[name].untyped_storage().nbytes() != out[name].nbytes
        ):  # a view: written alone, not with what surrounds it
            out[name] = out[name].clone()
    return out


def _check_place(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise WeightsError(f"{str(target)!r} is a file: give a folder for the checkpoint")
    strange = sorted({p.name for p in target.iterdir()} - {RECIPE, WEIGHTS, TOKENIZER})
    if strange:
        raise WeightsError(
            f"{str(target)!r} holds {strange[0]!r}, which is no part of a checkpoint: give an own folder"
        )


def _swap(new: Path, target: Path) -> None:
    if not target.exists():
        new.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    old.rmdir()
    target.rename(old)
    try:
        new.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
