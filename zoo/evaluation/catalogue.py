"""What each metric means: label, direction, and how it follows from the per-item scores.

This module imports nothing heavy, so that reports need no torch. Every metric with an interval is a mean or a ratio
of sums over items, named here once: the bootstrap (`zoo.compare.statistics`) recomputes the metric from the stored
columns by it.
"""

from __future__ import annotations

from zoo.evaluation.catalogue_images import answering_with_images, drawing, inpainting, scenes, segmentation
from zoo.evaluation.catalogue_questions import ANSWER_TYPES as ANSWER_TYPES
from zoo.evaluation.catalogue_questions import QUESTION_KINDS as QUESTION_KINDS
from zoo.evaluation.catalogue_questions import STRATEGIES as STRATEGIES
from zoo.evaluation.catalogue_questions import answering, polling
from zoo.evaluation.metric_info import MetricInfo as MetricInfo


def _recall(way: str, k: int, primary: bool = False, stage: str = "") -> MetricInfo:
    image_first = way == "i2t"
    return MetricInfo(
        label=f"{'I→T' if image_first else 'T→I'} R@{k}{stage and ' reranked'}",
        numerator=f"{way}_hits_{k}{stage}",
        denominator="" if image_first else "captions",
        percent=True,
        primary=primary,
        detail=k != 1,
        help=f"{'images that find one of their captions' if image_first else 'captions that find their image'} "
        f"among the first {k}",
    )


def _captions() -> dict[str, MetricInfo]:
    """The metrics of ``captioning``."""
    return {
        "cider_d": MetricInfo(
            label="CIDEr-D", numerator="cider_d", primary=True,
            help="agreement of n-grams with the references, rare ones weighing more; 0..10, published values times 100",
        ),
        "bleu4": MetricInfo(
            label="BLEU-4", percent=True, help="of the whole corpus, closest reference length; no mean over items",
        ),
        "bleu4_smoothed": MetricInfo(
            label="BLEU-4 mean", numerator="bleu4_smoothed", percent=True, detail=True,
            help="mean of each caption's BLEU-4 with 1 added to the counts above one word",
        ),
        "rouge_l": MetricInfo(
            label="ROUGE-L", numerator="rouge_l", percent=True,
            help="longest common subsequence, beta 1.2, best precision and best recall over the references",
        ),
        "bits_per_byte": MetricInfo(
            label="caption bits/byte", higher_is_better=False, numerator="bits", denominator="bytes",
            help="negative log-likelihood of the references, in bits a byte",
        ),
        "words": MetricInfo(
            label="caption words", higher_is_better=None, numerator="words", detail=True,
            help="mean length of the written captions",
        ),
    }  # fmt: skip


def _classes() -> dict[str, MetricInfo]:
    """The metrics of ``zero-shot``."""
    return {
        "top1": MetricInfo(
            label="zero-shot top-1", numerator="top1", percent=True, primary=True,
            help="the nearest class text is the right one, among all classes of the split",
        ),
        "top5": MetricInfo(
            label="zero-shot top-5", numerator="top5", percent=True, detail=True, help="the right one is among five",
        ),
        "top1_by_class": MetricInfo(
            label="zero-shot, classes", numerator="weighted_top1", denominator="weight", percent=True, detail=True,
            help="top-1 as a mean over classes, each weighing the same",
        ),
    }  # fmt: skip


COMPARED: dict[str, tuple[str, ...]] = {
    "naming": ("top1", "exact_match"),
    "retrieval": ("i2t_r1", "t2i_r1"),
    "text-to-image": ("score", "r_precision"),
}
"""Task -> those of its metrics that ``compositional`` reports for seen and held-out combinations."""


def _combinations(known: dict[str, dict[str, MetricInfo]]) -> dict[str, MetricInfo]:
    """The metrics of ``compositional``: those of other tasks, for pairs of a held-out and a seen combination."""
    parts = {
        "heldout": ("held out", True, "combinations that training lacks"),
        "seen": ("seen", None, "their partners, seen in training"),
        "gap": ("gap", False, "seen less held out, pair by pair"),
    }
    return {
        f"{task.replace('-', '_')}_{metric}_{part}": MetricInfo(
            label=f"{known[task][metric].label}, {label}",
            higher_is_better=direction,
            numerator=f"{task.replace('-', '_')}_{metric}_{part}",
            percent=True,
            primary=(task, metric, part) == ("naming", "top1", "heldout"),
            detail=metric != metrics[0],
            help=f"{known[task][metric].help}: {help}",
        )
        for task, metrics in COMPARED.items()
        for metric in metrics
        for part, (label, direction, help) in parts.items()
    }


_TASKS: dict[str, dict[str, MetricInfo]] = {
    "retrieval": {
        **{f"i2t_r{k}": _recall("i2t", k, primary=k == 1) for k in (1, 5, 10)},
        **{f"t2i_r{k}": _recall("t2i", k) for k in (1, 5, 10)},
        **{f"{way}_r{k}_reranked": _recall(way, k, stage="_reranked") for way in ("i2t", "t2i") for k in (1, 5, 10)},
        "i2t_median_rank": MetricInfo(
            label="I→T median", higher_is_better=False, detail=True, help="median rank of the right one; 1 is best"
        ),
        "t2i_median_rank": MetricInfo(
            label="T→I median", higher_is_better=False, detail=True, help="median rank of the right one; 1 is best"
        ),
    },
    "caption-likelihood": {
        "bits_per_byte": MetricInfo(
            label="bits/byte",
            higher_is_better=False,
            numerator="bits",
            denominator="bytes",
            primary=True,
            help="negative log-likelihood of the held-out captions in bits per UTF-8 byte; "
            "independent of the tokenizer",
        ),
    },
    "reconstruction": {
        "psnr": MetricInfo(
            label="PSNR",
            numerator="psnr",
            primary=True,
            help="of images drawn from their codes or latents, in dB",
        ),
        "ssim": MetricInfo(
            label="SSIM",
            numerator="ssim",
            help="structural similarity of images and what is drawn of their codes or latents, at most 1",
        ),
        "l1": MetricInfo(
            label="L1",
            higher_is_better=False,
            numerator="l1",
            detail=True,
            help="mean absolute error of values from 0 to 1",
        ),
        "codebook_share": MetricInfo(
            label="codebook used",
            percent=True,
            detail=True,
            help="share of the codebook that the split's patches use",
        ),
        "codes_used": MetricInfo(
            label="codes used", detail=True, help="different codes among all patches of the split"
        ),
        "perplexity": MetricInfo(
            label="code perplexity",
            detail=True,
            help="codes as if all were equally frequent",
        ),
    },
    "naming": {
        "top1": MetricInfo(
            label="name top-1",
            numerator="top1",
            percent=True,
            primary=True,
            help="the true name ranks first among the candidates; models that only embed rank by similarity",
        ),
        "mrr": MetricInfo(
            label="name MRR",
            numerator="reciprocal_rank",
            detail=True,
            help="mean reciprocal rank of the true name",
        ),
        "top1_per_byte": MetricInfo(
            label="top-1 per byte",
            numerator="top1_per_byte",
            detail=True,
            percent=True,
            help="the same ranking by log-likelihood divided by the name's length in bytes",
        ),
        "exact_match": MetricInfo(
            label="exact name",
            numerator="exact_match",
            percent=True,
            help="the generated text equals the name after normalisation",
        ),
    },
    "question-answering": answering(),
    "pope": polling(),
    "captioning": _captions(),
    "zero-shot": _classes(),
    "language-modelling": {
        "bits_per_byte": MetricInfo(
            label="text bits/byte",
            higher_is_better=False,
            numerator="bits",
            denominator="bytes",
            primary=True,
            help="negative log-likelihood of texts alone, without an image, in bits a byte",
        )
    },
    "text-to-image": drawing(),
    "illustrated-answers": answering_with_images(),
    "scene-check": scenes(),
    "inpainting": inpainting(),
    "segmentation": segmentation(),
}

METRICS: dict[str, dict[str, MetricInfo]] = {**_TASKS, "compositional": _combinations(_TASKS)}
"""Task name -> metric name -> meaning. Metrics that are only counts (items, candidates) are not listed."""


def metric_info(task: str, metric: str) -> MetricInfo | None:
    """Return what is known of a metric, asking the task registry for tasks of plugins; ``None`` for a plain count."""
    if task in METRICS:
        return METRICS[task].get(metric)
    from zoo.evaluation.task import (
        task_metrics,
    )  # only here: a plugin's task may import torch

    return task_metrics(task).get(metric)
