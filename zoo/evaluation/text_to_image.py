"""How well images drawn from texts fit the texts, and how far they lie from real ones, by an evaluator of the zoo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from zoo.errors import ConfigError, DataError
from zoo.evaluation.catalogue import METRICS, MetricInfo
from zoo.evaluation.drawing import Asked, DrawingConfig, DrawingTask
from zoo.evaluation.evaluator import embed_images, embed_texts, load_evaluator
from zoo.evaluation.naming import draw_candidates
from zoo.evaluation.task import (
    COSINE_TIE,
    Progress,
    SourceLike,
    TaskResult,
    by_hash,
    sample_ids,
    text_samples,
    thumbnail,
)

if TYPE_CHECKING:
    from torch import Tensor

HALVINGS = 8
"""Ways of dividing the samples in two over which distances of sets are averaged."""
LEAST = 4
"""Images below which two halves have no covariance."""


@dataclass(frozen=True, kw_only=True)
class TextToImageConfig(DrawingConfig):
    """Fields of the task ``text-to-image``: those of `DrawingConfig` and

    Attributes:
        candidates: texts among which an image's own one is ranked, that one included.
    """

    candidates: int = 100

    task: ClassVar[str] = "text-to-image"
    metrics: ClassVar[Mapping[str, MetricInfo]] = METRICS["text-to-image"]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.candidates < 2:
            raise ConfigError(f"{self.task}.candidates = {self.candidates}: expected at least 2 texts to rank among")

    def build(self) -> TextToImage:
        return TextToImage(self)


class TextToImage(DrawingTask):
    """Similarity of drawn images and texts, and distances of drawn and real ones, in the evaluator's space.

    Every number has its reference beside it, measured the same way on the real images of the same items (``*_real``):
    what it is when the images are perfect, which is the evaluator's own error.

    - ``score``: mean cosine of an image and its text. ``score_other``: of the text and the images drawn for other
      items' texts, the control. ``gain``: their difference.
    - ``r_precision``: the text is the nearest of `candidates` (drawn by the item's id from the split's other texts;
      Xu et al. 2018, "AttnGAN", section 4, with 99 others). ``mrr``: mean reciprocal rank.
    - ``frechet``, ``kernel``, ``cmmd`` (`zoo.evaluation.distances`): the samples are halved by a hash of their id; the
      images drawn for one half are compared with the real ones of the other, both ways; and the mean is taken over
      `HALVINGS` such divisions. No drawn image so meets the real one of its own text, and the reference, real of one
      half against real of the other, has the same sizes and with them the same bias. Of several texts of a sample only
      the first counts here.
    """

    name = "text-to-image"
    config: TextToImageConfig

    def run(self, model: Any, source: SourceLike, split: str, progress: Progress | None = None) -> TaskResult:
        import torch

        from zoo.evaluation.distances import distances
        from zoo.evaluation.metrics import MeanOf, RankMetric

        config = self.config
        judge = load_evaluator(config.evaluator, self.name, model)
        asked = self.asked(source, split)
        if len(asked) < LEAST:
            raise DataError(
                f"{self.name}: {len(asked)} images of the {split} split of {source.name} are too few to compare sets;"
                f" give at least {LEAST}"
            )
        owner = [n for n, one in enumerate(asked) for _ in one.texts]  # row -> sample
        first = [owner.index(n) for n in range(len(asked))]  # sample -> the row of its first text
        texts = [text for one in asked for text in one.texts]
        pictures, cost = self.draw(model, texts, progress)

        size = config.batch_size
        drawn = embed_images(judge, pictures, size, self.name)  # [R, D]
        real = embed_images(judge, [one.image for one in asked], size, self.name)  # [N, D]
        written = embed_texts(judge, texts, size)  # [R, D]
        other = _other_scores(drawn, written, texts, owner)  # [R]
        other_real = _other_scores(real[owner], written, texts, owner)  # [R]
        pool = self._pool(source, split)
        names = [
            f"{asked[n].id}/{r - first[n]}" if len(asked[n].texts) > 1 else asked[n].id for r, n in enumerate(owner)
        ]
        ranks = torch.tensor(self._ranks(judge, asked, owner, names, texts, pool, (drawn, real[owner])))  # [R, 2]

        items: list[dict[str, Any]] = []
        for r, n in enumerate(owner):
            row: dict[str, Any] = {"item": names[r], "cluster": asked[n].cluster, "text": texts[r]}
            for suffix, vectors, wrong, column in (("", drawn[r], other, 0), ("_real", real[n], other_real, 1)):
                score, rank = float(vectors @ written[r]), int(ranks[r, column])
                row |= {
                    f"score{suffix}": score,
                    f"score_other{suffix}": float(wrong[r]),
                    f"gain{suffix}": score - float(wrong[r]),
                    f"rank{suffix}": rank,
                    f"top1{suffix}": float(rank == 1),
                    f"reciprocal_rank{suffix}": 1 / rank,
                }
            items.append(row)

        metrics: dict[str, float] = {}
        for column, suffix in enumerate(("", "_real")):
            for key in ("score", "score_other", "gain"):
                mean = MeanOf()
                mean.update(torch.tensor([row[key + suffix] for row in items], dtype=torch.float64))
                metrics[key + suffix] = float(mean.compute())
            ranked = RankMetric(config.candidates, (1,))
            ranked.update(ranks[:, column])
            metrics[f"r_precision{suffix}"] = float(ranked.compute()["r1"])
            metrics[f"mrr{suffix}"] = float(ranked.compute()["mrr"])
        halved = [_halves([one.id for one in asked], n) for n in range(HALVINGS)]
        own = drawn[first]
        metrics |= distances([pair for a, b in halved for pair in ((own[a], real[b]), (own[b], real[a]))])
        metrics |= {f"{k}_real": v for k, v in distances([(real[a], real[b]) for a, b in halved]).items()}
        metrics |= {"images": float(len(texts)), "candidates": float(min(config.candidates, len(pool)))} | cost
        place = {one.id: n for n, one in enumerate(asked)}
        shown = {first[place[i]]: place[i] for i in sample_ids(list(place))}
        samples = [
            {
                "id": asked[n].id,
                "output": f"rank {items[r]['rank']}, score {items[r]['score']:.2f} (real {items[r]['score_real']:.2f})",
                "picture": thumbnail(pictures[r]),
                "text": texts[r],
                "kind": "drawn",
            }
            for r, n in shown.items()
        ]
        return TaskResult(
            name=self.name, metrics=metrics, items=items, spec_hash=self.spec_hash(source, split), samples=samples
        )

    def spec(self, source: SourceLike, split: str) -> dict[str, Any]:
        return {**super().spec(source, split), "ties": f"against the model, within {COSINE_TIE}"}

    def _pool(self, source: SourceLike, split: str) -> list[str]:
        """Return the distinct texts of the whole split, so that ``items`` does not change anyone's candidates."""
        samples = text_samples(source, source.ids(split))
        return list(dict.fromkeys(t for s in samples for t in self.texts_of(s)))

    def _ranks(
        self,
        judge: Any,
        asked: Sequence[Asked],
        owner: Sequence[int],
        names: Sequence[str],
        texts: Sequence[str],
        pool: Sequence[str],
        sets: Sequence[Tensor],
    ) -> list[list[int]]:
        """The rank of each row's text among its candidates, once for each set of image vectors [R, D]."""
        import torch

        from zoo.evaluation.metrics import ranks_of

        everything = list(dict.fromkeys([*pool, *texts]))
        vectors = embed_texts(judge, everything, self.config.batch_size)  # [T, D]
        row_of = {text: row for row, text in enumerate(everything)}
        ranks = []
        for r, n in enumerate(owner):
            mine = set(asked[n].texts) - {texts[r]}  # the sample's other texts are right too
            choices = draw_candidates(names[r], texts[r], [t for t in pool if t not in mine], self.config.candidates)
            rows = torch.tensor([row_of[t] for t in choices])
            right = [[choices.index(texts[r])]]
            ranks.append([int(ranks_of((s[r : r + 1] @ vectors[rows].T), right, COSINE_TIE)) for s in sets])
        return ranks


def _halves(ids: Sequence[str], number: int) -> tuple[list[int], list[int]]:
    """Places of two halves of the samples, of equal size, by a hash of the id and the number of the halving."""
    place = {f"{number}/{id}": n for n, id in enumerate(ids)}
    order = [place[key] for key in by_hash(list(place))]
    size = len(ids) // 2
    return sorted(order[:size]), sorted(order[size : 2 * size])


def _other_scores(images: Tensor, written: Tensor, texts: Sequence[str], owner: Sequence[int]) -> Tensor:
    """Mean cosine [R] of each row's text and the images of all rows of another sample and another text."""
    import torch

    scores = written.double() @ images.double().T  # [R, R] text by image
    sample = torch.tensor(owner)
    codes = {text: code for code, text in enumerate(dict.fromkeys(texts))}
    text = torch.tensor([codes[t] for t in texts])
    foreign = (sample[:, None] != sample[None]) & (text[:, None] != text[None])  # [R, R]
    mean: Tensor = (scores * foreign).sum(1) / foreign.sum(1).clamp(min=1)
    return mean
