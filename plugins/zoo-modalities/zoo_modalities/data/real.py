"""Real small sets that come inside scikit-learn: handwritten digits, and tables of measurements."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from zoo.data.sample import Sample, SourceConfig, check_split, stable_hash
from zoo.errors import ConfigError, DataError
from zoo_modalities.data.signal import Signal

TABLES: dict[str, tuple[str, ...]] = {
    "breast-cancer": ("malignant", "benign"),
    "wine": ("class_0", "class_1", "class_2"),
    "iris": ("setosa", "versicolor", "virginica"),
}
"""Table -> its labels, in scikit-learn's order."""
TEST_SHARE, VAL_SHARE = 0.25, 0.1


def scikit_learn(what: str) -> Any:
    """``sklearn.datasets``, imported when it is needed.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    try:
        return importlib.import_module("sklearn.datasets")
    except ImportError:
        raise ConfigError(
            f"{what} needs the package scikit-learn, which is not installed: pip install scikit-learn"
        ) from None


class Real:
    """Rows by number. Which split a row is in follows from a hash of its number: about a quarter test, a tenth val."""

    max_bad = 0
    licence: str

    def __init__(self, name: str, rows: int) -> None:
        self.name = name
        self._splits: dict[str, list[str]] = {"train": [], "val": [], "test": []}
        for row in range(rows):
            place = stable_hash("real", name, row) / 2**64
            split = "test" if place < TEST_SHARE else "val" if place < TEST_SHARE + VAL_SHARE else "train"
            self._splits[split].append(f"{row:04d}")
        self._known = {id for ids in self._splits.values() for id in ids}

    def ids(self, split: str) -> list[str]:
        """Return the ids of a split, ordered."""
        check_split(split)
        return list(self._splits[split])

    def row(self, id: str) -> int:
        """The row of an id.

        Raises:
            DataError: There is no such id.
        """
        if id not in self._known:
            raise DataError(f"{self.name} has no item {id!r}: its ids are row numbers of four digits")
        return int(id)


@dataclass(frozen=True, kw_only=True)
class DigitsConfig(SourceConfig):
    """1,797 digits that 43 people wrote, 8 x 8 pixels of 17 grey values (UCI, Alpaydin and Kaynak 1998), as images."""

    kind: ClassVar[str] = "digits"
    labels: ClassVar[tuple[str, ...]] = tuple("0123456789")

    def open(self, image_size: int | None) -> Digits:
        return Digits()


class Digits(Real):
    """See `DigitsConfig`. Black on white, as the icons are.

    Raises:
        ConfigError: scikit-learn is not installed.
    """

    licence = "UCI Optical Recognition of Handwritten Digits, CC BY 4.0, as shipped in scikit-learn"
    labels = DigitsConfig.labels

    def __init__(self) -> None:
        found = scikit_learn("data=digits").load_digits()
        self._pixels: NDArray[np.uint8] = (255 - found.images * 255 / 16).round().astype(np.uint8)  # [N, 8, 8]
        self._labels = [str(label) for label in found.target]
        self.version = f"uci-{len(self._labels)}"
        super().__init__("digits", len(self._labels))

    def sample(self, id: str) -> Sample:
        """Return a digit as an RGB image with its ``label``."""
        from PIL import Image

        row = self.row(id)
        label = self._labels[row]
        image = Image.fromarray(np.repeat(self._pixels[row][..., None], 3, 2))
        return Sample(id, image, (label,), {"label": label, "name": label})


@dataclass(frozen=True, kw_only=True)
class TableConfig(SourceConfig):
    """Rows of measurements with a class.

    Attributes:
        table: ``breast-cancer`` (569 rows of 30), ``wine`` (178 of 13) or ``iris`` (150 of 4).
    """

    kind: ClassVar[str] = "table"

    table: Literal["breast-cancer", "wine", "iris"] = "breast-cancer"

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes."""
        return TABLES[self.table]

    def open(self, image_size: int | None) -> Table:
        return Table(self)


class Table(Real):
    """See `TableConfig`. Columns are standardised by the mean and deviation of the training rows.

    Raises:
        ConfigError: scikit-learn is not installed.
    """

    licence = "UCI Machine Learning Repository, CC BY 4.0, as shipped in scikit-learn"

    def __init__(self, config: TableConfig) -> None:
        self.labels = config.labels
        load = getattr(scikit_learn(f"data={config.table}"), f"load_{config.table.replace('-', '_')}")
        found = load()
        super().__init__(config.table, len(found.target))
        train = found.data[[int(id) for id in self._splits["train"]]]
        self._values: NDArray[np.float64] = (found.data - train.mean(0)) / np.maximum(train.std(0), 1e-9)
        self._labels = [self.labels[int(label)] for label in found.target]
        self.columns = tuple(str(name) for name in found.feature_names)
        self.version = f"uci-{len(self._labels)}x{self._values.shape[1]}"

    def sample(self, id: str) -> Sample:
        """Return a row as ``meta["modalities"]["tabular"]`` with its ``label``."""
        row = self.row(id)
        label = self._labels[row]
        values = Signal(self._values[row].astype(np.float32))
        return Sample(id, None, (label,), {"label": label, "modalities": {"tabular": values}})
