"""Small fakes: a source of coloured squares and models whose answers follow from the pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor


@dataclass
class FakeSample:
    id: str
    image: Image.Image | None
    texts: tuple[str, ...]
    meta: dict[str, Any] = field(default_factory=dict)


class FakeSource:
    """``count`` squares; item n has grey value n and the captions of ``texts(n)``."""

    name, version, licence = "squares", "1", "CC0-1.0"

    def __init__(self, count: int = 40, captions: int = 1, clusters: int = 0) -> None:
        self.count, self.captions, self.clusters = count, captions, clusters
        self.read: list[str] = []

    def ids(self, split: str) -> list[str]:
        return [f"item-{n:03d}" for n in range(self.count)] if split == "test" else []

    def sample(self, id: str) -> FakeSample:
        self.read.append(id)
        n = int(id.split("-")[1])
        texts = tuple(f"the square {n}" + " again" * c for c in range(self.captions))
        meta = {"cluster": f"c{n % self.clusters}"} if self.clusters else {}
        return FakeSample(id, Image.new("RGB", (8, 8), (n, 2 * n, 255 - n)), texts, meta)


def _number(text: str) -> int:
    return int(next(word for word in text.split() if word.isdigit()))


class FakeTowers:
    """Embeds a square and its caption near one random direction; ``noise`` makes mistakes; counts its batches."""

    def __init__(self, noise: float = 0.0, width: int = 16, constant: bool = False) -> None:
        generator = torch.Generator().manual_seed(7)
        self.table = torch.randn(256, width, generator=generator)
        self.error = noise * torch.randn(256, width, generator=generator)
        self.constant = constant
        self.batches: list[int] = []

    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        self.batches.append(len(images))
        rows = torch.tensor([image.getpixel((0, 0))[0] for image in images])
        vectors = self.table[rows] + self.error[rows]
        return torch.nn.functional.normalize(torch.ones_like(vectors) if self.constant else vectors, dim=-1)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        vectors = self.table[[_number(t) for t in texts]]
        return torch.nn.functional.normalize(torch.ones_like(vectors) if self.constant else vectors, dim=-1)


class FakeWriter:
    """Scores a caption by its distance from the grey value and its length; writes the right name for even squares."""

    def __init__(self) -> None:
        self.scored = 0

    def score_text(self, images: Sequence[Image.Image], texts: Sequence[str], prompts: Any = None) -> Tensor:
        self.scored += len(texts)
        grey = torch.tensor([float(image.getpixel((0, 0))[0]) for image in images])
        number = torch.tensor([float(_number(t)) for t in texts])
        length = torch.tensor([float(len(t)) for t in texts])
        return -0.5 * (grey - number).abs() - 0.3 * length

    def generate_text(self, images: Sequence[Image.Image], prompts: Any = None, max_new_tokens: int = 32) -> list[str]:
        greys = [image.getpixel((0, 0))[0] for image in images]
        return [f"Square {g}." if g % 2 == 0 else "a circle" for g in greys]


@pytest.fixture
def source() -> FakeSource:
    return FakeSource()


@pytest.fixture
def make_source() -> type[FakeSource]:
    return FakeSource


@pytest.fixture
def towers() -> type[FakeTowers]:
    return FakeTowers


@pytest.fixture
def writer() -> type[FakeWriter]:
    return FakeWriter
