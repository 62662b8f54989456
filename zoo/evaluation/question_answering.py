"""Answering questions about images with short texts, and what of it is owed to the language alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from zoo.capabilities import GenerateText
from zoo.data.sample import BadSample, BadSamples
from zoo.errors import ConfigError, DataError
from zoo.evaluation.answers import VERSION, answer_type, exact_match, first_verdict, normalise_answer, vqa_accuracy
from zoo.evaluation.catalogue import ANSWER_TYPES, METRICS, QUESTION_KINDS, STRATEGIES, MetricInfo
from zoo.evaluation.task import (
    Progress,
    SampleLike,
    SourceLike,
    Task,
    TaskResult,
    by_hash,
    choose_ids,
    cluster_of,
    sample_ids,
)

IMAGES = ("shown", "blank", "both")


@dataclass(frozen=True, kw_only=True)
class QuestionAnsweringConfig:
    """Fields of the task ``question-answering``.

    Attributes:
        items: how many images of the split (chosen by hash of their id); 0 takes all.
        questions: of an image, at most; 0 asks all of them.
        batch_size: questions a batch.
        prompt: how a question is put, with ``{question}`` for it, e.g. ``Question: {question} Short answer:``.
        max_new_tokens: limit of an answer (greedy decoding).
        images: ``shown``; ``blank`` replaces every image by a white one of its size, for what a model answers without
            seeing; ``both`` measures both ways on the same questions, and their difference by question.
    """

    items: int = 500
    questions: int = 0
    batch_size: int = 64
    prompt: str = "{question}"
    max_new_tokens: int = 16
    images: str = "shown"
    metrics: ClassVar[Mapping[str, MetricInfo]] = METRICS["question-answering"]

    def __post_init__(self) -> None:
        if self.images not in IMAGES:
            raise ConfigError(f"question-answering.images = {self.images!r}: expected {', '.join(IMAGES)}")
        if "{question}" not in self.prompt:
            raise ConfigError(f"question-answering.prompt = {self.prompt!r}: expected {{question}} in it")
        if min(self.batch_size, self.max_new_tokens) < 1 or min(self.items, self.questions) < 0:
            raise ConfigError("question-answering: batch_size and max_new_tokens are at least 1, items and questions 0")

    def build(self) -> QuestionAnswering:
        return QuestionAnswering(self)


@dataclass(frozen=True, slots=True)
class Asked:
    """One question about one image."""

    item: str
    sample: str
    cluster: str
    image: Any
    question: str
    answers: tuple[str, ...]
    kind: str
    strategy: str
    type: str
    """Type of answer, where the source says it (VQAv2 sorts its questions itself)."""


def asked_of(sample: SampleLike) -> list[Asked]:
    """Return the questions that can each be asked alone.

    They are ``meta["questions"]`` where the source gives them: dictionaries with question, answer or several answers,
    and where they are known kind, strategy, id and type of answer. Else they are the first of ``meta["turns"]``, as the
    later turns of a dialogue may lean on it.
    """
    given: Sequence[Mapping[str, Any]] = sample.meta.get("questions") or [
        {"question": question, "answer": answer} for question, answer in list(sample.meta.get("turns") or ())[:1]
    ]
    out = []
    for n, question in enumerate(given):
        answers = tuple(map(str, question.get("answers") or (question["answer"],)))
        text = str(question["question"]).replace("<image>", "").strip()
        kind, strategy = str(question.get("kind") or ""), str(question.get("strategy") or "")
        own = sample.id if len(given) == 1 else f"{sample.id}/{n}"
        item, type = str(question.get("id") or own), str(question.get("type") or "")
        out.append(Asked(item, sample.id, cluster_of(sample), sample.image, text, answers, kind, strategy, type))
    return out


class QuestionAnswering(Task):
    """Mean `vqa_accuracy` of greedily generated answers, over questions; images are the clusters.

    Beside the whole: by kind of question, by type of answer (yes or no, number, other), and for ``exist`` questions
    POPE's precision, recall, F1 and share of yes, over all and accuracy for each way of choosing what is missing.
    """

    name = "question-answering"
    needs = (GenerateText,)
    config: QuestionAnsweringConfig

    def spec(self, source: SourceLike, split: str) -> dict[str, Any]:
        return {**super().spec(source, split), "decoding": "greedy", "normalisation": f"vqa/{VERSION}"}

    def run(self, model: Any, source: SourceLike, split: str, progress: Progress | None = None) -> TaskResult:
        config = self.config
        ids = choose_ids(source, split, config.items)
        shown = set(sample_ids(ids))
        items: list[dict[str, Any]] = []
        outputs: dict[str, list[str]] = {}
        for part in self._batches(source, ids, progress):
            written = self._answers(model, part, blank=config.images == "blank")
            blind = self._answers(model, part, blank=True) if config.images == "both" else None
            for n, (asked, answer) in enumerate(zip(part, written, strict=True)):
                items.append(_row(asked, answer, None if blind is None else blind[n]))
                if asked.sample in shown:
                    outputs.setdefault(asked.sample, []).append(f"{asked.question} {answer} [{asked.answers[0]}]")
        if not items:
            raise DataError(
                f"{self.name}: the {split} split of {source.name} has no questions about images; use"
                " data=openmoji-scenes, llava-json, vqav2 or gqa, or leave the task out"
            )
        samples = [{"id": id, "output": texts, "kind": "answers"} for id, texts in outputs.items()]
        return TaskResult(
            name=self.name,
            metrics=_metrics(items),
            items=items,
            spec_hash=self.spec_hash(source, split),
            samples=samples,
        )

    def _batches(self, source: SourceLike, ids: Sequence[str], progress: Progress | None) -> Iterator[list[Asked]]:
        """Yield questions ``batch_size`` at a time; samples without an image or a question are passed over."""
        bad = BadSamples(source.name, getattr(source, "max_bad", 0))
        waiting: list[Asked] = []
        size = self.config.batch_size
        if progress:
            progress(self.name, 0, len(ids))
        for done, id in enumerate(ids, 1):
            try:
                sample = source.sample(id)
            except BadSample as error:
                bad.add(error.id, error.reason)
                continue
            if sample.image is not None and not sample.meta.get("images"):
                asked = asked_of(sample)
                if self.config.questions:
                    kept = set(by_hash([a.item for a in asked])[: self.config.questions])
                    asked = [a for a in asked if a.item in kept]
                waiting += asked
            while len(waiting) >= size or (waiting and done == len(ids)):
                yield waiting[:size]
                waiting = waiting[size:]
                if progress:
                    progress(self.name, done, len(ids))
        if waiting:  # the last sample could not be read
            yield waiting
        if progress:
            progress(self.name, len(ids), len(ids))

    def _answers(self, model: Any, asked: Sequence[Asked], blank: bool) -> list[str]:
        from PIL import Image

        images = [Image.new("RGB", a.image.size, "white") if blank else a.image for a in asked]
        prompts = [self.config.prompt.replace("{question}", a.question) for a in asked]
        written: list[str] = model.generate_text(images, prompts, max_new_tokens=self.config.max_new_tokens)
        return [text.strip() for text in written]


def _row(asked: Asked, answer: str, blind: str | None) -> dict[str, Any]:
    """Return what is kept of one question. Columns that end in a kind, type or strategy are the sums of its metric."""
    score = vqa_accuracy(answer, asked.answers)
    kind = asked.type or answer_type(asked.answers)
    row: dict[str, Any] = {
        "item": asked.item,
        "cluster": asked.cluster,
        "question": asked.question,
        "reference": asked.answers[0],
        "output": answer,
        "kind": asked.kind,
        "strategy": asked.strategy,
        "answer_type": kind,
        "correct": score,
        "exact": float(exact_match(answer, asked.answers)),
    }
    for group, names, own in (
        ("kind", QUESTION_KINDS, asked.kind),
        ("type", ANSWER_TYPES, kind),
        ("exist", STRATEGIES, asked.strategy),
    ):
        for name in names:
            row[f"{group}_{name}"] = float(own == name)
            row[f"correct_{group}_{name}"] = score * (own == name)
    if asked.kind == "exist":
        yes, true = first_verdict(answer) == "yes", normalise_answer(asked.answers[0]) == "yes"
    else:
        yes = true = False
    row |= {
        "said_yes": float(yes),
        "is_yes": float(true),
        "true_yes": float(yes and true),
        "twice_true_yes": 2.0 * (yes and true),
        "yes_said_or_true": float(yes) + float(true),
    }
    if blind is not None:
        unseen = vqa_accuracy(blind, asked.answers)
        row |= {"output_blank": blind, "correct_blank": unseen, "gain": score - unseen}
    return row


def _metrics(items: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return every metric of the catalogue whose denominator is not nought, as a ratio of sums over the rows."""
    out: dict[str, float] = {}
    for name, info in METRICS["question-answering"].items():
        if info.numerator not in items[0]:
            continue
        below = sum(row[info.denominator] for row in items) if info.denominator else len(items)
        if below:
            out[name] = float(sum(row[info.numerator] for row in items) / below)
    return out | {"questions": float(len(items)), "images": float(len({row["cluster"] for row in items}))}
