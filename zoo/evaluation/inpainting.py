"""How well a part of an image is drawn anew: fidelity inside and outside the mask, and fit to the text."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from zoo.capabilities import InpaintImages
from zoo.data.sheet import to_picture
from zoo.errors import ConfigError, DataError
from zoo.evaluation.catalogue import METRICS, MetricInfo
from zoo.evaluation.evaluator import (
    embed_images,
    embed_texts,
    evaluator_folder,
    evaluator_hash,
    load_evaluator,
    to_pictures,
)
from zoo.evaluation.reconstruction import WINDOW
from zoo.evaluation.task import (
    Progress,
    SampleLike,
    SourceLike,
    Task,
    TaskResult,
    batches,
    choose_ids,
    cluster_of,
    sample_ids,
    thumbnail,
)

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

MASKS = ("rectangle", "object")
VERSION = 1
"""Raised whenever other masks are drawn."""


@dataclass(frozen=True, kw_only=True)
class InpaintingConfig:
    """Fields of the task ``inpainting``.

    Attributes:
        items: how many images of the split (chosen by hash of their id); 0 takes all.
        mask: ``rectangle``, a square at a place that follows from the item's id; ``object``, the box of one object of
            the scene (``meta["objects"]``, square images), which follows from it too.
        share: of the image's area that a rectangle covers.
        evaluator: run directory or checkpoint folder of a two-tower model that judges how the whole image fits its
            text; empty leaves that out.
        steps, guidance: handed to the model; None takes its own.
        seed: of the drawings; the batch that starts at image n is drawn with ``seed + n``.
        batch: images drawn together. Part of what is measured, as it decides the seeds.
    """

    items: int = 100
    mask: str = "rectangle"
    share: float = 0.25
    evaluator: str = ""
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    batch: int = 32
    metrics: ClassVar[Mapping[str, MetricInfo]] = METRICS["inpainting"]

    def __post_init__(self) -> None:
        if self.mask not in MASKS:
            raise ConfigError(f"inpainting.mask = {self.mask!r}: expected {' or '.join(MASKS)}")
        if not 0 < self.share < 1:
            raise ConfigError(f"inpainting.share = {self.share}: expected a share of the area between 0 and 1")
        if self.batch < 1 or min(self.items, self.seed) < 0:
            raise ConfigError("inpainting: batch is at least 1, items and seed at least 0")
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"inpainting.steps = {self.steps}: expected at least 1, or null for the model's own")

    def check(self) -> None:
        """Raise a ConfigError unless the evaluator is there, if one is given: asked before a run begins to train."""
        if self.evaluator:
            evaluator_folder(self.evaluator, "inpainting")

    def build(self) -> Inpainting:
        return Inpainting(self)


class Inpainting(Task):
    """PSNR and SSIM of the drawn image, inside and outside the mask, means over images of values in [0, 1].

    The text is the sample's first. Inside, a faithful copy is one answer among many: PSNR there is a lower bound of
    quality, and the evaluator's score of the whole image says whether what was drawn fits the text (``score_real``: of
    the image as it was). Outside, the image should come back as it was; a model that draws through an image tokenizer
    cannot be better than that: ``*_redrawn`` is the same of the images drawn with nothing masked.
    """

    name = "inpainting"
    needs = (InpaintImages,)
    config: InpaintingConfig

    def spec(self, source: SourceLike, split: str) -> dict[str, Any]:
        spec = {**super().spec(source, split), "masks": VERSION}
        if self.config.evaluator:
            spec["config"]["evaluator"] = evaluator_hash(self.config.evaluator, self.name)
        return spec

    def run(self, model: Any, source: SourceLike, split: str, progress: Progress | None = None) -> TaskResult:
        config = self.config
        ids = choose_ids(source, split, config.items)
        judge = load_evaluator(config.evaluator, self.name, model) if config.evaluator else None
        shown = set(sample_ids(ids))
        items: list[dict[str, Any]] = []
        pictures: dict[str, tuple[Image, Image]] = {}
        done = 0
        for samples in batches(self.name, source, ids, config.batch, progress):
            images = [s.image for s in samples]
            texts = [s.texts[0] for s in samples]
            wanted = model.prepared_images(images).float().cpu()  # [B, 3, H, W]
            masks = self._masks(samples, (int(wanted.shape[2]), int(wanted.shape[3])))  # [B, H, W]
            how = {"seed": config.seed + done, "steps": config.steps, "guidance": config.guidance}
            drawn = model.inpaint_images(images, masks, texts, **how).float().cpu()
            redrawn = model.inpaint_images(images, masks & False, texts, **how).float().cpu()
            columns = fidelity(drawn, wanted, masks)
            columns |= {f"{name}_redrawn": own for name, own in fidelity(redrawn, wanted, masks).items()}
            if judge is not None:
                columns |= self._scores(judge, drawn, wanted, texts)
            for n, sample in enumerate(samples):
                row = {name: values[n] for name, values in columns.items()}
                masked = float(masks[n].float().mean())
                items.append({"item": sample.id, "cluster": cluster_of(sample), "masked": masked, **row})
                if sample.id in shown:
                    given = to_picture(wanted[n].masked_fill(masks[n], 0.5))  # what is drawn anew is grey
                    pictures[sample.id] = to_picture(drawn[n]), given
            done += len(samples)
        metrics = {name: sum(row[name] for row in items) / len(items) for name in (*columns, "masked")}
        metrics["images"] = float(len(items))
        rows = {row["item"]: row for row in items}
        return TaskResult(
            name=self.name,
            metrics=metrics,
            items=items,
            spec_hash=self.spec_hash(source, split),
            samples=[
                {
                    "id": i,
                    "output": f"{rows[i]['psnr_inside']:.1f} dB inside, {rows[i]['psnr_outside']:.1f} dB outside",
                    "picture": thumbnail(picture),
                    "mask": thumbnail(given),
                    "kind": "redrawn",
                }
                for i, (picture, given) in pictures.items()
            ],
        )

    def _masks(self, samples: Sequence[SampleLike], size: tuple[int, int]) -> Tensor:
        """True where an image is drawn anew, [N, H, W]; never all of it, never nothing."""
        import torch

        masks = torch.zeros(len(samples), *size, dtype=torch.bool)
        for n, sample in enumerate(samples):
            left, top, right, bottom = self._box(sample, size)
            masks[n, top:bottom, left:right] = True
        return masks

    def _box(self, sample: SampleLike, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Left, top, right and bottom in pixels of the drawn image, the last two excluded."""
        digest = hashlib.sha256(f"inpainting/{sample.id}".encode()).digest()
        first, second = (int.from_bytes(digest[at : at + 8], "big") / 2**64 for at in (0, 8))
        height, width = size
        if self.config.mask == "rectangle":
            side = math.sqrt(self.config.share)
            tall = min(max(1, round(side * height)), height - 1)
            wide = min(max(1, round(side * width)), width - 1)
            left, top = int(first * (width - wide + 1)), int(second * (height - tall + 1))
            return left, top, left + wide, top + tall
        objects = [o for o in sample.meta.get("objects") or () if isinstance(o, Mapping) and "box" in o]
        if not objects:
            raise DataError(
                f"{self.name}: mask = 'object' needs boxes and {sample.id} has none in meta['objects']; use"
                " data=openmoji-scenes, or mask=rectangle"
            )
        image: Any = sample.image
        box = objects[int(first * len(objects))]["box"]
        across, down = width / image.size[0], height / image.size[1]
        left, top = int(box[0] * across), int(box[1] * down)
        right, bottom = math.ceil(box[2] * across), math.ceil(box[3] * down)
        right, bottom = min(max(right, left + 1), width), min(max(bottom, top + 1), height)
        whole = (right - left, bottom - top) == (width, height)
        return left, top, right - whole, bottom

    def _scores(self, judge: Any, drawn: Tensor, wanted: Tensor, texts: Sequence[str]) -> dict[str, list[float]]:
        """Cosine of each drawn image and its text, and of the image as it was."""
        size, count = self.config.batch, len(texts)
        written = embed_texts(judge, texts, size)  # [B, D]
        out = {}
        for name, pixels in (("score", drawn), ("score_real", wanted)):
            vectors = embed_images(judge, to_pictures(pixels, count, self.name), size, self.name)  # [B, D]
            out[name] = (vectors * written).sum(1).tolist()
        return out


def fidelity(drawn: Tensor, wanted: Tensor, masks: Tensor) -> dict[str, list[float]]:
    """``psnr`` in dB and, where images are large enough, ``ssim`` of each image, inside and outside its mask.

    PSNR is of the mean squared error over the pixels in question (at least 1e-10); SSIM the mean there of torchmetrics'
    map (Gaussian window of 11, sigma 1.5), so that pixels at the mask's edge see across it.

    Args:
        drawn, wanted: [N, 3, H, W] in [0, 1].
        masks: [N, H, W] bool, each neither empty nor full.
    """
    from zoo import torchvision_ops

    torchvision_ops.ensure()
    from torchmetrics.functional.image import structural_similarity_index_measure

    maps = {"psnr": (drawn - wanted).square().mean(1)}  # [N, H, W]
    if min(drawn.shape[-2:]) >= WINDOW:
        pair: Any = structural_similarity_index_measure(
            drawn, wanted, data_range=1.0, reduction="none", return_full_image=True
        )
        maps["ssim"] = pair[1].mean(1)
    out = {}
    for place, region in (("inside", masks), ("outside", ~masks)):
        for name, values in maps.items():
            mean = (values * region).flatten(1).double().sum(1) / region.flatten(1).sum(1)  # [N]
            if name == "psnr":
                mean = -10 * mean.clamp(min=1e-10).log10()
            out[f"{name}_{place}"] = mean.tolist()
    return out
