"""Image-text retrieval, both ways, with several captions an image."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from zoo.capabilities import EmbedImages, EmbedTexts
from zoo.evaluation.catalogue import METRICS, MetricInfo
from zoo.evaluation.task import (
    COSINE_TIE,
    Progress,
    SourceLike,
    Task,
    TaskResult,
    batches,
    choose_ids,
    cluster_of,
    sample_ids,
)

if TYPE_CHECKING:
    from torch import Tensor

KS = (1, 5, 10)


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
    """Fields of the task ``retrieval``.

    Attributes:
        items: how many images of the split (chosen by hash of their id); 0 takes all.
        batch_size: images or captions a forward pass.
        chunk: queries ranked at a time: memory is chunk x gallery.
    """

    items: int = 0
    batch_size: int = 64
    chunk: int = 512
    metrics: ClassVar[Mapping[str, MetricInfo]] = METRICS["retrieval"]

    def build(self) -> Retrieval:
        return Retrieval(self)


class Retrieval(Task):
    """R@1/5/10 and median rank, image to text and text to image.

    Conventions (Karpathy's, as in the CLIP and ALBEF papers): an image is right if *any* of its captions is among the
    first K of all captions; every caption is one query for its image. Two rules make the numbers well defined:
    captions that are equal as strings are right for each of their images, and ties count against the model
    (`metrics.ranks_of`).
    """

    name = "retrieval"
    needs = (EmbedImages, EmbedTexts)
    config: RetrievalConfig

    def run(self, model: Any, source: SourceLike, split: str, progress: Progress | None = None) -> TaskResult:
        import torch

        from zoo.evaluation.metrics import RankMetric, retrieval_ranks

        chosen = choose_ids(source, split, self.config.items)
        ids: list[str] = []
        image_parts: list[Tensor] = []
        captions: list[tuple[str, ...]] = []
        clusters: list[str] = []
        for samples in batches(self.name, source, chosen, self.config.batch_size, progress):
            image_parts.append(model.embed_images([s.image for s in samples]).float().cpu())
            captions.extend(tuple(dict.fromkeys(s.texts)) for s in samples)
            ids.extend(s.id for s in samples)
            clusters.extend(cluster_of(s) for s in samples)
        images = torch.cat(image_parts)  # [N, D]

        texts = list(dict.fromkeys(text for own in captions for text in own))  # a string is embedded once
        row_of = {text: row for row, text in enumerate(texts)}
        size = self.config.batch_size
        unique = torch.cat([model.embed_texts(texts[i : i + size]).float().cpu() for i in range(0, len(texts), size)])

        # A gallery row for every (image, caption) pair, as the convention counts them.
        pairs = [(image, text) for image, own in enumerate(captions) for text in own]
        gallery = unique[[row_of[text] for _, text in pairs]]  # [M, D]
        columns_of, images_of = defaultdict(list), defaultdict(list)
        for column, (image, text) in enumerate(pairs):
            columns_of[text].append(column)
            images_of[text].append(image)
        right_columns = [[c for text in own for c in columns_of[text]] for own in captions]
        right_images = [images_of[text] for _, text in pairs]

        chunk = self.config.chunk
        i2t = retrieval_ranks(images, gallery, right_columns, chunk)  # [N]
        t2i = retrieval_ranks(gallery, images, right_images, chunk)  # [M]

        metrics: dict[str, float] = {}
        for way, ranks, candidates in (("i2t", i2t, len(pairs)), ("t2i", t2i, len(images))):
            metric = RankMetric(candidates, KS)
            metric.update(ranks)
            values = metric.compute()
            metrics |= {f"{way}_{key}": float(values[key]) for key in (*(f"r{k}" for k in KS), "median_rank")}
        metrics |= {"images": float(len(images)), "captions": float(len(pairs))}

        own_ranks: list[list[int]] = [[] for _ in ids]
        for (image, _), rank in zip(pairs, t2i.tolist(), strict=True):
            own_ranks[image].append(rank)
        items = [
            {
                "item": ids[n],
                "cluster": clusters[n],
                "i2t_rank": rank,
                **{f"i2t_hits_{k}": float(rank <= k) for k in KS},
                "captions": len(own_ranks[n]),
                "t2i_best_rank": min(own_ranks[n]),
                **{f"t2i_hits_{k}": float(sum(r <= k for r in own_ranks[n])) for k in KS},
            }
            for n, rank in enumerate(i2t.tolist())
        ]
        shown = [ids.index(i) for i in sample_ids(ids)]
        similarity = images[shown] @ unique.T  # [<= 12, texts]
        top = similarity.topk(min(3, len(texts)), dim=1).indices.tolist()
        outputs = [
            {"id": ids[n], "output": [texts[t] for t in best], "rank": int(i2t[n]), "kind": "nearest captions"}
            for n, best in zip(shown, top, strict=True)
        ]
        return TaskResult(
            name=self.name, metrics=metrics, items=items, spec_hash=self.spec_hash(source, split), samples=outputs
        )

    def spec(self, source: SourceLike, split: str) -> dict[str, Any]:
        return {**super().spec(source, split), "ties": f"against the model, within {COSINE_TIE}"}
