"""The symmetric in-batch contrastive loss of CLIP (Radford et al. 2021, figure 3), with negatives from every rank."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from zoo.objectives.base import Objective, full_precision
from zoo.recipe import ObjectiveConfig

MAX_LOGIT_SCALE = math.log(100.0)
GATHERS = ("local", "full", "none")


@dataclass(frozen=True, kw_only=True)
class ContrastiveConfig(ObjectiveConfig):
    """The contrastive objective.

    Attributes:
        gather: Where negatives come from when several ranks train: ``local`` (every rank's columns for the own rows;
            the same loss and gradient as one process, and the least work), ``full`` (every rank computes the whole
            matrix), ``none`` (own rank only).
        label_smoothing: Mass spread evenly over the batch; CLIP uses none.
        clamp: Keep the temperature's logarithm in [0, ln 100] after each step; VLMo and BLIP-2 do not.
        keys_learn: What a row is compared with has a gradient too. BLIP-2's release gathers without one, the own rows
            included: images then learn from image-to-text alone, and texts from text-to-image.
    """

    gather: str = "local"
    label_smoothing: float = 0.0
    clamp: bool = True
    keys_learn: bool = True

    def __post_init__(self) -> None:
        if self.gather not in GATHERS:
            raise ValueError(f"gather = {self.gather!r} must be one of {', '.join(GATHERS)}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing = {self.label_smoothing} must be in [0, 1)")

    def build(self) -> Contrastive:
        return Contrastive(self)


@dataclass(frozen=True, kw_only=True)
class PairContrastiveConfig(ContrastiveConfig):
    """The contrastive objective once more, behind the pair experts, with a temperature of its own (unilm
    vlmo/modules/objectives.py, compute_itc; the paper describes only the first)."""

    def build(self) -> PairContrastive:
        return PairContrastive(self)


class _Gather(torch.autograd.Function):
    """All ranks' rows [R*B, D]; backward sums, over ranks, the gradient of the own rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        out = rows.new_empty(dist.get_world_size() * rows.shape[0], *rows.shape[1:])
        dist.all_gather(list(out.chunk(dist.get_world_size())), rows.contiguous())
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous()
        if dist.get_backend() == "nccl":
            own = gradient.new_empty(gradient.shape[0] // dist.get_world_size(), *gradient.shape[1:])
            dist.reduce_scatter_tensor(own, gradient)
            return own
        gradient = gradient.clone()  # all_reduce works in place, and autograd may hand this buffer to others
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenate [B, D] of every rank to [R*B, D] in rank order, with gradient; B must be equal on all ranks.

    After DDP's averaging over ranks the parameter gradient of a loss over gathered rows is that of one process.
    """
    out: Tensor = _Gather.apply(rows)  # type: ignore[no-untyped-call]
    return out


def similarities(images: Tensor, texts: Tensor) -> Tensor:
    """Products [N, M] of vectors [N, D] and [M, D]; where one side has several, [N, Q, D], the greatest of them.

    BLIP-2 compares an image's 32 queries with a text so (arXiv 2301.12597, section 3.1).
    """
    if images.ndim == 3:
        return torch.einsum("nqd,md->nmq", images, texts).max(-1).values
    return similarities(texts, images).T if texts.ndim == 3 else images @ texts.T


class Contrastive(Objective):
    """Mean of the image-to-text and the text-to-image cross-entropy; pairs stand on the diagonal, and with
    ``image_ids`` [B] in the batch all pairs of one image are right to equal parts."""

    learns: ClassVar[str] = "contrastive"
    needs: ClassVar[frozenset[str]] = frozenset({"image_embeds", "text_embeds", "logit_scale"})
    prefix: ClassVar[str] = ""  # of the outputs and of the model's temperature

    def __init__(self, config: ContrastiveConfig) -> None:
        super().__init__()
        self.clamp = config.clamp
        self.keys_learn = config.keys_learn
        self.gather = config.gather
        self.label_smoothing = config.label_smoothing

    def forward(
        self, model: Any, batch: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss from ``image_embeds`` and ``text_embeds`` [B, D] of unit length and ``logit_scale``, a
        logarithm. An image may have several vectors [B, Q, D], of which the nearest to a text counts.

        Returns:
            The loss in nats, and ``logit_scale`` (the factor itself) and ``image_to_text_accuracy`` in [0, 1].
        """
        images, texts = outputs[f"{self.prefix}image_embeds"], outputs[f"{self.prefix}text_embeds"]
        # similarities of unit vectors times up to 100 leave bfloat16 two digits
        with full_precision(images):
            images, texts = images.float(), texts.float()
            scale = outputs[f"{self.prefix}logit_scale"].float().exp()
            several = self.gather != "none" and dist.is_available() and dist.is_initialized()
            first = 0
            ids = all_ids = batch.get("image_ids")
            all_images, all_texts = images, texts
            if several and dist.get_world_size() > 1:
                all_images, all_texts = gather_rows(images), gather_rows(texts)
                all_ids = None if ids is None else gather_rows(ids)
                if self.gather == "full":
                    images, texts, ids = all_images, all_texts, all_ids
                else:
                    first = dist.get_rank() * images.shape[0]
            if not self.keys_learn:
                all_images, all_texts = all_images.detach(), all_texts.detach()
            logits_per_image = similarities(scale * images, all_texts)  # [B, R*B]
            logits_per_text = similarities(scale * texts, all_images)
            labels = targets = torch.arange(first, first + images.shape[0], device=images.device)
            if ids is not None and all_ids is not None:
                same = (ids[:, None] == all_ids).float()
                targets = same / same.sum(1, keepdim=True)
            loss = (self._cross_entropy(logits_per_image, targets) + self._cross_entropy(logits_per_text, targets)) / 2
        hits = (logits_per_image.detach().argmax(1) == labels).float().mean()
        return loss, {"logit_scale": scale.detach(), "image_to_text_accuracy": hits}

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)

    @torch.no_grad()
    def after_step(self, model: Any) -> None:
        """Keep the temperature's logarithm in [0, ln 100], as open_clip's training loop does after each step."""
        if self.clamp:
            getattr(model, f"{self.prefix}logit_scale").clamp_(0.0, MAX_LOGIT_SCALE)


class PairContrastive(Contrastive):
    """``Contrastive`` of ``pair_image_embeds``, ``pair_text_embeds`` and ``pair_logit_scale``."""

    needs: ClassVar[frozenset[str]] = frozenset({"pair_image_embeds", "pair_text_embeds", "pair_logit_scale"})
    prefix: ClassVar[str] = "pair_"
