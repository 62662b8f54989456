"""Outputs of a frozen encoder or image tokenizer kept on disk: computed once for an image, read by every run that sees
it again.

A *set* is a folder for one (encoder's weights and configuration, image transform, source, precision), named by the
hash of that. It holds

    about.json    what the set is of; its time of change is when the set was last opened
    tokens.bin    the tokens (codes, latents) of an image a row, all rows of one size; longer than what is written: room
                  is reserved
    index.bin     24 bytes a row, in the same order: 16 of the image's key, 4 of the row's CRC-32, 4 that are zero

A row is written first and its index record after it, so that a process killed at any moment leaves whole rows and
perhaps bytes that no record speaks of, which the next writer overwrites. Rows never change once they have a record, so
that readers need no lock. A row's checksum is looked at when a process reads it first.

Locks are ``flock`` on files beside the sets, which end with the process that holds them: NAME.fill is held by the one
process that computes (others wait for its rows), NAME.use is shared by all that read a set (a set in use is not
removed), and size.lock guards the sum of all sets' sizes.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
import os
import shutil
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zoo.data.images import ImageTransform
from zoo.data.processor import images_of
from zoo.data.sample import Sample
from zoo.errors import ConfigError, DataError, RunError

if TYPE_CHECKING:
    from zoo.data.processor import Processor

RECORD = [("key", "V16"), ("crc", "<u4"), ("zero", "<u4")]
RECORD_BYTES = 24
GB = 10**9


class FeatureStore:
    """One set: rows of one shape and dtype by key: tokens [n, D], codes [n], latents [C, h, w].

    Args:
        root: Folder of all sets.
        about: JSON-like description of everything that decides the rows; equal descriptions share a set.
        shape: Of a row.
        dtype: Of the rows on disk.

    Raises:
        ConfigError: The system has no ``flock``.
        RunError: The folder cannot be written.
    """

    def __init__(self, root: Path, about: Mapping[str, Any], shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.root = root
        self.about = {**about, "shape": list(shape), "stored": str(dtype).removeprefix("torch.")}
        text = json.dumps(self.about, sort_keys=True, separators=(",", ":"))
        self.name = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.folder = root / self.name
        self.shape = shape
        self.dtype = dtype
        self.row_bytes = math.prod(shape) * dtype.itemsize
        self._rows: dict[bytes, int] = {}
        self._crc: NDArray[np.uint32] = np.empty(0, np.uint32)
        self._checked: NDArray[np.bool_] = np.empty(0, np.bool_)
        self._map: NDArray[np.uint8] | None = None
        try:
            root.mkdir(parents=True, exist_ok=True)
            self._use: IO[bytes] | None = _lock(root / f"{self.name}.use", shared=True)
            self.folder.mkdir(exist_ok=True)
            for name in ("tokens.bin", "index.bin"):
                (self.folder / name).touch()
            partial = self.folder / f"about.{uuid.uuid4().hex}.partial"
            partial.write_text(json.dumps(self.about, indent=1), encoding="utf-8")
            os.replace(partial, self.folder / "about.json")
        except OSError as error:
            raise _unwritable(root, error) from error
        self.refresh()

    def close(self) -> None:
        """Let the set be removed for another one's sake."""
        self._map = None
        if self._use is not None:
            self._use.close()
            self._use = None

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, key: bytes) -> bool:
        return key in self._rows

    def row(self, key: bytes) -> int | None:
        """The row of a key; None where there is none."""
        return self._rows.get(key)

    def refresh(self) -> None:
        """See what other processes have added."""
        with (self.folder / "index.bin").open("rb") as file:
            file.seek(len(self._crc) * RECORD_BYTES)
            raw = file.read()
        new = np.frombuffer(
            raw[: len(raw) // RECORD_BYTES * RECORD_BYTES], np.dtype(RECORD)
        )  # a torn record is left out
        whole = (self.folder / "tokens.bin").stat().st_size // self.row_bytes
        new = new[: max(0, whole - len(self._crc))]
        for number, key in enumerate(new["key"].tolist(), len(self._crc)):
            self._rows[key] = number
        self._crc = np.concatenate([self._crc, new["crc"]])
        self._checked = np.concatenate([self._checked, np.zeros(len(new), np.bool_)])
        self._map = None

    # -- writing ---------------------------------------------------------------------------------------------------

    @contextmanager
    def filling(self, waiting: Callable[[], None] | None = None) -> Iterator[None]:
        """Be the one process that adds to the set; waits for another that does, and then knows its rows.

        Args:
            waiting: Called where there is one to wait for.
        """
        path = self.root / f"{self.name}.fill"
        try:
            lock = _lock(path, wait=False)
        except BlockingIOError:
            if waiting is not None:
                waiting()
            lock = _lock(path)
        with lock:
            self.refresh()
            yield

    def reserve(self, rows: int, limit: int) -> None:
        """Make room for ``rows`` more, removing the sets that were used least recently and by no running process.

        Args:
            limit: Bytes that all sets together may take.

        Raises:
            ConfigError: The set alone would be larger than ``limit``, or the others are in use.
            RunError: The disk has no room.
        """
        size = (len(self._crc) + rows) * self.row_bytes
        if size > limit:
            raise ConfigError(
                f"the cached features of {len(self._crc) + rows} images take {size / GB:.3g} GB, more than"
                f" trainer.cache_max_gb = {limit / GB:.3g}: raise it, or leave trainer.cache_features off"
            )
        tokens = self.folder / "tokens.bin"
        with _lock(self.root / "size.lock"):
            others = sorted((p for p in self.root.iterdir() if _is_set(p) and p != self.folder), key=_last_used)
            taken = sum(map(_bytes_of, others))
            for other in others:
                if taken + size <= limit:
                    break
                freed = _bytes_of(other)
                taken -= freed if _remove(other) else 0
            if taken + size > limit:
                raise ConfigError(
                    f"the feature caches that other runs are using take {taken / GB:.3g} GB and this one needs"
                    f" {size / GB:.3g}: raise trainer.cache_max_gb = {limit / GB:.3g}, or run one after the other"
                )
            now = tokens.stat().st_size
            free = shutil.disk_usage(self.root).free
            if size - len(self._crc) * self.row_bytes > free:  # reserved room is a hole that takes no disk yet
                raise RunError(f"{self.root} has {free / GB:.3g} GB free, the cached features need {size / GB:.3g} GB")
            if size > now:
                os.truncate(tokens, size)

    def append(self, keys: Sequence[bytes], rows: Tensor) -> None:
        """Add rows [N, *shape]; call it inside ``filling``. Keys that are there already are left as they are.

        Raises:
            RunError: The disk is full; what was added before stays.
        """
        fresh = [i for i, key in enumerate(keys) if key not in self._rows]
        if not fresh:
            return
        data = rows[fresh].detach().to("cpu", self.dtype).contiguous().view(torch.uint8)
        plain = data.reshape(len(fresh), self.row_bytes).numpy()
        records = np.zeros(len(fresh), np.dtype(RECORD))
        for place, i in enumerate(fresh):
            records[place] = (keys[i], zlib.crc32(plain[place]), 0)
        start = len(self._crc)
        try:
            with (self.folder / "tokens.bin").open("r+b") as file:
                file.seek(start * self.row_bytes)
                file.write(plain.tobytes())
            with (self.folder / "index.bin").open("r+b") as file:  # after the rows are written and closed
                file.seek(start * RECORD_BYTES)
                file.write(records.tobytes())
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        self.refresh()

    # -- reading ---------------------------------------------------------------------------------------------------

    def read(self, rows: Sequence[int]) -> Tensor:
        """The rows [N, *shape] in the dtype they are stored in; -1 gives zeros.

        Raises:
            DataError: A row's bytes are not those that were written.
        """
        index = np.asarray(rows, np.int64)
        if self._map is None:
            size = len(self._crc) * self.row_bytes
            path = self.folder / "tokens.bin"
            flat: Any = np.memmap(path, np.uint8, "r", shape=(size,)) if size else np.empty(0, np.uint8)
            self._map = flat.reshape(len(self._crc), self.row_bytes)
        out = np.zeros((len(index), self.row_bytes), np.uint8)
        if (index < 0).any():
            out[index >= 0] = self._map[index[index >= 0]]
        else:
            np.take(self._map, index, axis=0, out=out, mode="clip")
        for place, row in enumerate(index.tolist()):
            if row >= 0 and not self._checked[row]:
                if zlib.crc32(out[place]) != self._crc[row]:
                    raise DataError(
                        f"the cached features in {self.folder} are damaged: delete the folder and run again"
                    )
                self._checked[row] = True
        return torch.from_numpy(out).view(self.dtype).view(len(index), *self.shape)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_map": None, "_use": None}  # a worker maps the file itself; its parent holds the lock


@dataclass(frozen=True)
class CachedImage:
    """Stands in a sample for an image whose tokens are in row ``row`` of a store."""

    row: int


class RowTransform:
    """Stands for a processor's image transform: "pixels" [N, 3, 1, 1] that are the numbers of rows."""

    size = 1
    _BASE = 1 << 20  # float32 holds whole numbers up to 2**24

    def __call__(self, images: Sequence[Any], keys: Any = None) -> Tensor:
        rows = [image.row for image in images]
        values = [[row // self._BASE + 1, row % self._BASE, 0] for row in rows]
        return torch.tensor(values, dtype=torch.float32).view(len(rows), 3, 1, 1)

    def rows(self, pixels: Tensor) -> list[int]:
        """The numbers again; -1 where a processor put zeros for an image that is not there."""
        high, low = (pixels[:, channel, 0, 0].round().long() for channel in (0, 1))
        return ((high - 1) * self._BASE + low).masked_fill(high == 0, -1).tolist()


def image_transform(processor: Any) -> ImageTransform:
    """The image transform of a processor, or of one that it is made of.

    Raises:
        ConfigError: It has none.
    """
    for value in vars(processor).values():
        if isinstance(value, ImageTransform):
            return value
    for value in vars(processor).values():
        if isinstance(getattr(value, "transform", None), ImageTransform):
            return image_transform(value)
    raise ConfigError(f"{type(processor).__name__} has no image transform to cache after: leave cache_features off")


class CachedFeatures:
    """What the loader reads of a store: batches with ``image_tokens`` [N, n, D] in place of ``pixel_values``, or what
    ``name`` says.

    Processors handle images through their transform alone, so that one which handles row numbers leaves everything
    else about a batch as it is.

    Args:
        dtype: Of ``image_tokens``: what the encoder returned, however it is stored.
        name: What the batch calls them: ``image_tokens``, ``image_codes``, ``image_latents``.
        stamp: Id -> the state of its image's file, where the source knows one (``image_stamp``).
        drawn: Places of the order that the run's steps draw; what the loader prepares beyond them is never looked at,
            and gets zeros where the store has no row.
    """

    def __init__(
        self,
        store: FeatureStore,
        dtype: torch.dtype,
        stamp: Callable[[str], str] | None = None,
        drawn: int | None = None,
        name: str = "image_tokens",
    ) -> None:
        self.store = store
        self.name = name
        self.dtype = dtype
        self.transform = RowTransform()
        self.stamp = stamp
        self.drawn = drawn

    def key(self, id: str, place: int = 0) -> bytes:
        """16 bytes for an image of a sample: its id, its place among the sample's images, and its file's state."""
        stamp = "" if self.stamp is None else self.stamp(id)
        return hashlib.blake2b(f"{id}\0{place}\0{stamp}".encode(), digest_size=16).digest()

    def knows(self, id: str) -> bool:
        """Whether the images of a sample are in the store; the first one is written last."""
        return self.key(id) in self.store

    def count(self, id: str) -> int:
        """How many images of a sample are in the store."""
        return next(place for place in itertools.count() if self.key(id, place) not in self.store)

    def mark(self, sample: Sample, known: bool = False, place: int = 0) -> Sample:
        """The sample with rows for images.

        Args:
            known: The sample was read without its image, which is in the store.
            place: Where in the order the sample was drawn.

        Raises:
            DataError: An image is not in the store.
        """
        count = max(1, self.count(sample.id)) if known else len(images_of(sample))
        rows = [self.store.row(self.key(sample.id, image)) for image in range(count)]
        if self.drawn is not None and place >= self.drawn:
            rows = [-1 if row is None else row for row in rows]
        if None in rows:
            raise DataError(
                f"the features of sample {sample.id!r} are not in {self.store.folder}: run again to add them"
            )
        marks = [CachedImage(row) for row in rows if row is not None]
        return with_images(sample, marks)

    def over(self, processor: Processor) -> Processor:
        """A processor that puts row numbers where ``processor``, or one that it is made of, puts pixels."""
        other: Any = copy.copy(cast("Any", processor))
        for name, value in list(vars(other).items()):
            if isinstance(value, ImageTransform):
                setattr(other, name, self.transform)
            elif isinstance(getattr(value, "transform", None), ImageTransform):
                setattr(other, name, self.over(value))
        return cast("Processor", other)

    def tokens(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch of ``over``'s processor with the tokens of its rows."""
        if "pixel_values" in batch:
            rows = self.transform.rows(batch.pop("pixel_values"))
            batch[self.name] = self.store.read(rows).to(self.dtype)
        return batch


def with_images(sample: Sample, images: Sequence[Any]) -> Sample:
    """The sample with other images in place of ``images_of``'s."""
    first = images[0] if images else None
    if len(images) < 2 and not sample.meta.get("images"):
        return replace(sample, image=first)
    return replace(sample, image=first, meta={**sample.meta, "images": tuple(images)})


def weights_hash(module: torch.nn.Module) -> str:
    """sha256 (hex) over names, dtypes, shapes and bytes of a module's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        plain = tensor.detach().to("cpu").contiguous().reshape(-1)
        if plain.numel():
            digest.update(plain.view(torch.uint8).numpy())
    return digest.hexdigest()


def _lock(path: Path, shared: bool = False, wait: bool = True) -> IO[bytes]:
    """An open file that holds the lock until it is closed.

    Raises:
        BlockingIOError: Another process holds it, and ``wait`` is False.
    """
    try:
        import fcntl
    except ImportError:
        raise ConfigError("trainer.cache_features needs file locks of Linux or macOS: leave it off here") from None
    file = path.open("ab")
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BaseException:
        file.close()
        raise
    return file


def _is_set(folder: Path) -> bool:
    """Whether a folder is one of ours: nothing else may ever be removed."""
    return len(folder.name) == 16 and set(folder.name) <= set("0123456789abcdef") and (folder / "index.bin").is_file()


def _remove(folder: Path) -> bool:
    """Delete a set unless a process uses it."""
    try:
        with _lock(folder.with_name(f"{folder.name}.use"), wait=False):
            for pattern in ("index.bin", "tokens.bin", "about.json", "about.*.partial"):  # the index first: no rows
                for file in folder.glob(pattern):
                    file.unlink()
            folder.rmdir()
            return True
    except OSError:  # in use, or not ours to delete
        return False


def _last_used(folder: Path) -> float:
    with suppress(OSError):
        return (folder / "about.json").stat().st_mtime
    return 0.0


def _bytes_of(folder: Path) -> int:
    total = 0
    for file in folder.glob("*"):
        with suppress(OSError):
            total += file.stat().st_size
    return total


def _unwritable(path: Path, error: OSError) -> RunError:
    return RunError(
        f"cannot write to the feature cache {path}: {error.strerror or error}; free space, or choose another folder"
        " with trainer.cache_dir=FOLDER"
    )
