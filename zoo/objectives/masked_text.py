"""Masked language modelling of a text alone: VLMo's second stage (arXiv 2111.02358, section 3.3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from zoo.objectives.masked_lm import MaskedLM, MaskedLMConfig


@dataclass(frozen=True, kw_only=True)
class MaskedTextConfig(MaskedLMConfig):
    """The masked-LM objective without an image, and without a momentum copy."""

    alpha: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha:
            raise ValueError(f"alpha = {self.alpha}: a text alone is learned without a momentum copy, expected 0")

    def build(self) -> MaskedText:
        return MaskedText(self)


class MaskedText(MaskedLM):
    """``MaskedLM`` over ``model.read_text(masked ids, attention_mask)``; no image is looked at."""

    needs: ClassVar[frozenset[str]] = frozenset({"text_states"})  # it reads masked ones in their place

    def _read(self, model: Any, outputs: Mapping[str, Tensor], masked: Tensor, mask: Tensor | None) -> Tensor:
        """States [B, L, D] of the masked text."""
        states: Tensor = model.read_text(masked, mask).tokens
        return states
