"""Hugging Face datasets: rows of a table whose columns the configuration names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any, ClassVar

import numpy as np

from zoo.data.decode import decode
from zoo.data.hf_tables import Table, mapped, streamed
from zoo.data.image_files import check_fractions, split_of
from zoo.data.order import Order
from zoo.data.sample import SPLITS, BadSample, Sample, SourceConfig, check_split
from zoo.data.window import WindowOrder
from zoo.errors import ConfigError, DataError, near


@dataclass(frozen=True, kw_only=True)
class HfConfig(SourceConfig):
    """A Hugging Face dataset.

    ``path`` is a folder or file of parquet or arrow, a folder that ``save_to_disk`` wrote, or the id of a dataset on
    the hub (``config`` and ``revision`` are the hub's). Columns are named: ``image`` (bytes, or ``datasets``' images;
    empty = text alone), ``texts`` (columns joined by ``+``, each a text or a list of texts), ``question`` with
    ``answers`` (a text or a list of them each; the first answer is trained on), and ``id`` (empty = the number of the
    row). ``splits`` says which split of the dataset is train, val and test (``{val: validation}``); by default those of
    these names. Where the dataset has one split alone, ``val_fraction`` and ``test_fraction`` of it are held out by a
    hash of the ids.

    ``streaming`` reads parquet files where they lie, a row group at a time, without copying them into Arrow files
    first: row groups are shuffled, and samples among ``window`` of them at a time. Up to ``max_bad`` rows that cannot
    be used are logged and skipped; images of more than ``max_pixels`` are refused.
    """

    kind: ClassVar[str] = "hf"
    path: str = ""
    config: str = ""
    revision: str = ""
    image: str = "image"
    texts: str = ""
    question: str = ""
    answers: str = ""
    id: str = ""
    splits: dict[str, str] = field(default_factory=dict)
    streaming: bool = False
    window: int = 8
    val_fraction: float = 0.05
    test_fraction: float = 0.1
    max_bad: int = 10
    max_pixels: int = 50_000_000

    def open(self, image_size: int | None) -> HfDataset:
        return HfDataset(self)


class HfDataset:
    """See :class:`HfConfig`. Opening reads footers and, where one is named, the column of ids.

    Raises:
        ConfigError: No ``path``, a column that is not there, or nothing to read.
        DataError: No such data or split, or ids that occur twice.
        MissingExtra: ``datasets`` is not installed (``streaming`` does without).
    """

    name = "hf"
    licence = "as given by the owner of the dataset"

    def __init__(self, config: HfConfig) -> None:
        if not config.path:
            raise ConfigError("data=hf needs path, a folder, a file or a dataset's id on the hub: data.path=PATH")
        if not config.image and not config.texts and not config.question:
            raise ConfigError("data=hf reads no column: set data.image, data.texts or data.question")
        if bool(config.question) != bool(config.answers):
            raise ConfigError("data.question and data.answers belong together: set both or neither")
        if config.window < 1:
            raise ConfigError(f"data.window = {config.window}: expected 1 or more row groups")
        check_fractions(config.val_fraction, config.test_fraction)
        self.config = config
        self.columns = tuple(filter(None, config.texts.split("+")))
        self.max_bad = config.max_bad
        if config.streaming:
            self.tables = streamed(config.path, config.revision, config.splits, config.window)
        else:
            self.tables = mapped(config.path, config.config, config.revision, config.splits)
        for table in self.tables.values():
            self._check_columns(table)
        self._rows: dict[str, tuple[str, int]] = {}  # id -> split of the dataset, row
        for split, table in self.tables.items():
            for row, id in enumerate(self._ids(split, table)):
                if id in self._rows:
                    raise DataError(
                        f"the id {id!r} stands in row {self._rows[id][1]} and row {row} of {config.path!r}: name a"
                        " column whose values are distinct, or none (data.id=)"
                    )
                self._rows[id] = (split, row)
        if not self._rows:
            raise DataError(f"the dataset {config.path!r} has no rows")
        self._splits: dict[str, list[str]] = {split: [] for split in SPLITS}
        alone = len(self.tables) == 1 and "train" in self.tables
        for id, (split, _) in self._rows.items():
            own = split_of((id,), config.val_fraction, config.test_fraction) if alone else split
            self._splits[own].append(id)
        told = [[split, table.mark(), len(table)] for split, table in self.tables.items()]
        columns = [config.image, config.texts, config.question, config.answers, config.id]
        fractions = [config.val_fraction, config.test_fraction] if alone else []
        self.version = hashlib.sha256(json.dumps([told, columns, fractions]).encode()).hexdigest()[:16]
        if config.streaming:
            self.order = self._order

    def _check_columns(self, table: Table) -> None:
        c = self.config
        named = {"image": c.image, "question": c.question, "answers": c.answers, "id": c.id}
        wanted = [(key, name) for key, name in named.items() if name] + [("texts", name) for name in self.columns]
        for key, name in wanted:
            if name not in table.columns:
                hint = near(name, table.columns) or f"; it has {', '.join(table.columns)}"
                raise ConfigError(f"data.{key} = {name!r} is no column of {c.path!r}{hint}")

    def _ids(self, split: str, table: Table) -> list[str]:
        if self.config.id:
            return [str(value) for value in table.column(self.config.id)]
        return [f"{split}/{row:08d}" for row in range(len(table))]

    # -- the source ------------------------------------------------------------------------------------------------

    def ids(self, split: str) -> list[str]:
        check_split(split)
        return self._splits[split]

    def sample(self, id: str) -> Sample:
        """Return a row as a sample.

        Raises:
            BadSample: The row has no image or no text where one is named, or its image cannot be read.
            DataError: A file is damaged.
        """
        return self._read(id, images=bool(self.config.image))

    def text_sample(self, id: str) -> Sample:
        """Return the sample without its image."""
        return self._read(id, images=False)

    def _read(self, id: str, images: bool) -> Sample:
        if id not in self._rows:
            raise BadSample(id, "the dataset has no such row")
        split, number = self._rows[id]
        row, c = self.tables[split].row(number), self.config
        texts = tuple(text for name in self.columns for text in _texts(row[name], id, name))
        if self.columns and not texts:
            raise BadSample(id, f"no text in {' or '.join(map(repr, self.columns))}")
        meta: dict[str, Any] = {}
        if c.question:
            asked, given = _texts(row[c.question], id, c.question), _answers(row[c.answers], id, c.answers)
            if not asked or not given:
                raise BadSample(id, f"no text in {(c.answers if asked else c.question)!r}")
            meta["questions"] = [{"question": asked[0], "answers": given}]
            meta["turns"] = ((asked[0], given[0]),)
            texts = texts or tuple(dict.fromkeys(given))
        image = decode(BytesIO(_bytes(row[c.image], id, c.image)), id, c.max_pixels) if images else None
        return Sample(id, image, texts, meta)

    def _order(self, split: str, seed: int) -> Order:
        """Row groups in an order drawn for each epoch, rows shuffled among ``window`` of them."""
        ids = self.ids(split)
        place = {id: n for n, id in enumerate(ids)}
        blocks: list[Any] = []
        for name, table in self.tables.items():
            own = [id for id, (part, _) in self._rows.items() if part == name]
            for block in table.blocks() or []:
                kept = [place[own[row]] for row in block.tolist() if own[row] in place]
                blocks += [np.array(kept)] if kept else []
        return WindowOrder(ids, seed, blocks, self.config.window)

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["config"])  # type: ignore[misc]


def _texts(value: Any, id: str, column: str) -> list[str]:
    """The texts of a cell that are not empty."""
    values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if any(text is not None and not isinstance(text, str) for text in values):
        raise BadSample(id, f"the column {column!r} holds no text, but {type(values[0]).__name__}")
    return [text.strip() for text in values if text and text.strip()]


def _answers(value: Any, id: str, column: str) -> list[str]:
    """As ``_texts``; VQAv2's rows hold ``[{"answer": ...}, ...]``."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = [row.get("answer") if isinstance(row, Mapping) else row for row in value]
    return _texts(value, id, column)


def _bytes(value: Any, id: str, column: str) -> bytes:
    """The bytes of an image's cell."""
    inner = value.get("bytes") if isinstance(value, Mapping) else value
    if isinstance(inner, bytes | bytearray | memoryview):
        return bytes(inner)
    if isinstance(value, Mapping) and value.get("path"):
        raise BadSample(id, f"the column {column!r} names the file {value['path']!r} and does not hold the image")
    raise BadSample(id, f"no image in {column!r}" if inner is None else f"the column {column!r} holds no image")
