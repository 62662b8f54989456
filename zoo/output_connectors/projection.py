"""NExT-GPT's output projection, one a modality (arXiv 2309.05519, section 3; ``TransformersProjector`` of the release,
once ``TextFcLayer``): states and input embeddings of the signal tokens, a narrow encoder-decoder, a linear map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from zoo.output_connectors.base import Unconditional
from zoo.output_connectors.mapper import Mapper, MapperConfig


@dataclass(frozen=True, kw_only=True)
class ProjectionConfig(MapperConfig):
    """As released: width 512, 4 + 4 layers, 4 heads, ReLU, one linear map before and one behind, queries that start at
    zero: 77 for images and video, 1 for audio."""

    width: int = 512
    heads: int = 4
    ffn: int = 2048
    inputs: int = 1
    project: bool = True
    query_std: float = 0.0

    def build(
        self, *, in_width: int, in_tokens: int, out_width: int, image_width: int = 0, image_tokens: int = 0
    ) -> Projection:
        return Projection(self, in_width, out_width)


class Projection(Mapper):
    """A ``Mapper`` that reads states plus input embeddings; guidance leaves its condition out with the image decoder's
    own empty prompt, as the stock pipelines it feeds do."""

    unconditional: ClassVar[Unconditional] = "text"
    shifted: ClassVar[bool] = False
    adds_embeddings: ClassVar[bool] = True
