"""Asking about objects that are there and objects that are not: POPE (Li et al. 2023), on any data that names them."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from zoo.capabilities import GenerateText
from zoo.errors import ConfigError, DataError
from zoo.evaluation.answers import first_verdict
from zoo.evaluation.catalogue import METRICS, STRATEGIES, MetricInfo
from zoo.evaluation.task import (
    Progress,
    SampleLike,
    SourceLike,
    Task,
    TaskResult,
    batches,
    choose_ids,
    cluster_of,
    sample_ids,
    text_samples,
)

if TYPE_CHECKING:
    from zoo.evaluation.torchmetrics_base import MetricCollection

VERSION = 1
"""Raised whenever other questions are asked or an answer is read otherwise."""
PARSERS = ("released", "first")


@dataclass(frozen=True, kw_only=True)
class PopeConfig:
    """Fields of the task ``pope``.

    Attributes:
        items: how many images of the split (chosen by hash of their id); 0 takes all.
        pairs: objects of an image that are asked about, at most; each brings one missing object for every strategy.
        batch_size: questions a batch.
        question: with ``{object}`` for a name, or ``{an_object}`` for it with its article.
        prompt: how a question is put to the model, with ``{question}`` for it.
        max_new_tokens: limit of an answer (greedy decoding).
        parse: how an answer is read. ``released``: the rule of POPE's evaluate.py, "no" if the first sentence has the
            word no or not, else "yes". ``first``: "yes" if it begins with yes, else "no".
    """

    items: int = 100
    pairs: int = 3
    batch_size: int = 64
    question: str = "is there {an_object} icon in the picture?"
    prompt: str = "{question}"
    max_new_tokens: int = 8
    parse: str = "released"
    metrics: ClassVar[Mapping[str, MetricInfo]] = METRICS["pope"]

    def __post_init__(self) -> None:
        if self.parse not in PARSERS:
            raise ConfigError(f"pope.parse = {self.parse!r}: expected {' or '.join(PARSERS)}")
        if "{object}" not in self.question and "{an_object}" not in self.question:
            raise ConfigError(f"pope.question = {self.question!r}: expected {{object}} or {{an_object}} in it")
        if "{question}" not in self.prompt:
            raise ConfigError(f"pope.prompt = {self.prompt!r}: expected {{question}} in it")
        if min(self.pairs, self.batch_size, self.max_new_tokens) < 1 or self.items < 0:
            raise ConfigError("pope: pairs, batch_size and max_new_tokens are at least 1, items at least 0")

    def build(self) -> Pope:
        return Pope(self)


def read_released(answer: str) -> str:
    """``no`` if the first sentence has the word No, no or not, else ``yes``: also of an answer that is neither."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def read_first(answer: str) -> str:
    """``yes`` if the answer begins with yes, else ``no``."""
    return "yes" if first_verdict(answer) == "yes" else "no"


def says_either(answer: str) -> bool:
    """Whether an answer has the word yes, no or not at all."""
    return bool({"yes", "no", "not"} & set(re.findall(r"[a-z]+", answer.lower())))


def objects_of(sample: SampleLike) -> list[str]:
    """The distinct names of what a sample shows: ``meta["objects"]``, names or dictionaries with a ``name``."""
    given = sample.meta.get("objects") or ()
    return list(dict.fromkeys(str(o["name"]) if isinstance(o, Mapping) else str(o) for o in given))


@dataclass
class ObjectCounts:
    """How often objects are shown, and which are shown together, over the images of a split."""

    shown: Counter[str] = field(default_factory=Counter)
    together: dict[str, Counter[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, images: Iterable[Sequence[str]]) -> ObjectCounts:
        """Count the distinct names of each image."""
        counts = cls()
        for names in images:
            counts.shown.update(names)
            for name in names:
                counts.together.setdefault(name, Counter()).update(other for other in names if other != name)
        return counts

    def ranked(self, counter: Counter[str]) -> list[str]:
        """Names, most frequent first; equally frequent ones in alphabetical order."""
        return sorted(counter, key=lambda name: (-counter[name], name))


@dataclass(frozen=True, slots=True)
class Polled:
    """One question about an image: an object, whether it is there, and the strategies in whose sets it is, each as
    often as its set has the question. ``question`` is the source's own wording, if it has one."""

    object: str
    there: bool
    strategies: tuple[str, ...]
    question: str = ""


def released_of(sample: SampleLike) -> list[Polled]:
    """The questions that a source brings itself: those of ``meta["questions"]`` that say in which ``settings`` (random,
    popular, adversarial) they stand (data=pope)."""
    return [
        Polled("", str(q["answer"]) == "yes", tuple(q["settings"]), str(q["question"]))
        for q in sample.meta.get("questions") or ()
        if q.get("settings")
    ]


def poll(item: str, names: Sequence[str], counts: ObjectCounts, pairs: int) -> list[Polled]:
    """Return what is asked about one image, as POPE's released ``utils.py`` builds its three sets.

    For each object that is there, one that is not: ``random`` any other, ``popular`` the most frequent of the data,
    ``adversarial`` the one most often shown together with the object (a random one where none is left). No missing
    object is asked twice within a set. Beyond the release: objects and random choices follow from a hash of the item
    and the name; a missing object whose name shares a word with a shown one ("weary cat", "cat") is not asked for, as
    nobody could say no to it; an object that is missing in several sets is asked once and counted in each.
    """
    from zoo.data.scenes_icons import stems

    present = [name for _, name in sorted((_hash(item, name), name) for name in names)][:pairs]
    words = frozenset().union(*map(stems, names)) if names else frozenset()
    free = [name for name in counts.shown if name not in names and words.isdisjoint(stems(name))]
    allowed = set(free)
    popular = [name for name in counts.ranked(counts.shown) if name in allowed]
    anyone = [name for _, name in sorted((_hash(item, name), name) for name in free)]
    missing: dict[str, list[str]] = {strategy: [] for strategy in STRATEGIES}
    asked = []
    for name in present:
        adversarial = [n for n in counts.ranked(counts.together.get(name, Counter())) if n in allowed]
        found = {
            strategy: next((n for n in ranking if n not in missing[strategy]), None)
            for strategy, ranking in zip(STRATEGIES, (anyone, popular, [*adversarial, *anyone]), strict=True)
        }
        if None in found.values():  # without its "no" the "yes" would tip the balance
            break
        asked.append(name)
        for strategy, other in found.items():
            missing[strategy].append(str(other))
    sets: dict[str, list[str]] = {}
    for strategy in STRATEGIES:
        for name in missing[strategy]:
            sets.setdefault(name, []).append(strategy)
    there = [Polled(name, True, STRATEGIES) for name in asked]
    return there + [Polled(name, False, tuple(strategies)) for name, strategies in sets.items()]


def _hash(item: str, name: str) -> str:
    return hashlib.sha256(f"pope/{item}/{name}".encode()).hexdigest()


class Pope(Task):
    """Accuracy, precision, recall, F1 and the share of yes, over the three sets together and for each of them.

    Half of every set are objects that are there. "Yes" is the positive answer. How often objects are shown, and shown
    together, is counted over the whole split. A source that brings POPE's own questions (data=pope) is asked these, all
    of them and as they are written; ``pairs`` and ``question`` have no part in it.
    """

    name = "pope"
    needs = (GenerateText,)
    config: PopeConfig

    def spec(self, source: SourceLike, split: str) -> dict[str, Any]:
        return {**super().spec(source, split), "decoding": "greedy", "rules": f"pope/{VERSION}"}

    def run(self, model: Any, source: SourceLike, split: str, progress: Progress | None = None) -> TaskResult:
        config = self.config
        ids = choose_ids(source, split, config.items)
        released = any(released_of(sample) for sample in text_samples(source, ids[:1]))
        named = () if released else text_samples(source, source.ids(split))
        counts = ObjectCounts.of(objects_of(sample) for sample in named)
        if not released and len(counts.shown) < 2:
            raise DataError(
                f"{self.name}: the {split} split of {source.name} names {len(counts.shown)} objects in"
                " meta['objects'], and at least 2 are needed; use data=openmoji-scenes or data=pope, or leave"
                " the task out"
            )
        read = read_released if config.parse == "released" else read_first
        collections = {key: _collection() for key in ("", *STRATEGIES)}
        items: list[dict[str, Any]] = []
        outputs: dict[str, list[str]] = {}
        shown = set(sample_ids(ids))
        for part in self._batches(source, ids, counts, progress):
            images = [sample.image for sample, _, _ in part]
            questions = [polled.question or self._question(polled.object) for _, _, polled in part]
            prompts = [config.prompt.replace("{question}", question) for question in questions]
            answers = model.generate_text(images, prompts, max_new_tokens=config.max_new_tokens)
            for (sample, number, polled), question, answer in zip(part, questions, answers, strict=True):
                yes = read(answer.strip()) == "yes"
                items.append(_row(sample, number, polled, question, answer.strip(), yes))
                if sample.id in shown:
                    truth = "yes" if polled.there else "no"
                    outputs.setdefault(sample.id, []).append(f"{question} {answer.strip()} [{truth}]")
        if not items:
            raise DataError(f"{self.name}: no chosen image of {source.name} names an object that can be asked for")
        metrics: dict[str, float] = {}
        for strategy, collection in collections.items():
            if not any(row[f"asked_{strategy}" if strategy else "asked"] for row in items):
                continue  # a source may bring one of the three sets
            _add(collection, items, strategy)
            suffix = f"_{strategy}" if strategy else ""
            metrics |= {f"{name}{suffix}": float(value) for name, value in collection.compute().items()}
            asked = sum(row[f"asked{suffix}"] for row in items)
            metrics[f"yes_ratio{suffix}"] = sum(row[f"said_yes{suffix}"] for row in items) / asked
        metrics["unread"] = sum(row["unread"] for row in items) / len(items)
        metrics |= {"questions": float(len(items)), "images": float(len({row["sample"] for row in items}))}
        return TaskResult(
            name=self.name,
            metrics=metrics,
            items=items,
            spec_hash=self.spec_hash(source, split),
            samples=[{"id": id, "output": texts, "kind": "answers"} for id, texts in outputs.items()],
        )

    def _question(self, name: str) -> str:
        from zoo.data.scenes_texts import an

        return self.config.question.replace("{an_object}", an(name)).replace("{object}", name)

    def _batches(
        self, source: SourceLike, ids: Sequence[str], counts: ObjectCounts, progress: Progress | None
    ) -> Iterator[list[tuple[SampleLike, int, Polled]]]:
        """Yield (sample, number of the question, question) ``batch_size`` at a time."""
        size, waiting = self.config.batch_size, list[tuple[SampleLike, int, Polled]]()
        for samples in batches(self.name, source, ids, 16, progress):
            for sample in samples:
                polled = released_of(sample) or poll(sample.id, objects_of(sample), counts, self.config.pairs)
                waiting += [(sample, number, one) for number, one in enumerate(polled)]
            while len(waiting) >= size:
                yield waiting[:size]
                waiting = waiting[size:]
        if waiting:
            yield waiting


def _row(sample: SampleLike, number: int, polled: Polled, question: str, answer: str, yes: bool) -> dict[str, Any]:
    """What is kept of one question: the counts behind every metric, for each set and, without a suffix, over all."""
    row: dict[str, Any] = {
        "item": f"{sample.id}/{number}",
        "cluster": cluster_of(sample),
        "sample": sample.id,
        "question": question,
        "object": polled.object,
        "reference": "yes" if polled.there else "no",
        "output": answer,
        "unread": float(not says_either(answer)),
    }
    both = yes and polled.there
    for suffix, times in (
        ("", len(polled.strategies)),
        *((f"_{s}", polled.strategies.count(s)) for s in STRATEGIES),
    ):
        row |= {
            f"asked{suffix}": float(times),
            f"correct{suffix}": float(times * (yes == polled.there)),
            f"said_yes{suffix}": float(times * yes),
            f"is_yes{suffix}": float(times * polled.there),
            f"true_yes{suffix}": float(times * both),
            f"twice_true_yes{suffix}": float(2 * times * both),
            f"yes_said_or_true{suffix}": float(times * (yes + polled.there)),
        }
    return row


def _collection() -> MetricCollection:
    from zoo.evaluation.torchmetrics_base import (
        BinaryAccuracy,
        BinaryF1Score,
        BinaryPrecision,
        BinaryRecall,
        MetricCollection,
    )

    return MetricCollection(
        {
            "accuracy": BinaryAccuracy(),
            "precision": BinaryPrecision(),
            "recall": BinaryRecall(),
            "f1": BinaryF1Score(),
        }
    )


def _add(collection: MetricCollection, items: Sequence[Mapping[str, Any]], strategy: str) -> None:
    """Add the answers of one set, or of all three one after the other."""
    import torch

    suffix = f"_{strategy}" if strategy else ""
    times = torch.tensor([int(row[f"asked{suffix}"]) for row in items])
    said = torch.tensor([int(row["said_yes"] > 0) for row in items]).repeat_interleave(times)
    true = torch.tensor([int(row["is_yes"] > 0) for row in items]).repeat_interleave(times)
    collection.update(said, true)
