"""Questions about images: VQAv2 (Goyal et al. 2017) and GQA (Hudson & Manning 2019)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from zoo.data.image_files import split_of
from zoo.data.public.base import Item, PublicConfig, PublicSet, text_of
from zoo.data.sample import BadSample
from zoo.data.templates import SHORT
from zoo.errors import ConfigError, DataError

ANSWER_TYPES = {"yes/no": "yes_no", "number": "number", "other": "other"}


@dataclass(frozen=True, kw_only=True)
class QuestionsConfig(PublicConfig):
    """Fields of sets of questions.

    ``train``, ``val`` and ``test`` are the files of questions of these splits; an empty one leaves a split out. Without
    ``val``, ``val_fraction`` of the images of ``train`` are held out for it, by a hash. A sample is an image with all
    its questions, or with ``turns`` of them at most (``turns=1``: a sample a question); what is left over follows in
    further samples of the same image.
    """

    train: str = ""
    val: str = ""
    test: str = ""
    val_fraction: float = 0.0
    turns: int = 0


@dataclass(frozen=True, kw_only=True)
class Vqav2Config(QuestionsConfig):
    """VQAv2: files v2_OpenEnded_mscoco_*_questions.json, each with its v2_mscoco_*_annotations.json beside it (or
    named by ``train_annotations`` and so on). ``root`` holds train2014 and val2014. Ten answers a question; models are
    trained on the one that most people gave (``multiple_choice_answer``)."""

    kind: ClassVar[str] = "vqav2"
    train_annotations: str = ""
    val_annotations: str = ""
    test_annotations: str = ""

    def open(self, image_size: int | None) -> Vqav2:
        return Vqav2(self)


@dataclass(frozen=True, kw_only=True)
class GqaConfig(QuestionsConfig):
    """GQA: files like train_balanced_questions.json, or a folder of such files (train_all_questions). ``root`` is the
    folder of the images, or holds it as images. One short answer a question; ``answers=full`` trains on the sentence
    (``fullAnswer``) instead, evaluation always judges by the short one."""

    kind: ClassVar[str] = "gqa"
    answers: str = "short"

    def open(self, image_size: int | None) -> Gqa:
        return Gqa(self)


@dataclass(slots=True)
class Asked:
    """One question of an image: what evaluation reads of it, and the answer that training gives."""

    image: str
    name: str
    folders: tuple[str, ...]
    question: dict[str, Any]
    answer: str


class QuestionSet(PublicSet):
    """Images with questions. ``meta["questions"]``: question, its answers, its id, and the type of answer where the set
    says it; ``meta["turns"]``: (question, answer) to train on, for templates that ask for short answers (``format``);
    ``texts``: the distinct answers of the turns.

    Ids are those of the images; with ``turns`` the further samples of one image are ``IMAGE#2`` and so on.
    """

    def _check(self) -> None:
        config = self.config
        if not 0 <= config.val_fraction < 1:
            raise ConfigError(f"data.val_fraction = {config.val_fraction}: expected 0 or more, and less than 1")
        if config.turns < 0:
            raise ConfigError(f"data.turns = {config.turns}: expected 0 (all questions of an image) or more")
        if not (config.train or config.val or config.test):
            raise ConfigError(
                f"the {self.name} source needs data.train=FILE, data.val=FILE or data.test=FILE: {self.layout}"
            )

    def _questions(self, path: Path, split: str) -> Iterator[Asked]:
        """Yield the questions of one file in its order."""
        raise TypeError(f"{type(self).__name__} defines no _questions")

    def _read(self) -> Iterator[tuple[str, Item]]:
        held_out = self.config.val_fraction if not self.config.val else 0.0
        of_image: dict[str, list[Asked]] = {}
        splits: dict[str, str] = {}
        for given in ("train", "val", "test"):
            name = getattr(self.config, given)
            if not name or (given not in self.wanted and not (given == "train" and held_out and "val" in self.wanted)):
                continue
            for path in self._files(self.file(name, f"data.{given}", folder=self.folders_too), given):
                for asked in self._questions(path, given):
                    split: str = given
                    if given == "train" and held_out:
                        split = split_of((self.name, asked.image), held_out, 0.0)
                    if splits.setdefault(asked.image, split) != split:
                        raise DataError(
                            f"{self.name}: the image {asked.image!r} of data.{given}={name} is also in the"
                            f" {splits[asked.image]} split; an image belongs to one split"
                        )
                    of_image.setdefault(asked.image, []).append(asked)
        for image, asked_all in of_image.items():
            if splits[image] not in self.wanted:
                continue
            size = self.config.turns or len(asked_all)
            for start in range(0, len(asked_all), size):
                id = image if not start else f"{image}#{start // size + 1}"
                yield id, self._item_of(asked_all[start : start + size], splits[image])

    folders_too: ClassVar[bool] = False

    @property
    def short(self) -> bool:
        """Whether the answers to train on are words or phrases."""
        return True

    def _files(self, path: Path, split: str) -> list[Path]:
        if path.is_file():
            return [path]
        found = sorted(path.glob("*.json"))
        if not found:
            raise DataError(f"{self.name}: the folder {str(path)!r} holds no .json file; set data.{split}")
        return found

    def _item_of(self, asked: list[Asked], split: str) -> Item:
        first = asked[0]
        turns = tuple((a.question["question"], a.answer) for a in asked)
        meta: dict[str, Any] = {"cluster": first.image, "questions": [a.question for a in asked], "turns": turns}
        if self.short:  # templates that know how to ask for a word or phrase do so
            meta["format"] = SHORT
        return Item(first.name, first.folders, split, tuple(dict.fromkeys(a.answer for a in asked)), meta)


class Vqav2(QuestionSet):
    """See :class:`Vqav2Config`."""

    name = "vqav2"
    layout = (
        'expected the released files, {"data_subtype": "val2014", "questions": [{"question_id", "image_id",'
        ' "question"}, ...]} and {"annotations": [{"question_id", "answers": [{"answer"}, ...]}, ...]}'
    )

    def _questions(self, path: Path, split: str) -> Iterator[Asked]:
        whole = self.json(path)
        rows = self.rows(whole, "questions", path)
        subset = str(whole.get("data_subtype", ""))
        if not subset:
            raise DataError(f"{self.name}: {path.name!r} has no key 'data_subtype'; {self.layout}")
        answered = self._annotations(path, split)
        for place, row in self.checked(rows, ("question_id", "image_id", "question"), path):
            try:
                question = text_of(row, "question")
                if row["question_id"] not in answered:
                    raise BadSample("", f"the question {row['question_id']} has no annotation")
                answers, target, kind = answered[row["question_id"]]
                number = int(row["image_id"])
            except (BadSample, ValueError, TypeError) as error:
                self.bad.add(place, error.reason if isinstance(error, BadSample) else f"image_id: {error}")
                continue
            known = {"id": str(row["question_id"]), "question": question, "answers": answers, "answer": target}
            if kind:
                known["type"] = kind
            yield Asked(str(number), f"COCO_{subset}_{number:012d}.jpg", (subset,), known, target)

    def _annotations(self, path: Path, split: str) -> dict[Any, tuple[tuple[str, ...], str, str]]:
        """Return question id -> (ten answers, the most common one, type of answer)."""
        where = f"data.{split}_annotations"
        given = getattr(self.config, f"{split}_annotations")
        if given:
            file = self.file(given, where)
        else:  # as released: v2_OpenEnded_mscoco_val2014_questions.json and v2_mscoco_val2014_annotations.json
            file = path.with_name(path.name.replace("OpenEnded_", "").replace("questions", "annotations"))
            if file == path or not file.is_file():
                raise DataError(
                    f"{self.name}: {path.name!r} has no annotations beside it (looked for {file.name!r}); set {where}"
                )
        rows = self.rows(self.json(file), "annotations", file)
        found: dict[Any, tuple[tuple[str, ...], str, str]] = {}
        for place, row in self.checked(rows, ("question_id", "answers"), file):
            answers = [a.get("answer") for a in row["answers"] if isinstance(a, dict)] if row["answers"] else []
            texts = tuple(answer for answer in answers if isinstance(answer, str))
            if not texts or len(texts) != len(answers):
                self.bad.add(place, "answers must be a list of objects with a text as 'answer'")
                continue
            common = row.get("multiple_choice_answer") or max(texts, key=texts.count)
            kind = ANSWER_TYPES.get(str(row.get("answer_type")), "")
            found[row["question_id"]] = (texts, str(common), kind)
        return found


class Gqa(QuestionSet):
    """See :class:`GqaConfig`."""

    name = "gqa"
    folders_too = True
    layout = 'expected the released files, {"QUESTION_ID": {"imageId": ..., "question": ..., "answer": ...}, ...}'

    def _check(self) -> None:
        super()._check()
        if self.config.answers not in ("short", "full"):
            raise ConfigError(f"data.answers = {self.config.answers!r}: expected short or full")

    @property
    def short(self) -> bool:
        return bool(self.config.answers == "short")

    def _questions(self, path: Path, split: str) -> Iterator[Asked]:
        whole = self.json(path)
        if not isinstance(whole, dict) or not whole:
            raise DataError(f"{self.name}: {path.name!r} holds no object of questions; {self.layout}")
        target = "fullAnswer" if self.config.answers == "full" else "answer"
        needed = tuple(dict.fromkeys(("imageId", "question", "answer", target)))
        rows = ({**row, "id": id} if isinstance(row, dict) else row for id, row in whole.items())
        for place, row in self.checked(rows, needed, path):
            try:
                question, answer, taught = (text_of(row, key) for key in ("question", "answer", target))
            except BadSample as error:
                self.bad.add(place, error.reason)
                continue
            image = str(row["imageId"])
            known = {"id": str(row["id"]), "question": question, "answer": answer}
            yield Asked(image, f"{image}.jpg", ("images",), known, taught)
