"""Referring expressions (RefCOCO, RefCOCO+, RefCOCOg): texts that each name one object, with its box and mask."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from zoo.data.public.base import Item, PublicConfig, PublicSet
from zoo.data.public.masks import mask_of
from zoo.data.sample import BadSample
from zoo.errors import ConfigError, DataError, near

PARTITIONS = ("train", "val", "test", "testA", "testB")
_COCO_NAME = re.compile(r"(COCO_(?:train|val)2014_\d{12})(?:_\d+)?\.jpg")
_FOLDERS = ("train2014",)


@dataclass(frozen=True, kw_only=True)
class RefcocoConfig(PublicConfig):
    """Referring expressions in one of two forms.

    - REFER's references as JSON: ``file`` is a list of ``{"ref_id", "ann_id", "image_id", "split", "sentences":
      [{"sent"}, ...]}``, and ``instances`` COCO's instances.json with the boxes and masks of the annotations (not
      needed where the references hold ``bbox`` and ``segmentation`` themselves). The release stores the references as a
      pickle, which is not read, as loading one runs whatever it says.
    - Rows as the parquet files of lmms-lab: ``question_id``, ``answer`` (a list of expressions), ``segmentation``,
      ``bbox`` (x, y, width, height), ``file_name`` and ``image``. ``file`` is one file, or the folder of them, whose
      names begin with the partition (``testA-00000-of-00001.parquet``). Images are read from ``root``, and from the
      rows where there is no ``root``.

    ``test`` is the partition that is the test split: test, testA or testB. Pictures are COCO's train2014, which
    ``root`` is or holds.
    """

    kind: ClassVar[str] = "refcoco"
    file: str = ""
    instances: str = ""
    test: str = "testA"

    def open(self, image_size: int | None) -> Refcoco:
        return Refcoco(self)


@dataclass(slots=True)
class Reference:
    """One object that expressions name."""

    image: str
    partition: str
    texts: tuple[str, ...]
    box: tuple[float, ...]
    segmentation: str
    """As JSON, which takes a fraction of the memory."""
    id: str
    stored: tuple[str, int, int] | None = None
    """File, row group and row of the picture in a parquet file."""


class Refcoco(PublicSet):
    """See :class:`RefcocoConfig`. A sample is an image with all expressions about it; ids are those of the images.

    ``texts`` are the expressions; ``meta["referred"]`` the same in this order, each with ``text``, ``box`` (left, top,
    right, bottom, in pixels) and ``ref``, the object it names; :meth:`masks` are theirs.
    """

    name = "refcoco"
    layout = (
        'expected rows {"image_id", "split", "ann_id", "sentences"} of REFER as JSON, or lmms-lab\'s parquet files'
        ' {"file_name", "answer", "segmentation", "bbox"}'
    )

    def _check(self) -> None:
        if self.config.test not in ("test", "testA", "testB"):
            raise ConfigError(f"data.test = {self.config.test!r}: expected test, testA or testB")
        self._stored: dict[str, tuple[str, int, int]] = {}
        self._masks: dict[str, list[str]] = {}

    def _needs_root(self) -> bool:
        return not self._parquet()

    def _parquet(self) -> bool:
        given = Path(self.config.file).expanduser()
        return given.suffix == ".parquet" or (given.is_dir() and any(given.glob("*.parquet")))

    def _read(self) -> Iterator[tuple[str, Item]]:
        given = self.file(self.config.file, "data.file", folder=True)
        files = sorted(given.glob("*.parquet")) if given.is_dir() else [given]
        if not files:
            raise DataError(f"refcoco: the folder {str(given)!r} holds no .parquet file; {self.layout}")
        seen: set[str] = set()
        of_image: dict[str, list[Reference]] = {}
        splits: dict[str, str] = {}
        for path in files:
            for one in self._rows(path) if path.suffix == ".parquet" else self._references(path):
                seen.add(one.partition)
                split = self._split(one.partition)
                if split not in self.wanted:
                    continue
                if splits.setdefault(one.image, split) != split:
                    raise DataError(
                        f"refcoco: the image {one.image!r} is in the {splits[one.image]} and the {split} split; take a"
                        " split by images (umd for RefCOCOg), or read one split (data.splits)"
                    )
                of_image.setdefault(one.image, []).append(one)
        others = sorted(partition for partition in seen if partition.startswith("test"))
        if "test" in self.wanted and others and self.config.test not in seen:
            raise DataError(
                f"refcoco: there is no partition {self.config.test!r}; the files have {', '.join(sorted(seen))};"
                f" set data.test={others[0]}"
            )
        for image, references in of_image.items():
            yield from self._sample_of(image, splits[image], references)

    def _split(self, partition: str) -> str:
        return "test" if partition == self.config.test else partition if partition in ("train", "val") else ""

    def _sample_of(self, name: str, split: str, references: list[Reference]) -> Iterator[tuple[str, Item]]:
        id = str(int(name.rpartition("_")[2].removesuffix(".jpg"))) if _COCO_NAME.fullmatch(name) else name
        referred = []
        masks = []
        for one in references:
            x, y, width, height = one.box
            for text in one.texts:
                referred.append({"text": text, "box": [x, y, x + width, y + height], "ref": one.id})
                masks.append(one.segmentation)
        stored = references[0].stored
        self._masks[id] = masks
        if self.folder is None:
            assert stored is not None
            self._stored[id] = stored
        image = name if self.folder is not None else ""
        meta = {"cluster": id, "referred": referred}
        yield id, Item(image, _FOLDERS, split, tuple(text for one in references for text in one.texts), meta)

    # -- REFER's references --------------------------------------------------------------------------------------------

    def _references(self, path: Path) -> Iterator[Reference]:
        rows = self.json(path)
        if not isinstance(rows, list):
            raise DataError(
                f"refcoco: {path.name!r} holds a {type(rows).__name__}, no list of references; {self.layout}"
            )
        annotations, names = self._instances(rows)
        for place, row in self.checked(rows, ("image_id", "split", "sentences"), path):
            try:
                partition = _partition(row["split"])
                known = row if annotations is None else annotations.get(row.get("ann_id"))
                if known is None:
                    raise BadSample("", f"the annotation {row.get('ann_id')!r} is not among the instances")
                name = names.get(row["image_id"]) or _image_name(row)
                ref = str(row.get("ref_id", place))
                yield Reference(name, partition, _texts(row["sentences"]), _box(known), _segmentation(known), ref)
            except BadSample as error:
                self.bad.add(place, error.reason)

    def _instances(self, rows: list[Any]) -> tuple[dict[Any, Any] | None, dict[Any, str]]:
        """Return annotation id -> annotation, None where the references hold what is needed; image id -> file name."""
        if not self.config.instances:
            if rows and isinstance(rows[0], dict) and "split" in rows[0] and "segmentation" not in rows[0]:
                raise ConfigError(
                    "refcoco: the references hold no 'segmentation': set data.instances=instances.json, COCO's"
                    " annotations with boxes and masks"
                )
            return None, {}
        path = self.file(self.config.instances, "data.instances")
        whole = self.json(path)
        wanted = {row.get("ann_id") for row in rows if isinstance(row, dict)}
        found = {
            row["id"]: row for _, row in self.checked(self.rows(whole, "annotations", path), ("id",), path)
            if row["id"] in wanted
        }  # fmt: skip
        pictures = self.checked(whole.get("images") or [], ("id", "file_name"), path)
        return found, {row["id"]: str(row["file_name"]) for _, row in pictures}

    # -- parquet rows --------------------------------------------------------------------------------------------------

    def _rows(self, path: Path) -> Iterator[Reference]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            file = pq.ParquetFile(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"refcoco: {path.name!r} cannot be read as parquet ({error}); {self.layout}") from None
        names = file.schema_arrow.names
        needed = ("file_name", "answer", "segmentation", "bbox", *(() if self.folder else ("image",)))
        for key in needed:
            if key not in names:
                raise DataError(
                    f"refcoco: {path.name!r} has no column {key!r}{near(key, names)} (it has {', '.join(names)});"
                    f" {self.layout}"
                )
        partition = path.name.partition("-")[0].removesuffix(".parquet")
        if "split" not in names and partition not in PARTITIONS:
            raise DataError(
                f"refcoco: {path.name!r} does not begin with one of {', '.join(PARTITIONS)}, and it has no column"
                " 'split'"
            )
        columns = [
            key for key in ("file_name", "answer", "segmentation", "bbox", "split", "question_id") if key in names
        ]
        for group in range(file.num_row_groups):
            for number, row in enumerate(file.read_row_group(group, columns=columns).to_pylist()):
                place = f"{path.name}[{group}/{number}]"
                try:
                    own = _partition(row.get("split", partition))
                    ref = str(row.get("question_id") or place)
                    parts = _image_name(row), own, _texts(row["answer"]), _box(row), _segmentation(row), ref
                    yield Reference(*parts, (str(path), group, number))
                except BadSample as error:
                    self.bad.add(place, error.reason)

    # -- samples -------------------------------------------------------------------------------------------------------

    def _further(self, id: str) -> list[str]:
        stored = [str(Path(self._stored[id][0]).stat().st_size)] if id in self._stored else []
        return [*self._masks[id], *stored]

    def _file(self, id: str, item: Item) -> Path | io.BytesIO:
        if self.folder is not None:
            return super()._file(id, item)
        path, group, number = self._stored[id]
        picture = _pictures(path, group)[number]
        if not isinstance(picture, Mapping) or not picture.get("bytes"):
            raise BadSample(id, "its row holds no picture; set data.root to COCO's train2014")
        return io.BytesIO(picture["bytes"])

    def image_stamp(self, id: str) -> str:
        """Return the state of the file that holds the image."""
        if self.folder is not None:
            return super().image_stamp(id)
        self._item(id)
        state = Path(self._stored[id][0]).stat()
        return f"{state.st_size}/{state.st_mtime_ns}"

    def masks(self, id: str, size: int | None = None) -> NDArray[np.bool_]:
        """Return ``[expressions, H, W]``: the pixels of what each of ``meta["referred"]`` names, at the image's size.

        Args:
            size: the width to return, if not the image's; pixels are then the nearest ones.

        Raises:
            BadSample: a mask that cannot be read, or of another size than the image.
        """
        from PIL import Image

        try:
            with Image.open(self._file(id, self._item(id))) as image:
                width, height = image.size
            found = [mask_of(json.loads(segmentation), height, width) for segmentation in self._masks[id]]
        except (ValueError, TypeError, OSError) as error:
            raise BadSample(id, f"a mask cannot be read: {error}") from None
        masks = np.stack(found)
        if size is None or size == width:
            return masks
        rows = np.arange(max(1, round(height * size / width))) * width // size
        return masks[:, np.minimum(rows, height - 1)][:, :, np.arange(size) * width // size]


@lru_cache(maxsize=2)
def _pictures(path: str, group: int) -> list[Any]:
    """The column ``image`` of one row group: reading is in order mostly, so that the last group is enough."""
    import pyarrow.parquet as pq

    pictures: list[Any] = pq.ParquetFile(path).read_row_group(group, columns=["image"])["image"].to_pylist()
    return pictures


def _partition(value: Any) -> str:
    if value not in PARTITIONS:
        raise BadSample("", f"split must be one of {', '.join(PARTITIONS)}, not {value!r}")
    return str(value)


def _image_name(row: Mapping[str, Any]) -> str:
    """The picture's name: REFER appends the number of the annotation (COCO_train2014_000000581857_16.jpg)."""
    name = row.get("file_name")
    if isinstance(name, str) and name:
        found = _COCO_NAME.fullmatch(name)
        return f"{found[1]}.jpg" if found else name
    if isinstance(row.get("image_id"), int):
        return f"COCO_train2014_{row['image_id']:012d}.jpg"
    raise BadSample("", f"file_name must be the name of an image, not {name!r}")


def _texts(value: Any) -> tuple[str, ...]:
    """The expressions, as REFER's users read them (``sent``, else as they were written)."""
    rows = value if isinstance(value, list) else []
    found = [(row.get("sent") or row.get("raw")) if isinstance(row, dict) else row for row in rows]
    texts = tuple(text.strip() for text in found if isinstance(text, str) and text.strip())
    if not texts or len(texts) != len(found):
        raise BadSample("", f"the expressions must be a list of texts, not {str(value)[:60]!r}")
    return texts


def _box(row: Mapping[str, Any]) -> tuple[float, ...]:
    box = row.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(v, int | float) for v in box):
        raise BadSample("", f"bbox must be x, y, width and height, not {str(box)[:60]!r}")
    return tuple(map(float, box))


def _segmentation(row: Mapping[str, Any]) -> str:
    """What :func:`mask_of` reads; checked in full when a mask is asked for, as an image's size belongs to it."""
    found = row.get("segmentation")
    if not isinstance(found, list | dict) or not found:
        raise BadSample("", f"segmentation must be polygons or runs, not {str(found)[:60]!r}")
    return json.dumps(found)
