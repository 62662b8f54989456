"""Reading weight files without running anything that is in them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.errors import WeightsError

State = dict[str, Tensor]

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_FILE = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)/([\w./-]+\.(?:safetensors|bin|pt|pth|ckpt))")
"""A file of a hub repository: its id, a slash and the file's path in it."""

PICKLED = "pytorch_model.bin"
"""The one pickled file that is had from the hub, where a repository has no safetensors."""

WANTED = ["*.json", "*.safetensors", "*.txt", "*.model"]


def locate(source: str | Path) -> Path:
    """The local file or folder of ``source``, downloading a hub id (safetensors and text files; ``pytorch_model.bin``
    where there are none) or one file of it (``owner/name/path/to/file.pt``). Nothing of it is run.

    Raises:
        WeightsError: Nothing is there, or the hub cannot be reached.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    file = HUB_FILE.fullmatch(str(source))
    if file is None and not HUB_ID.fullmatch(str(source)):
        raise WeightsError(f"there is no folder or file {str(source)!r}, and it is no hub id (owner/name)")
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        if file is not None:
            return Path(hf_hub_download(file[1], file[2]))
        folder = Path(snapshot_download(str(source), allow_patterns=WANTED))
        if not list(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(str(source), allow_patterns=[*WANTED, PICKLED]))
        return folder
    except (OSError, ValueError, RuntimeError) as error:  # the hub's and the connection's errors are kinds of these
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WeightsError(
            f"{str(source)!r} is no local folder and could not be had from the hub ({type(error).__name__}: {reason}); "
            "check the name and the network, or give a downloaded folder"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        WeightsError: The file is unreadable, damaged, or no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path.name} of {str(path.parent)!r} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path.name} of {str(path.parent)!r} is no JSON object")
    return content


STEMS = ("open_clip_model", "open_clip_pytorch_model", "model", "diffusion_pytorch_model", "pytorch_model")
"""How weight files in folders of other libraries are called."""


def stem_of(folder: Path) -> str:
    """The first of ``STEMS`` that the folder has as safetensors; where it has none, open_clip's or ``model``."""
    missing = "open_clip_model" if (folder / "open_clip_config.json").is_file() else "model"
    return next((stem for stem in STEMS if list(folder.glob(f"{stem}.safetensors*"))), missing)


def read_folder(folder: Path, stem: str = "model", *, pickled: bool = False) -> State:
    """The tensors of ``STEM.safetensors``, or of the shards that ``STEM.safetensors.index.json`` lists.

    Args:
        pickled: Read ``pytorch_model.bin``, or the shards of its index, where there is neither, as files of tensors and
            nothing else.

    Raises:
        WeightsError: No such file (a pickled one is named, and why it is not read), or it is damaged.
    """
    whole, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if whole.is_file():
        return read_file(whole)
    if index.is_file():
        return _read_shards(folder, index)
    if pickled and (folder / PICKLED).is_file():
        return read_file(folder / PICKLED)
    if pickled and (folder / f"{PICKLED}.index.json").is_file():
        return _read_shards(folder, folder / f"{PICKLED}.index.json")
    others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    hint = (
        f"; {others[0]} is there: give that file by its path with model=..., or convert it to safetensors"
        if others
        else ""
    )
    raise WeightsError(f"{str(folder)!r} has no {whole.name}{hint}")


def _read_shards(folder: Path, index: Path) -> State:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise WeightsError(f"{index.name} of {str(folder)!r} lists no tensors")
    state: State = {}
    for shard in sorted(set(map(str, places.values()))):
        if Path(shard).name != shard:
            raise WeightsError(f"{index.name} of {str(folder)!r} names a file outside the folder: {shard!r}")
        if not (folder / shard).is_file():
            raise WeightsError(f"{str(folder)!r} lacks the shard {shard}: download it again")
        state |= read_file(folder / shard)
    lost = sorted(set(places) - set(state))
    if lost:
        raise WeightsError(f"{str(folder)!r}: the shards lack {lost[0]}, which {index.name} lists")
    return state


def read_file(path: Path) -> State:
    """The tensors of one file: safetensors, or a torch file that holds tensors and nothing else.

    Raises:
        WeightsError: Damaged, unsafe, or of an unknown kind.
    """
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        return _read_torch(path)
    raise WeightsError(f"{path.name} is no weight file: expected .safetensors, .bin, .pt or .pth")


def _read_safetensors(path: Path) -> State:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{str(path)!r} is truncated or damaged ({error}): copy it again") from error


def _read_torch(path: Path) -> State:
    import argparse
    import pickle

    try:
        # a namespace of command-line arguments, which training scripts keep beside the weights, holds data only
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "Unsupported" in line or "GLOBAL" in line), "")
        raise WeightsError(
            f"{str(path)!r} is refused: it is a pickle with more than tensors in it, and could run code "
            f"({reason.strip() or 'not loadable with weights_only'}); convert it to safetensors where you trust it"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"{str(path)!r} is truncated, damaged, or a TorchScript archive ({reason})") from error
    while isinstance(content, Mapping):
        inner = next(
            (content[k] for k in ("state_dict", "model", "module", "ema") if isinstance(content.get(k), Mapping)), None
        )
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping) or not content:
        raise WeightsError(f"{str(path)!r} holds no state dict")
    strange = [str(k) for k, v in content.items() if not isinstance(v, Tensor)]
    state = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    if not state:
        raise WeightsError(f"{str(path)!r} holds no tensors, but {', '.join(strange[:3])}")
    if all(name.startswith("module.") for name in state):  # saved from a DistributedDataParallel wrapper
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return state
