"""Image-text matching with hard negatives drawn from the contrastive similarities (ALBEF, arXiv 2107.07651)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from zoo.draws import choose
from zoo.errors import ConfigError
from zoo.objectives.base import Objective, full_precision
from zoo.objectives.contrastive import gather_rows, similarities
from zoo.objectives.momentum import gathered, own_rows
from zoo.part import Features
from zoo.recipe import ObjectiveConfig

SIMILARITIES = ("momentum", "online")
EXCLUDED = ("after", "before")
NONE = -100


@dataclass(frozen=True, kw_only=True)
class MatchingConfig(ObjectiveConfig):
    """The matching objective.

    Attributes:
        similarity: Whose features weigh the negatives: ``momentum`` compares the own features with the momentum copy's
            keys (ALBEF, BLIP's pre-training) where a run has one, ``online`` with the model's own (BLIP's retrieval).
        floor: Added to the sampling weights after the softmax, so that no row underflows to zero; BLIP's fix, which
            ALBEF's release lacks (models/blip_pretrain.py).
        exclude: Leave the own pair out of the sampling weights ``after`` the softmax (ALBEF, BLIP) or ``before`` it
            (BLIP-2), where nothing can underflow.
        gather: Draw negatives from the batch of every rank, as one process with the whole batch would; False draws
            within a rank, as ALBEF's release does.
    """

    similarity: str = "momentum"
    floor: float = 1e-4
    exclude: str = "after"
    gather: bool = True

    def __post_init__(self) -> None:
        if self.similarity not in SIMILARITIES:
            raise ValueError(f"similarity = {self.similarity!r} must be one of {', '.join(SIMILARITIES)}")
        if self.floor < 0:
            raise ValueError(f"floor = {self.floor} must not be negative")
        if self.exclude not in EXCLUDED:
            raise ValueError(f"exclude = {self.exclude!r} must be one of {', '.join(EXCLUDED)}")

    def check_batch(self, batch_size: int) -> None:
        """Refuse a batch without any negative."""
        if batch_size < 2:
            raise ConfigError(
                f"objective.matching takes its negatives from the batch: a batch of {batch_size} has none"
            )

    def build(self) -> Matching:
        return Matching(self)


class Matching(Objective):
    """Cross-entropy of "match" (1) or not (0) over 3B pairs: the B given ones, each text with a drawn image, each image
    with a drawn text.

    Where the model's texts for it are not the batch's ``input_ids``, its outputs have ``text_ids`` and ``text_mask``.

    It calls ``model.fuse(Features(image tokens), input_ids, attention_mask)``, with ``text_tokens`` where the model's
    outputs have them and with ``rows`` where it ``shares_images``, and ``model.matching_logits(fused)`` [N, 2]. The
    draws come from torch's global stream, unless the batch brings them: ``negative_images`` and ``negative_texts`` [B]
    int64, rows of the gathered batch.
    """

    learns: ClassVar[str] = "matching"
    needs: ClassVar[frozenset[str]] = frozenset({"image_embeds", "text_embeds", "logit_scale", "image_tokens"})

    def __init__(self, config: MatchingConfig) -> None:
        super().__init__()
        self.config = config

    def forward(
        self, model: Any, batch: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss; with ``image_ids`` [B] in the batch a pair of equal ids is never a negative.

        Returns:
            The loss in nats, and ``accuracy`` in [0, 1]; always answering "no" has 2/3.
        """
        images = outputs["image_tokens"]  # [B, N, D]
        own_ids = "text_ids" in outputs
        ids = outputs["text_ids"] if own_ids else batch["input_ids"]
        mask = outputs["text_mask"] if own_ids else batch.get("attention_mask")
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        other_image, other_text, found = self._negatives(batch, outputs)
        pool = {"images": images, "ids": ids, "mask": mask}
        if "text_tokens" in outputs:  # a stack that can goes on from the states of the text alone
            pool["texts"] = outputs["text_tokens"]
        pool, every = self._everywhere(pool)
        at_text = [name for name in pool if name != "images"]
        joined = {name: torch.cat([pool[name], pool[name], every[name][other_text]]) for name in at_text}  # [3B, L, ..]
        more = {"text_tokens": joined["texts"]} if "texts" in joined else {}
        if every is pool and getattr(model, "shares_images", False):  # three texts read one image, projected once
            own = torch.arange(len(images), device=images.device)
            seen, more["rows"] = images, torch.cat([own, other_image, own])
        else:
            seen = torch.cat([images, every["images"][other_image], images])  # [3B, N, D]
        logits = model.matching_logits(model.fuse(Features(seen), joined["ids"], joined["mask"], **more))  # [3B, 2]
        with full_precision(logits):
            labels = torch.cat([torch.ones_like(other_image), *(torch.where(found, 0, NONE) for _ in range(2))])
            loss = F.cross_entropy(logits.float(), labels, ignore_index=NONE)
        kept = labels != NONE
        accuracy = ((logits.detach().argmax(-1) == labels) & kept).sum() / kept.sum()
        return loss, {"accuracy": accuracy}

    @torch.no_grad()
    def _negatives(self, batch: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """An image for every text and a text for every image, [B] each, and whether the row has any negative."""
        image_weights, text_weights = self.weights(batch, outputs)
        found = (image_weights.sum(1) > 0) & (text_weights.sum(1) > 0)
        drawn = []
        for name, weights in (("negative_images", image_weights), ("negative_texts", text_weights)):
            given = batch.get(name)
            weights = torch.where(found[:, None], weights, 1.0)
            drawn.append(choose(weights) if given is None else given)
        return drawn[0], drawn[1], found

    @torch.no_grad()
    def weights(self, batch: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What negatives are drawn by: [B, R*B] of images for each text, and of texts for each image; zero on the own
        pair and on every other of the same image."""
        images, texts = outputs["image_embeds"].float(), outputs["text_embeds"].float()
        self.check(len(images))
        keys = {"image_embeds": images, "text_embeds": texts}
        if self.config.similarity == "momentum" and self.momentum is not None:
            keys = {name: key.float() for name, key in self.momentum.features(batch, outputs).items() if name in keys}
        ids = batch.get("image_ids")
        all_ids = ids
        first = 0
        if self.config.gather:
            keys = {name: gathered(key) for name, key in keys.items()}
            all_ids = None if ids is None else gathered(ids)
            first = own_rows(len(images)).start
        scale = outputs["logit_scale"].float().exp()
        own = torch.arange(first, first + len(images), device=images.device)
        columns = torch.arange(len(keys["image_embeds"]), device=images.device)
        same = own[:, None] == columns
        if ids is not None and all_ids is not None:
            same = ids[:, None] == all_ids
        both = []
        for mine, name in ((texts, "image_embeds"), (images, "text_embeds")):
            with full_precision(mine):
                logits = scale * similarities(mine, keys[name])
                if self.config.exclude == "before":
                    logits = logits.masked_fill(same, -1e4)
                weights = logits.softmax(-1) + self.config.floor
            both.append(weights.masked_fill(same, 0.0))
        return both[0], both[1]

    def _everywhere(self, own: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The own rows, with texts as long as the longest of any rank, and the rows of all ranks.

        Features keep their gradient, so that a negative teaches the rank that encoded it.
        """
        several = self.config.gather and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if not several:
            return own, own
        length = torch.tensor(own["ids"].shape[1], device=own["ids"].device)
        dist.all_reduce(length, op=dist.ReduceOp.MAX)
        more = int(length) - own["ids"].shape[1]
        for name in ("ids", "mask", "texts"):
            if name in own and more:
                own[name] = F.pad(own[name], (0, 0, 0, more) if name == "texts" else (0, more))
        every = {name: gathered(own[name]) for name in ("ids",)} | {"mask": gathered(own["mask"].long()).bool()}
        every |= {name: gather_rows(own[name]) for name in ("images", "texts") if name in own}
        return own, every

    def check(self, rows: int) -> None:
        """Refuse what has no negatives."""
        self.config.check_batch(len(gathered(torch.empty(rows))) if self.config.gather else rows)
