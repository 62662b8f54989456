"""What every part shares: typed configuration, standard sizes, seeded construction, and the tokens parts exchange."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

if TYPE_CHECKING:
    from torch import Tensor

SIZE_FIELDS = frozenset(
    {
        "width", "depth", "heads", "kv_heads", "head_dim", "ffn", "image_size", "patch_size", "vocab_size",
        "context_length", "embed_width", "queries", "queue_size", "tokenizer", "latents", "stem_width", "dropout",
    }
)  # fmt: skip
"""Fields that ``scale`` may set. A recipe's body may not: a published size is a preset of a part's name."""


@dataclass(frozen=True, kw_only=True)
class PartConfig:
    """Base of the typed configuration of a part; the class lives beside the module it builds.

    Attributes:
        later_fields: Fields that came after runs had been made: left out of what is written while they have their
            default, so that these runs keep their hash. Such a default may never change.
        scale_settles: Fields beside the standard sizes that a ``scaled`` of the class's own may change.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}
    later_fields: ClassVar[frozenset[str]] = frozenset()
    scale_settles: ClassVar[frozenset[str]] = frozenset()

    def scaled(self, sizes: Mapping[str, Any]) -> Self:
        """The same part with the standard size fields it has replaced by those of ``sizes``."""
        own = {f.name for f in dataclasses.fields(self)} & SIZE_FIELDS & set(sizes)
        return dataclasses.replace(self, **{name: sizes[name] for name in sorted(own)})


@dataclass
class Features:
    """Tokens a part hands to the next.

    Attributes:
        tokens: [B, N, D], floating point.
        mask: [B, N] bool, True where a token is real; None when all are.
        pooled: [B, D] one vector an item, where the part has one.
        grid: (height, width) of the patch grid when the last height x width tokens are one, in row order.
    """

    tokens: Tensor
    mask: Tensor | None = None
    pooled: Tensor | None = None
    grid: tuple[int, int] | None = None


def derived_seed(seed: int, path: str) -> int:
    """A 63-bit seed for the part at ``path``: the first bytes of sha256 of ``"seed/path"``, equal on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{path}".encode()).digest()[:8], "big") >> 1


@contextmanager
def seeded(seed: int, path: str) -> Iterator[None]:
    """Run a constructor on its own random stream, drawn from (seed, path), and leave the global stream as it was.

    Library modules initialise from torch's global generator and take no other; forking it here is what keeps every
    part's initial weights independent of which other parts are built.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derived_seed(seed, path))
        yield
