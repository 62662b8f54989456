"""Momentum: a slow copy of the model's parts, and the contrastive loss over its features (ALBEF, arXiv 2107.07651).

ALBEF and BLIP train with an exponential moving average of their encoders. It supplies the keys of the contrastive loss,
a queue of past keys, and soft targets for it and for masked words. ``Momentum`` is that average, one for a run however
many objectives read it.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.objectives.base import Objective, full_precision
from zoo.recipe import ObjectiveConfig


@dataclass(frozen=True, kw_only=True)
class DistilledConfig(ObjectiveConfig):
    """Fields of the objectives that learn from a momentum copy.

    Attributes:
        momentum: Decay of the copy, a forward pass; equal in all objectives of a run.
        alpha: Share of the copy's soft targets in the loss; the rest is the data's.
        ramp: Steps in which ``alpha`` rises linearly from 0 when 1 or more, a fraction of the stage's steps when below
            1; 0 = no ramp. ALBEF ramps over the first of 30 epochs, BLIP over the first two of 20.
    """

    momentum: float = 0.995
    alpha: float = 0.4
    ramp: float = 1 / 30

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1 or not 0 <= self.alpha <= 1 or self.ramp < 0:
            raise ValueError(
                f"momentum = {self.momentum}, alpha = {self.alpha}, ramp = {self.ramp}:"
                " need momentum in [0, 1), alpha in [0, 1] and ramp of 0 or more"
            )


@dataclass(frozen=True, kw_only=True)
class MomentumContrastiveConfig(DistilledConfig):
    """The contrastive objective with a momentum copy, a queue and soft targets.

    Attributes:
        queue_size: Past keys that serve as negatives; a multiple of the global batch, or 0 for none. ALBEF 65,536,
            BLIP 57,600.
    """

    queue_size: int = 65536

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.queue_size < 0:
            raise ValueError(f"queue_size = {self.queue_size} must be 0 or more")

    def check_batch(self, batch_size: int) -> None:
        """Refuse a global batch that does not divide the queue."""
        if self.queue_size % batch_size:
            least = max(1, self.queue_size // batch_size) * batch_size
            raise ConfigError(
                f"objective.momentum-contrastive.queue_size = {self.queue_size} is not divisible by the batch of"
                f" {batch_size}: set it to a multiple, such as {least}"
            )

    def build(self) -> MomentumContrastive:
        return MomentumContrastive(self)


class Momentum(nn.Module):
    """The moving average of the parts that ``model.momentum_parts()`` names: no gradients, saved in checkpoints.

    Attributes:
        teacher: The model with nothing but these parts, copied; ``encode(batch)`` and ``fuse`` run on them.
        rate: Decay.
        step: Training steps done, from which alpha is ramped.
        steps: Steps planned, which fractions of ramps refer to; None = unknown, and such a ramp is over at once.
    """

    step: Tensor

    def __init__(self, model: Any, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.steps: float | None = None
        self.teacher = copied(model, model.momentum_parts())
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self._last: tuple[weakref.ref[Tensor], dict[str, Tensor]] | None = None

    @torch.no_grad()
    def update(self, model: Any) -> None:
        """m = rate m + (1 - rate) p for every parameter, before the forward pass as in the release; buffers are
        copied."""
        self._last = None
        slow, fast = list(self.teacher.parameters()), parameters_of(model, model.momentum_parts())
        for divided in (False, True):  # under FSDP most are DTensors, and a scalar is not
            pairs = [(s, f.detach()) for s, f in zip(slow, fast, strict=True) if hasattr(f, "placements") == divided]
            if pairs:
                torch._foreach_lerp_([s for s, _ in pairs], [f for _, f in pairs], 1 - self.rate)
        sources = {n: getattr(model, n) for n in model.momentum_parts()}
        for name, part in sources.items():
            for mine, theirs in zip(getattr(self.teacher, name).buffers(), part.buffers(), strict=True):
                mine.copy_(theirs)

    def finish(self) -> None:
        """Count the step and let go of its features."""
        self._last = None
        self.step += 1

    @torch.no_grad()
    def features(self, batch: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the copy makes of a batch, once however many objectives ask: ``model.encode(batch)`` of the teacher.

        Args:
            outputs: The model's own outputs of the same batch, by which a second question is recognised.
        """
        of = outputs["image_embeds"]
        if self._last is None or self._last[0]() is not of:
            self._last = (weakref.ref(of), dict(self.teacher.encode(batch)))
        return self._last[1]

    def share(self, config: DistilledConfig) -> Tensor:
        """Alpha [] at the current step: 0 at first, ``config.alpha`` from the end of the ramp on."""
        ramp = config.ramp if config.ramp >= 1 else config.ramp * (self.steps or 0)
        if ramp <= 0:
            return torch.full((), config.alpha, device=self.step.device)
        return config.alpha * (self.step / ramp).clamp(max=1.0)


def copied(model: nn.Module, parts: Iterable[str]) -> Any:
    """A model of the same class with copies of these parts and no other parameters; none of them learns."""
    missing = [name for name in parts if not isinstance(getattr(model, name, None), nn.Module)]
    if missing:
        raise ConfigError(f"{type(model).__name__} has no part {missing[0]!r} to keep a momentum copy of")
    memo: dict[int, Any] = {}
    teacher = copy.copy(model)
    own = {name: copy.deepcopy(getattr(model, name), memo) for name in parts}
    for field in ("_parameters", "_buffers", "_modules"):
        teacher.__dict__[field] = {}
    teacher.__dict__["_modules"] = own
    return teacher.requires_grad_(False)


def parameters_of(model: nn.Module, parts: Iterable[str]) -> list[nn.Parameter]:
    """The parameters of these parts, each once, in the order of a copy's ``parameters()``."""
    seen: dict[int, nn.Parameter] = {}
    for name in parts:
        for parameter in getattr(model, name).parameters():
            seen.setdefault(id(parameter), parameter)
    return list(seen.values())


def shared_momentum(objectives: Iterable[Objective], model: Any) -> Momentum | None:
    """The one momentum copy of a run, handed to every objective; None where none needs it.

    Raises:
        ConfigError: Objectives of different decay, or a model that names no parts.
    """
    objectives = list(objectives)
    rates = sorted({o.momentum_rate for o in objectives if o.momentum_rate is not None})
    if len(rates) > 1:
        raise ConfigError(
            f"the objectives share one momentum copy, but their momentum is {' and '.join(map(str, rates))}: set it"
            " equal in all of them"
        )
    if rates and not hasattr(model, "momentum_parts"):
        raise ConfigError(f"{type(model).__name__} names no parts to keep a momentum copy of: choose other objectives")
    momentum = Momentum(model, rates[0]) if rates else None
    for objective in objectives:
        objective.prepare(model, momentum)
    return momentum


def gathered(rows: Tensor) -> Tensor:
    """[B, ...] of every rank as [R*B, ...] in rank order, without gradient."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows
    out = rows.new_empty(dist.get_world_size() * rows.shape[0], *rows.shape[1:])
    dist.all_gather(list(out.chunk(dist.get_world_size())), rows.contiguous())
    return out


def own_rows(count: int) -> slice:
    """Where this rank's ``count`` rows stand among the gathered ones."""
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    return slice(rank * count, (rank + 1) * count)


class MomentumContrastive(Objective):
    """Cross-entropy of the own features against [momentum keys of the batch | queue] with softened targets.

    q = alpha softmax(s_m) + (1 - alpha) y, loss = mean over both directions of -(q log_softmax(s)).sum (ALBEF,
    section 3.3, models/model_pretrain.py). y is one-hot on the own pair or, where the batch has ``image_ids`` [B],
    uniform over all keys of the same image (models/model_retrieval.py). The keys of all ranks count, so that several
    processes learn what one with the whole batch would. Keys are enqueued after the forward pass.

    Attributes:
        image_queue, text_queue: [queue_size, D] unit rows, random at first.
        id_queue: [queue_size] image ids, -100 where unknown.
        pointer: Row that is written next.
    """

    learns: ClassVar[str] = "contrastive"
    needs: ClassVar[frozenset[str]] = frozenset({"image_embeds", "text_embeds", "logit_scale"})
    image_queue: Tensor
    text_queue: Tensor
    id_queue: Tensor
    pointer: Tensor

    def __init__(self, config: MomentumContrastiveConfig) -> None:
        super().__init__()
        self.config = config
        self.momentum_rate = config.momentum
        self.register_buffer("image_queue", torch.empty(0))
        self.register_buffer("text_queue", torch.empty(0))
        self.register_buffer("id_queue", torch.full((config.queue_size,), -100))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))
        self._keys: tuple[Tensor, Tensor, Tensor | None] | None = None

    def prepare(self, model: Any, momentum: Momentum | None) -> None:
        """Draw the queues at the width of the model's shared space."""
        super().prepare(model, momentum)
        shape = (self.config.queue_size, model.shared_width)
        self.image_queue = F.normalize(torch.randn(shape), dim=-1)
        self.text_queue = F.normalize(torch.randn(shape), dim=-1)

    def forward(
        self, model: Any, batch: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss from ``image_embeds`` and ``text_embeds`` [B, D] of unit length and ``logit_scale``, a
        logarithm.

        Returns:
            The loss in nats (soft targets have an entropy, so that it does not fall to 0), and ``logit_scale`` (the
            factor itself), ``alpha`` and ``image_to_text_accuracy`` within the batch, in [0, 1].
        """
        assert self.momentum is not None
        slow = self.momentum.features(batch, outputs)
        with full_precision(outputs["image_embeds"]):
            images, texts = outputs["image_embeds"].float(), outputs["text_embeds"].float()
            scale = outputs["logit_scale"].float().exp()
            own_images, own_texts = slow["image_embeds"].float(), slow["text_embeds"].float()
            keys = gathered(own_images), gathered(own_texts)
            ids = batch.get("image_ids")
            self._keys = (*keys, None if ids is None else gathered(ids))
            first = own_rows(images.shape[0]).start
            image_keys = torch.cat([keys[0], self.image_queue.to(keys[0])])  # [R*B + K, D]
            text_keys = torch.cat([keys[1], self.text_queue.to(keys[1])])
            hard = self._targets(images.shape[0], len(text_keys), first, ids)  # [B, R*B + K]
            alpha = self.momentum.share(self.config)
            loss = torch.zeros((), device=images.device)
            hits = loss
            for mine, own, others in ((images, own_images, text_keys), (texts, own_texts, image_keys)):
                logits = scale * mine @ others.T  # [B, R*B + K]
                with torch.no_grad():
                    soft = (scale * own @ others.T).softmax(-1)
                    target = alpha * soft + (1 - alpha) * hard
                if mine is images:
                    best = logits.detach()[:, : len(keys[0])].argmax(1)
                    hits = (best == torch.arange(first, first + len(best), device=best.device)).float().mean()
                loss = loss - (target * logits.log_softmax(-1)).sum(-1).mean() / 2
        return loss, {"logit_scale": scale.detach(), "alpha": alpha, "image_to_text_accuracy": hits}

    def _targets(self, rows: int, keys: int, first: int, ids: Tensor | None) -> Tensor:
        """Hard targets [rows, keys], each row summing to 1."""
        if ids is None:
            place = torch.arange(first, first + rows, device=self.pointer.device)
            return F.one_hot(place, keys).float()
        assert self._keys is not None
        assert self._keys[2] is not None
        same = (ids[:, None] == torch.cat([self._keys[2], self.id_queue])).float()
        return same / same.sum(1, keepdim=True)

    @torch.no_grad()
    def after_forward(self) -> None:
        """Put the batch's keys in the place of the oldest ones."""
        if self._keys is None or not self.config.queue_size:
            return
        images, texts, ids = self._keys
        self._keys = None
        self.config.check_batch(len(images))
        rows = (self.pointer + torch.arange(len(images), device=images.device)) % self.config.queue_size
        self.image_queue[rows] = images.to(self.image_queue)
        self.text_queue[rows] = texts.to(self.text_queue)
        self.id_queue[rows] = -100 if ids is None else ids
        self.pointer.copy_((self.pointer + len(images)) % self.config.queue_size)
