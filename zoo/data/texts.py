"""Plain texts of the user's own: files of paragraphs, or of one JSON object a line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from zoo.data.image_files import check_fractions, near_path, split_of
from zoo.data.sample import SPLITS, BadSamples, Sample, SourceConfig, check_split
from zoo.errors import ConfigError, DataError, near

ENDINGS = (".jsonl", ".txt")


@dataclass(frozen=True, kw_only=True)
class TextsConfig(SourceConfig):
    """Texts without images, for language modelling beside images or alone.

    ``root`` is a file or a folder, of which all files ending in .txt or .jsonl are read, those of its folders too. A
    .txt file holds a text a paragraph (paragraphs are parted by empty lines); a line of a .jsonl file is an object
    whose ``text_column`` is a text, or a list of texts of one sample. Ids are ``FILE:LINE``. The split follows from a
    hash of the text, so that equal texts are in one split. Up to ``max_bad`` lines that cannot be used are logged and
    skipped.
    """

    kind: ClassVar[str] = "texts"
    root: str = ""
    text_column: str = "text"
    val_fraction: float = 0.01
    test_fraction: float = 0.01
    max_bad: int = 10

    def open(self, image_size: int | None) -> Texts:
        return Texts(self)


class Texts:
    """See :class:`TextsConfig`. Opening reads all texts.

    Raises:
        ConfigError: no ``root``, or fractions that leave nothing to train on.
        DataError: a missing file or folder, no texts in it, or more than ``max_bad`` lines that cannot be used.
    """

    name = "texts"
    licence = "as given by the owner of the texts"

    def __init__(self, config: TextsConfig) -> None:
        if not config.root:
            raise ConfigError("the texts source needs root, a file or a folder of texts: data.root=PATH")
        check_fractions(config.val_fraction, config.test_fraction)
        self.config = config
        self.max_bad = config.max_bad
        root = Path(config.root).expanduser()
        if not root.exists():
            raise DataError(f"the texts {str(root)!r} do not exist{near_path(root)}; set data.root")
        self.bad = BadSamples(f"texts {root.name}", config.max_bad)
        files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.suffix.lower() in ENDINGS)
        if not files or files[0].suffix.lower() not in ENDINGS:
            raise DataError(f"no texts in {str(root)!r}: expected files ending in {' or '.join(ENDINGS)}")
        self._texts: dict[str, tuple[str, ...]] = {}
        for file in files:
            name = file.name if root.is_file() else file.relative_to(root).as_posix()
            for line, texts in self._of(file, name):
                self._texts[f"{name}:{line}"] = texts
        if not self._texts:
            raise DataError(f"no usable texts in {str(root)!r}: every line was empty or skipped")
        self._splits: dict[str, list[str]] = {split: [] for split in SPLITS}
        digest = hashlib.sha256()
        for id, texts in self._texts.items():
            self._splits[split_of(("texts", *texts), config.val_fraction, config.test_fraction)].append(id)
            digest.update(json.dumps([id, texts]).encode())
        self.version = f"{config.val_fraction}/{config.test_fraction}/{digest.hexdigest()[:16]}"

    def _of(self, file: Path, name: str) -> Iterator[tuple[int, tuple[str, ...]]]:
        """Yield (line number, texts) of one file."""
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"the file {name!r} cannot be read: {error}; expected UTF-8 text") from None
        if file.suffix.lower() == ".txt":
            yield from _paragraphs(lines)
            return
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                self.bad.add(f"{name}:{number}", f"not JSON ({error})")
                continue
            found = row.get(self.config.text_column) if isinstance(row, dict) else None
            texts = [found] if isinstance(found, str) else found
            if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
                self.bad.add(f"{name}:{number}", f"expected an object with a text as {self.config.text_column!r}")
                continue
            yield number, tuple(text.strip() for text in texts)

    def ids(self, split: str) -> list[str]:
        """Return the ids of a split in the order of files and lines."""
        check_split(split)
        return list(self._splits[split])

    def sample(self, id: str) -> Sample:
        """Return one text, or the texts of one line, without an image.

        Raises:
            DataError: there is no such id.
        """
        if id not in self._texts:
            raise DataError(f"unknown text {id!r}{near(id, list(self._texts)[:10000])}")
        return Sample(id, None, self._texts[id])

    text_sample = sample


def _paragraphs(lines: list[str]) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yield (number of the first line, (text,)) of what empty lines part, its own lines joined by blanks."""
    kept: list[str] = []
    for number, line in enumerate([*lines, ""], 1):
        if line.strip():
            kept.append(line.strip())
        elif kept:
            yield number - len(kept), (" ".join(kept),)
            kept = []
