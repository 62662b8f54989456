"""POPE's own questions (Li et al. 2023): is there an object, in three settings of what is asked for in vain."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from zoo.data.public.base import Item, PublicConfig, PublicSet, text_of
from zoo.data.sample import BadSample
from zoo.data.templates import SHORT
from zoo.errors import DataError

SETTINGS = ("random", "popular", "adversarial")


@dataclass(frozen=True, kw_only=True)
class PopeSetConfig(PublicConfig):
    """POPE's released questions about COCO's val2014 (or other images in the same form).

    ``file`` is the folder that holds coco_pope_random.json, coco_pope_popular.json and coco_pope_adversarial.json, or
    one of these files. ``root`` is the folder of the images, or holds it as val2014. All is the test split.
    """

    kind: ClassVar[str] = "pope"
    file: str = ""

    def open(self, image_size: int | None) -> PopeSet:
        return PopeSet(self)


class PopeSet(PublicSet):
    """See :class:`PopeSetConfig`. A sample is an image with its distinct questions.

    ``meta["questions"]``: question, answer (yes or no), kind ``exist``, and ``settings``: the files it stands in, each
    as often as it does. The task ``pope`` asks these questions and no others.
    """

    name = "pope"
    layout = (
        'expected the released lines, {"question_id": 1, "image": "NAME.jpg", "text": "Is there ...?", "label": "yes"}'
    )

    def _read(self) -> Iterator[tuple[str, Item]]:
        questions: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}
        for setting, path in self._files().items():
            for place, row in self.checked(self._lines(path), ("image", "text", "label"), path, places=False):
                try:
                    image, text, label = (text_of(row, key) for key in ("image", "text", "label"))
                    if label.lower() not in ("yes", "no"):
                        raise BadSample("", f"label must be yes or no, not {label!r}")
                except BadSample as error:
                    self.bad.add(place, error.reason)
                    continue
                known = questions.setdefault(image, {}).setdefault(
                    (text, label.lower()),
                    {"question": text, "answer": label.lower(), "kind": "exist", "settings": []},
                )
                known["settings"].append(setting)
        for image, asked in questions.items() if "test" in self.wanted else ():
            rows = list(asked.values())
            turns = tuple((row["question"], row["answer"]) for row in rows)
            meta = {"questions": rows, "turns": turns, "format": SHORT}
            texts = tuple(dict.fromkeys(row["answer"] for row in rows))
            yield Path(image).stem, Item(image, ("val2014",), "test", texts, meta)

    def _files(self) -> dict[str, Path]:
        """Return setting -> file.

        Raises:
            DataError: a folder without such files, or with those of several sets of images.
        """
        given = self.file(self.config.file, "data.file", folder=True)
        named = "names that end in _random.json, _popular.json or _adversarial.json"
        found: dict[str, Path] = {}
        for path in [given] if given.is_file() else sorted(given.glob("*.json")):
            setting = path.stem.rpartition("_")[2]
            if setting not in SETTINGS:
                continue
            if setting in found:
                raise DataError(
                    f"pope: {str(given)!r} holds {found[setting].name!r} and {path.name!r}; put the files about one set"
                    " of images into a folder of their own"
                )
            found[setting] = path
        if not found:
            raise DataError(f"pope: data.file={self.config.file}: expected files with {named}")
        return {setting: found[setting] for setting in SETTINGS if setting in found}

    def _lines(self, path: Path) -> Iterator[Any]:
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (UnicodeDecodeError, OSError) as error:
            raise DataError(f"pope: {path.name!r} cannot be read ({error}); {self.layout}") from None
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise DataError(
                        f"pope: line {number} of {path.name!r} is no JSON ({error}); {self.layout}"
                    ) from None
