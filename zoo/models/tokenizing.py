"""The text tokenizer of a model, made on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

if TYPE_CHECKING:
    from zoo.data.text import TextTokenizer


class OwnsTokenizer(nn.Module):
    """``tokenizer``, which a user may replace; the processor is then made again.

    Attributes:
        tokenizer_of: Name of the attribute that holds the configuration of the part whose ids they are.
    """

    tokenizer_of: ClassVar[str] = "text_config"
    _tokenizer: TextTokenizer | None = None
    _processor: Any = None

    @property
    def tokenizer(self) -> TextTokenizer:
        """The text tokenizer, made on first use: published ones need files or the network."""
        if self._tokenizer is None:
            from zoo.data.text import named_tokenizer

            self._tokenizer = named_tokenizer(getattr(self, self.tokenizer_of).tokenizer)
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._processor = None
