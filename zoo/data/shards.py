"""Samples in tar shards (WebDataset), read by their place: any order, any number of readers, any resume."""

from __future__ import annotations

import json
import os
import tarfile
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from zoo.data.image_files import check_fractions, near_path, split_of
from zoo.data.order import Order
from zoo.data.sample import SPLITS, BadSample, Sample, SourceConfig, check_split, stable_hash
from zoo.data.shard_samples import key_of, read_members, sample_of
from zoo.data.window import WindowOrder
from zoo.errors import ConfigError, DataError

LIST = "shards.json"
"""Beside shards that the zoo packed: what they are, their checksums."""
FORMAT = 1
OPEN_FILES = 64
"""Shards that a process keeps open."""


@dataclass(frozen=True, kw_only=True)
class ShardsConfig(SourceConfig):
    """Tar shards below ``root``: those of ``zoo data pack``, with splits, ids and an index of their own; or
    WebDataset's from elsewhere, whose files are listed once and remembered in the zoo's cache folder.

    Of shards from elsewhere, files named ``train*``, ``val*`` or ``test*`` are that split; without such names
    ``val_fraction`` and ``test_fraction`` of the samples are held out by a hash of their keys. ``window`` makes reading
    of training nearly sequential, for discs and file systems that are slow at jumps: shards are shuffled, and samples
    only among as many shards as it says; 0 shuffles all samples. ``verify`` reads all shards once and compares
    checksums before anything else. Up to ``max_bad`` samples that cannot be read are logged and skipped; images of more
    than ``max_pixels`` are refused.
    """

    kind: ClassVar[str] = "shards"
    root: str = ""
    window: int = 0
    verify: bool = False
    val_fraction: float = 0.05
    test_fraction: float = 0.1
    max_bad: int = 10
    max_pixels: int = 50_000_000

    def open(self, image_size: int | None) -> Shards:
        return Shards(self)


@dataclass(frozen=True)
class Shard:
    """One tar: where each sample's files begin and end, in bytes."""

    path: Path
    split: str | None
    ids: tuple[str, ...]
    places: NDArray[np.int64]  # [n, 2]


class Shards:
    """See :class:`ShardsConfig`. Opening reads the indexes, no image.

    Raises:
        ConfigError: no ``root``, or values out of range.
        DataError: a missing folder, no shards in it, an index that does not fit its shard, or (``verify``) a checksum
            that is wrong; the message names the shard.
    """

    def __init__(self, config: ShardsConfig) -> None:
        if not config.root:
            raise ConfigError("the source shards needs root, the folder that holds the shards: data.root=PATH")
        if config.window < 0:
            raise ConfigError(f"window = {config.window} must be 0 (shuffle everything) or a number of shards")
        check_fractions(config.val_fraction, config.test_fraction)
        self.config = config
        self.max_bad = config.max_bad
        self.root = Path(config.root).expanduser()
        if not self.root.is_dir():
            raise DataError(
                f"the folder of shards {str(self.root)!r} does not exist{near_path(self.root)}; set data.root"
            )
        self.packed = _read_list(self.root / LIST)
        self.name = str(self.packed["name"]) if self.packed else "shards"
        self.licence = str(self.packed["licence"]) if self.packed else "as given by the owner of the images"
        self._shards = list(self._open_packed() if self.packed else self._open_foreign())
        if not any(len(shard.ids) for shard in self._shards):
            raise DataError(f"no samples in the shards of {str(self.root)!r}: expected .tar files, or zoo data pack")
        if config.verify:
            self._verify()
        marks = [(shard.path.name, len(shard.ids), shard.path.stat().st_size) for shard in self._shards]
        self.version = str(self.packed["version"]) if self.packed else f"{stable_hash(*map(str, marks)):016x}"
        if config.window:
            self.order = self._order
        self._files: OrderedDict[int, int] = OrderedDict()
        self._owner = os.getpid()

    # -- lists -----------------------------------------------------------------------------------------------------

    def _open_packed(self) -> Iterator[Shard]:
        assert self.packed is not None
        for entry in self.packed["shards"]:
            path = self.root / Path(str(entry["file"])).name
            if not path.is_file():
                raise DataError(f"the shard {path.name} of {str(self.root)!r} is missing: run zoo data pack again")
            if path.stat().st_size != entry["bytes"]:
                raise DataError(
                    f"the shard {path.name} has {path.stat().st_size} bytes and should have {entry['bytes']}: it is cut"
                    " short or another file; copy it again, or delete it and run zoo data pack again"
                )
            ids, places = read_index(path)
            if len(ids) != entry["samples"]:
                raise DataError(f"the index of {path.name} lists {len(ids)} samples, expected {entry['samples']}")
            yield Shard(path, str(entry["split"]), ids, places)

    def _open_foreign(self) -> Iterator[Shard]:
        from zoo.data.shard_index import listed

        for path in sorted(self.root.rglob("*.tar")):
            split = next((name for name in SPLITS if path.name.lower().startswith(name)), None)
            keys, places = listed(path)
            stem = path.relative_to(self.root).with_suffix("").as_posix()
            yield Shard(path, split, tuple(f"{stem}/{key}" for key in keys), places)

    def _verify(self) -> None:
        if self.packed is None:
            raise ConfigError("verify needs checksums, which only shards of zoo data pack have: data.verify=false")
        for entry, shard in zip(self.packed["shards"], self._shards, strict=True):
            if checksum(shard.path) != entry["sha256"]:
                raise DataError(f"the shard {shard.path.name} is damaged (its checksum is another): copy it again")

    @cached_property
    def _splits(self) -> dict[str, list[str]]:
        named = any(shard.split for shard in self._shards)
        out: dict[str, list[str]] = {split: [] for split in SPLITS}
        for shard in self._shards:
            if named:
                out[shard.split or "train"] += shard.ids
            else:
                for id in shard.ids:
                    out[split_of(id, self.config.val_fraction, self.config.test_fraction)].append(id)
        return out

    @cached_property
    def _where(self) -> dict[str, int]:
        """Id -> shard * 2^32 + row: one number a sample, since there may be many."""
        return {id: (n << 32) + row for n, shard in enumerate(self._shards) for row, id in enumerate(shard.ids)}

    # -- the source ------------------------------------------------------------------------------------------------

    def ids(self, split: str) -> list[str]:
        check_split(split)
        return self._splits[split]

    def sample(self, id: str) -> Sample:
        if id not in self._where:
            raise BadSample(id, "no shard has it")
        number, row = divmod(self._where[id], 1 << 32)
        shard = self._shards[number]
        start, stop = (int(place) for place in shard.places[row])
        data = os.pread(self._file(number), stop - start, start)
        if len(data) < stop - start:
            raise BadSample(id, f"the shard {shard.path.name} ends before it")
        try:
            found = sample_of(read_members(data, id), id, self.config.max_pixels)
        except BadSample as error:
            raise BadSample(id, f"{error.reason}, in the shard {shard.path.name}") from None
        if self.packed is not None and found.id != id:
            raise BadSample(id, f"the shard {shard.path.name} has {found.id!r} in its place")
        return found

    def _order(self, split: str, seed: int) -> Order:
        rows = {id: n for n, id in enumerate(self.ids(split))}
        blocks = [[rows[id] for id in shard.ids if id in rows] for shard in self._shards]
        return WindowOrder(self.ids(split), seed, [np.array(b) for b in blocks if b], self.config.window)

    def _file(self, number: int) -> int:
        """The open file of a shard in this process: forked readers must not share what they read from."""
        if self._owner != os.getpid():
            self._files, self._owner = OrderedDict(), os.getpid()
        if number in self._files:
            self._files.move_to_end(number)
            return self._files[number]
        if len(self._files) >= OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        self._files[number] = os.open(self._shards[number].path, os.O_RDONLY)
        return self._files[number]

    def __getstate__(self) -> dict[str, Any]:
        return {"config": replace(self.config, verify=False)}  # once is enough, not in every worker

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["config"])  # type: ignore[misc]


def index_path(shard: Path) -> Path:
    return shard.with_suffix(".index.npz")


def write_index(path: Path, ids: list[str], places: list[tuple[int, int]]) -> None:
    """Write the index of a shard, whole or not at all."""
    partial = path.with_name(path.name + ".partial.npz")
    text = np.frombuffer("\n".join(json.dumps(id) for id in ids).encode(), np.uint8)
    np.savez_compressed(partial, ids=text, places=np.array(places, np.int64).reshape(-1, 2))
    partial.replace(path)


def read_index(shard: Path) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Ids and places [n, 2] of the samples of a packed shard.

    Raises:
        DataError: there is no index, or it cannot be read.
    """
    try:
        with np.load(index_path(shard), allow_pickle=False) as found:
            text = found["ids"].tobytes().decode()
            return tuple(json.loads(line) for line in text.splitlines()), found["places"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"the index of the shard {shard.name} cannot be read ({error}): delete the shard and pack again"
        ) from None


def scan(path: Path) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Keys and places [n, 2] of the samples of any tar, from its headers.

    Raises:
        DataError: it is no tar, or compressed.
    """
    keys: list[str] = []
    places: list[tuple[int, int]] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                key = key_of(member.name)[0]
                stop = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if keys and keys[-1] == key:
                    places[-1] = (places[-1][0], stop)
                else:
                    keys.append(key)
                    places.append((member.offset, stop))
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"the shard {path.name} cannot be read ({error}): expected an uncompressed tar") from None
    if len(set(keys)) != len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise DataError(f"the shard {path.name} has the files of {twice!r} in two places: sort it by name")
    return tuple(keys), np.array(places, np.int64).reshape(-1, 2)


def checksum(path: Path) -> str:
    """The sha256 of a file, hex."""
    import hashlib

    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read_list(path: Path) -> dict[str, Any] | None:
    """What ``zoo data pack`` wrote; None where nothing was."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        assert found["format"] == FORMAT
        assert {"name", "version", "licence", "shards"} <= set(found)
    except (OSError, ValueError, KeyError, AssertionError, TypeError) as error:
        raise DataError(f"{path} is no list of shards of this version ({error}): run zoo data pack again") from None
    result: dict[str, Any] = found
    return result
