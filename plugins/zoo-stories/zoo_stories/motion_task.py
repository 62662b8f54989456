"""How near predicted motion is to the real one: the task ``motion-prediction``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from zoo.data.processor import images_of
from zoo.errors import ConfigError, DataError
from zoo.evaluation.metric_info import MetricInfo
from zoo.evaluation.task import Progress, SourceLike, Task, TaskResult, batches, choose_ids


@dataclass(frozen=True, kw_only=True)
class MotionPredictionConfig:
    """Fields of the task ``motion-prediction``.

    Attributes:
        items: How many samples of the split (chosen by hash of their id); 0 takes all.
        batch_size: Samples worked on together.
    """

    items: int = 0
    batch_size: int = 32

    task: ClassVar[str] = "motion-prediction"
    metrics: ClassVar[Mapping[str, MetricInfo]] = {
        "error": MetricInfo(
            label="motion error", higher_is_better=False, numerator="error", primary=True,
            help="squared distance of predicted and real embeddings of the frames between two pictures",
        ),
        "cosine": MetricInfo(
            label="motion cosine", numerator="cosine", percent=True,
            help="cosine of predicted and real embeddings of the frames between two pictures",
        ),
        "error_line": MetricInfo(
            label="motion error, line", higher_is_better=None, numerator="error_line", detail=True,
            help="that of the linear interpolation of both ends, the control",
        ),
        "gain": MetricInfo(
            label="motion gain", numerator="gain", help="how much smaller the error is than that of the interpolation",
        ),
    }  # fmt: skip

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.items < 0:
            raise ConfigError(f"{self.task}: batch_size is at least 1, items 0")

    def build(self) -> MotionPrediction:
        return MotionPrediction(self)


class MotionPrediction(Task):
    """Real embeddings are those of the model's own encoder, which must be equal for models that are compared."""

    name = "motion-prediction"
    config: MotionPredictionConfig

    def missing(self, model: Any) -> tuple[str, ...]:
        plain = getattr(model, "model", model)
        return () if hasattr(plain, "predict_motion") else ("predict_motion",)

    def run(self, model: Any, source: SourceLike, split: str, progress: Progress | None = None) -> TaskResult:
        import torch
        import torch.nn.functional as F

        from zoo_stories.motion import inner_error

        plain = getattr(model, "model", model)
        items: list[dict[str, Any]] = []
        ids = choose_ids(source, split, self.config.items)
        for samples in batches(self.name, source, ids, self.config.batch_size, progress):
            frames = [images_of(sample) for sample in samples]  # type: ignore[arg-type]
            short = next((s for s, images in zip(samples, frames, strict=True) if len(images) < 3), None)
            if short is not None:
                raise DataError(f"{self.name}: item {short.id} of {source.name} has no 3 frames; choose moving-scenes")
            for sample, images in zip(samples, frames, strict=True):
                target = plain.embed_images(images)[None]  # [1, L, D]
                count = len(images)
                predicted = plain.predict_motion([images[0]], [images[-1]], count)
                line = plain.line(target[:, 0], target[:, -1], count)
                error = float(inner_error(predicted, target))
                alone = float(inner_error(line, target))
                with torch.inference_mode():
                    cosine = float(F.cosine_similarity(predicted, target, dim=-1)[:, 1:-1].mean())
                items.append(
                    {"item": sample.id, "cluster": sample.id, "error": error, "error_line": alone,
                     "gain": alone - error, "cosine": cosine}
                )  # fmt: skip
        metrics = {key: sum(row[key] for row in items) / len(items) for key in self.config.metrics}
        return TaskResult(name=self.name, metrics=metrics, items=items, spec_hash=self.spec_hash(source, split))
