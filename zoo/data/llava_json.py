"""Instruction data in LLaVA's JSON: rows of an image and a conversation about it, or of a conversation alone."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from zoo.data.decode import decode
from zoo.data.image_files import ImageFolder, check_fractions, near_path, split_of
from zoo.data.sample import SPLITS, BadSample, BadSamples, Sample, SourceConfig, check_split
from zoo.errors import ConfigError, DataError, near

PLACE = "<image>"
_ASKS, _ANSWERS = ("human", "user"), ("gpt", "assistant")


@dataclass(frozen=True, kw_only=True)
class LlavaJsonConfig(SourceConfig):
    """Conversations about images, as LLaVA's instruction data hold them.

    ``file`` is a ``.json`` list or a ``.jsonl`` of rows ``{"id": ..., "image": PATH, "conversations": [{"from":
    "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cup."}, ...]}``; ``image`` is a path
    relative to ``root`` (a list of paths where several images are shown), and a row without one is text alone. The
    first turns hold one ``<image>`` for each image. Speakers are human and gpt (or user and assistant) in turns.
    ``val_fraction`` and ``test_fraction`` are held out by a hash of the image, so that all conversations about one
    image are in one split. Up to ``max_bad`` rows or images that cannot be used are logged and skipped. Images of more
    than ``max_pixels`` are refused before they are decoded.
    """

    kind: ClassVar[str] = "llava-json"
    file: str = ""
    root: str = ""
    val_fraction: float = 0.01
    test_fraction: float = 0.01
    max_bad: int = 10
    max_pixels: int = 50_000_000

    def open(self, image_size: int | None) -> LlavaJson:
        return LlavaJson(self)


@dataclass(frozen=True, slots=True)
class _Row:
    images: tuple[str, ...]
    turns: tuple[tuple[str, str], ...]


class LlavaJson:
    """See :class:`LlavaJsonConfig`. Opening reads every row and checks that its images are there; it decodes none.

    Raises:
        ConfigError: no ``file``, no ``root`` though rows have images, or fractions that leave nothing to train on.
        DataError: the file is missing or no JSON, a path leads out of ``root``, a speaker is unknown, or more than
            ``max_bad`` rows cannot be used.
    """

    name = "llava-json"
    licence = "as given by the owner of the data"

    def __init__(self, config: LlavaJsonConfig) -> None:
        if not config.file:
            raise ConfigError("the llava-json source needs file, the .json or .jsonl of conversations: data.file=PATH")
        check_fractions(config.val_fraction, config.test_fraction)
        self.config = config
        self.max_bad = config.max_bad
        self.file = Path(config.file).expanduser()
        if not self.file.is_file():
            raise DataError(
                f"the conversations file {str(self.file)!r} does not exist{near_path(self.file)}; set data.file"
            )
        self.folder = ImageFolder(config.root) if config.root else None
        self.bad = BadSamples(f"llava-json {self.file.name}", config.max_bad)
        self._rows = self._read()
        if not self._rows:
            raise DataError(f"no usable rows in {self.file.name!r}: it is empty or every row was skipped")
        self._splits: dict[str, list[str]] = {split: [] for split in SPLITS}
        for id, row in self._rows.items():
            self._splits[self._split(row.images[0] if row.images else id)].append(id)
        digest = hashlib.sha256()
        for id, row in self._rows.items():
            sizes = [self._inside(image).stat().st_size for image in row.images]
            digest.update(
                json.dumps(
                    [id, self._split(row.images[0] if row.images else id), row.images, row.turns, sizes]
                ).encode()
                + b"\n"
            )
        self.version = digest.hexdigest()[:16]

    # -- reading the rows ----------------------------------------------------------------------------------------------

    def _read(self) -> dict[str, _Row]:
        found: dict[str, _Row] = {}
        seen: Counter[str] = Counter()
        for place, value in self._values():
            try:
                row = self._row(value)
            except BadSample as error:
                self.bad.add(place, error.reason)
                continue
            id = str(value["id"]) if isinstance(value.get("id"), str | int) else place
            seen[id] += 1  # LLaVA's mixture uses the id of an image for every conversation about it
            while (distinct := id if seen[id] == 1 else f"{id}#{seen[id]}") in found:
                seen[id] += 1
            found[distinct] = row
        return found

    def _values(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (where it stands, row); what is no row is counted in ``bad``."""
        name = self.file.name
        try:
            text = self.file.read_text(encoding="utf-8-sig")
        except (UnicodeDecodeError, OSError) as error:
            raise DataError(f"the conversations file {name!r} cannot be read: {error}") from None
        if self.file.suffix.lower() == ".jsonl":
            for number, line in enumerate(text.splitlines(), 1):
                if line.strip():
                    try:
                        yield from self._checked(f"{name}:{number}", json.loads(line))
                    except ValueError as error:
                        self.bad.add(f"{name}:{number}", f"not JSON ({error})")
            return
        try:
            values = json.loads(text)
        except ValueError as error:
            raise DataError(
                f"the conversations file {name!r} is not JSON ({error}); name it .jsonl if rows are lines"
            ) from None
        if not isinstance(values, list):
            raise DataError(f"the conversations file {name!r} must hold a list of rows, not a {type(values).__name__}")
        for number, value in enumerate(values):
            yield from self._checked(f"{name}[{number}]", value)

    def _checked(self, place: str, value: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        if isinstance(value, dict):
            yield place, value
        else:
            self.bad.add(place, f"a row must be an object, not a {type(value).__name__}")

    def _row(self, value: dict[str, Any]) -> _Row:
        image = value.get("image")
        images = [] if image is None else [image] if isinstance(image, str) else image
        if not isinstance(images, list) or not all(isinstance(i, str) and i for i in images):
            raise BadSample("", f"image must be a path or a list of paths, not {image!r}")
        for path in images:
            if not self._inside(path).is_file():
                raise BadSample("", f"the image {path!r} is missing")
        turns = _turns(value.get("conversations"))
        places = sum(question.count(PLACE) for question, _ in turns)
        if places != len(images):
            raise BadSample("", f"{len(images)} images and {places} {PLACE} in the questions; they must be as many")
        return _Row(tuple(images), turns)

    def _inside(self, path: str) -> Path:
        if self.folder is None:
            raise ConfigError("rows of the llava-json source name images: set data.root, the folder that holds them")
        return self.folder.inside(path)

    def _split(self, key: str) -> str:
        return split_of(("llava-json", key), self.config.val_fraction, self.config.test_fraction)

    # -- samples -------------------------------------------------------------------------------------------------------

    def ids(self, split: str) -> list[str]:
        """Return the ids of a split in the order of the file; a repeated id gets "#2", "#3", ..."""
        check_split(split)
        return list(self._splits[split])

    def sample(self, id: str) -> Sample:
        """Return the first image (None for text alone) and the answers as texts.

        ``meta``: ``turns`` (question, answer), with ``<image>`` where an image stands; ``images``, all of them, where
        there are several; ``cluster``, the first image's path.

        Raises:
            DataError: there is no such id.
            BadSample: an image cannot be decoded or is too large.
        """
        row = self._rows.get(id)
        if row is None:
            raise DataError(f"unknown sample {id!r}{near(id, list(self._rows)[:10000])}")
        images = tuple(decode(self._inside(path), id, self.config.max_pixels) for path in row.images)
        meta: dict[str, Any] = {"turns": row.turns, "cluster": row.images[0] if row.images else id}
        if len(images) > 1:
            meta["images"] = images
        return Sample(id, images[0] if images else None, tuple(dict.fromkeys(a for _, a in row.turns)), meta)

    def image_stamp(self, id: str) -> str:
        """Return the state of the files of a row's images, which changes when they do: sizes and times of change."""
        return self.folder.stamp(self._rows[id].images) if self.folder else ""


def _turns(value: Any) -> tuple[tuple[str, str], ...]:
    """Return (question, answer) pairs; a first turn of the model is dropped, as LLaVA's preprocessing does.

    Raises:
        BadSample: no conversation, an unknown speaker, speakers out of turn, or an empty answer.
    """
    if not isinstance(value, list) or not value:
        raise BadSample("", "conversations must be a list of turns")
    said: list[tuple[bool, str]] = []
    for turn in value:
        speaker, text = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        if not isinstance(text, str) or not isinstance(speaker, str):
            raise BadSample("", f"a turn must have from and value as texts, not {str(turn)[:60]!r}")
        if speaker not in (*_ASKS, *_ANSWERS):
            raise BadSample(
                "", f"unknown speaker {speaker!r}{near(speaker, (*_ASKS, *_ANSWERS))}; expected human or gpt"
            )
        said.append((speaker in _ASKS, text.strip()))
    if not said[0][0]:
        said = said[1:]
    if not said or len(said) % 2 or any(asks != (n % 2 == 0) for n, (asks, _) in enumerate(said)):
        raise BadSample("", "human and gpt must take turns, human first and gpt last")
    if not all(text for asks, text in said if not asks):
        raise BadSample("", "an answer is empty")
    if any(PLACE in text for asks, text in said if not asks):
        raise BadSample("", f"{PLACE} stands in an answer; images are placed in questions")
    return tuple((said[n][1], said[n + 1][1]) for n in range(0, len(said), 2))
