"""Whether the frames of a story show one character: the task ``story-consistency``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from zoo.capabilities import GenerateImages
from zoo.errors import ConfigError, DataError
from zoo.evaluation.evaluator import (
    embed_images,
    embed_texts,
    evaluator_folder,
    evaluator_hash,
    load_evaluator,
    to_pictures,
)
from zoo.evaluation.metric_info import MetricInfo
from zoo.evaluation.task import Progress, SourceLike, Task, TaskResult, by_hash, choose_ids, sample_ids, thumbnail

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

FRAMES_AT_ONCE = 32
"""Frames of several stories that are drawn as one batch."""


def _metrics() -> dict[str, MetricInfo]:
    def of(key: str, label: str, help: str, **more: Any) -> dict[str, MetricInfo]:
        return {key: MetricInfo(label=label, numerator=key, percent=True, help=help, **more)}

    plain: dict[str, Any] = {"higher_is_better": None, "detail": True}
    return {
        **of("consistency", "consistency", "mean cosine of the frames of a story, two by two, in the evaluator's space",
             primary=True),
        **of("text", "story text", "mean cosine of a frame and its caption in the evaluator's space"),
        **of("consistency_gain", "consistency gain", "consistency less that of the same frames drawn each for itself"),
        **of("text_gain", "story text gain", "story text less that of the same frames drawn each for itself"),
        **of("consistency_alone", "consistency, alone", "of the same frames, seeds and steps, drawn each for itself",
             **plain),
        **of("text_alone", "story text, alone", "of the same frames, seeds and steps, drawn each for itself", **plain),
        **of("consistency_other", "consistency, other", "of frames of different stories, the control", **plain),
        **of("consistency_real", "consistency (real)", "of the real frames: the best that can be had", **plain),
        **of("text_real", "story text (real)", "of the real frames: the best that can be had", **plain),
    }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class StoryConsistencyConfig:
    """Fields of the task ``story-consistency``.

    Attributes:
        evaluator: Run directory or checkpoint folder of the two-tower model that judges.
        items: How many stories of the split (chosen by hash of their id); 0 takes all.
        steps, guidance: Handed to the model; None takes its own.
        rate, layers, start_step: How frames read each other (``zoo_stories.Consistency``); None takes what the model
            says of itself, which is how runs and claims compare them, and that class's defaults where it says nothing.
        seed: Of the drawings.
        batch_size: Images or texts that the evaluator embeds together.
    """

    evaluator: str = ""
    items: int = 50
    steps: int | None = None
    guidance: float | None = None
    rate: float | None = None
    layers: str | None = None
    start_step: int | None = None
    seed: int = 0
    batch_size: int = 64

    task: ClassVar[str] = "story-consistency"
    metrics: ClassVar[Mapping[str, MetricInfo]] = _metrics()

    def __post_init__(self) -> None:
        from zoo_stories.consistency import Consistency

        Consistency(**self.changed())
        if self.batch_size < 1 or min(self.items, self.seed) < 0:
            raise ConfigError(f"{self.task}: batch_size is at least 1, items and seed 0")
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"{self.task}.steps = {self.steps}: expected at least 1, or null for the model's own")

    def changed(self) -> dict[str, Any]:
        """What is said here of how frames read each other."""
        said = {"rate": self.rate, "layers": self.layers, "start_step": self.start_step}
        return {name: value for name, value in said.items() if value is not None}

    def check(self) -> None:
        """Raise a ConfigError unless the evaluator is there: asked before a run begins to train."""
        evaluator_folder(self.evaluator, self.task)

    def build(self) -> StoryConsistency:
        return StoryConsistency(self)


@dataclass(frozen=True)
class _Story:
    id: str
    captions: tuple[str, ...]
    images: tuple[Image, ...]


class StoryConsistency(Task):
    """Stories are drawn twice from the same noise: frames that read each other, and frames drawn each for itself.

    ``consistency`` is the mean cosine of all pairs of a story's frames, ``text`` that of frames and their captions.
    Both have their value without reading beside them (``*_alone``), their difference item by item (``*_gain``), and
    that of the real frames (``*_real``).
    """

    name = "story-consistency"
    needs = (GenerateImages,)
    config: StoryConsistencyConfig

    def missing(self, model: Any) -> tuple[str, ...]:
        lacking = super().missing(model)
        return lacking or (() if hasattr(getattr(model, "model", model), "denoiser") else ("a denoiser",))

    def spec(self, source: SourceLike, split: str) -> dict[str, Any]:
        spec = super().spec(source, split)
        spec["config"]["evaluator"] = evaluator_hash(self.config.evaluator, self.name)
        return spec

    def run(self, model: Any, source: SourceLike, split: str, progress: Progress | None = None) -> TaskResult:
        import torch

        from zoo_stories.consistency import Consistency
        from zoo_stories.drawing import model_of

        config = self.config
        plain = model_of(model)
        rules = replace(getattr(plain, "consistency", None) or Consistency(), **config.changed())
        judge = load_evaluator(config.evaluator, self.name, plain)
        stories = self._stories(source, split)
        sets = {
            "": self._drawn(plain, stories, rules, progress),
            "_alone": self._drawn(plain, stories, replace(rules, rate=0.0, rates={}), progress),
            "_real": [list(story.images) for story in stories],
        }
        lengths = [len(story.captions) for story in stories]
        texts = [text for story in stories for text in story.captions]
        written = torch.split(embed_texts(judge, texts, config.batch_size), lengths)
        items: list[dict[str, Any]] = [{"item": s.id, "cluster": s.id, "frames": len(s.captions)} for s in stories]
        for suffix, drawn in sets.items():
            flat = [picture for pictures in drawn for picture in pictures]
            vectors = torch.split(embed_images(judge, flat, config.batch_size, self.name), lengths)
            for n, (row, images, words) in enumerate(zip(items, vectors, written, strict=True)):
                row[f"consistency{suffix}"] = pairs(images)
                row[f"text{suffix}"] = float((images * words).sum(1).mean())
                if not suffix:
                    foreign = vectors[(n + 1) % len(vectors)]
                    row["consistency_other"] = float((images @ foreign.T).mean())
        for row in items:
            for key in ("consistency", "text"):
                row[f"{key}_gain"] = row[key] - row[f"{key}_alone"]
        metrics = {key: sum(row[key] for row in items) / len(items) for key in self.config.metrics}
        metrics |= {"stories": float(len(stories)), "frames": float(len(texts))}
        shown = set(sample_ids([story.id for story in stories]))
        samples = [
            {
                "id": story.id,
                "output": f"consistency {row['consistency']:.2f} (alone {row['consistency_alone']:.2f})",
                "picture": thumbnail(strip(sets[""][n]), 384),
                "picture alone": thumbnail(strip(sets["_alone"][n]), 384),
                "text": " | ".join(story.captions),
                "kind": "drawn",
            }
            for n, (story, row) in enumerate(zip(stories, items, strict=True))
            if story.id in shown
        ]
        return TaskResult(
            name=self.name, metrics=metrics, items=items, spec_hash=self.spec_hash(source, split), samples=samples
        )

    def _stories(self, source: SourceLike, split: str) -> list[_Story]:
        """The stories of a split.

        Raises:
            DataError: Its samples are no stories, or there are fewer than two.
        """
        wanted, seen = self.config.items, dict[str, list[str]]()
        for id in choose_ids(source, split, 0):
            seen.setdefault(id.partition(".")[0], []).append(id)
        chosen = list(seen)
        if wanted and wanted < len(chosen):
            kept = set(by_hash(chosen)[:wanted])
            chosen = [story for story in chosen if story in kept]
        found = [_story(source, name, seen[name][0]) for name in chosen]
        if len(found) < 2:
            raise DataError(
                f"{self.name}: the {split} split of {source.name} has fewer than two stories; choose another"
            )
        return found

    def _drawn(self, model: Any, stories: Sequence[_Story], rules: Any, progress: Progress | None) -> list[list[Image]]:
        """The frames of all stories: several stories a batch, where a frame reads its own story alone."""
        from zoo_stories.drawing import draw_frames

        drawn: list[list[Image]] = []
        start = 0
        while start < len(stories):
            if progress:
                progress(self.name, start, len(stories))
            stop, frames = start + 1, len(stories[start].captions)
            while not rules.window and stop < len(stories) and frames + len(stories[stop].captions) <= FRAMES_AT_ONCE:
                frames += len(stories[stop].captions)
                stop += 1
            part = stories[start:stop]
            images = draw_frames(
                model,
                [text for story in part for text in story.captions],
                [frozenset({story.id}) for story in part for _ in story.captions],
                rules,
                seed=self.config.seed + start,
                steps=self.config.steps,
                guidance=self.config.guidance,
            )
            pictures = to_pictures(images, frames, self.name)
            for story in part:
                drawn.append(pictures[: len(story.captions)])
                pictures = pictures[len(story.captions) :]
            start = stop
        if progress:
            progress(self.name, len(stories), len(stories))
        return drawn


def _story(source: SourceLike, name: str, id: str) -> _Story:
    """One story of a source of frames (``story-frames``) or of whole stories (``openmoji-stories``)."""
    first = source.sample(id)
    told = first.meta.get("story")
    if told is not None:
        images = tuple(source.sample(frame).image for frame in told["ids"])
        captions = tuple(told["captions"])
    else:
        images, captions = tuple(first.meta.get("images", ())), tuple(first.meta.get("captions", ()))
    if len(captions) < 2 or len(images) != len(captions) or not all(images):
        raise DataError(
            f"story-consistency: item {id} of {source.name} is no story of several frames with captions; choose"
            " data=story-frames or data=openmoji-stories"
        )
    return _Story(name, captions, tuple(image.convert("RGB") for image in images if image is not None))


def pairs(vectors: Tensor) -> float:
    """Mean cosine of all pairs of rows [N, D] of unit length, N of 2 or more."""
    count = len(vectors)
    total = float((vectors.double().sum(0) ** 2).sum()) - float((vectors.double() ** 2).sum())
    return total / (count * (count - 1))


def strip(pictures: Sequence[Image]) -> Image:
    """Pictures of one height side by side."""
    from PIL import Image as pil

    sheet = pil.new("RGB", (sum(p.width for p in pictures), max(p.height for p in pictures)), "white")
    x = 0
    for picture in pictures:
        sheet.paste(picture, (x, 0))
        x += picture.width
    return sheet
