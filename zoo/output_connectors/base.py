"""What an output connector is: a language model's states in, what something that draws is conditioned on out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from zoo.part import Features, PartConfig

Target = Literal["text", "image"]
"""What ``align`` is compared with: the text encoder's states of the caption, or the image encoder's tokens."""

Unconditional = Literal["states", "text", "image"]
"""The branch of guidance without a condition: the connector of zero states, the empty caption, or a blank image."""


class OutputConnector(nn.Module):
    """Base of output connectors.

    Attributes:
        width: Width of the condition's tokens.
        outputs: Tokens of the condition.
        aligns: What ``align`` returns is compared with.
        aligned: Tokens and width of it.
        unconditional: What guidance leaves the condition out with.
        shifted: The states are those that predict an image's tokens, from the one before the first on (MiniGPT-5);
            otherwise those of the tokens themselves.
        adds_embeddings: The input embeddings of the same tokens are added to the states first (NExT-GPT).
    """

    width: int
    outputs: int
    aligned: tuple[int, int]
    aligns: ClassVar[Target] = "text"
    unconditional: ClassVar[Unconditional] = "states"
    shifted: ClassVar[bool] = True
    adds_embeddings: ClassVar[bool] = False

    def align(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """What is compared with the caption or the image: [N, m, D_a].

        Args:
            states: [N, S, D_in], the language model's states at an image's tokens.
            mask: [N, S] bool, True where a state is real; None when all are.
        """
        raise TypeError(f"{type(self).__name__} defines no align")

    def condition(self, aligned: Tensor) -> Features:
        """What is drawn from, tokens [N, outputs, width], out of what ``align`` returns or is compared with."""
        return Features(aligned)

    def target(self, features: Tensor) -> Tensor:
        """What ``align`` is to return for an image: out of its tokens [N, P, D] in row order, [N, m, D]."""
        raise TypeError(f"{type(self).__name__} aligns with text")

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Features:
        """States [N, S, D_in] -> the condition, tokens [N, outputs, width]."""
        return self.condition(self.align(states, mask))


@dataclass(frozen=True, kw_only=True)
class OutputConnectorConfig(PartConfig):
    """Base of output connectors' configuration; widths and numbers of tokens are derived when parts are joined."""

    def build(
        self, *, in_width: int, in_tokens: int, out_width: int, image_width: int = 0, image_tokens: int = 0
    ) -> OutputConnector:
        """Build it.

        Args:
            in_width: Width of the language model's states.
            in_tokens: States an image.
            out_width: Width of the condition.
            image_width: Width of the image encoder's tokens, for connectors that align with them; 0 = there is none.
            image_tokens: Patches of an image.

        Raises:
            ConfigError: It cannot join these.
        """
        raise TypeError(f"{type(self).__name__} defines no build")
