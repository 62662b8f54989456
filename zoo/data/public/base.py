"""What published sets share: files and image folders by path, bounded bad rows, splits, versions."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

from zoo.data.decode import decode
from zoo.data.image_files import EXTENSIONS, ImageFolder, near_path
from zoo.data.sample import SPLITS, BadSample, BadSamples, Sample, SourceConfig, check_split
from zoo.errors import ConfigError, DataError, near


@dataclass(frozen=True, kw_only=True)
class PublicConfig(SourceConfig):
    """Fields of every published set.

    ``root`` is the folder of the images, or the one above their released folders. Files are looked for in ``root``,
    then from where the command runs. ``splits`` names those that are read at all, joined by ``+``, for who has the
    images of some only. Up to ``max_bad`` rows or images that cannot be used are logged and skipped. Images of more
    than ``max_pixels`` are refused before they are decoded.
    """

    root: str = ""
    splits: str = "train+val+test"
    max_bad: int = 10
    max_pixels: int = 50_000_000


@dataclass(slots=True)
class Item:
    """One image: where it lies, its split, its texts and what else is known of it."""

    image: str
    folders: tuple[str, ...]
    split: str
    texts: tuple[str, ...]
    meta: dict[str, Any] = field(default_factory=dict)


class PublicSet:
    """Base of published sets. Opening reads the rows and checks that every image is there; it decodes none.

    ``meta["cluster"]`` of every sample is its image, so that intervals resample images.

    Raises:
        ConfigError: no ``root``, no file, or an unknown split.
        DataError: a missing file or folder, another layout than the released one, or more than ``max_bad`` rows that
            cannot be used.
    """

    name: ClassVar[str] = ""
    licence: ClassVar[str] = "as given by the authors of the set and the owners of the images"
    layout: ClassVar[str] = ""
    """How the released file looks, for messages."""

    def __init__(self, config: PublicConfig) -> None:
        self.config: Any = config
        self.max_bad = config.max_bad
        self.bad = BadSamples(self.name, config.max_bad)
        self.wanted = self._wanted(config.splits)
        self._found: dict[tuple[str, ...], ImageFolder] = {}
        self._sizes: dict[tuple[tuple[str, ...], str], int] = {}
        self.folder: ImageFolder | None = None
        self._check()
        if config.root:
            self.folder = ImageFolder(config.root)
        elif self._needs_root():
            raise ConfigError(f"the {self.name} source needs root, the folder that holds the images: data.root=PATH")
        self._items: dict[str, Item] = {}
        for id, item in self._read():
            self._add(id, item)
        if not self._items:
            raise DataError(f"{self.name}: no usable rows of the splits {config.splits} in its files")
        self._splits: dict[str, list[str]] = {split: [] for split in SPLITS}
        digest = hashlib.sha256()
        for id, item in self._items.items():
            self._splits[item.split].append(id)
            row = [id, item.split, item.image, item.texts, item.meta, self._sizes.get((item.folders, item.image))]
            row += self._further(id)
            digest.update(json.dumps(row, default=str).encode() + b"\n")
        self.version = digest.hexdigest()[:16]

    # -- what a set says of itself -------------------------------------------------------------------------------------

    def _check(self) -> None:
        """Raise a ConfigError for fields that make no sense; nothing was read by then."""

    def _needs_root(self) -> bool:
        return True

    def _read(self) -> Iterator[tuple[str, Item]]:
        """Yield (id, item) of the wanted splits, in the order of the files; the items' images were not looked for."""
        raise TypeError(f"{type(self).__name__} defines no _read")

    def _further(self, id: str) -> list[str]:
        """Return what else of an item goes into the version."""
        return []

    def _file(self, id: str, item: Item) -> Path | BytesIO:
        """Return what the image is read from."""
        return self._path(item)

    # -- files ---------------------------------------------------------------------------------------------------------

    def _wanted(self, splits: str) -> tuple[str, ...]:
        names = tuple(part.strip() for part in splits.split("+"))
        for name in names:
            if name not in SPLITS:
                raise ConfigError(f"data.splits = {splits!r}: unknown split {name!r}{near(name, SPLITS)}")
        return names

    def file(self, path: str, where: str, folder: bool = False) -> Path:
        """Return the file ``path``, in ``root`` or from where the command runs.

        Args:
            path: as the user gave it.
            where: the field it came from, e.g. ``data.file``.
            folder: whether a folder will do.

        Raises:
            ConfigError: no path.
            DataError: there is no such file.
        """
        if not path:
            raise ConfigError(f"the {self.name} source needs {where}=PATH: {self.layout}")
        given = Path(path).expanduser()
        tried = [given] if given.is_absolute() or self.folder is None else [self.folder.root / given, given]
        for one in tried:
            if one.is_file() or (folder and one.is_dir()):
                return one
        hint = next((hint for one in tried if (hint := near_path(one))), "")
        if any(one.is_dir() for one in tried):
            raise DataError(f"{self.name}: {path!r} is a folder, and {where} must be a file: {self.layout}")
        beside = "" if len(tried) == 1 else f" in {str(tried[0].parent)!r} or {str(Path.cwd())!r}"
        raise DataError(f"{self.name}: the file {path!r} does not exist{beside}{hint}; set {where}")

    def json(self, path: Path) -> Any:
        """Return what a JSON file holds.

        Raises:
            DataError: it is no JSON.
        """
        try:
            return json.loads(path.read_text(encoding="utf-8-sig"))
        except (ValueError, OSError) as error:
            raise DataError(f"{self.name}: {path.name!r} cannot be read as JSON ({error}); {self.layout}") from None

    def rows(self, value: Any, key: str, path: Path) -> list[Any]:
        """Return the list ``value[key]`` of a file.

        Raises:
            DataError: the file has another layout; the message says which key is missing.
        """
        if not isinstance(value, dict):
            raise DataError(
                f"{self.name}: {path.name!r} holds a {type(value).__name__}, no object with {key!r}; {self.layout}"
            )
        if key not in value:
            known = ", ".join(map(repr, list(value)[:8])) or "none"
            raise DataError(f"{self.name}: {path.name!r} has no key {key!r} (its keys: {known}); {self.layout}")
        found = value[key]
        if not isinstance(found, list):
            raise DataError(f"{self.name}: {key!r} of {path.name!r} must be a list; {self.layout}")
        return found

    def checked(
        self, rows: Iterable[Any], needed: Sequence[str], path: Path, places: bool = True
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (place in the file, row); a row that lacks a needed key is counted as bad.

        Raises:
            DataError: the first row lacks a key, so that the file has another layout.
        """
        for number, row in enumerate(rows):
            place = f"{path.name}[{number}]" if places else f"{path.name}:{number + 1}"
            missing = [key for key in needed if not isinstance(row, dict) or key not in row]
            if missing and not number:
                known = ", ".join(map(repr, list(row)[:8])) if isinstance(row, dict) else type(row).__name__
                raise DataError(f"{self.name}: {place} has no key {missing[0]!r} (it has {known}); {self.layout}")
            if missing:
                self.bad.add(place, f"it has no key {missing[0]!r}")
            else:
                yield place, row

    # -- images --------------------------------------------------------------------------------------------------------

    def _add(self, id: str, item: Item) -> None:
        """Keep an item whose image is there."""
        if id in self._items:
            other = self._items[id].split
            between = f"the {other} and the {item.split} split" if other != item.split else f"the {other} split twice"
            raise DataError(f"{self.name}: {id!r} is in {between}; an image belongs to one split")
        if item.image:
            key = item.folders, item.image
            if key not in self._sizes:
                path = self._path(item)
                try:
                    self._sizes[key] = path.stat().st_size
                except OSError:
                    self.bad.add(id, f"the image {path.name!r} is missing in {str(path.parent)!r}")
                    return
        item.meta.setdefault("cluster", id)
        self._items[id] = item

    def _path(self, item: Item) -> Path:
        if item.folders not in self._found:
            self._found[item.folders] = self._folder(item.folders)
        return self._found[item.folders].inside(item.image)

    def _folder(self, names: tuple[str, ...]) -> ImageFolder:
        """Return the first of the released folders that is below ``root``, or ``root`` where that holds images."""
        assert self.folder is not None
        root = self.folder.root
        for name in names:
            if self.folder.below(name).is_dir():
                return ImageFolder(str(self.folder.below(name)))  # the user's own link may lead elsewhere
        with os.scandir(root) as entries:
            if any(os.path.splitext(entry.name)[1].lower() in EXTENSIONS for entry in entries):
                return self.folder
        looked = " or ".join(map(repr, names))
        raise DataError(
            f"{self.name}: the image folder {str(root)!r} has no folder {looked} and no images; set data.root, or"
            f" leave out splits whose images you do not have (data.splits={self.config.splits})"
        )

    # -- samples -------------------------------------------------------------------------------------------------------

    def ids(self, split: str) -> list[str]:
        """Return the ids of a split in the order of the file; none where the files or ``splits`` leave it out."""
        check_split(split)
        return list(self._splits[split])

    def text_sample(self, id: str) -> Sample:
        """Return the sample without its image, which is not opened.

        Raises:
            DataError: there is no such id.
        """
        item = self._item(id)
        return Sample(id, None, item.texts, dict(item.meta))

    def sample(self, id: str) -> Sample:
        """Return the image (RGB, as stored otherwise), its texts, and ``meta`` as the set has it.

        Raises:
            DataError: there is no such id.
            BadSample: the image cannot be decoded or is too large.
        """
        item = self._item(id)
        image = decode(self._file(id, item), id, self.config.max_pixels)
        return Sample(id, image, item.texts, dict(item.meta))

    def image_stamp(self, id: str) -> str:
        """Return the state of the image's file, which changes when the file does."""
        item = self._item(id)
        return self._found[item.folders].stamp([item.image])

    def _item(self, id: str) -> Item:
        item = self._items.get(id)
        if item is None:
            raise DataError(f"unknown sample {id!r}{near(id, list(self._items)[:10000])}")
        return item


def text_of(row: Mapping[str, Any], key: str) -> str:
    """Return the text under a key.

    Raises:
        BadSample: it is none.
    """
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise BadSample("", f"{key} must be a text, not {str(value)[:60]!r}")
    return value.strip()
