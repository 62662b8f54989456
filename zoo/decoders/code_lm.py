"""A language model whose words are image codes: Llama with positions on two axes (LlamaGen, arXiv 2406.06525)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from zoo.decoders.trunk_lm import TrunkLM, TrunkLMConfig
from zoo.layout import TokenBatch
from zoo.nn import TrunkConfig, start_std


@dataclass(frozen=True, kw_only=True)
class CodeLMConfig(TrunkLMConfig):
    """LlamaGen-B by default; the wiring sets ``vocab_size`` and ``context_length`` from the image tokenizer.

    Positions are (row, column) of an image code, each on one half of a head; a token whose position is negative, as
    the condition's, has no rotation row, so that its query and key vanish.

    Attributes:
        kv_heads: As of the base; 0 = as many as heads, which all published sizes have.
        rope_axes: Position ids a token has.
        dropout: On the embeddings and on the output of every branch while training.
        drop_path: Probability of dropping a branch, rising over the layers; the released code drops no branch output
            then.
        zero_head: Start with an output matrix of zeros, so that every code is equally likely (gpt.py,
            initialize_weights).
    """

    vocab_size: int = 16384
    context_length: int = 257
    width: int = 768
    depth: int = 12
    heads: int = 12
    kv_heads: int = 0
    ffn: int = 2048
    tie: bool = False
    dropout: float = 0.1
    rope_axes: int = 2
    drop_path: float = 0.0
    zero_head: bool = True

    def trunk(self) -> TrunkConfig:
        """The trunk's configuration.

        Raises:
            ConfigError: A value the trunk does not know, or sizes that do not divide.
        """
        return dataclasses.replace(
            super().trunk(),
            rope_axes=self.rope_axes,
            drop_path=self.drop_path,
            dropout=0.0 if self.drop_path else self.dropout,
            init_std=start_std(self.width),
        )

    def build(self) -> CodeLM:
        return CodeLM(self)


class CodeLM(TrunkLM):
    """``embedding``, ``trunk`` and ``lm_head``."""

    def __init__(self, config: CodeLMConfig) -> None:
        super().__init__(config)
        self.dropout = nn.Dropout(config.dropout)
        if self.lm_head is not None:
            if config.zero_head:
                nn.init.zeros_(self.lm_head.weight)
            else:
                nn.init.normal_(self.lm_head.weight, std=start_std(config.width))

    def forward(self, batch: TokenBatch, cache: Any = None) -> Tensor:
        return super().forward(dataclasses.replace(batch, embeds=self.dropout(batch.embeds)), cache)
