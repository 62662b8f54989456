"""What each metric means: label, direction, and how it follows from the per-item scores.

This module imports nothing heavy, so that reports need no torch. Every metric with an interval is a mean or a ratio
of sums over items, named here once: the bootstrap (`zoo.compare.bootstrap`) recomputes the metric from the stored
columns by it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class MetricInfo:
    """One metric of one task.

    Attributes:
        label: short column heading.
        higher_is_better: direction; ``None`` for a quantity that is only described.
        numerator: item column that is summed; ``""`` when the metric does not follow from sums (a median).
        denominator: item column that is summed and divided by; ``""`` divides by the number of items.
        percent: shown times 100.
        primary: the one metric of the task that plots and summaries show.
        detail: shown only in the task's own table, not in the overview.
        help: one line for the reader of a report.
    """

    label: str
    higher_is_better: bool | None = True
    numerator: str = ""
    denominator: str = ""
    percent: bool = False
    primary: bool = False
    detail: bool = False
    help: str = ""


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


QUESTION_KINDS = ("what", "count", "exist", "where", "relation", "which", "colour")
ANSWER_TYPES = ("yes_no", "number", "other")
STRATEGIES = ("random", "popular", "adversarial")


def _answering() -> dict[str, MetricInfo]:
    """The metrics of ``question-answering``; each is a ratio of sums of the columns of its rows."""

    def part(label: str, column: str, help: str) -> MetricInfo:
        return MetricInfo(
            label=label, numerator=f"correct_{column}", denominator=column, percent=True, detail=True, help=help
        )

    def verdict(label: str, above: str, below: str, help: str, direction: bool | None = True) -> MetricInfo:
        return MetricInfo(
            label=label, higher_is_better=direction, numerator=above, denominator=below, percent=True, detail=True,
            help=help,
        )  # fmt: skip

    return {
        "accuracy": MetricInfo(
            label="QA accuracy",
            numerator="correct",
            percent=True,
            primary=True,
            help="generated answers that equal the reference after the VQA normalisation (soft if there are several)",
        ),
        "blank_accuracy": MetricInfo(
            label="QA blank",
            higher_is_better=None,
            numerator="correct_blank",
            percent=True,
            help="the same model and questions with blank images: what it answers without seeing",
        ),
        "gain": MetricInfo(
            label="QA gain",
            numerator="gain",
            percent=True,
            help="accuracy less that with blank images, question by question",
        ),
        **{f"accuracy_{k}": part(f"QA {k}", f"kind_{k}", f"accuracy on questions of kind {k}") for k in QUESTION_KINDS},
        **{
            f"accuracy_{t}": part(f"QA {t.replace('_', '/')}", f"type_{t}", f"accuracy where the answer is {t}")
            for t in ANSWER_TYPES
        },
        **{
            f"accuracy_exist_{s}": part(f"exist {s}", f"exist_{s}", f"POPE accuracy, what is missing chosen {s}")
            for s in STRATEGIES
        },
        "exist_precision": verdict("exist precision", "true_yes", "said_yes", "POPE: right among those answered yes"),
        "exist_recall": verdict("exist recall", "true_yes", "is_yes", "POPE: answered yes among those that are there"),
        "exist_f1": verdict("exist F1", "twice_true_yes", "yes_said_or_true", "POPE: of precision and recall"),
        "exist_yes_ratio": verdict(
            "says yes", "said_yes", "kind_exist", "POPE: share answered yes; half is true", None
        ),
    }


def _drawing() -> dict[str, MetricInfo]:
    """The metrics of ``text-to-image``; each ``*_real`` is the same of real images: the best that can be had."""

    def of(key: str, info: MetricInfo) -> dict[str, MetricInfo]:
        real = replace(
            info,
            label=f"{info.label} (real)",
            higher_is_better=None,
            numerator=info.numerator and f"{info.numerator}_real",
            primary=False,
            detail=True,
            help=f"of the real images: {info.help}",
        )
        return {key: info, f"{key}_real": real}

    def distance(label: str, help: str) -> MetricInfo:
        return MetricInfo(label=label, higher_is_better=False, help=help)

    return {
        **of("score", MetricInfo(
            label="evaluator score", numerator="score", percent=True, primary=True,
            help="cosine of a drawn image and its text in the evaluator's space",
        )),
        **of("score_other", MetricInfo(
            label="score, other", higher_is_better=None, numerator="score_other", percent=True, detail=True,
            help="cosine of a text and the images drawn for other texts, the control",
        )),
        **of("gain", MetricInfo(
            label="score gain", numerator="gain", percent=True, help="evaluator score less that with other images",
        )),
        **of("r_precision", MetricInfo(
            label="R-precision", numerator="top1", percent=True,
            help="drawn images whose text is the nearest of 100, the others drawn at random",
        )),
        **of("mrr", MetricInfo(
            label="text MRR", numerator="reciprocal_rank", detail=True, help="mean reciprocal rank of the own text",
        )),
        **of("frechet", distance(
            "Fréchet", "distance of the Gaussians of drawn and real images in the evaluator's space; half against half",
        )),
        **of("kernel", distance(
            "kernel", "squared MMD, polynomial kernel, unbiased, of drawn and real images in the evaluator's space",
        )),
        **of("cmmd", distance(
            "CMMD", "squared MMD times 1000, Gaussian kernel, unbiased, in the evaluator's space",
        )),
    }  # fmt: skip


def _scenes() -> dict[str, MetricInfo]:
    """The metrics of ``scene-check``: shares of what the captions state, of drawn and of other images."""
    what = {
        "objects": ("stated objects", "stated kinds of objects that are there"),
        "counts": ("stated counts", "stated counts that are right"),
        "positions": ("stated positions", "stated relations of places that hold"),
        "scenes": ("whole scenes", "images in which everything stated is right"),
    }
    sets = {
        "": ("", "", True),
        "_other": (", other", "; images drawn for other captions, the control", None),
        "_real": (" (real)", "; real images: the checker's own error", None),
        "_blurred": (" (blurred)", "; real images at half their resolution: the checker's error on soft ones", None),
    }
    return {
        f"{key}{suffix}": MetricInfo(
            label=label + mark,
            higher_is_better=direction,
            numerator=f"right_{key}{suffix}",
            denominator=f"stated_{key}",
            percent=True,
            primary=key == "objects" and not suffix,
            detail=bool(suffix),
            help=help + more,
        )
        for suffix, (mark, more, direction) in sets.items()
        for key, (label, help) in what.items()
    }


METRICS: dict[str, dict[str, MetricInfo]] = {
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
    "question-answering": _answering(),
    "text-to-image": _drawing(),
    "scene-check": _scenes(),
}
"""Task name -> metric name -> meaning. Metrics that are only counts (items, candidates) are not listed."""


def metric_info(task: str, metric: str) -> MetricInfo | None:
    """Return what is known of a metric, asking the task registry for tasks of plugins; ``None`` for a plain count."""
    if task in METRICS:
        return METRICS[task].get(metric)
    from zoo.evaluation.task import (
        task_metrics,
    )  # only here: a plugin's task may import torch

    return task_metrics(task).get(metric)
