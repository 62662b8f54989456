"""How well an image tokenizer draws held-out images from their codes, and how much of its codebook it uses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from zoo.capabilities import EncodeImages, ReconstructImages
from zoo.evaluation.catalogue import METRICS, MetricInfo
from zoo.evaluation.task import Progress, SourceLike, Task, TaskResult, batches, choose_ids, cluster_of

if TYPE_CHECKING:
    from torch import Tensor


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
    """Mean PSNR in dB of values in [0, 1] (an image's error counts 1e-10 at least), the different codes, and the
    perplexity of their distribution, over the whole split."""

    name = "reconstruction"
    needs = (EncodeImages, ReconstructImages)
    config: ReconstructionConfig

    def run(self, model: Any, source: SourceLike, split: str, progress: Progress | None = None) -> TaskResult:
        import torch

        items: list[dict[str, Any]] = []
        codes: list[Tensor] = []
        chosen = choose_ids(source, split, self.config.items)
        for samples in batches(self.name, source, chosen, self.config.batch_size, progress):
            images = [s.image for s in samples]
            drawn, wanted = model.reconstruct_images(images), model.prepared_images(images)
            error = (drawn - wanted).square().flatten(1).mean(1).clamp(min=1e-10)  # [B]
            codes.append(model.image_codes(images).cpu())
            psnr = (-10 / math.log(10) * error.log()).tolist()
            items += [
                {"item": s.id, "cluster": cluster_of(s), "psnr": value} for s, value in zip(samples, psnr, strict=True)
            ]
        share = torch.bincount(torch.cat(codes).flatten()).double()
        share = share / share.sum()
        metrics = {
            "psnr": sum(row["psnr"] for row in items) / len(items),
            "codes_used": float((share > 0).sum()),
            "perplexity": float(torch.special.entr(share).sum().exp()),
            "images": float(len(items)),
        }
        return TaskResult(name=self.name, metrics=metrics, items=items, spec_hash=self.spec_hash(source, split))
