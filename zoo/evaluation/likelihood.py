"""How well a model predicts the held-out captions, in a unit that does not depend on its tokenizer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from zoo.capabilities import ScoreText
from zoo.errors import ConfigError
from zoo.evaluation.catalogue import METRICS, MetricInfo
from zoo.evaluation.task import Progress, SourceLike, Task, TaskResult, batches, choose_ids, cluster_of, sample_ids

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class CaptionLikelihoodConfig:
    """Fields of the task ``caption-likelihood``.

    Attributes:
        items: how many images of the split (chosen by hash of their id); 0 takes all.
        batch_size: image-caption pairs a forward pass.
        captions: ``all`` captions of an image, or only the ``first``.
        prompt: text before the caption; empty uses the model's own default.
    """

    items: int = 0
    batch_size: int = 64
    captions: str = "all"
    prompt: str = ""
    metrics: ClassVar[Mapping[str, MetricInfo]] = METRICS["caption-likelihood"]

    def __post_init__(self) -> None:
        if self.captions not in ("all", "first"):
            raise ConfigError(f"caption-likelihood.captions = {self.captions!r}: expected all or first")

    def build(self) -> CaptionLikelihood:
        return CaptionLikelihood(self)


class CaptionLikelihood(Task):
    """Bits per byte: total -log2 p(caption | image) over total UTF-8 bytes of the captions (`metrics.BitsPerByte`).

    The end of the text is scored (its nats count, it has no bytes), so a model must also know where to stop.
    """

    name = "caption-likelihood"
    needs = (ScoreText,)
    config: CaptionLikelihoodConfig

    def run(self, model: Any, source: SourceLike, split: str, progress: Progress | None = None) -> TaskResult:
        from zoo.evaluation.metrics import BitsPerByte

        ids = choose_ids(source, split, self.config.items)
        metric = BitsPerByte()
        items: list[dict[str, Any]] = []
        shown, outputs = set(sample_ids(ids)), []
        size = self.config.batch_size
        for samples in batches(self.name, source, ids, size, progress):
            texts = [tuple(dict.fromkeys(s.texts)) if self.config.captions == "all" else s.texts[:1] for s in samples]
            costs, lengths = caption_costs(model, [s.image for s in samples], texts, self.config.prompt, size)
            metric.update(-costs, lengths)
            for sample, own, nats, count in zip(samples, texts, costs.tolist(), lengths.tolist(), strict=True):
                bits = nats / math.log(2)
                items.append(
                    {
                        "item": sample.id,
                        "cluster": cluster_of(sample),
                        "nll": nats,
                        "bits": bits,
                        "bytes": count,
                        "captions": len(own),
                    }
                )
                if sample.id in shown:
                    outputs.append({"id": sample.id, "output": f"{bits / count:.2f} bits/byte", "kind": "likelihood"})
        metrics = {
            "bits_per_byte": float(metric.compute()),
            "images": float(len(items)),
            "bytes": float(metric.bytes),
        }
        return TaskResult(
            name=self.name, metrics=metrics, items=items, spec_hash=self.spec_hash(source, split), samples=outputs
        )


def caption_costs(
    model: Any, images: Sequence[Any], captions: Sequence[Sequence[str]], prompt: str, size: int
) -> tuple[Tensor, Tensor]:
    """What an image's captions cost together: -log p(caption | image) [N] float64 in nats, and their UTF-8 bytes [N].

    Args:
        model: offers ``score_text``.
        captions: of each image.
        prompt: text before a caption; empty uses the model's own default.
        size: pairs a forward pass.
    """
    import torch

    pairs = [(n, text) for n, own in enumerate(captions) for text in own]
    nats = torch.zeros(len(images), dtype=torch.float64)
    lengths = torch.zeros(len(images), dtype=torch.int64)
    for start in range(0, len(pairs), size):
        part = pairs[start : start + size]
        prompts = [prompt] * len(part) if prompt else None
        scores = model.score_text([images[n] for n, _ in part], [text for _, text in part], prompts).double().cpu()
        rows = torch.tensor([n for n, _ in part])
        nats.index_add_(0, rows, -scores)
        lengths.index_add_(0, rows, torch.tensor([len(text.encode()) for _, text in part]))
    return nats, lengths
