"""What the tasks of generated images share: fields, prompts, drawing, and a spec that names the evaluator's weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from zoo.capabilities import GenerateImages
from zoo.errors import ConfigError
from zoo.evaluation.evaluator import evaluator_folder, evaluator_hash, to_pictures
from zoo.evaluation.task import Progress, SampleLike, SourceLike, Task, batches, choose_ids, cluster_of

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, kw_only=True)
class DrawingConfig:
    """Fields that every task of generated images has.

    Attributes:
        evaluator: run directory or checkpoint folder of the two-tower model that judges.
        items: how many images of the split (chosen by hash of their id) give their texts; 0 takes all.
        texts: ``first`` text of an image, or ``all`` of them, one drawn image each.
        steps, guidance: handed to the model; None takes its own.
        seed: of the drawings; the batch that starts at text n is drawn with ``seed + n``.
        batch: texts drawn together. Part of what is measured, as it decides the seeds.
        batch_size: images or texts that the evaluator embeds together.
    """

    evaluator: str = ""
    items: int = 0
    texts: str = "first"
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    batch: int = 64
    batch_size: int = 64

    task: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if self.texts not in ("first", "all"):
            raise ConfigError(f"{self.task}.texts = {self.texts!r}: expected first or all")
        if min(self.batch, self.batch_size) < 1 or min(self.items, self.seed) < 0:
            raise ConfigError(f"{self.task}: batch and batch_size are at least 1, items and seed 0")
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"{self.task}.steps = {self.steps}: expected at least 1, or null for the model's own")

    def check(self) -> None:
        """Raise a ConfigError unless the evaluator is there: asked before a run begins to train."""
        evaluator_folder(self.evaluator, self.task)


@dataclass(slots=True)
class Asked:
    """One sample of the split and the texts of it that are drawn."""

    id: str
    cluster: str
    image: Image
    texts: tuple[str, ...]
    meta: Mapping[str, Any]


class DrawingTask(Task):
    """A task that draws a picture for each text; its spec names the evaluator by its weights."""

    needs = (GenerateImages,)
    config: DrawingConfig

    def spec(self, source: SourceLike, split: str) -> dict[str, Any]:
        spec = super().spec(source, split)
        spec["config"]["evaluator"] = evaluator_hash(self.config.evaluator, self.name)
        return spec

    def asked(self, source: SourceLike, split: str) -> list[Asked]:
        """Read the samples whose texts are drawn.

        Raises:
            DataError: the split is empty or an item has no image or text.
        """
        ids = choose_ids(source, split, self.config.items)
        found = []
        for samples in batches(self.name, source, ids, self.config.batch_size, None):
            for s in samples:
                assert s.image is not None  # `batches` has refused those without
                found.append(Asked(s.id, cluster_of(s), s.image.convert("RGB"), self.texts_of(s), s.meta))
        return found

    def texts_of(self, sample: SampleLike) -> tuple[str, ...]:
        """Return the distinct texts of a sample that are drawn."""
        texts = tuple(dict.fromkeys(sample.texts))
        return texts if self.config.texts == "all" else texts[:1]

    def draw(self, model: Any, texts: Sequence[str], progress: Progress | None) -> tuple[list[Image], dict[str, float]]:
        """Draw one picture a text, ``batch`` at a time.

        Returns:
            The pictures, and ``passes``: forward passes an image took on average, as `zoo.sampling.passes` counted
            them; nothing for a model that draws by loops of its own.
        """
        from zoo.sampling.passes import counted

        config = self.config
        pictures: list[Image] = []
        with counted() as passes:
            for start in range(0, len(texts), config.batch):
                if progress:
                    progress(self.name, start, len(texts))
                part = list(texts[start : start + config.batch])
                drawn = model.generate_images(
                    part, seed=config.seed + start, steps=config.steps, guidance=config.guidance
                )
                pictures += to_pictures(drawn, len(part), self.name)
        if progress:
            progress(self.name, len(texts), len(texts))
        return pictures, {"passes": passes.count / len(texts)} if passes.count else {}
