"""Retrieval and classification between modalities that were bound to images only, never to each other
(arXiv 2305.05665, sections 4.1 and 4.2: emergent zero-shot)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from zoo.capabilities import EmbedModalities
from zoo.data.sample import BadSample, BadSamples
from zoo.errors import ConfigError, DataError, near
from zoo.evaluation.metric_info import MetricInfo
from zoo.evaluation.naming import name_of
from zoo.evaluation.task import (
    COSINE_TIE,
    Progress,
    SampleLike,
    SourceLike,
    Task,
    TaskResult,
    choose_ids,
    cluster_of,
    sample_ids,
)
from zoo.evaluation.zero_shot import TEMPLATES
from zoo_modalities.data.signal import signals_of

if TYPE_CHECKING:
    from torch import Tensor

KNOWN = ("audio", "depth", "image", "imu", "text", "thermal", "video")
KS = (1, 5, 10)
MAIN = "audio-text"
"""The pair that overviews show."""


def retrieval_metrics() -> dict[str, MetricInfo]:
    """R@K of every ordered pair of known modalities, and what chance would give."""
    out: dict[str, MetricInfo] = {}
    for query in KNOWN:
        for gallery in KNOWN:
            if query == gallery:
                continue
            key = f"{query}_{gallery}"
            for k in KS:
                out[f"{key}_r{k}"] = MetricInfo(
                    label=f"{query}→{gallery} R@{k}",
                    numerator=f"{key}_hits_{k}",
                    percent=True,
                    primary=k == 1 and key == MAIN.replace("-", "_"),
                    detail=k != 1,
                    help=f"items whose {query} finds their own {gallery} among the first {k}",
                )
            out[f"{key}_median_rank"] = MetricInfo(
                label=f"{query}→{gallery} median rank", higher_is_better=False, detail=True, help="1 is best"
            )
    for k in KS:
        out[f"chance_r{k}"] = MetricInfo(
            label=f"chance R@{k}", higher_is_better=None, percent=True, detail=k != 1, help="K of the gallery's items"
        )
    out["gallery"] = MetricInfo(label="items", higher_is_better=None, detail=True, help="items of the gallery")
    return out


@dataclass(frozen=True, kw_only=True)
class EmergentRetrievalConfig:
    """Fields of the task ``emergent-retrieval``.

    Attributes:
        pairs: Ordered pairs joined by ``+``, such as ``audio-text+text-audio``: the first's items search the second's.
        items: How many items of the split (chosen by hash of their id); 0 takes all.
        batch_size: Items a forward pass.
        chunk: Queries ranked at a time.
    """

    pairs: str = MAIN
    items: int = 0
    batch_size: int = 64
    chunk: int = 512
    metrics: ClassVar[Mapping[str, MetricInfo]] = retrieval_metrics()

    def __post_init__(self) -> None:
        for query, gallery in self.parsed():
            if query == gallery:
                raise ConfigError(f"emergent-retrieval.pairs = {self.pairs!r}: a pair is of two modalities")
            for name in (query, gallery):
                if name not in KNOWN:
                    raise ConfigError(
                        f"emergent-retrieval.pairs = {self.pairs!r}: no modality {name!r}{near(name, KNOWN)}"
                    )
        if self.items < 0 or self.batch_size < 1 or self.chunk < 1:
            raise ConfigError("emergent-retrieval: items is at least 0, batch_size and chunk at least 1")

    def parsed(self) -> list[tuple[str, str]]:
        """The pairs as (query, gallery).

        Raises:
            ConfigError: Something that is no pair.
        """
        out = []
        for pair in self.pairs.split("+"):
            query, dash, gallery = pair.strip().partition("-")
            if not (query and dash and gallery):
                raise ConfigError(f"emergent-retrieval.pairs = {self.pairs!r}: expected pairs such as audio-text")
            out.append((query, gallery))
        return out

    def build(self) -> EmergentRetrieval:
        return EmergentRetrieval(self)


class EmergentRetrieval(Task):
    """R@1/5/10 and median rank between modalities of the same items: each item's own counterpart alone is right, and
    ties count against the model. Chance is K over the items, as every item has one right counterpart."""

    name = "emergent-retrieval"
    needs = (EmbedModalities,)
    config: EmergentRetrievalConfig

    def run(self, model: Any, source: SourceLike, split: str, progress: Progress | None = None) -> TaskResult:
        from zoo.evaluation.metrics import RankMetric, retrieval_ranks, similarity

        config = self.config
        wanted = list(dict.fromkeys(name for pair in config.parsed() for name in pair))
        embedded = embed_split(self.name, model, source, split, wanted, config.items, config.batch_size, progress)
        ids, count = embedded.ids, len(embedded.ids)
        if count < 2:
            raise DataError(f"{self.name}: {count} item of the {split} split of {source.name}; two are needed to rank")
        own = [[n] for n in range(count)]
        metrics: dict[str, float] = {}
        items: list[dict[str, Any]] = [
            {"item": id, "cluster": cluster} for id, cluster in zip(ids, embedded.clusters, strict=True)
        ]
        for query, gallery in config.parsed():
            a, b = embedded.vectors[query], embedded.vectors[gallery]
            ranks = retrieval_ranks(a, b, own, config.chunk)
            metric = RankMetric(count, KS)
            metric.update(ranks)
            values = metric.compute()
            key = f"{query}_{gallery}"
            metrics |= {f"{key}_{name}": float(values[name]) for name in (*(f"r{k}" for k in KS), "median_rank")}
            for row, rank in zip(items, ranks.tolist(), strict=True):
                row |= {f"{key}_rank": rank, **{f"{key}_hits_{k}": float(rank <= k) for k in KS}}
        metrics |= {f"chance_r{k}": min(k, count) / count for k in KS} | {"gallery": float(count)}
        return TaskResult(
            name=self.name,
            metrics=metrics,
            items=items,
            spec_hash=self.spec_hash(source, split),
            samples=self._samples(embedded, similarity),
        )

    def _samples(self, embedded: Embedded, similarity: Any) -> list[dict[str, Any]]:
        """The nearest items by name, of the first pair."""
        query, gallery = self.config.parsed()[0]
        shown = set(sample_ids(embedded.ids))
        rows = [n for n, id in enumerate(embedded.ids) if id in shown]
        scores = similarity(embedded.vectors[query][rows], embedded.vectors[gallery])
        best = scores.topk(min(3, scores.shape[1]), dim=1).indices.tolist()
        return [
            {
                "id": embedded.ids[row],
                "output": [embedded.names[n] for n in nearest],
                "kind": "nearest captions",
                "pair": f"{query} to {gallery}",
            }
            for row, nearest in zip(rows, best, strict=True)
        ]


@dataclass(kw_only=True)
class Embedded:
    """A split's items in the shared space.

    Attributes:
        ids, clusters, names: Of the items.
        vectors: Modality -> [N, D] float32.
        metas: What each sample knows.
    """

    ids: list[str]
    clusters: list[str]
    names: list[str]
    vectors: dict[str, Tensor]
    metas: list[Mapping[str, Any]]


def embed_split(
    task: str,
    model: Any,
    source: SourceLike,
    split: str,
    wanted: Sequence[str],
    items: int,
    batch_size: int,
    progress: Progress | None,
) -> Embedded:
    """Embed every chosen item of a split in each of the wanted modalities.

    Raises:
        ConfigError: A modality that the model does not embed.
        DataError: An item lacks a modality.
    """
    import torch

    for name in wanted:
        if name not in model.modalities:
            raise ConfigError(f"{task}: the model embeds no {name!r}{near(name, model.modalities)}")
    chosen = choose_ids(source, split, items)
    bad = BadSamples(source.name, getattr(source, "max_bad", 0))
    parts: dict[str, list[Tensor]] = {name: [] for name in wanted}
    out = Embedded(ids=[], clusters=[], names=[], vectors={}, metas=[])
    if progress:
        progress(task, 0, len(chosen))
    for start in range(0, len(chosen), batch_size):
        samples: list[SampleLike] = []
        for id in chosen[start : start + batch_size]:
            try:
                samples.append(source.sample(id))
            except BadSample as error:
                bad.add(error.id, error.reason)
        if samples:
            for name in wanted:
                values = [item_of(task, source, sample, name) for sample in samples]
                parts[name].append(model.embed(name, values).float().cpu())
        out.ids += [s.id for s in samples]
        out.clusters += [cluster_of(s) for s in samples]
        out.names += [name_of(s) for s in samples]
        out.metas += [s.meta for s in samples]
        if progress:
            progress(task, min(start + batch_size, len(chosen)), len(chosen))
    out.vectors = {name: torch.cat(rows) if rows else torch.empty(0, 1) for name, rows in parts.items()}
    return out


def item_of(task: str, source: SourceLike, sample: SampleLike, modality: str) -> Any:
    """What a sample carries of a modality: its image, its first text, or a signal.

    Raises:
        DataError: It has none.
    """
    if modality == "image" and sample.image is not None:
        return sample.image
    if modality == "text" and sample.texts:
        return sample.texts[0]
    signals = signals_of(sample)
    if modality not in signals:
        has = ", ".join((*(("image",) if sample.image is not None else ()), *signals)) or "none"
        raise DataError(
            f"{task}: item {sample.id} of {source.name} has no {modality} (it has: {has}); add it to data.modalities,"
            " or choose other data"
        )
    return signals[modality]


@dataclass(frozen=True, kw_only=True)
class EmergentClassificationConfig:
    """Fields of the task ``emergent-classification``.

    Attributes:
        modality: Whose items are classified by the texts of the classes.
        label: Where a sample's class stands: ``name``, or a key of its meta data (``role``, ``skin_tone``, ``gender``,
            ``motion``). Samples without it are left out.
        templates: As of the task ``zero-shot``: ``plain``, ``icons``, ``simple``, or patterns with {} parted by ``|``.
        items: How many items of the split (chosen by hash of their id); 0 takes all.
        batch_size: Items a forward pass.
    """

    modality: str = "audio"
    label: str = "skin_tone"
    templates: str = "plain"
    items: int = 0
    batch_size: int = 64
    metrics: ClassVar[Mapping[str, MetricInfo]] = {
        "top1": MetricInfo(
            label="emergent top-1", numerator="top1", percent=True, primary=True, help="items whose class is first"
        ),
        "top1_by_class": MetricInfo(
            label="emergent top-1, by class", numerator="weighted_top1", denominator="weight", percent=True,
            detail=True, help="the mean over classes; chance is one over their number",
        ),
        "majority": MetricInfo(
            label="majority", higher_is_better=None, percent=True, detail=True, help="share of the commonest class"
        ),
        "classes": MetricInfo(label="classes", higher_is_better=None, detail=True),
        "items": MetricInfo(label="items", higher_is_better=None, detail=True),
    }  # fmt: skip

    def __post_init__(self) -> None:
        if self.modality not in KNOWN or self.modality == "text":
            raise ConfigError(
                f"emergent-classification.modality = {self.modality!r}{near(self.modality, KNOWN)}; texts are classes"
            )
        if self.templates not in TEMPLATES and not all("{}" in part for part in self.templates.split("|")):
            raise ConfigError(
                f"emergent-classification.templates = {self.templates!r}: expected {', '.join(TEMPLATES)}, or templates"
                " with {} in each, parted by |"
            )
        if self.items < 0 or self.batch_size < 1:
            raise ConfigError("emergent-classification: items is at least 0, batch_size at least 1")

    @property
    def patterns(self) -> tuple[str, ...]:
        """The templates themselves."""
        return TEMPLATES.get(self.templates) or tuple(part.strip() for part in self.templates.split("|"))

    def build(self) -> EmergentClassification:
        return EmergentClassification(self)


class EmergentClassification(Task):
    """Top-1 among the classes of the chosen items, whose vectors are those of their names in all templates."""

    name = "emergent-classification"
    needs = (EmbedModalities,)
    config: EmergentClassificationConfig

    def run(self, model: Any, source: SourceLike, split: str, progress: Progress | None = None) -> TaskResult:
        import torch
        import torch.nn.functional as F

        from zoo.evaluation.metrics import ranks_of, similarity

        config = self.config
        embedded = embed_split(
            self.name, model, source, split, [config.modality], config.items, config.batch_size, progress
        )
        labels = [
            name if config.label == "name" else meta.get(config.label)
            for name, meta in zip(embedded.names, embedded.metas, strict=True)
        ]
        rows = [n for n, label in enumerate(labels) if isinstance(label, str) and label]
        classes = sorted({str(labels[n]) for n in rows})
        if len(classes) < 2:
            keys = sorted({key for meta in embedded.metas for key, value in meta.items() if isinstance(value, str)})
            raise DataError(
                f"{self.name}: label = {config.label!r} has {len(classes)} classes in the {split} split of"
                f" {source.name}{near(config.label, keys)}: expected name, or one of {', '.join(keys) or 'no keys'}"
            )
        patterns = config.patterns
        texts = [pattern.replace("{}", name) for name in classes for pattern in patterns]
        vectors = model.embed("text", texts).float().cpu().view(len(classes), len(patterns), -1)
        vectors = F.normalize(F.normalize(vectors, dim=-1).mean(1), dim=-1)  # [C, D]
        scores = similarity(embedded.vectors[config.modality][rows], vectors)  # [n, C]
        place = {name: row for row, name in enumerate(classes)}
        right = [place[str(labels[n])] for n in rows]
        ranks = ranks_of(scores, [[r] for r in right], COSINE_TIE).tolist()
        frequency = Counter(right)
        items = [
            {
                "item": embedded.ids[n],
                "cluster": embedded.clusters[n],
                "reference": classes[r],
                "output": classes[int(scores[i].argmax())],
                "top1": float(ranks[i] == 1),
                "weight": 1 / frequency[r],
                "weighted_top1": (ranks[i] == 1) / frequency[r],
            }
            for i, (n, r) in enumerate(zip(rows, right, strict=True))
        ]
        sums = torch.tensor([[row["weighted_top1"], row["weight"]] for row in items], dtype=torch.float64).sum(0)
        metrics = {
            "top1": sum(row["top1"] for row in items) / len(items),
            "top1_by_class": float(sums[0] / sums[1]),
            "majority": max(frequency.values()) / len(items),
            "classes": float(len(classes)),
            "items": float(len(items)),
        }
        shown = set(sample_ids([row["item"] for row in items]))
        samples = [
            {"id": row["item"], "output": row["output"], "kind": "likeliest names"}
            for row in items
            if row["item"] in shown
        ]
        return TaskResult(
            name=self.name, metrics=metrics, items=items, spec_hash=self.spec_hash(source, split), samples=samples
        )
