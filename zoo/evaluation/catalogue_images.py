"""What the metrics of drawn images and of masks mean; part of `zoo.evaluation.catalogue`."""

from __future__ import annotations

from dataclasses import replace

from zoo.evaluation.metric_info import MetricInfo


def drawing() -> dict[str, MetricInfo]:
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


def answering_with_images() -> dict[str, MetricInfo]:
    """The metrics of ``illustrated-answers``: those of its images, and what its answers hold."""

    def share(label: str, key: str, help: str, detail: bool = True) -> dict[str, MetricInfo]:
        return {key: MetricInfo(label=label, numerator=key, percent=True, detail=detail, help=help)}

    return {
        **drawing(),
        **share("text and image", "both", "answers that hold a text and an image", detail=False),
        **share("with image", "with_image", "answers that hold an image"),
        **share("with text", "with_text", "answers that hold a text"),
        **share("repeats", "repeats", "answers whose text is the prompt's own"),
    }


def scenes() -> dict[str, MetricInfo]:
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


def inpainting() -> dict[str, MetricInfo]:
    """The metrics of ``inpainting``; each ``*_redrawn`` is the same of images drawn with nothing masked."""
    units = {"psnr": ("PSNR", "dB of the mean squared error"), "ssim": ("SSIM", "structural similarity, 1 is equal")}
    found = {
        f"{name}_{place}{suffix}": MetricInfo(
            label=f"{label} {place}{suffix and ' (redrawn)'}",
            higher_is_better=None if suffix else True,
            numerator=f"{name}_{place}{suffix}",
            primary=(name, place, suffix) == ("psnr", "inside", ""),
            detail=bool(suffix) or name == "ssim",
            help=f"{help}, {place} the mask{suffix and '; nothing masked: what drawing costs by itself'}",
        )
        for suffix in ("", "_redrawn")
        for name, (label, help) in units.items()
        for place in ("inside", "outside")
    }
    return found | {
        "score": MetricInfo(
            label="inpainted score", numerator="score", percent=True,
            help="cosine of the whole image and its text in the evaluator's space",
        ),
        "score_real": MetricInfo(
            label="inpainted score (real)", higher_is_better=None, numerator="score_real", percent=True, detail=True,
            help="the same of the images as they were",
        ),
        "masked": MetricInfo(
            label="masked", higher_is_better=None, numerator="masked", percent=True, detail=True,
            help="share of the pixels that were to be drawn anew",
        ),
    }  # fmt: skip


def segmentation() -> dict[str, MetricInfo]:
    """The metrics of ``segmentation``."""
    return {
        "giou": MetricInfo(
            label="gIoU", numerator="iou", percent=True, primary=True,
            help="mean intersection over union of the targets; an absent object with an empty mask counts 1",
        ),
        "ciou": MetricInfo(
            label="cIoU", numerator="intersection", denominator="union", percent=True,
            help="all intersections over all unions: large objects weigh more",
        ),
        "giou_present": MetricInfo(
            label="gIoU, there", numerator="iou_present", denominator="present", percent=True, detail=True,
            help="gIoU of objects that are there",
        ),
        "absent_right": MetricInfo(
            label="absent, empty", numerator="absent_right", denominator="absent", percent=True, detail=True,
            help="absent objects whose mask is empty, as it should be",
        ),
    }  # fmt: skip
