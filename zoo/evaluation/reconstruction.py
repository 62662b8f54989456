"""How well an image tokenizer draws held-out images again, and how much of its codebook it uses where it has one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from zoo.capabilities import EncodeImages, ReconstructImages
from zoo.data.sheet import to_picture
from zoo.evaluation.catalogue import METRICS, MetricInfo
from zoo.evaluation.task import (
    Progress,
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

WINDOW = 11
"""Side of SSIM's window; smaller images have none."""


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig:
    """Fields of the task ``reconstruction``.

    Attributes:
        items: how many images of the split (chosen by hash of their id); 0 takes all.
        batch_size: images a forward pass.
    """

    items: int = 0
    batch_size: int = 64
    metrics: ClassVar[Mapping[str, MetricInfo]] = METRICS["reconstruction"]

    def build(self) -> Reconstruction:
        return Reconstruction(self)


class Reconstruction(Task):
    """Means over images of values in [0, 1], and the use of a codebook where there is one.

    PSNR in dB (an image's error counts 1e-10 at least), SSIM (torchmetrics': a Gaussian window of 11, sigma 1.5,
    borders reflected) and absolute error; of discrete tokenizers the different codes, their share of the codebook, and
    the perplexity of their distribution over the whole split.
    """

    name = "reconstruction"
    version = 2
    needs = (ReconstructImages,)
    config: ReconstructionConfig

    def run(self, model: Any, source: SourceLike, split: str, progress: Progress | None = None) -> TaskResult:
        items: list[dict[str, Any]] = []
        codes: list[Tensor] = []
        pictures: dict[str, Image] = {}
        chosen = choose_ids(source, split, self.config.items)
        shown = set(sample_ids(chosen))
        for samples in batches(self.name, source, chosen, self.config.batch_size, progress):
            images: list[Any] = [s.image for s in samples]
            drawn, wanted = model.reconstruct_images(images), model.prepared_images(images)
            if isinstance(model, EncodeImages):
                codes.append(model.image_codes(images).cpu())
            columns = scores(drawn, wanted)
            for place, sample in enumerate(samples):
                row = {name: values[place] for name, values in columns.items()}
                items.append({"item": sample.id, "cluster": cluster_of(sample), **row})
                if sample.id in shown:
                    pictures[sample.id] = to_picture(drawn[place])
        metrics = {name: sum(row[name] for row in items) / len(items) for name in columns}
        metrics["images"] = float(len(items))
        if codes:
            metrics |= use_of(codes, model.codebook_size)
        rows = {row["item"]: row for row in items}
        return TaskResult(
            name=self.name,
            metrics=metrics,
            items=items,
            spec_hash=self.spec_hash(source, split),
            samples=[
                {
                    "id": i,
                    "output": f"{rows[i]['psnr']:.1f} dB",
                    "picture": thumbnail(pictures[i]),
                    "kind": "redrawn",
                }
                for i in chosen
                if i in pictures
            ],
        )


def scores(drawn: Tensor, wanted: Tensor) -> dict[str, list[float]]:
    """Each image's ``psnr``, ``l1`` and, where it is large enough, ``ssim``, of [N, 3, H, W] in [0, 1]."""
    from zoo import torchvision_ops

    torchvision_ops.ensure()
    from torchmetrics.functional.image import structural_similarity_index_measure

    error = drawn - wanted
    squared = error.square().flatten(1).mean(1).clamp(min=1e-10)  # [N]
    columns = {
        "psnr": (-10 / math.log(10) * squared.log()).tolist(),
        "l1": error.abs().flatten(1).mean(1).tolist(),
    }
    if min(drawn.shape[-2:]) >= WINDOW:
        similar: Any = structural_similarity_index_measure(drawn, wanted, data_range=1.0, reduction="none")
        columns["ssim"] = similar.reshape(len(drawn)).tolist()
    return columns


def use_of(codes: list[Tensor], size: int) -> dict[str, float]:
    """How much of a codebook of ``size`` the codes [N, n] of all batches use."""
    import torch

    share = torch.bincount(torch.cat([c.flatten() for c in codes])).double()
    share = share / share.sum()
    used = float((share > 0).sum())
    return {
        "codes_used": used,
        "codebook_share": used / size,
        "perplexity": float(torch.special.entr(share).sum().exp()),
    }
