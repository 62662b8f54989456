"""Writing captions, judged by the references with the metrics of coco-caption."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from zoo.capabilities import GenerateText, ScoreText
from zoo.errors import ConfigError
from zoo.evaluation.catalogue import METRICS, MetricInfo
from zoo.evaluation.likelihood import caption_costs
from zoo.evaluation.task import Progress, SourceLike, Task, TaskResult, batches, choose_ids, cluster_of, sample_ids


@dataclass(frozen=True, kw_only=True)
class CaptioningConfig:
    """Fields of the task ``captioning``.

    Attributes:
        items: how many images of the split (chosen by hash of their id); 0 takes all.
        batch_size: images, or image-caption pairs that are scored, a forward pass.
        references: ``all`` distinct texts of an image, or only the ``first``.
        prompt: what the model is asked; empty uses its own default.
        max_new_tokens: limit of a caption (greedy decoding).
    """

    items: int = 500
    batch_size: int = 64
    references: str = "all"
    prompt: str = ""
    max_new_tokens: int = 48
    metrics: ClassVar[Mapping[str, MetricInfo]] = METRICS["captioning"]

    def __post_init__(self) -> None:
        if self.references not in ("all", "first"):
            raise ConfigError(f"captioning.references = {self.references!r}: expected all or first")
        if min(self.batch_size, self.max_new_tokens) < 1 or self.items < 0:
            raise ConfigError("captioning: batch_size and max_new_tokens are at least 1, items at least 0")

    def build(self) -> Captioning:
        return Captioning(self)


class Captioning(Task):
    """CIDEr-D, BLEU-4 and ROUGE-L of greedy captions; the bits per byte of the references where the model can score.

    Candidates and references go through one tokenisation (`zoo.evaluation.caption_metrics.caption_words`). CIDEr-D's
    document frequencies are those of the references of the evaluated items, so that its values can be compared only
    between models on the same items; of one item it is nought. ``bleu4`` is of the corpus, no mean over items;
    ``bleu4_smoothed`` is the mean of each caption's smoothed BLEU, for intervals.
    """

    name = "captioning"
    needs = (GenerateText,)
    config: CaptioningConfig

    def spec(self, source: SourceLike, split: str) -> dict[str, Any]:
        from zoo.evaluation.caption_metrics import WORDS_VERSION

        return {**super().spec(source, split), "decoding": "greedy", "words": f"plain/{WORDS_VERSION}"}

    def run(self, model: Any, source: SourceLike, split: str, progress: Progress | None = None) -> TaskResult:
        from zoo.evaluation.caption_metrics import Bleu, CiderD, caption_words, rouge_l, smoothed_bleu
        from zoo.evaluation.metrics import BitsPerByte

        config = self.config
        ids = choose_ids(source, split, config.items)
        scores = isinstance(model, ScoreText)
        cider, bleu, bits = CiderD(), Bleu(), BitsPerByte()
        items: list[dict[str, Any]] = []
        for samples in batches(self.name, source, ids, config.batch_size, progress):
            images = [s.image for s in samples]
            texts = [tuple(dict.fromkeys(s.texts)) if config.references == "all" else s.texts[:1] for s in samples]
            prompts = [config.prompt] * len(images) if config.prompt else None
            written = model.generate_text(images, prompts, max_new_tokens=config.max_new_tokens)
            candidates = [caption_words(text) for text in written]
            references = [[caption_words(text) for text in own] for own in texts]
            cider.update(candidates, references)
            bleu.add(candidates, references)
            rows: list[dict[str, Any]] = [
                {
                    "item": sample.id,
                    "cluster": cluster_of(sample),
                    "output": text.strip(),
                    "reference": own[0],
                    "references": len(own),
                    "words": len(candidate),
                    "rouge_l": rouge_l(candidate, wanted),
                    "bleu4_smoothed": smoothed_bleu(candidate, wanted),
                }
                for sample, text, own, candidate, wanted in zip(
                    samples, written, texts, candidates, references, strict=True
                )
            ]
            if scores:
                costs, lengths = caption_costs(model, images, texts, config.prompt, config.batch_size)
                bits.update(-costs, lengths)
                for row, nats, count in zip(rows, costs.tolist(), lengths.tolist(), strict=True):
                    row |= {"nll": nats, "bits": nats / math.log(2), "bytes": count}
            items += rows
        judged = cider.compute()
        for row, value in zip(items, judged["scores"].tolist(), strict=True):
            row["cider_d"] = value
        metrics = {
            "cider_d": float(judged["score"]),
            "bleu4": float(bleu.compute()),
            **{key: sum(row[key] for row in items) / len(items) for key in ("bleu4_smoothed", "rouge_l", "words")},
        }
        if scores:
            metrics["bits_per_byte"] = float(bits.compute())
        metrics |= {"images": float(len(items)), "references": float(sum(row["references"] for row in items))}
        shown = set(sample_ids(ids))
        samples_shown = [
            {"id": row["item"], "output": row["output"], "cider_d": row["cider_d"], "kind": "written"}
            for row in items
            if row["item"] in shown
        ]
        return TaskResult(
            name=self.name, metrics=metrics, items=items, spec_hash=self.spec_hash(source, split), samples=samples_shown
        )
