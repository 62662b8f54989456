"""Rows of Hugging Face datasets by their number: memory-mapped through ``datasets``, or parquet files read in place."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from zoo.errors import ConfigError, DataError, MissingExtra, near

ENDINGS = (".parquet", ".arrow")
NAMED = {"train": ("train",), "val": ("validation", "val", "valid", "dev"), "test": ("test",)}
"""What datasets call the zoo's splits."""
HELD = 8
"""Row groups that a process keeps decoded, beside those of a window."""


class Table(Protocol):
    """One split: its columns, and rows by number as plain Python values, images as their bytes."""

    columns: tuple[str, ...]

    def __len__(self) -> int: ...
    def row(self, number: int) -> Mapping[str, Any]: ...
    def column(self, name: str) -> list[Any]: ...
    def blocks(self) -> list[NDArray[np.int64]] | None: ...
    def mark(self) -> str: ...


def files_of(root: Path, splits: Mapping[str, str]) -> dict[str, list[str]]:
    """Dataset split -> files of a folder (or one file), as their names say: ``train-00000-of-00004.parquet``, or in a
    folder ``train``. Files whose name says nothing are of ``train``.

    Raises:
        DataError: No such folder, or no parquet or arrow files in it.
    """
    paths = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.suffix in ENDINGS)
    return named_files([str(p) for p in paths], str(root), splits)


def named_files(paths: Sequence[str], root: str, splits: Mapping[str, str]) -> dict[str, list[str]]:
    """``files_of`` of paths that are already listed."""
    if not paths:
        raise DataError(f"no parquet or arrow files in {root!r}: expected a folder of them, one file, or a hub id")
    known = {name for names in NAMED.values() for name in names} | set(splits.values())
    found: dict[str, list[str]] = {}
    for path in paths:
        inner = path[len(root) :] if path.startswith(root) and path != root else path.rpartition("/")[2]
        words = inner.lower().replace("\\", "/").replace("_", "-").replace(".", "-").replace("/", "-").split("-")
        split = next((word for word in words if word in {name.lower() for name in known}), "train")
        found.setdefault(split, []).append(path)
    return found


def chosen(wanted: Mapping[str, str], there: Sequence[str], what: str) -> dict[str, str]:
    """Zoo split -> the dataset's, of those that are there.

    Raises:
        ConfigError: ``wanted`` has a split that the zoo does not know.
        DataError: A split that was asked for by name is not there, or none for training.
    """
    for split, name in wanted.items():
        if split not in NAMED:
            raise ConfigError(f"data.splits: unknown split {split!r}{near(split, NAMED)}")
        if name and name not in there:
            raise DataError(f"{what} has no split {name!r}{near(name, there)}; set data.splits.{split}")
    found = {}
    for split, names in NAMED.items():
        name = wanted[split] if split in wanted else next((n for n in names if n in there), "")
        if name:
            found[split] = name
    if not found:
        raise DataError(f"{what} has the splits {', '.join(there)}: say which are which, data.splits.train=NAME")
    return found


# -- memory-mapped -----------------------------------------------------------------------------------------------------


class Mapped:
    """A ``datasets.Dataset``: any row at any time, from memory-mapped Arrow files."""

    def __init__(self, dataset: Any, mark: str) -> None:
        import datasets

        images = [name for name, kind in dataset.features.items() if isinstance(kind, datasets.Image)]
        for name in images:  # as they are stored: the zoo decodes them itself, with its own limits
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
        self.dataset = dataset.with_format(None)
        self.columns = tuple(dataset.column_names)
        self._mark = mark

    def __len__(self) -> int:
        return len(self.dataset)

    def row(self, number: int) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.dataset[number]
        return found

    def column(self, name: str) -> list[Any]:
        return list(self.dataset[name])

    def blocks(self) -> None:
        return None

    def mark(self) -> str:
        return self._mark


def mapped(path: str, config: str, revision: str, splits: Mapping[str, str]) -> dict[str, Table]:
    """Zoo split -> table, through the library ``datasets``: a folder of ``save_to_disk``, a file or folder of parquet
    or arrow, or a dataset of the hub. Nothing of a dataset is ever executed (the library has no loading scripts since
    its version 4).

    Raises:
        MissingExtra: The library is not installed.
        DataError: No such data or split, or the library cannot read it.
    """
    try:
        import datasets
    except ImportError:
        raise MissingExtra("datasets", "datasets", "data=hf") from None
    if int(datasets.__version__.split(".")[0]) < 4:
        raise DataError(f"datasets {datasets.__version__} may execute code of datasets: pip install -U 'datasets>=4'")
    root = Path(path).expanduser()
    bars = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        if (root / "dataset_dict.json").is_file() or (root / "state.json").is_file():
            loaded = datasets.load_from_disk(str(root))
            found = loaded if isinstance(loaded, dict) else {"train": loaded}
            mark = "/".join(f"{name}:{len(part)}:{part.info.dataset_size}" for name, part in found.items())
        elif root.exists():
            files = files_of(root, splits)
            kinds = {Path(file).suffix for paths in files.values() for file in paths}
            if len(kinds) > 1:
                raise DataError(f"{path!r} holds parquet and arrow files together: keep one kind in the folder")
            found = datasets.load_dataset(kinds.pop().removeprefix("."), data_files=files)
            mark = local_mark(files)
        else:
            found = datasets.load_dataset(path, config or None, revision=revision or None)
            mark = f"{path}@{revision}/{config}/" + "/".join(f"{name}:{len(part)}" for name, part in found.items())
    except DataError:
        raise
    except Exception as error:  # the library raises what its many readers raise
        text = " ".join(str(error).split())[:300]
        raise DataError(
            f"the dataset {path!r} cannot be read ({type(error).__name__}: {text}); set data.path"
        ) from None
    finally:
        if bars:
            datasets.enable_progress_bars()
    names = chosen(splits, list(found), f"the dataset {path!r}")
    return {split: Mapped(found[name], f"{mark}/{name}") for split, name in names.items()}


def local_mark(files: Mapping[str, Sequence[str]]) -> str:
    """What files are, for a source's version: names and sizes."""
    states = [f"{split}/{Path(p).name}/{Path(p).stat().st_size}" for split, paths in files.items() for p in paths]
    return hashlib.sha256("\0".join(states).encode()).hexdigest()[:16]


# -- streamed ----------------------------------------------------------------------------------------------------------


class Streamed:
    """Parquet files read where they lie, a row group at a time: on this disk, on the hub (``hf://``), or anywhere
    fsspec reads. Opening reads their footers, which say how many rows each group has, so that any row has a number and
    any reader finds its place again without a state.
    """

    def __init__(self, files: Sequence[str], system: Any, held: int) -> None:
        self.files, self.system, self.held = list(files), system, held
        self._open: OrderedDict[int, Any] = OrderedDict()
        self._groups: OrderedDict[int, Any] = OrderedDict()
        self._owner = os.getpid()
        self.columns: tuple[str, ...] = ()
        places: list[tuple[int, int]] = []  # file, its row group
        sizes: list[int] = []
        for number in range(len(self.files)):
            metadata = self._file(number).metadata
            columns = tuple(self._file(number).schema_arrow.names)
            if self.columns and columns != self.columns:
                raise DataError(
                    f"{self.files[number]!r} has the columns {', '.join(columns)}, and the files before it"
                    f" {', '.join(self.columns)}: expected one table in several files"
                )
            self.columns = columns
            places += [(number, group) for group in range(metadata.num_row_groups)]
            sizes += [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self.places = places
        self.ends = np.cumsum(np.array(sizes, np.int64))

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def row(self, number: int) -> Mapping[str, Any]:
        group = int(np.searchsorted(self.ends, number, side="right"))
        first = int(self.ends[group - 1]) if group else 0
        row: Mapping[str, Any] = self._group(group).slice(number - first, 1).to_pylist()[0]
        return row

    def column(self, name: str) -> list[Any]:
        return [value for n in range(len(self.files)) for value in self._read(n, None, [name])[name].to_pylist()]

    def blocks(self) -> list[NDArray[np.int64]]:
        """The rows of each row group."""
        starts = np.concatenate([[0], self.ends[:-1]])
        return [np.arange(a, b) for a, b in zip(starts, self.ends, strict=True) if b > a]

    def mark(self) -> str:
        states = [f"{file.rpartition('/')[2]}/{self.system.size(file)}" for file in self.files]
        return hashlib.sha256("\0".join(states).encode()).hexdigest()[:16]

    def _group(self, group: int) -> Any:
        self._mine()
        if group in self._groups:
            self._groups.move_to_end(group)
            return self._groups[group]
        if len(self._groups) >= self.held:
            self._groups.popitem(last=False)
        file, inner = self.places[group]
        self._groups[group] = self._read(file, inner, None)
        return self._groups[group]

    def _read(self, file: int, group: int | None, columns: list[str] | None) -> Any:
        import pyarrow as pa

        try:
            found = self._file(file)
            return found.read(columns=columns) if group is None else found.read_row_group(group, columns=columns)
        except (pa.ArrowException, OSError) as error:
            where = "" if group is None else f", row group {group}"
            raise DataError(
                f"{self.files[file].rpartition('/')[2]}{where} is damaged ({' '.join(str(error).split())[:200]}):"
                " download or copy it again"
            ) from None

    def _file(self, number: int) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._mine()
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        if len(self._open) >= 64:
            self._open.popitem(last=False)
        try:
            self._open[number] = pq.ParquetFile(self.system.open(self.files[number], "rb"))
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{self.files[number].rpartition('/')[2]} is no parquet file ({' '.join(str(error).split())[:200]})"
            ) from None
        return self._open[number]

    def _mine(self) -> None:
        """Forked readers must not share what they read from."""
        if self._owner != os.getpid():
            self._open, self._groups, self._owner = OrderedDict(), OrderedDict(), os.getpid()


def streamed(path: str, revision: str, splits: Mapping[str, str], window: int) -> dict[str, Table]:
    """Zoo split -> table of parquet files below ``path``: a folder or file here, an address that fsspec reads, or a
    dataset of the hub by its id.

    Raises:
        DataError: As ``mapped``; or a file is no parquet file.
    """
    import fsspec

    local = Path(path).expanduser()
    address = str(local) if local.exists() else path
    if "://" not in path and not local.exists():
        address = f"hf://datasets/{path}" + (f"@{revision}" if revision else "")
    try:
        system, root = fsspec.core.url_to_fs(address)
        paths = [root] if system.isfile(root) else sorted(p for p in system.find(root) if p.endswith(".parquet"))
    except Exception as error:  # of whatever the address is read by
        text = " ".join(str(error).split())[:300]
        raise DataError(
            f"the dataset {path!r} cannot be listed ({type(error).__name__}: {text}); set data.path"
        ) from None
    files = named_files([str(p) for p in paths], str(root), splits)
    names = chosen(splits, list(files), f"the dataset {path!r}")
    return {split: Streamed(files[name], system, HELD + window) for split, name in names.items()}
