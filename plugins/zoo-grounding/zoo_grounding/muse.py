"""MUSE, questions answered with masks of several instances, in its released JSON (arXiv 2312.02228, section 4)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from zoo.data.public.base import Item, PublicConfig, PublicSet
from zoo.data.public.masks import mask_of
from zoo.data.sample import SPLITS, BadSample, Sample
from zoo.data.scenes_layout import Stream
from zoo.errors import ConfigError
from zoo_grounding.muse_templates import SEG

FOLDERS = ("train2017", "val2017", "train2014", "val2014")

REQUESTS = (  # the release's long questions; its loader draws one
    "{question} Please respond with segmentation mask.",
    "{question} Please output segmentation mask.",
)

LISTS = (  # answers where the file has none, for several targets; one target is always "NAME is {seg}."
    "{names} are {segs}.",
    "{names} are {segs}, separately.",
    "Sure, {names} are {segs}.",
    "Sure, {names} are {segs}, separately.",
    "the segmentation result of {names} are {segs}.",
)


@dataclass(frozen=True, kw_only=True)
class MuseConfig(PublicConfig):
    """MUSE by path: ``train``, ``val`` and ``test`` name its files (muse_train.json, muse_val.json, and of
    muse_test_less.json, muse_test_many.json one).

    A file is a list of images: ``file_name`` (COCO's train2014) or ``coco_url``, ``height``, ``width``, ``questions``
    (texts), ``answers`` (a list a question of ``{"segmentation", "category_name", "rephrased_name"}``, each a target in
    order of mention) and ``text_answers`` (texts with ``{seg}`` once a target; one may be null or all be missing: the
    answer is then made of the names). ``request`` adds what asks for masks to every question, as the release does.
    """

    kind: ClassVar[str] = "muse"
    train: str = ""
    val: str = ""
    test: str = ""
    request: bool = True

    def open(self, image_size: int | None) -> Muse:
        return Muse(self)


class MaskedAnswers(PublicSet):
    """Base of sources of one question a sample, answered with the masks of several targets.

    ``meta``: ``turns``, one question and its answer with ``{seg}`` once a target; ``targets``, their names in this
    order; ``masks`` [targets] of [H, W] bool, in ``sample`` alone; ``cluster``, the image.
    """

    _masks: dict[str, list[str]]

    def _check(self) -> None:
        self._masks = {}

    def question(
        self, id: str, image: str, turn: tuple[str, str], targets: Sequence[tuple[str, Any]], split: str
    ) -> tuple[str, Item]:
        """The item of one question about an image, whose name may begin with its released folder (train2017/...).

        Args:
            targets: Name and segmentation each, in order of mention.
        """
        self._masks[id] = [json.dumps(segmentation) for _, segmentation in targets]
        meta = {"cluster": image, "turns": [turn], "targets": [name for name, _ in targets]}
        folder, _, name = image.rpartition("/")
        # a name alone does not tell its folder: those of the split are looked for first
        folders = (folder,) if folder else tuple(sorted(FOLDERS, key=lambda f: not f.startswith(split)))
        return id, Item(name, folders, split, (turn[1].replace(f" {SEG}", ""),), meta)

    def _further(self, id: str) -> list[str]:
        return self._masks[id]

    def sample(self, id: str) -> Sample:
        """Return the image with its question, answer and masks.

        Raises:
            BadSample: the image cannot be decoded, or a mask not be read.
        """
        found = super().sample(id)
        assert found.image is not None
        masks = self._drawn(id, found.image.height, found.image.width)
        return replace(found, meta={**found.meta, "masks": list(masks)})

    def masks(self, id: str, size: int | None = None) -> NDArray[np.bool_]:
        """Return ``[targets, H, W]`` of ``meta["targets"]`` at the image's size.

        Args:
            size: the width to return, if not the image's; pixels are then the nearest ones.

        Raises:
            BadSample: as `sample`.
        """
        from PIL import Image

        with Image.open(self._file(id, self._item(id))) as image:
            width, height = image.size
        masks = self._drawn(id, height, width)
        if size is None or size == width:
            return masks
        rows = np.arange(max(1, round(height * size / width))) * width // size
        return masks[:, np.minimum(rows, height - 1)][:, :, np.arange(size) * width // size]

    def _drawn(self, id: str, height: int, width: int) -> NDArray[np.bool_]:
        try:
            found = [mask_of(json.loads(one), height, width) for one in self._masks[id]]
        except (ValueError, TypeError) as error:
            raise BadSample(id, f"a mask cannot be read: {error}") from None
        return np.stack(found) if found else np.zeros((0, height, width), bool)


class Muse(MaskedAnswers):
    """See :class:`MuseConfig`. Ids are ``IMAGE/NUMBER`` with the number of the question; intervals resample images."""

    name = "muse"
    layout = (
        'expected a list of images {"file_name" or "coco_url", "height", "width", "questions", "answers": [[{'
        '"segmentation", "category_name"}, ...], ...], "text_answers"} as the released muse_*.json'
    )

    def _read(self) -> Iterator[tuple[str, Item]]:
        files = {split: getattr(self.config, split) for split in SPLITS}
        if not any(files[split] for split in self.wanted):
            raise ConfigError(f"the muse source needs data.train=, data.val= or data.test=FILE: {self.layout}")
        for split in self.wanted:
            if files[split]:
                yield from self._images(files[split], split)

    def _images(self, file: str, split: str) -> Iterator[tuple[str, Item]]:
        path = self.file(file, f"data.{split}")
        rows = self.json(path)
        seen: dict[str, int] = {}
        for place, row in self.checked(
            rows if isinstance(rows, list) else [rows], ("questions", "answers", "height", "width"), path
        ):
            try:
                image = _image_of(row)
                first = seen.get(image, 0)
                for number, (question, targets, text) in enumerate(_questions(row), first):
                    id = f"{image}/{number}"
                    stream = Stream("muse", id)
                    names = [_name(target) for target in targets]
                    asked = stream.choice(REQUESTS).format(question=question) if self.config.request else question
                    turn = (asked, text or _listed(names, stream))
                    wanted = [(name, target["segmentation"]) for name, target in zip(names, targets, strict=True)]
                    yield self.question(id, image, turn, wanted, split)
                    seen[image] = number + 1
            except BadSample as error:
                self.bad.add(place, error.reason)


def _image_of(row: Mapping[str, Any]) -> str:
    """The image with its folder: a URL has it (``train2017/000000000009.jpg``), and a name alone is of train2014."""
    name, url = row.get("file_name"), row.get("coco_url")
    if isinstance(name, str) and name:
        return f"train2014/{name}"
    if isinstance(url, str) and url.count("/") >= 1:
        return "/".join(url.split("/")[-2:])
    raise BadSample("", f"file_name or coco_url must name an image, not {str(name or url)[:60]!r}")


def _questions(row: Mapping[str, Any]) -> list[tuple[str, list[dict[str, Any]], str]]:
    """(question, targets, answer or empty) of an image.

    Raises:
        BadSample: lists of other lengths, a target without a segmentation, or an answer with another number of targets.
    """
    questions, answers = row["questions"], row["answers"]
    texts = row.get("text_answers") or [None] * len(questions)
    if (
        not isinstance(questions, list)
        or not isinstance(answers, list)
        or not len(questions) == len(answers) == len(texts)
    ):
        raise BadSample("", "questions, answers and text_answers must be lists of one length")
    out = []
    for question, targets, text in zip(questions, answers, texts, strict=True):
        if not isinstance(question, str) or not question.strip():
            raise BadSample("", f"a question must be a text, not {str(question)[:60]!r}")
        if not isinstance(targets, list) or not all(isinstance(t, dict) and t.get("segmentation") for t in targets):
            raise BadSample("", f"the answer to {question[:40]!r} must be a list of targets with a segmentation")
        if text is not None and (not isinstance(text, str) or text.count(SEG) != len(targets)):
            raise BadSample(
                "", f"the text answer to {question[:40]!r} must have {SEG} once for each of {len(targets)} targets"
            )
        if not targets and text is None:
            raise BadSample("", f"the question {question[:40]!r} has neither targets nor a text answer")
        out.append((question.strip(), targets, (text or "").strip()))
    return out


def _name(target: Mapping[str, Any]) -> str:
    name = target.get("rephrased_name") or target.get("category_name")
    if not isinstance(name, str) or not name.strip():
        raise BadSample("", f"a target must have a category_name, not {str(name)[:60]!r}")
    return name.strip()


def _listed(names: Sequence[str], stream: Stream) -> str:
    """An answer in the release's templates: each name with its target, or all names and then all targets."""
    if len(names) == 1 or stream.below(2):
        parts = [f"{name} is {SEG}" for name in names]
        return (parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}") + "."
    segs = f"{', '.join([SEG] * (len(names) - 1))} and {SEG}"
    return stream.choice(LISTS).format(names=", ".join(names).lower(), segs=segs)
