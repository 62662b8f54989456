"""Images with LISA's JSON files (ReasonSeg): questions or names, polygons of the target, areas to ignore."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from zoo.data.decode import decode
from zoo.data.image_files import EXTENSIONS, ImageFolder
from zoo.data.sample import BadSample, Sample, SourceConfig, check_split, stable_hash
from zoo.errors import DataError
from zoo_grounding.marks import TARGET
from zoo_grounding.masks import IGNORED

SPLITS = ("train", "val", "test")
NAMED = "Can you segment {} in this image?"
SENTENCE = "{} Please respond with segmentation mask."


@dataclass(frozen=True, kw_only=True)
class ReasonSegConfig(SourceConfig):
    """A folder laid out as ReasonSeg: ``train``, ``val`` and ``test``, in each an image and a JSON file of one name.

    A JSON file has ``text`` (questions or names of the same target), ``is_sentence`` and ``shapes``, each with
    ``label`` (``target``, ``ignore``, or ``flag``, which is left out) and ``points``. Every text is a sample, all of an
    image one cluster. ``explanations`` is LISA's file of longer answers, ``[{"image", "query", "outputs"}]``, below
    ``root``: of the training samples it names, a tenth answers in words alone, and half of the others adds the words
    to the mask; which ones follows from a hash of the sample. ``max_bad`` is how many files may be unreadable.
    """

    kind: ClassVar[str] = "reason-seg"
    root: str = ""
    explanations: str = ""
    max_bad: int = 0
    max_pixels: int = 50_000_000

    def open(self, image_size: int | None) -> ReasonSeg:
        return ReasonSeg(self)


class ReasonSeg:
    """See :class:`ReasonSegConfig`. Ids are ``SPLIT/NAME#n``, the n-th text of a file.

    Raises:
        DataError: the folder, or what it should hold, is not there; a JSON file is no JSON.
    """

    name = "reason-seg"
    licence = "as the folder says; ReasonSeg: images of OpenImages and ScanNetv2, non-commercial research"

    def __init__(self, config: ReasonSegConfig) -> None:
        if not config.root:
            raise DataError("data=reason-seg needs data.root, a folder with train, val or test in it")
        self.config = config
        self.folder = ImageFolder(config.root)
        self.max_bad = config.max_bad
        self._images: dict[str, Path] = {}
        self._texts: dict[str, list[str]] = {}
        self._ids: dict[str, list[str]] = {}
        stamp: list[object] = []
        for split in SPLITS:
            files = sorted((self.folder.root / split).glob("*.json"))
            own: list[str] = []
            for file in files:
                about = _read(file)
                image = next((p for e in sorted(EXTENSIONS) if (p := file.with_suffix(e)).is_file()), None)
                if image is None:
                    raise DataError(f"{split}/{file.name} has no image of its name beside it")
                key = f"{split}/{file.stem}"
                self._images[key] = image
                self._texts[key] = [str(text) for text in about["text"]]
                own += [f"{key}#{n}" for n in range(len(about["text"]))]
                stamp += [key, file.stat().st_size, file.stat().st_mtime_ns, image.stat().st_size]
            self._ids[split] = own
        if not self._images:
            raise DataError(
                f"{config.root!r} has no JSON files in train, val or test; set data.root to ReasonSeg's folder"
            )
        self._explained = self._read_explanations()
        self.version = f"{stable_hash(*stamp, config.explanations):016x}"
        self._masks = lru_cache(maxsize=256)(self._mask)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_masks"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._masks = lru_cache(maxsize=256)(self._mask)

    def _read_explanations(self) -> dict[tuple[str, str], str]:
        if not self.config.explanations:
            return {}
        path = self.folder.below(self.config.explanations)
        if not path.is_file():
            raise DataError(
                f"data.explanations = {self.config.explanations!r} is not there; it is relative to data.root"
            )
        rows = _json(path)
        try:
            return {(Path(row["image"]).stem, str(row["query"])): str(row["outputs"]) for row in rows}
        except (KeyError, TypeError):
            raise DataError(
                f"{path.name}: expected a list of objects with 'image', 'query' and 'outputs' (LISA)"
            ) from None

    def ids(self, split: str) -> list[str]:
        """Return the ids of a split, ordered."""
        check_split(split)
        return list(self._ids[split])

    def sample(self, id: str) -> Sample:
        """Return an image with one question; ``meta["masks"]`` has 1 inside, 255 where nobody scores.

        Raises:
            BadSample: the image cannot be read, or a shape has no points.
        """
        key, _, number = id.rpartition("#")
        if key not in self._images or not number.isdigit() or int(number) >= len(self._texts[key]):
            raise DataError(f"unknown id {id!r} of reason-seg; ids are SPLIT/NAME#n, as val/image_12#0")
        image = decode(self._images[key], id, self.config.max_pixels)
        text = self._texts[key][int(number)]
        about = _read(self._images[key].with_suffix(".json"))
        question = (SENTENCE if about["is_sentence"] else NAMED).format(text)
        answer, masks = TARGET, [self._masks(key, image.height, image.width)]
        words = self._explained.get((self._images[key].stem, text))
        if words and key.startswith("train/"):
            place = stable_hash("reason-seg-answer", id) % 20
            answer = words if place < 2 else f"{TARGET} {words}" if place < 11 else TARGET
            masks = masks if TARGET in answer else []
        meta = {"turns": [(question, f"{answer}." if answer == TARGET else answer)], "masks": masks, "cluster": key}
        meta["questions"] = [{"question": question, "kind": "reason" if about["is_sentence"] else "name"}]
        return Sample(id, image, (text,), meta)

    def _mask(self, key: str, height: int, width: int) -> NDArray[np.uint8]:
        return drawn(_read(self._images[key].with_suffix(".json"))["shapes"], height, width, key)


def drawn(shapes: Sequence[Any], height: int, width: int, id: str = "mask") -> NDArray[np.uint8]:
    """Return [height, width] with 1 in target shapes and 255 in shapes to ignore, larger shapes painted first
    (``get_mask_from_json`` of LISA).

    Raises:
        BadSample: a shape without a label or points.
    """
    from PIL import Image, ImageDraw

    def painted(points: Any) -> NDArray[np.bool_]:
        canvas = Image.new("1", (width, height))
        ImageDraw.Draw(canvas).polygon([(int(x), int(y)) for x, y in points], fill=1, outline=1)
        return np.asarray(canvas, np.bool_)

    found: list[tuple[NDArray[np.bool_], int]] = []
    for shape in shapes:
        try:
            label, points = str(shape["label"]).lower(), shape["points"]
            if label == "flag":  # meaningless, says the release
                continue
            found.append((painted(points), IGNORED if "ignore" in label else 1))
        except (KeyError, TypeError, ValueError) as error:
            raise BadSample(id, f"a shape needs 'label' and 'points', two numbers each ({error})") from None
    out = np.zeros((height, width), np.uint8)
    for inside, value in sorted(found, key=lambda pair: -int(pair[0].sum())):
        out[inside] = value
    return out


def _read(file: Path) -> dict[str, Any]:
    return _parsed(file, file.stat().st_mtime_ns, file.stat().st_size)


@lru_cache(maxsize=4096)
def _parsed(file: Path, changed: int, size: int) -> dict[str, Any]:
    about = _json(file)
    if not (
        isinstance(about, dict) and {"text", "is_sentence", "shapes"} <= set(about) and isinstance(about["text"], list)
    ):
        raise DataError(
            f"{file.parent.name}/{file.name}: expected 'text' (a list), 'is_sentence' and 'shapes' (ReasonSeg)"
        )
    return about


def _json(file: Path) -> Any:
    """Read JSON that is UTF-8, or cp1252, as some released files are."""
    raw = file.read_bytes()
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError:
        try:
            return json.loads(raw.decode("cp1252"))
        except ValueError as error:
            raise DataError(f"{file.parent.name}/{file.name} is no JSON: {error}") from None
    except ValueError as error:
        raise DataError(f"{file.parent.name}/{file.name} is no JSON: {error}") from None
