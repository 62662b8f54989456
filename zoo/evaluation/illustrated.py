"""How well a model answers a text with a text and an image in one call, by an evaluator of the zoo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from zoo.capabilities import GenerateInterleaved
from zoo.evaluation.catalogue import METRICS, MetricInfo
from zoo.evaluation.task import Progress, SourceLike, TaskResult
from zoo.evaluation.text_to_image import TextToImage, TextToImageConfig

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, kw_only=True)
class IllustratedConfig(TextToImageConfig):
    """Fields of the task ``illustrated-answers``: those of ``text-to-image`` and

    Attributes:
        max_new_tokens: tokens of text an answer has at most.
    """

    max_new_tokens: int = 24

    task: ClassVar[str] = "illustrated-answers"
    metrics: ClassVar[Mapping[str, MetricInfo]] = METRICS["illustrated-answers"]

    def build(self) -> Illustrated:
        return Illustrated(self)


class Illustrated(TextToImage):
    """``text-to-image`` of images that stand in answers: each text is a prompt of ``generate_interleaved``, at most one
    image is drawn, and what is measured of it is measured the same way. An answer without an image has a blank one.

    - ``both``: answers that hold a text and an image; ``with_image``, ``with_text``: one of the two.
    - ``repeats``: answers whose text is the prompt's own, ignoring case and outer blanks: what the zoo's pairs teach.
    """

    name = "illustrated-answers"
    needs = (GenerateInterleaved,)  # type: ignore[assignment]
    config: IllustratedConfig

    def __init__(self, config: IllustratedConfig) -> None:
        super().__init__(config)
        self._answers: list[dict[str, float]] = []

    def run(self, model: Any, source: SourceLike, split: str, progress: Progress | None = None) -> TaskResult:
        self._answers = []
        result = super().run(model, source, split, progress)
        for item, own in zip(result.items, self._answers, strict=True):
            item |= own
        for key in ("both", "with_image", "with_text", "repeats"):
            result.metrics[key] = sum(own[key] for own in self._answers) / len(self._answers)
        return result

    def draw(self, model: Any, texts: Sequence[str], progress: Progress | None) -> tuple[list[Image], dict[str, float]]:
        """Answer each text, ``batch`` at a time; the first image of each answer."""
        import torch

        from zoo.evaluation.evaluator import to_pictures

        config = self.config
        pictures: list[Image] = []
        options = {"steps": config.steps, "guidance": config.guidance}
        given = {name: value for name, value in options.items() if value is not None}
        for start in range(0, len(texts), config.batch):
            if progress:
                progress(self.name, start, len(texts))
            part = texts[start : start + config.batch]
            answers = model.generate_interleaved(
                [[text] for text in part], max_images=1, max_new_tokens=config.max_new_tokens,
                seed=config.seed + start, **given,
            )  # fmt: skip
            for text, answer in zip(part, answers, strict=True):
                images = [piece for piece in answer if not isinstance(piece, str)]
                words = " ".join(piece for piece in answer if isinstance(piece, str)).strip()
                self._answers.append(
                    {
                        "both": float(bool(images and words)),
                        "with_image": float(bool(images)),
                        "with_text": float(bool(words)),
                        "repeats": float(words.lower() == text.strip().lower()),
                    }
                )
                shown = images[0].cpu() if images else torch.ones(3, 8, 8)
                pictures += to_pictures(shown[None], 1, self.name)
        if progress:
            progress(self.name, len(texts), len(texts))
        return pictures, {}
