"""The user's own images: a folder, and captions in a jsonl or csv file beside them."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from zoo.data.decode import decode
from zoo.data.image_files import EXTENSIONS, ImageFolder, check_fractions, near_path, split_of
from zoo.data.sample import SPLITS, BadSample, BadSamples, Sample, SourceConfig, check_split
from zoo.errors import ConfigError, DataError, near


@dataclass(frozen=True, kw_only=True)
class FolderConfig(SourceConfig):
    """Images under ``root`` with captions.

    ``captions`` is a ``.jsonl`` or ``.csv`` file, relative to ``root``; null takes the file names as captions. Each
    row names an image by a path relative to ``root`` and gives one text, or in jsonl a list of texts; rows of the same
    image are joined. The id of a sample is ``id_column`` or else the image's path. ``split_column`` holds train, val or
    test; without it ``val_fraction`` and ``test_fraction`` are held out by a hash of the id, so that adding images
    moves no other image. Up to ``max_bad`` rows or images that cannot be read are logged and skipped. Images of more
    than ``max_pixels`` are refused before they are decoded.
    """

    kind: ClassVar[str] = "folder"
    root: str = ""
    captions: str | None = None
    image_column: str = "image"
    text_column: str = "caption"
    id_column: str | None = None
    split_column: str | None = None
    val_fraction: float = 0.05
    test_fraction: float = 0.1
    max_bad: int = 10
    max_pixels: int = 50_000_000

    def open(self, image_size: int | None) -> Folder:
        return Folder(self)


@dataclass
class _Item:
    path: Path
    texts: list[str] = field(default_factory=list)
    split: str | None = None


class Folder:
    """See :class:`FolderConfig`. Opening reads the captions and checks that every image is there; it decodes none.

    Raises:
        ConfigError: fractions that leave no train split, or no ``root``.
        DataError: a missing folder or captions file, no images, wrong columns, a path out of the folder, or more than
            ``max_bad`` rows that cannot be used.
    """

    name = "folder"

    def __init__(self, config: FolderConfig) -> None:
        if not config.root:
            raise ConfigError("the folder source needs root, the folder that holds the images: data.root=PATH")
        check_fractions(config.val_fraction, config.test_fraction)
        self.config = config
        self.max_bad = config.max_bad
        self.licence = "as given by the owner of the images"
        self.folder = ImageFolder(config.root)
        self.root = self.folder.root
        self.bad = BadSamples(f"folder {self.root.name}", config.max_bad)
        self._items = self._from_captions(config.captions) if config.captions else self._from_names()
        if not self._items:
            raise DataError(f"no usable samples in {str(self.root)!r}: every row was skipped")
        self._splits = self._split()
        self.version = self._fingerprint()

    # -- reading the list ------------------------------------------------------------------------------------------

    def _from_names(self) -> dict[str, _Item]:
        items: dict[str, _Item] = {}
        for folder, _, names in sorted(os.walk(self.root)):
            for name in sorted(names):
                path = Path(folder) / name
                if path.suffix.lower() in EXTENSIONS and not name.startswith("."):
                    id = path.relative_to(self.root).as_posix()
                    self.folder.inside(id)
                    items[id] = _Item(path, [path.stem.replace("_", " ").replace("-", " ").strip()])
        if not items:
            raise DataError(
                f"no images in {str(self.root)!r}: expected files ending in {', '.join(sorted(EXTENSIONS))} "
                "in it or below it"
            )
        return items

    def _from_captions(self, captions: str) -> dict[str, _Item]:
        config = self.config
        path = self.folder.inside(captions)
        if not path.is_file():
            raise DataError(f"the captions file {captions!r} is not in {str(self.root)!r}{near_path(path)}")
        needed = [config.image_column, config.text_column, config.id_column, config.split_column]
        items: dict[str, _Item] = {}
        rows = 0
        for number, row in _rows(path, self.bad):
            if rows == 0:
                for column in needed:
                    if column is not None and column not in row:
                        raise DataError(
                            f"the captions file {captions!r} has no column {column!r}{near(column, row)}; its columns "
                            f"are {', '.join(map(repr, row))}; set image_column and text_column"
                        )
            rows += 1
            try:
                id, item = self._item(row)
            except BadSample as error:
                self.bad.add(f"{captions}:{number}", error.reason)
                continue
            known = items.setdefault(id, item)
            if known is not item:
                if known.path != item.path:
                    raise DataError(f"{captions}:{number}: the id {id!r} is used for two images; ids must be distinct")
                known.texts += [t for t in item.texts if t not in known.texts]
        if rows == 0:
            raise DataError(f"the captions file {captions!r} has no rows")
        return dict(sorted(items.items()))

    def _item(self, row: dict[str, Any]) -> tuple[str, _Item]:
        config = self.config
        image, text = row.get(config.image_column), row.get(config.text_column)
        if not isinstance(image, str) or not image:
            raise BadSample("", f"{config.image_column} must be the path of an image, not {image!r}")
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
            raise BadSample("", f"{config.text_column} must be a text or a list of texts, not {text!r}")
        path = self.folder.inside(image)
        if not path.is_file():
            raise BadSample("", f"the image {image!r} is missing")
        split = None
        if config.split_column is not None:
            split = str(row.get(config.split_column))
            if split not in SPLITS:
                raise BadSample("", f"{config.split_column} must be one of {', '.join(SPLITS)}, not {split!r}")
        id = image if config.id_column is None else str(row.get(config.id_column))
        return id, _Item(path, [t.strip() for t in texts], split)

    def _split(self) -> dict[str, list[str]]:
        config = self.config
        splits: dict[str, list[str]] = {split: [] for split in SPLITS}
        for id, item in self._items.items():
            if item.split is None:
                item.split = split_of(("folder", id), config.val_fraction, config.test_fraction)
            splits[item.split].append(id)
        return splits

    def _fingerprint(self) -> str:
        """Hash ids, splits, texts, and of the images name and size in bytes: decoding them all would take too long."""
        digest = hashlib.sha256()
        for id, item in self._items.items():
            row = [id, item.split, item.texts, item.path.relative_to(self.root).as_posix(), item.path.stat().st_size]
            digest.update(json.dumps(row).encode() + b"\n")
        return digest.hexdigest()[:16]

    # -- samples ---------------------------------------------------------------------------------------------------

    def ids(self, split: str) -> list[str]:
        """Return the ids of a split, ordered."""
        check_split(split)
        return list(self._splits[split])

    def sample(self, id: str) -> Sample:
        """Return the image (RGB, as stored otherwise) and its texts.

        Raises:
            DataError: there is no such id.
            BadSample: the image cannot be decoded or is too large.
        """
        item = self._items.get(id)
        if item is None:
            raise DataError(f"unknown sample {id!r}{near(id, list(self._items)[:10000])}")
        return Sample(id, decode(item.path, id, self.config.max_pixels), tuple(item.texts), {})

    def text_sample(self, id: str) -> Sample:
        """Return the sample without its image, which is not opened."""
        return Sample(id, None, tuple(self._items[id].texts), {})

    def image_stamp(self, id: str) -> str:
        """Return the state of the image's file, which changes when the file does: size and time of change."""
        return self.folder.stamp([self._items[id].path.relative_to(self.root).as_posix()])


def _rows(path: Path, bad: BadSamples) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, row); rows that do not parse are counted in ``bad``."""
    kind = path.suffix.lower()
    if kind not in (".jsonl", ".csv"):
        raise DataError(f"the captions file {path.name!r} must end in .jsonl or .csv")
    try:
        with path.open(encoding="utf-8-sig", newline="" if kind == ".csv" else None) as file:
            if kind == ".csv":
                table = csv.DictReader(file)
                for row in table:
                    if None in row or None in row.values():
                        bad.add(f"{path.name}:{table.line_num}", "the row has another number of cells than the header")
                        continue
                    yield table.line_num, dict(row)
                return
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    value = json.loads(line)
                except ValueError as error:
                    bad.add(f"{path.name}:{number}", f"not JSON ({error})")
                    continue
                if not isinstance(value, dict):
                    bad.add(f"{path.name}:{number}", "each line must be a JSON object")
                    continue
                yield number, value
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"the captions file {path.name!r} cannot be read: {error}; expected UTF-8 text") from None
