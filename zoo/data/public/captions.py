"""COCO and Flickr30k with five captions an image, in the splits of Karpathy and Fei-Fei (2015)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import ClassVar

from zoo.data.public.base import Item, PublicConfig, PublicSet
from zoo.data.sample import BadSample
from zoo.errors import ConfigError

SPLIT_OF = {"train": "train", "restval": "train", "val": "val", "test": "test"}
FOLD = 1000


@dataclass(frozen=True, kw_only=True)
class KarpathyConfig(PublicConfig):
    """COCO with Karpathy's split: ``file`` is dataset_coco.json; ``root`` holds train2014 and val2014.

    ``restval`` counts as train, as usual (113,287 images; 5,000 for val and for test). ``captions`` keeps so many of an
    image's captions, the first ones (0 keeps all): some of COCO's have six or seven, and tables count five. ``fold`` 1
    to 5 leaves the test split only its n-th thousand of images, in the order of the file: the mean over the five is
    what papers call the 1k test. 0 is the 5k test.
    """

    kind: ClassVar[str] = "coco-karpathy"
    file: str = "dataset_coco.json"
    captions: int = 5
    fold: int = 0

    def open(self, image_size: int | None) -> Karpathy:
        return Karpathy(self)


@dataclass(frozen=True, kw_only=True)
class Flickr30kConfig(PublicConfig):
    """Flickr30k with Karpathy's split (1,000 images for val and for test): ``file`` is dataset_flickr30k.json;
    ``root`` is the folder of the images, or holds it as flickr30k-images. ``captions`` as in coco-karpathy."""

    kind: ClassVar[str] = "flickr30k"
    file: str = "dataset_flickr30k.json"
    captions: int = 5

    def open(self, image_size: int | None) -> Flickr30k:
        return Flickr30k(self)


class Captions(PublicSet):
    """Images with their captions in Karpathy's JSON. ``texts`` are the captions as written, outer blanks removed."""

    layout = (
        "expected Karpathy's JSON,"
        ' {"images": [{"split": ..., "filename": ..., "sentences": [{"raw": ...}, ...]}, ...]}'
    )

    def _check(self) -> None:
        if self.config.captions < 0:
            raise ConfigError(f"data.captions = {self.config.captions}: expected 0 (all) or more")

    def _read(self) -> Iterator[tuple[str, Item]]:
        path = self.file(self.config.file, "data.file")
        rows = self.rows(self.json(path), "images", path)
        fold, tested = getattr(self.config, "fold", 0), 0
        for place, row in self.checked(rows, ("split", "filename", "sentences"), path):
            try:
                id, item = self._row(row)
            except BadSample as error:
                self.bad.add(place, error.reason)
                continue
            if item.split == "test":
                tested += 1
                if fold and (tested - 1) // FOLD + 1 != fold:
                    continue
            if item.split in self.wanted:
                yield id, item

    def _row(self, row: dict[str, object]) -> tuple[str, Item]:
        split, name, sentences = row["split"], row["filename"], row["sentences"]
        if split not in SPLIT_OF:
            raise BadSample("", f"split must be one of {', '.join(SPLIT_OF)}, not {split!r}")
        if not isinstance(name, str) or not name:
            raise BadSample("", f"filename must be the name of an image, not {name!r}")
        found = sentences if isinstance(sentences, list) else []
        texts = [s["raw"].strip() for s in found if isinstance(s, dict) and isinstance(s.get("raw"), str)]
        texts = [text for text in texts if text][: self.config.captions or None]
        if not texts:
            raise BadSample("", "sentences must be a list of objects with a text as 'raw'")
        return self._placed(row, str(split), name, tuple(texts))

    def _placed(self, row: dict[str, object], split: str, name: str, texts: tuple[str, ...]) -> tuple[str, Item]:
        folders = ("flickr30k-images", "flickr30k_images", "images")
        return PurePosixPath(name).stem, Item(name, folders, SPLIT_OF[split], texts)


class Flickr30k(Captions):
    """See :class:`Flickr30kConfig`. Ids are the names of the images without their ending."""

    name = "flickr30k"


class Karpathy(Captions):
    """See :class:`KarpathyConfig`. Ids are COCO's ids of the images."""

    name = "coco-karpathy"

    def _check(self) -> None:
        super()._check()
        if not 0 <= self.config.fold <= 5:
            raise ConfigError(
                f"data.fold = {self.config.fold}: expected 0 (the 5k test) or one of five thousands, 1 to 5"
            )

    def _placed(self, row: dict[str, object], split: str, name: str, texts: tuple[str, ...]) -> tuple[str, Item]:
        folder = row.get("filepath") or ("train2014" if "train2014" in name else "val2014")
        return str(row.get("cocoid", PurePosixPath(name).stem)), Item(name, (str(folder),), SPLIT_OF[split], texts)
