"""Naming what an image shows: ranking the true name among 100, and writing it."""

from __future__ import annotations

import hashlib
import random
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from zoo.capabilities import EmbedImages, EmbedTexts, GenerateText, ScoreText, ScoreTexts
from zoo.errors import ConfigError
from zoo.evaluation.catalogue import METRICS, MetricInfo
from zoo.evaluation.task import (
    COSINE_TIE,
    NATS_TIE,
    Progress,
    SampleLike,
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

ARTICLES = ("a", "an", "the")


@dataclass(frozen=True, kw_only=True)
class NamingConfig:
    """Fields of the task ``naming``.

    Attributes:
        items: how many images of the split (chosen by hash of their id); 0 takes all.
        candidates: names an image is ranked among, the true one included.
        batch_size: images a forward pass; also (image, name) pairs where a model only has ``score_text``.
        prompt: text before the name; empty uses the model's own default.
        max_new_tokens: limit of the written name (greedy decoding).
    """

    items: int = 100
    candidates: int = 100
    batch_size: int = 64
    prompt: str = ""
    max_new_tokens: int = 24
    metrics: ClassVar[Mapping[str, MetricInfo]] = METRICS["naming"]

    def __post_init__(self) -> None:
        if self.candidates < 2:
            raise ConfigError(f"naming.candidates = {self.candidates}: expected at least 2 names to rank among")

    def build(self) -> Naming:
        return Naming(self)


def normalise(text: str) -> str:
    """Bring a name to the form in which exact match compares.

    First line; Unicode NFKC; case folded; everything but letters, digits and marks becomes a space; leading articles
    (a, an, the) dropped; spaces collapsed. "A Man: Curly-Hair." and "man curly hair" are equal; word order counts.
    """
    line = text.strip().split("\n", 1)[0]
    folded = unicodedata.normalize("NFKC", line).casefold()
    words = re.sub(r"[^\w]|_", " ", folded).split()
    while len(words) > 1 and words[0] in ARTICLES:
        words = words[1:]
    return " ".join(words)


def name_of(sample: SampleLike) -> str:
    """Return the name of what a sample shows: its meta ``name``, else its first text."""
    return str(sample.meta.get("name") or sample.texts[0])


def draw_candidates(item: str, name: str, pool: Sequence[str], count: int) -> list[str]:
    """Return ``count`` distinct names with ``name`` among them, in an order fixed by the item's id.

    Args:
        pool: all names of the split, distinct, in a stable order.
        count: names wanted; fewer come back if the pool is smaller.
    """
    same = normalise(name)
    rng = random.Random(int.from_bytes(hashlib.sha256(f"candidates/{item}".encode()).digest()[:8], "big"))
    others = [n for n in pool if normalise(n) != same]
    chosen = [name, *rng.sample(others, min(count - 1, len(others)))]
    rng.shuffle(chosen)
    return chosen


class Naming(Task):
    """Top-1 and mean reciprocal rank of the true name among the candidates, and exact match of the written name.

    The scorer is the best that the model offers and is stored with every item: ``likelihood`` (log p(name | image),
    summed; ``top1_per_byte`` divides it by the name's bytes), else ``similarity`` (cosine of the embeddings, as
    zero-shot classification). The two answer one question by different means: compare them knowing that.
    """

    name = "naming"
    config: NamingConfig

    def missing(self, model: Any) -> tuple[str, ...]:
        if self._scorer(model) or isinstance(model, GenerateText):
            return ()
        return ("score_text or generate_text or embed_images with embed_texts",)

    @staticmethod
    def _scorer(model: Any) -> str:
        if isinstance(model, (ScoreTexts, ScoreText)):
            return "likelihood"
        return "similarity" if isinstance(model, EmbedImages) and isinstance(model, EmbedTexts) else ""

    def run(self, model: Any, source: SourceLike, split: str, progress: Progress | None = None) -> TaskResult:
        import torch

        from zoo.evaluation.metrics import MeanOf, RankMetric, ranks_of

        config = self.config
        ids = choose_ids(source, split, config.items)
        pool = self._pool(source, split)
        scorer = self._scorer(model)
        writes = isinstance(model, GenerateText)
        tie = COSINE_TIE if scorer == "similarity" else NATS_TIE
        ranks_metric, per_byte, exact = RankMetric(config.candidates, (1,)), MeanOf(), MeanOf()
        vectors = self._embed_names(model, pool) if scorer == "similarity" else {}

        items: list[dict[str, Any]] = []
        shown, outputs = set(sample_ids(ids)), []
        for samples in batches(self.name, source, ids, config.batch_size, progress):
            images = [s.image for s in samples]
            names = [name_of(s) for s in samples]
            rows: list[dict[str, Any]] = [
                {"item": s.id, "cluster": cluster_of(s), "scorer": scorer or "none", "name": n}
                for s, n in zip(samples, names, strict=True)
            ]
            best: list[list[str]] = [[] for _ in samples]
            if scorer:
                choices = [
                    draw_candidates(s.id, n, pool, config.candidates) for s, n in zip(samples, names, strict=True)
                ]
                true = [[own.index(n)] for own, n in zip(choices, names, strict=True)]
                scores = self._scores(model, images, choices, vectors)  # [B, C], -inf where a row has fewer
                ranks = ranks_of(scores, true, tie)
                ranks_metric.update(ranks)
                for row, rank in zip(rows, ranks.tolist(), strict=True):
                    row |= {"rank": rank, "top1": float(rank == 1), "reciprocal_rank": 1 / rank}
                if scorer == "likelihood":
                    width = scores.shape[1]
                    lengths = torch.tensor(
                        [[len(n.encode()) for n in own] + [1] * (width - len(own)) for own in choices]
                    )
                    hits = ranks_of(scores / lengths, true, tie) == 1
                    per_byte.update(hits)
                    for row, hit in zip(rows, hits.tolist(), strict=True):
                        row["top1_per_byte"] = float(hit)
                order = scores.topk(min(3, scores.shape[1]), dim=1).indices.tolist()
                best = [[own[c] for c in columns] for own, columns in zip(choices, order, strict=True)]
            if writes:
                prompts = [config.prompt] * len(images) if config.prompt else None
                written = model.generate_text(images, prompts, max_new_tokens=config.max_new_tokens)
                hits = torch.tensor([normalise(w) == normalise(n) for w, n in zip(written, names, strict=True)])
                exact.update(hits)
                for row, text, hit in zip(rows, written, hits.tolist(), strict=True):
                    row |= {"output": text, "exact_match": float(hit)}
            for row, top in zip(rows, best, strict=True):
                if row["item"] in shown:
                    outputs.append(
                        {
                            "id": row["item"],
                            "output": row.get("output") or top,
                            "top": top,
                            "rank": row.get("rank", 0),
                            "kind": "written" if writes else "likeliest names",
                        }
                    )
            items += rows

        metrics: dict[str, float] = {}
        if scorer:
            ranked = ranks_metric.compute()
            metrics |= {"top1": float(ranked["r1"]), "mrr": float(ranked["mrr"])}
        if scorer == "likelihood":
            metrics["top1_per_byte"] = float(per_byte.compute())
        if writes:
            metrics["exact_match"] = float(exact.compute())
        metrics |= {"items": float(len(items)), "candidates": float(min(config.candidates, len(pool)))}
        return TaskResult(
            name=self.name, metrics=metrics, items=items, spec_hash=self.spec_hash(source, split), samples=outputs
        )

    def spec(self, source: SourceLike, split: str) -> dict[str, Any]:
        return {
            **super().spec(source, split),
            "decoding": "greedy",
            "ties": f"against the model, {COSINE_TIE}/{NATS_TIE}",
        }

    @staticmethod
    def _pool(source: SourceLike, split: str) -> list[str]:
        """Return the distinct names of the whole split, so that ``items`` does not change anyone's candidates."""
        names = getattr(source, "names", None)
        everything = (
            names(split)
            if callable(names)
            else [name_of(s) for part in batches("naming", source, source.ids(split), 64, None) for s in part]
        )
        distinct: dict[str, str] = {}
        for name in everything:
            distinct.setdefault(normalise(name), name)
        return list(distinct.values())

    def _embed_names(self, model: Any, names: Sequence[str]) -> dict[str, Tensor]:
        size = self.config.batch_size
        rows = [row for i in range(0, len(names), size) for row in model.embed_texts(names[i : i + size]).float().cpu()]
        return dict(zip(names, rows, strict=True))

    def _scores(
        self, model: Any, images: Sequence[Any], choices: Sequence[Sequence[str]], vectors: dict[str, Tensor]
    ) -> Tensor:
        """Return [B, C] scores of each image's candidates."""
        import torch

        width = max(len(own) for own in choices)
        scores = torch.full((len(images), width), -torch.inf, dtype=torch.float64)
        prompt = self.config.prompt
        if isinstance(model, ScoreTexts):
            if len({len(own) for own in choices}) == 1:
                return (
                    model.score_candidates(images, choices, [prompt] * len(images) if prompt else None).double().cpu()
                )
            for row, own in enumerate(choices):
                scores[row, : len(own)] = model.score_candidates([images[row]], [own], [prompt] if prompt else None)[0]
            return scores
        if isinstance(model, ScoreText):
            pairs = [(row, column) for row, own in enumerate(choices) for column in range(len(own))]
            for start in range(0, len(pairs), self.config.batch_size):
                part = pairs[start : start + self.config.batch_size]
                values = model.score_text(
                    [images[r] for r, _ in part],
                    [choices[r][c] for r, c in part],
                    [prompt] * len(part) if prompt else None,
                )
                rows, columns = zip(*part, strict=True)
                scores[list(rows), list(columns)] = values.double().cpu()
            return scores
        from zoo.evaluation.metrics import similarity

        embedded = model.embed_images(images).float().cpu()  # [B, D] or [B, Q, D]
        missing = [n for own in choices for n in own if n not in vectors]
        if missing:  # a name that equals another one of the pool only after normalisation
            vectors |= self._embed_names(model, list(dict.fromkeys(missing)))
        for row, own in enumerate(choices):
            named = torch.stack([vectors[n] for n in own])  # [C, D]
            scores[row, : len(own)] = similarity(embedded[row : row + 1], named)[0].double()
        return scores
