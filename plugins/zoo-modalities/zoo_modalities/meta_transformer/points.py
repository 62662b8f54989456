"""Point clouds: groups of neighbours around points that are far from each other, positions before every block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from zoo.data.images import uniforms
from zoo.data.sample import Sample
from zoo.data_tokenizers.base import DataTokenizer, DataTokenizerConfig, DataTokens
from zoo.errors import DataError
from zoo_modalities.data.signal import Signal
from zoo_modalities.meta_transformer.reading import draws_of, example_signal, values_of

PLACE_HIDDEN = 128
"""Hidden width of the network from a centre to its position (3, 128, D)."""


@dataclass(frozen=True, kw_only=True)
class PointTokensConfig(DataTokenizerConfig):
    """Farthest points, their nearest neighbours, a small network over each group (the card's section 2; openpoints'
    ``P3Embed`` and metatransformer.py, whose groups are these; no released number was compared).

    Attributes:
        points: Of a cloud; more are thinned, fewer refused.
        ratio: Centres over points.
        neighbours: Points of a group, the centre itself among them.
        features: ``dp``, a neighbour less its centre, or ``dp_df``, that and the difference of features, which are the
            coordinates here.
        hidden: Width inside the groups' network.
        rotate: Turn training clouds about z by any angle (the recipe of ScanObjectNN).
    """

    modality: ClassVar[str] = "points"
    scale_settles: ClassVar[frozenset[str]] = frozenset({"points", "neighbours", "hidden"})

    points: int = 1024
    ratio: float = 0.25
    neighbours: int = 32
    features: Literal["dp", "dp_df"] = "dp_df"
    hidden: int = 256
    rotate: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1 or self.centres < 1 or not 1 <= self.neighbours <= self.points:
            raise ValueError(
                f"points = {self.points}, ratio = {self.ratio}, neighbours = {self.neighbours}: expected a ratio within"
                " 0 and 1 that leaves a centre, and no more neighbours than points"
            )

    def scaled(self, sizes: Mapping[str, Any]) -> Self:
        """At most four points for each pixel of an image's side, an eighth of the width as neighbours, a quarter of it
        inside groups."""
        small = super().scaled(sizes)
        if "image_size" not in sizes or "width" not in sizes:
            return small
        points = min(small.points, 4 * sizes["image_size"])
        neighbours = min(small.neighbours, max(4, sizes["width"] // 8), points)
        return replace(small, points=points, neighbours=neighbours, hidden=min(small.hidden, sizes["width"] // 4))

    @property
    def centres(self) -> int:
        """Groups of a cloud."""
        return int(self.points * self.ratio)

    def build(self, width: int) -> PointTokens:
        return PointTokens(width, self)

    def collate(
        self, samples: Sequence[Sample], train: bool = False, draws: Sequence[int] | None = None, seed: int = 0
    ) -> dict[str, Tensor]:
        """``points`` [B, N, 3], about their mean and within the unit sphere, and ``point_place`` [B, N], which points
        of the sample they are."""
        clouds, places = [], []
        for sample, draw in zip(samples, draws_of(samples, draws), strict=True):
            cloud = values_of(sample, "points", 2)
            if cloud.shape[1] != 3 or len(cloud) < self.points:
                raise DataError(
                    f"sample {sample.id!r}: points: the values have shape {cloud.shape}, expected at least"
                    f" {self.points} rows of 3 coordinates (data_tokenizer.points)"
                )
            place = np.arange(len(cloud))
            if len(cloud) > self.points:  # the same ones in evaluation, others at every draw in training
                key = ("points", seed, sample.id, draw) if train else ("points", sample.id)
                place = np.sort(np.argsort(uniforms(len(cloud), *key), kind="stable")[: self.points])
            cloud = unit_sphere(cloud[place])
            if train and self.rotate:
                cloud = turned(cloud, 2 * np.pi * float(uniforms(1, "turn", seed, sample.id, draw)[0]))
            clouds.append(cloud)
            places.append(place)
        return {
            "points": torch.from_numpy(np.stack(clouds)),
            "point_place": torch.from_numpy(np.stack(places).astype(np.int64)),
        }

    def example(self, batch_size: int = 1) -> dict[str, Tensor]:
        cloud = torch.from_numpy(unit_sphere(example_signal(0, self.points, 3, low=-1)))
        place = torch.arange(self.points)
        return {"points": cloud.expand(batch_size, -1, -1), "point_place": place.expand(batch_size, -1)}

    def examples(self, count: int) -> list[Sample]:
        clouds = [example_signal(i, self.points, 3, low=-1) for i in range(count)]
        return [Sample(f"example-{i}", meta={"modalities": {"points": Signal(c)}}) for i, c in enumerate(clouds)]


def unit_sphere(cloud: NDArray[np.float32]) -> NDArray[np.float32]:
    """Points [N, 3] about their mean, the farthest at distance 1."""
    cloud = cloud - cloud.mean(0)
    unit: NDArray[np.float32] = (cloud / max(1e-9, float(np.linalg.norm(cloud, axis=1).max()))).astype(np.float32)
    return unit


def turned(cloud: NDArray[np.float32], angle: float) -> NDArray[np.float32]:
    """Points [N, 3] turned about z."""
    cos, sin = np.cos(angle), np.sin(angle)
    rotated: NDArray[np.float32] = (cloud @ np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])).astype(np.float32)
    return rotated


def farthest_points(cloud: Tensor, count: int) -> Tensor:
    """Places [B, count] of points of clouds [B, N, 3] that are far from each other: each next one is the farthest from
    all before (Eldar et al. 1997; PointNet++, arXiv 1706.02413, section 3.2).

    The first is the farthest from the mean, so that the set does not depend on the order of the points; the released
    code starts with the first point.
    """
    with torch.no_grad():
        nearest = (cloud - cloud.mean(1, keepdim=True)).square().sum(2)  # [B, N]
        chosen = [nearest.argmax(1)]
        nearest = torch.full_like(nearest, torch.inf)
        while len(chosen) < count:
            last = cloud.gather(1, chosen[-1][:, None, None].expand(-1, -1, 3))  # [B, 1, 3]
            nearest = torch.minimum(nearest, (cloud - last).square().sum(2))
            chosen.append(nearest.argmax(1))
        return torch.stack(chosen, 1)


def nearest_points(centres: Tensor, cloud: Tensor, count: int) -> Tensor:
    """Places [B, M, count] of the points of [B, N, 3] nearest to centres [B, M, 3], nearest first."""
    with torch.no_grad():
        return torch.cdist(centres, cloud, compute_mode="donot_use_mm_for_euclid_dist").topk(count, 2, False).indices


def rows_at(x: Tensor, place: Tensor) -> Tensor:
    """Rows [B, ..., D] of [B, N, D] at places [B, ...]."""
    flat = x.gather(1, place.flatten(1)[..., None].expand(-1, -1, x.shape[2]))
    return flat.view(*place.shape, x.shape[2])


class PointTokens(DataTokenizer):
    """``first`` and ``second``, two convolutions each with batch norm and ReLU between, over the points of a group
    (between them the group's maximum joins every point), the maximum, ``project``; ``place``, positions of centres;
    ``cls`` and ``cls_place``."""

    def __init__(self, width: int, config: PointTokensConfig) -> None:
        super().__init__()
        c = self.config = config
        self.width, self.cls, self.tokens = width, True, c.centres + 1
        inputs = 3 if c.features == "dp" else 6
        self.first = nn.Sequential(
            nn.Conv2d(inputs, c.hidden, 1, bias=False),
            nn.BatchNorm2d(c.hidden),
            nn.ReLU(),
            nn.Conv2d(c.hidden, c.hidden, 1),
        )
        self.second = nn.Sequential(
            nn.Conv2d(2 * c.hidden, 2 * c.hidden, 1, bias=False),
            nn.BatchNorm2d(2 * c.hidden),
            nn.ReLU(),
            nn.Conv2d(2 * c.hidden, c.hidden, 1, bias=False),
            nn.BatchNorm2d(c.hidden),
            nn.ReLU(),
        )
        self.project = nn.Linear(c.hidden, width)
        self.place = nn.Sequential(nn.Linear(3, PLACE_HIDDEN), nn.GELU(), nn.Linear(PLACE_HIDDEN, width))
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.cls_place = nn.Parameter(0.02 * torch.randn(1, 1, width))

    def forward(self, inputs: Mapping[str, Tensor]) -> DataTokens:
        """Points [B, N, 3] -> tokens and positions [B, 1 + centres, D]; ``place`` says whose group a token is."""
        cloud, c = inputs["points"], self.config
        chosen = farthest_points(cloud, c.centres)  # [B, M]
        centres = rows_at(cloud, chosen)  # [B, M, 3]
        near = rows_at(cloud, nearest_points(centres, cloud, c.neighbours))  # [B, M, K, 3]
        difference = near - centres[:, :, None]
        features = difference if c.features == "dp" else torch.cat([difference, difference], 3)
        x = self.first(features.permute(0, 3, 1, 2))  # [B, hidden, M, K]
        x = self.second(torch.cat([x.amax(3, keepdim=True).expand_as(x), x], 1)).amax(3)  # [B, hidden, M]
        tokens, positions = self.project(x.transpose(1, 2)), self.place(centres)  # [B, M, D]
        tokens = torch.cat([self.cls_token.expand(len(cloud), -1, -1), tokens], 1)
        positions = torch.cat([self.cls_place.expand(len(cloud), -1, -1), positions], 1)
        place = torch.cat([chosen.new_full((len(cloud), 1), -1), inputs["point_place"].gather(1, chosen)], 1)
        return DataTokens(tokens, positions=positions, place=place)
