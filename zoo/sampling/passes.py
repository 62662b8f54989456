"""How many forward passes images took, counted where they are run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass
class Passes:
    """A running count.

    Attributes:
        count: Forward passes times the images that took part in them. The branches of guidance are one pass; reading
            the prompt is none, unless the first code of an image is drawn from it.
    """

    count: int = 0


_COUNTING: ContextVar[Passes | None] = ContextVar("passes", default=None)


@contextmanager
def counted() -> Iterator[Passes]:
    """Count what is drawn inside; nested counts are their own."""
    passes = Passes()
    token = _COUNTING.set(passes)
    try:
        yield passes
    finally:
        _COUNTING.reset(token)


def passed(images: int) -> None:
    """Say that a forward pass over so many images was run; without a count nothing happens."""
    passes = _COUNTING.get()
    if passes is not None:
        passes.count += images
