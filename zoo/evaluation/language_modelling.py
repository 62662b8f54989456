"""How well a model predicts text alone, without an image, in a unit that does not depend on its tokenizer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from zoo.capabilities import ScorePlainText
from zoo.errors import ConfigError, DataError
from zoo.evaluation.catalogue import METRICS, MetricInfo
from zoo.evaluation.task import Progress, SourceLike, Task, TaskResult, choose_ids, cluster_of, sample_ids, text_samples


@dataclass(frozen=True, kw_only=True)
class LanguageModellingConfig:
    """Fields of the task ``language-modelling``.

    Attributes:
        items: how many samples of the split (chosen by hash of their id); 0 takes all.
        batch_size: texts a forward pass.
        texts: ``all`` distinct texts of a sample, or only the ``first``.
    """

    items: int = 0
    batch_size: int = 64
    texts: str = "all"
    metrics: ClassVar[Mapping[str, MetricInfo]] = METRICS["language-modelling"]

    def __post_init__(self) -> None:
        if self.texts not in ("all", "first"):
            raise ConfigError(f"language-modelling.texts = {self.texts!r}: expected all or first")
        if self.batch_size < 1 or self.items < 0:
            raise ConfigError("language-modelling: batch_size is at least 1, items at least 0")

    def build(self) -> LanguageModelling:
        return LanguageModelling(self)


class LanguageModelling(Task):
    """Bits per byte of held-out texts: total -log2 p(text) over total UTF-8 bytes (`metrics.BitsPerByte`).

    A text is read by itself: no image, no prompt, no template. Its end is scored, with no bytes of its own. Samples
    need texts and nothing else: captions of any source, or ``data=texts``. Beside ``caption-likelihood`` on the same
    captions it says what the image is worth.
    """

    name = "language-modelling"
    needs = (ScorePlainText,)
    config: LanguageModellingConfig

    def run(self, model: Any, source: SourceLike, split: str, progress: Progress | None = None) -> TaskResult:
        import torch

        from zoo.evaluation.metrics import BitsPerByte

        config = self.config
        ids = choose_ids(source, split, config.items)
        rows: list[tuple[str, str, str]] = []  # sample, cluster, text
        for sample in text_samples(source, ids):
            own = [text for text in dict.fromkeys(sample.texts) if text]
            if not own:
                raise DataError(f"{self.name}: item {sample.id} of {source.name} has no text; leave it out")
            rows += [(sample.id, cluster_of(sample), text) for text in (own if config.texts == "all" else own[:1])]

        metric = BitsPerByte()
        items: dict[str, dict[str, Any]] = {}
        for start in range(0, len(rows), config.batch_size):
            if progress:
                progress(self.name, start, len(rows))
            part = rows[start : start + config.batch_size]
            scores = model.score_plain_text([text for _, _, text in part]).double().cpu()  # [B] nats
            lengths = torch.tensor([len(text.encode()) for _, _, text in part])
            metric.update(scores, lengths)
            for (item, cluster, _), score, count in zip(part, scores.tolist(), lengths.tolist(), strict=True):
                row = items.setdefault(
                    item, {"item": item, "cluster": cluster, "nll": 0.0, "bits": 0.0, "bytes": 0, "texts": 0}
                )
                row["nll"] -= score
                row["bits"] -= score / math.log(2)
                row["bytes"] += count
                row["texts"] += 1
        if progress:
            progress(self.name, len(rows), len(rows))
        shown = [items[i] for i in sample_ids(list(items))]
        return TaskResult(
            name=self.name,
            metrics={
                "bits_per_byte": float(metric.compute()),
                "texts": float(len(rows)),
                "bytes": float(metric.bytes),
            },
            items=list(items.values()),
            spec_hash=self.spec_hash(source, split),
            samples=[
                {"id": r["item"], "output": f"{r['bits'] / r['bytes']:.2f} bits/byte", "kind": "likelihood"}
                for r in shown
            ],
        )
