"""Resumable checkpoints on disk: shards written by torch.distributed.checkpoint as safetensors, and an index of JSON.

A checkpoint is a folder ``step-XXXXXXXX`` of one safetensors file or more a process and ``index.json``. The index is
written last, in a folder of another name; all files are synced, then the folder gets its name in one rename. The index
has every file's size and sha256, so that what a crash of the machine tore is found before anything of it is loaded.

The stock ``FileSystemWriter`` pickles its metadata, and reading that runs what it says. DCP's safetensors storage keeps
the place of each shard in the file's own header instead; values that are no tensors are in the index. Nothing is
pickled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.futures import Future

INDEX = "index.json"
FORMAT = 2
NAME = "step-{:08d}"
FILE_BYTES = 2 * 10**9
"""Tensors of about this size share a file: a file is put together in memory before it is written."""


class Damaged(Exception):
    """A checkpoint cannot be used; the message says what is wrong with it."""


class Writer(HuggingFaceStorageWriter):
    """Writes one checkpoint: every process its shards, the first one the index and the final name.

    Args:
        folder: Where the checkpoint will stand.
        values: What else the index holds.
        sizes: Bytes of every tensor, by name, equal on all processes.
        keep: How many checkpoints stay in the folder's parent, this one included.
    """

    def __init__(self, folder: Path, values: Mapping[str, Any], sizes: Mapping[str, int], keep: int) -> None:
        self.folder, self.values, self.keep = folder, dict(values), keep
        self.partial = folder.with_name(folder.name + ".partial")
        super().__init__(str(self.partial), fqn_to_index_mapping=files_of(sizes), save_distributed=True)

    def write_data(self, plan: Any, planner: Any) -> Any:
        written = super().write_data(plan, planner).wait()
        names = sorted({result.storage_data.relative_path for result in written})
        facts = {name: [(self.partial / name).stat().st_size, sha256(self.partial / name)] for name in names}
        done: Future[Any] = Future()
        done.set_result(
            [
                dataclasses.replace(result, storage_data=(name, facts[name]))
                for result in written
                if (name := result.storage_data.relative_path)
            ]
        )
        return done

    def finish(self, metadata: Any, results: Any) -> None:
        tensors = {
            name: [list(found.size), str(found.properties.dtype).removeprefix("torch.")]
            for name, found in metadata.state_dict_metadata.items()
        }
        files = dict(result.storage_data for of_rank in results for result in of_rank)
        index = {"format": FORMAT, "files": files, "tensors": tensors, **self.values}
        with (self.partial / INDEX).open("w", encoding="utf-8") as file:
            json.dump(index, file)
            file.flush()
            os.fsync(file.fileno())
        sync(self.partial)
        if self.folder.exists():  # a damaged one, which the run went back behind
            discard(self.folder)
        self.partial.rename(self.folder)
        sync(self.folder.parent)
        prune(self.folder.parent, self.keep)


def files_of(sizes: Mapping[str, int]) -> dict[str, int]:
    """Number of the file, from 1, that each tensor is in: as many in a row as come to ``FILE_BYTES``."""
    number, filled = 1, 0
    out = {}
    for name, size in sorted(sizes.items()):
        if filled and filled + size > FILE_BYTES:
            number, filled = number + 1, 0
        out[name] = number
        filled += size
    return out


def sync(folder: Path) -> None:
    """Let the names in a folder outlive a crash of the machine."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def discard(folder: Path) -> None:
    """Remove a checkpoint; one that is removed by half has no checkpoint's name."""
    doomed = folder.with_name(folder.name + ".removed")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def found(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the latest first."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if re.fullmatch(r"step-\d{8,}", p.name)), key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def prune(folder: Path, keep: int) -> None:
    """Leave the last ``keep`` checkpoints."""
    for path in found(folder)[keep:]:
        discard(path)


def clear_partial(folder: Path) -> None:
    """Remove what attempts before left behind half-written or half-removed; of one process, before any writes."""
    if folder.is_dir():
        for path in folder.glob("step-*.*"):
            shutil.rmtree(path, ignore_errors=True)


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a checkpoint.

    Raises:
        Damaged: There is none, or it is no index of this format.
    """
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise Damaged(f"it has no {INDEX}") from error
    except (OSError, ValueError) as error:
        raise Damaged(f"its {INDEX} cannot be read") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise Damaged(f"its {INDEX} is not of format {FORMAT}")
    if not {"files", "tensors", "state", "identity"} <= set(index):
        raise Damaged(f"its {INDEX} is not complete")
    strange = [name for name in index["files"] if not re.fullmatch(r"[\w.-]+\.safetensors", name)]
    if strange:
        raise Damaged(f"its {INDEX} names the file {strange[0]!r}")
    return index


def check_files(folder: Path, index: Mapping[str, Any], share: int = 0, shares: int = 1) -> None:
    """Compare the files with the index: sizes of all of them, checksums of every ``shares``-th from ``share`` on.

    Raises:
        Damaged: A file is missing, cut or changed.
    """
    for number, (name, (size, checksum)) in enumerate(sorted(index["files"].items())):
        path = folder / name
        if not path.is_file():
            raise Damaged(f"its file {name} is missing")
        if path.stat().st_size != size:
            raise Damaged(f"its file {name} has {path.stat().st_size} bytes in place of {size}")
        if number % shares == share and sha256(path) != checksum:
            raise Damaged(f"its file {name} has changed since it was written")


class Reader(HuggingFaceStorageReader):
    """Reads the shards; a tensor of no dimensions has no slice."""

    def _process_read_request(self, file: Any, request: Any, planner: Any) -> None:
        if len(request.lengths):
            super()._process_read_request(file, request, planner)
            return
        target = planner.resolve_tensor(request).detach()
        target.copy_(file.get_tensor(request.storage_index.fqn))
        planner.commit_tensor(request, target)


def load_into(folder: Path, targets: dict[str, Tensor], group: Any = None, several: bool = False) -> None:
    """Fill tensors, sharded ones too, in place; shards of any number of processes are put together as needed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled, unavailable or uninitialized.*")
        load(targets, storage_reader=Reader(str(folder)), process_group=group, no_dist=not several)


def empty(index: Mapping[str, Any], names: Iterable[str]) -> dict[str, Tensor]:
    """Tensors on the CPU to load ``names`` into."""
    return {name: torch.empty(index["tensors"][name][0], dtype=dtype(index["tensors"][name][1])) for name in names}


def dtype(name: str) -> torch.dtype:
    kind = getattr(torch, name, None)
    if not isinstance(kind, torch.dtype):
        raise Damaged(f"its {INDEX} names the dtype {name!r}")
    return kind


def save(
    folder: Path,
    state: Mapping[str, Any],
    values: Mapping[str, Any],
    *,
    keep: int,
    leave_out: Callable[[str], bool],
    group: Any = None,
    several: bool = False,
) -> Any:
    """Begin to write a checkpoint and return: the tensors are copied first, and what happens to them later is not in
    it.

    Args:
        state: Nested; tensors, numbers, strings, None.
        leave_out: Names of tensors that other processes write.
        group: A group of all processes that works on the CPU and is used by nothing else.

    Returns:
        A future, whose result raises what went wrong.
    """
    plain, tensors = split(state)
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    writer = Writer(folder, {**values, "state": plain}, sizes, keep)
    given = {name: tensor for name, tensor in tensors.items() if not leave_out(name)}
    return async_save(given, storage_writer=writer, process_group=group, no_dist=not several)


def split(state: Any) -> tuple[Any, dict[str, Tensor]]:
    """What JSON can say of a nested state, and its tensors by the names that stand in their places.

    Tied tensors get one name. A mapping whose keys are no strings and a tuple are marked, so that ``join`` makes them
    again.

    Raises:
        TypeError: A value is of another kind.
    """
    tensors: dict[str, Tensor] = {}
    seen: dict[Any, str] = {}

    def walk(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            name = path
            if value.numel() and not hasattr(value, "placements"):
                place = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)
                name = seen.setdefault(place, path)
            tensors[name] = tensors.get(name, value)
            return {"$tensor": name}
        if isinstance(value, Mapping):
            if all(isinstance(key, str) and not key.startswith("$") for key in value):
                return {key: walk(item, f"{path}/{key}" if path else key) for key, item in value.items()}
            return {"$items": [[walk(key, path), walk(item, f"{path}/{key}")] for key, item in value.items()]}
        if isinstance(value, tuple):
            return {"$tuple": [walk(item, f"{path}/{i}") for i, item in enumerate(value)]}
        if isinstance(value, list):
            return [walk(item, f"{path}/{i}") for i, item in enumerate(value)]
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise TypeError(f"a checkpoint cannot hold {path}, a {type(value).__name__}")

    return walk(state, ""), tensors


def names_in(plain: Any) -> list[str]:
    """Names of the tensors of what ``split`` returned."""
    if isinstance(plain, dict):
        if "$tensor" in plain:
            return [plain["$tensor"]]
        return [name for item in plain.values() for name in names_in(item)]
    return [name for item in plain for name in names_in(item)] if isinstance(plain, list) else []


def join(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The state that ``split`` took apart."""
    if isinstance(plain, dict):
        if "$tensor" in plain:
            return tensors[plain["$tensor"]]
        if "$tuple" in plain:
            return tuple(join(item, tensors) for item in plain["$tuple"])
        if "$items" in plain:
            return {join(key, tensors): join(item, tensors) for key, item in plain["$items"]}
        return {key: join(item, tensors) for key, item in plain.items()}
    return [join(item, tensors) for item in plain] if isinstance(plain, list) else plain
