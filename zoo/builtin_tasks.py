"""Tasks of captions, objects, classes, text alone, masks and combinations in the zoo's own manifest (``zoo.builtin``).
Data only."""

from __future__ import annotations

from zoo.registry import Component


def _task(name: str, ref: str, summary: str) -> Component:
    return Component(kind="task", name=name, ref=f"zoo.evaluation.{ref}", summary=summary)


EVALUATIONS = (
    _task(
        "captioning", "captioning:CaptioningConfig", "CIDEr-D, BLEU-4 and ROUGE-L of written captions, bits per byte"
    ),
    _task(
        "pope", "hallucination:PopeConfig", "POPE: yes or no about objects that are there, random, popular, adversarial"
    ),
    _task("zero-shot", "zero_shot:ZeroShotConfig", "top-1 and top-5 among class texts in ensembles of templates"),
    _task(
        "language-modelling", "language_modelling:LanguageModellingConfig", "bits per byte of texts without an image"
    ),
    _task(
        "inpainting", "inpainting:InpaintingConfig", "PSNR and SSIM inside and outside the mask, an evaluator's score"
    ),
    _task("segmentation", "segmentation:SegmentationConfig", "gIoU and cIoU of the pixels that a name stands for"),
    _task(
        "compositional",
        "compositional:CompositionalConfig",
        "naming, retrieval, drawing on combinations that training lacks, against like ones it saw",
    ),
)
