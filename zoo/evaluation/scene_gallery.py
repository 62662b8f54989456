"""Which icon a cut-out shows: the nearest one, in the evaluator's image space and in plain pixels.

A cut-out and an icon are compared by two vectors each: the evaluator's, and `GRID` x `GRID` pixels. Icons of scenes are
small and drawn ones are soft, so every icon is there at several resolutions; what differs between the renderings of one
icon does not tell icons apart, and both spaces are whitened by the covariance of these differences (the metric of
linear discriminant analysis; Hastie et al., "The Elements of Statistical Learning", section 4.3). The likeness of a
cut-out and an icon is the mean of the two cosines in the whitened spaces, for the best of the icon's renderings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.evaluation.evaluator import embed_images
from zoo.evaluation.scene_facts import Found
from zoo.evaluation.scene_objects import (
    CUT,
    Group,
    best_cut,
    cut_out,
    descendants,
    foreground,
    framed,
    groups_of,
    pixels_of,
    softened,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from zoo.evaluation.evaluator import Judge

SHARPNESS = (64, 40, 28, 20, 14, 10)
"""Pixels a side of the renderings of an icon."""
GRID = 16
RIDGE = 0.003
"""Share of the largest variance added to all: keeps directions without differences from being blown up."""


class Space:
    """Vectors whitened by what differs within an icon.

    Args:
        views: [S, K, D], S renderings of K icons.
    """

    def __init__(self, views: Tensor) -> None:
        width = views.shape[-1]
        self.mean = views.mean((0, 1))  # [D]
        within = (views - views.mean(0, keepdim=True)).reshape(-1, width).double()
        covariance = within.T @ within / max(1, len(within) - views.shape[1])  # [D, D]
        values, vectors = torch.linalg.eigh(covariance)
        values = values.clamp(min=0) + RIDGE * values.max().clamp(min=1e-12)
        self.whiten = (vectors / values.sqrt() @ vectors.T).to(views.dtype)  # [D, D]

    def __call__(self, vectors: Tensor) -> Tensor:
        """[..., D] of unit length."""
        out: Tensor = F.normalize((vectors - self.mean) @ self.whiten, dim=-1)
        return out


class Gallery:
    """The icons that objects are compared with.

    Args:
        judge: embeds images.
        icons: pictures of the icons on white, one each, of about `CUT` pixels or more.
        names: of the icons, in the same order.
        least: the likeness from which a group is an object and not nothing.
        batch: cut-outs embedded together.
    """

    def __init__(
        self, judge: Judge, icons: Sequence[Image], names: Sequence[str], least: float = 0.0, batch: int = 64
    ) -> None:
        self.judge, self.names, self.least, self.batch = judge, tuple(names), least, batch
        shown = []
        for icon in icons:
            pixels = pixels_of(icon)
            shown.append(cut_out(pixels, framed(foreground(pixels))))
        views = [self._vectors([softened(i, side) if side < CUT else i for i in shown]) for side in SHARPNESS]
        stacked: list[Tensor] = [torch.stack(kind) for kind in zip(*views, strict=True)]  # two of [S, K, D]
        self.spaces = [Space(kind) for kind in stacked]
        self.views = self._joined(stacked)  # [S, K, D]

    def _vectors(self, images: Sequence[Image]) -> list[Tensor]:
        """[N, D] of the evaluator, and [N, 3 * GRID^2] of the pixels."""
        from PIL import Image as pil

        small = np.stack([np.asarray(i.resize((GRID, GRID), pil.Resampling.BOX), np.float32) for i in images])
        return [
            embed_images(self.judge, images, self.batch, "scene-check"),
            torch.from_numpy(small).flatten(1) / 255,
        ]

    def _joined(self, vectors: Sequence[Tensor]) -> Tensor:
        """Vectors whose dot product is the mean of the cosines in the two spaces."""
        parts = [space(own) for space, own in zip(self.spaces, vectors, strict=True)]
        return torch.cat(parts, -1) / math.sqrt(len(parts))

    def nearest(self, images: Sequence[Image]) -> tuple[Tensor, Tensor]:
        """The likeness [N] of cut-outs to their nearest icons, and the icons' rows [N]."""
        own = self._joined(self._vectors(images))  # [N, D]
        likeness = (own @ self.views.flatten(0, 1).T).view(len(own), *self.views.shape[:2]).amax(1)  # [N, K]
        best = likeness.max(1)
        return best.values, best.indices

    def find(self, images: Sequence[Image]) -> list[list[tuple[Found, float]]]:
        """What each picture shows from left to right and how like its icon each is, what is below `least` too."""
        trees: list[list[Group]] = []
        cuts: list[Image] = []
        groups: list[Group] = []
        for image in images:
            pixels = pixels_of(image)
            trees.append(groups_of(foreground(pixels)))
            for group in descendants(trees[-1]):
                groups.append(group)
                cuts.append(cut_out(pixels, group))
        if not groups:
            return [[] for _ in images]
        likeness, rows = self.nearest(cuts)
        of = {id(group): value for group, value in zip(groups, likeness.tolist(), strict=True)}
        name = {id(group): self.names[row] for group, row in zip(groups, rows.tolist(), strict=True)}
        out = []
        for roots in trees:
            chosen = [group for root in roots for group in best_cut(root, of)[1] if id(group) in of]
            found = [(Found(name[id(group)], group.box), of[id(group)]) for group in chosen]
            out.append(sorted(found, key=lambda pair: pair[0].box))
        return out

    def objects(self, images: Sequence[Image]) -> list[list[Found]]:
        """What each picture shows: the objects that are like their icons by at least `least`."""
        return [[found for found, likeness in own if likeness >= self.least] for own in self.find(images)]
