"""What a connector is: tokens of one part in, tokens another part can read out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.part import Features, PartConfig


class Connector(nn.Module):
    """Base of connectors.

    Attributes:
        width: Width of the tokens it returns, the decoder's.
        tokens: Tokens an item it returns.
        needs_cls: False when a class token among the input would disturb it (it works on the grid).
        reads_text: It reads the instruction beside the image: ``embed_text(ids, mask)`` makes the ``text`` of
            ``forward`` from ids of the connector's own vocabulary.
        forward_only: Nothing but ``forward`` reads its parameters, so that FSDP may gather them when it is called.
    """

    width: int
    tokens: int
    reads_text: bool = False
    forward_only: bool = True

    def embed_text(self, ids: Tensor, mask: Tensor | None = None) -> Features:
        """Ids [B, T] of an instruction, mask [B, T] bool (True = real) -> its tokens, the ``text`` of ``forward``."""
        raise TypeError(f"{type(self).__name__} reads no text")

    def forward(self, features: Features, text: Features | None = None) -> Features:
        """Map tokens [B, N, D_in] to [B, n, D_out]; ``text`` are instruction tokens, for connectors that read them."""
        raise TypeError(f"{type(self).__name__} defines no forward")


@dataclass(frozen=True, kw_only=True)
class ConnectorConfig(PartConfig):
    """Base of connectors' configuration; widths are derived when parts are joined.

    Attributes:
        sized_by: The field whose value, 1 or more, sets how many parameters it has and nothing else that another part
            sees, for comparisons at equal numbers (``match=parameters``); empty = there is none.
    """

    sized_by: ClassVar[str] = ""

    def with_tokens(self, tokens: int, in_tokens: int) -> Self:
        """The same connector returning ``tokens`` of an encoder's ``in_tokens``, for comparisons at equal numbers.

        Raises:
            ConfigError: It cannot return that many.
        """
        raise ConfigError(f"{type(self).__name__} cannot be told how many tokens to return: leave visual_tokens at 0")

    def build(self, *, in_width: int, in_tokens: int, out_width: int) -> Connector:
        raise TypeError(f"{type(self).__name__} defines no build")
