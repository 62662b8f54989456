"""Any source as tar shards with an index and checksums: in parallel, the same bytes every time, resumable."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from typing import Any

from zoo.data.sample import SPLITS, BadSample, Source, stable_hash
from zoo.data.shard_samples import FORMATS, members_of, tar_bytes
from zoo.data.shards import FORMAT, LIST, checksum, index_path, read_index, write_index
from zoo.errors import ConfigError, DataError, RunError, near

PLAN = "packing.json"
"""While packing: what is being packed, so that another source is not added to it."""
END = b"\0" * 1024
Tell = Callable[[int, int], None]


@dataclass(frozen=True)
class Packing:
    """How a source is packed.

    Attributes:
        data: Configuration of the source, with ``name``, as ``run.yaml`` has it.
        out: The folder.
        samples: A shard, at most.
        splits: Which.
        image_format: ``png`` keeps every pixel, ``jpeg`` (quality 95) does not.
        image_size: Pixels, for sources that render.
        workers: Processes.
    """

    data: Mapping[str, Any]
    out: Path
    samples: int = 1000
    splits: tuple[str, ...] = SPLITS
    image_format: str = "png"
    image_size: int | None = None
    workers: int = 1

    def __post_init__(self) -> None:
        if self.samples < 1 or self.workers < 1:
            raise ConfigError(f"samples = {self.samples}, workers = {self.workers}: expected 1 or more")
        for split in self.splits:
            if split not in SPLITS:
                raise ConfigError(f"unknown split {split!r}{near(split, SPLITS)}")
        if self.image_format not in FORMATS:
            raise ConfigError(f"image format {self.image_format!r}{near(self.image_format, FORMATS)}")

    def open(self) -> Source:
        from zoo.plugin import catalogue

        values = {key: value for key, value in self.data.items() if key != "name"}
        source: Source = catalogue()["data"].parse(str(self.data["name"]), values, "data").build(self.image_size)
        return source


def pack(packing: Packing, tell: Tell | None = None) -> dict[str, Any]:
    """Write the shards of a source: ``SPLIT-000000.tar`` with ``SPLIT-000000.index.npz`` beside it, and ``shards.json``
    when all are there. Stopped and started again, it writes what is missing; a shard is there whole or not at all.

    Args:
        tell: called with shards that are done and all shards.

    Returns:
        What ``shards.json`` holds.

    Raises:
        DataError: the folder holds shards of something else, the source has no samples in these splits, or more of
            them than its ``max_bad`` cannot be read.
        RunError: no space, or a folder that cannot be written.
    """
    source = packing.open()
    lists = {split: source.ids(split) for split in packing.splits}
    jobs = [
        (packing, f"{split}-{number:06d}.tar", split, ids[first : first + packing.samples])
        for split, ids in lists.items()
        for number, first in enumerate(range(0, len(ids), packing.samples))
    ]
    if not jobs:
        raise DataError(f"{source.name} has no samples in {', '.join(packing.splits)}: nothing to pack")
    version = f"{source.version}/{packing.image_format}{packing.image_size or ''}"
    plan = {
        "format": FORMAT,
        "name": source.name,
        "version": version,
        "samples": packing.samples,
        "splits": {split: f"{stable_hash(*ids):016x}" for split, ids in lists.items()},
    }
    _claim(packing.out, plan)
    done: dict[str, dict[str, Any]] = {}
    forks = "fork" in get_all_start_methods()  # quicker, and not on Windows
    with ProcessPoolExecutor(packing.workers, mp_context=get_context("fork" if forks else None)) as pool:
        futures = {pool.submit(_shard, *job): job[1] for job in jobs}
        try:
            for future in as_completed(futures):
                done[futures[future]] = future.result()
                if tell is not None:
                    tell(len(done), len(jobs))
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    shards = [done[job[1]] for job in jobs]
    skipped = [line for shard in shards for line in shard.pop("skipped")]
    if len(skipped) > source.max_bad:
        raise DataError(
            f"{len(skipped)} samples of {source.name} cannot be read, more than max_bad={source.max_bad}; the first:"
            f" {skipped[0]}"
        )
    found = {**plan, "licence": source.licence, "data": dict(packing.data), "skipped": skipped, "shards": shards}
    _write(packing.out / LIST, found)
    (packing.out / PLAN).unlink(missing_ok=True)
    return found


def _shard(packing: Packing, file: str, split: str, ids: Sequence[str]) -> dict[str, Any]:
    """Write one shard unless it is there; what ``shards.json`` says of it."""
    path = packing.out / file
    note = path.with_suffix(".json")
    if note.is_file() and path.is_file() and index_path(path).is_file():
        known: dict[str, Any] = json.loads(note.read_text(encoding="utf-8"))
        if known["bytes"] == path.stat().st_size and len(read_index(path)[0]) == known["samples"]:
            return known
    source = _opened(packing)
    partial = path.with_name(path.name + ".partial")
    kept: list[str] = []
    places: list[tuple[int, int]] = []
    skipped: list[str] = []
    try:
        with partial.open("wb") as tar:
            for number, id in enumerate(ids):
                try:
                    members = members_of(source.sample(id), packing.image_format)
                except BadSample as error:
                    skipped.append(str(error))
                    continue
                start = tar.tell()
                tar.write(tar_bytes(f"{number:08d}", members))
                kept.append(id)
                places.append((start, tar.tell()))
            tar.write(END)
            tar.flush()
            os.fsync(tar.fileno())
        said = {
            "file": file,
            "split": split,
            "samples": len(kept),
            "bytes": partial.stat().st_size,
            "sha256": checksum(partial),
            "skipped": skipped,
        }
        write_index(index_path(path), kept, places)
        partial.replace(path)
        _write(note, said)
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error.strerror or error}; make room and run the same command again"
        ) from error
    return said


_OPEN: dict[str, Source] = {}
"""The source of this worker process."""


def _opened(packing: Packing) -> Source:
    key = json.dumps([dict(packing.data), packing.image_size], sort_keys=True, default=str)
    if key not in _OPEN:
        _OPEN[key] = packing.open()
    return _OPEN[key]


def _claim(out: Path, plan: Mapping[str, Any]) -> None:
    """Make the folder, or check that what is in it is this packing's."""
    for name in (PLAN, LIST):
        path = out / name
        if path.is_file():
            before = json.loads(path.read_text(encoding="utf-8"))
            other = next((key for key in plan if before.get(key) != plan[key]), None)
            if other is not None:
                raise DataError(
                    f"{out} holds shards of something else ({other}: {before.get(other)!r}, not {plan[other]!r}):"
                    " choose another folder, or delete it"
                )
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not (out / LIST).is_file():
            _write(out / PLAN, plan)
    except OSError as error:
        raise RunError(f"cannot write to {out}: {error.strerror or error}; choose another folder") from error


def _write(path: Path, values: Mapping[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)
