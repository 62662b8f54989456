"""Image-text retrieval, both ways, with several captions an image."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from zoo.capabilities import EmbedImages, EmbedTexts, Match
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
RERANK_SCORES = ("published", "posterior")


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
    """Fields of the task ``retrieval``.

    Attributes:
        items: how many images of the split (chosen by hash of their id); 0 takes all.
        batch_size: images or captions a forward pass.
        chunk: queries ranked at a time: memory is chunk x gallery.
        rerank: how many of the nearest candidates of each query are ordered again by ``match``, as ALBEF and BLIP do
            (256 on COCO, 128 on Flickr30k), where the model can; 0 = none. Metrics then also come as ``*_reranked``.
        rerank_score: What orders them. ``published``: as the system's release, by the matching logit (ALBEF), or by it
            and the cosine similarity (BLIP, VLMo). ``posterior``: by the logit and the similarity over the temperature.
            The head learned to tell pairs from negatives drawn by that similarity, so that its logit is about
            log p(match) - log q(negative): what it adds to the first stage, and no replacement of it.
    """

    items: int = 0
    batch_size: int = 64
    chunk: int = 512
    rerank: int = 0
    rerank_score: str = "published"
    metrics: ClassVar[Mapping[str, MetricInfo]] = METRICS["retrieval"]

    def __post_init__(self) -> None:
        if self.rerank < 0:
            raise ValueError(f"rerank = {self.rerank} must be 0 (none) or more")
        if self.rerank_score not in RERANK_SCORES:
            raise ValueError(f"rerank_score = {self.rerank_score!r} must be one of {', '.join(RERANK_SCORES)}")

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

        from zoo.evaluation.metrics import RankMetric, retrieval_ranks, similarity

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
        images = torch.cat(image_parts)  # [N, D] or [N, Q, D]

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

        stages = [("", i2t, t2i)]
        if self.config.rerank and isinstance(model, Match):
            again = Reranking(model, source, ids, texts, self.config, progress)
            rows = torch.tensor([row_of[text] for _, text in pairs])
            stages.append(("_reranked", *again.ranks(images, unique, rows, right_columns, right_images)))

        metrics: dict[str, float] = {}
        for suffix, of_images, of_texts in stages:
            for way, ranks, candidates in (("i2t", of_images, len(pairs)), ("t2i", of_texts, len(images))):
                metric = RankMetric(candidates, KS)
                metric.update(ranks)
                values = metric.compute()
                keys = (*(f"r{k}" for k in KS), "median_rank")
                metrics |= {f"{way}_{key}{suffix}": float(values[key]) for key in keys}
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
        for suffix, of_images, of_texts in stages[1:]:
            again_ranks: list[list[int]] = [[] for _ in ids]
            for (image, _), rank in zip(pairs, of_texts.tolist(), strict=True):
                again_ranks[image].append(rank)
            for n, rank in enumerate(of_images.tolist()):
                items[n] |= {f"i2t_hits_{k}{suffix}": float(rank <= k) for k in KS}
                items[n] |= {f"t2i_hits_{k}{suffix}": float(sum(r <= k for r in again_ranks[n])) for k in KS}
        shown = [ids.index(i) for i in sample_ids(ids)]
        top = similarity(images[shown], unique).topk(min(3, len(texts)), dim=1).indices.tolist()  # [<= 12, 3]
        outputs = [
            {"id": ids[n], "output": [texts[t] for t in best], "rank": int(i2t[n]), "kind": "nearest captions"}
            for n, best in zip(shown, top, strict=True)
        ]
        return TaskResult(
            name=self.name, metrics=metrics, items=items, spec_hash=self.spec_hash(source, split), samples=outputs
        )

    def spec(self, source: SourceLike, split: str) -> dict[str, Any]:
        spec = {**super().spec(source, split), "ties": f"against the model, within {COSINE_TIE}"}
        if not self.config.rerank:  # hashes of runs from before there was a second stage still hold
            del spec["config"]["rerank"], spec["config"]["rerank_score"]
        return spec


OUTSIDE = -100.0
"""Score of what the first stage did not pass on (Retrieval.py of ALBEF's release)."""


class Reranking:
    """The second stage: the nearest candidates of each query in the order of their matching logits."""

    def __init__(
        self,
        model: Any,
        source: SourceLike,
        ids: Sequence[str],
        texts: Sequence[str],
        config: RetrievalConfig,
        progress: Progress | None,
    ) -> None:
        self.model, self.source, self.ids, self.texts = model, source, ids, texts
        self.config, self.progress = config, progress

    def ranks(
        self,
        images: Tensor,
        unique: Tensor,
        rows: Tensor,
        right_columns: Sequence[Sequence[int]],
        right_images: Sequence[Sequence[int]],
    ) -> tuple[Tensor, Tensor]:
        """Ranks of the right ones, image to text [N] and text to image [M].

        Args:
            images: [N, D], or [N, Q, D] of several vectors an image; unique: [T, D], embedded texts.
            rows: [M] the text of each gallery row.
            right_columns, right_images: for each image the right gallery rows, and for each of these the right images.
        """
        import torch

        from zoo.evaluation.metrics import ranks_of, similarity

        cosine = similarity(images, unique)  # [N, T]
        k = self.config.rerank
        # equal captions are one candidate, so that they use up one place among the k
        of_image = torch.zeros_like(cosine, dtype=torch.bool).scatter_(
            1, cosine.topk(min(k, cosine.shape[1])).indices, True
        )
        of_text = torch.zeros_like(of_image).scatter_(0, cosine.topk(min(k, len(cosine)), dim=0).indices, True)
        scores = self._scores(of_image | of_text)
        if self.config.rerank_score == "posterior":
            scores = scores + cosine * float(self.model.logit_scale.detach().exp())
        elif getattr(self.model, "rerank_similarity", False):  # BLIP adds the first stage's similarity
            scores = scores + cosine
        i2t = ranks_of(torch.where(of_image, scores, OUTSIDE)[:, rows], right_columns, COSINE_TIE)
        t2i = ranks_of(torch.where(of_text, scores, OUTSIDE).T[rows], right_images, COSINE_TIE)
        return i2t, t2i

    def _scores(self, wanted: Tensor) -> Tensor:
        """Matching logits [N, T] of the wanted pairs; an image is encoded once."""
        import torch

        out = torch.zeros(wanted.shape)
        start = 0
        chosen = list(self.ids)
        for samples in batches("retrieval", self.source, chosen, self.config.batch_size, self.progress):
            part = wanted[start : start + len(samples)]
            pairs = part.nonzero()  # [P, 2]
            used, column = torch.unique(pairs[:, 1], return_inverse=True)
            texts = [self.texts[t] for t in used.tolist()]
            shown = [s.image for s in samples]
            if hasattr(self.model, "match_pairs"):
                logits = self.model.match_pairs(shown, texts, torch.stack([pairs[:, 0], column], 1))
            else:
                logits = self.model.match([shown[i] for i, _ in pairs.tolist()], [texts[c] for c in column.tolist()])
            out[start : start + len(samples)][part] = logits.float().cpu()
            start += len(samples)
        return out
