"""InstructBLIP's Q-Former (arXiv 2305.06500, section 2.3): the instruction stands beside the queries and talks to them
through self-attention, so that what is read of the image depends on the task."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from zoo.connectors.qformer import QFormer, QFormerConfig


@dataclass(frozen=True, kw_only=True)
class InstructQFormerConfig(QFormerConfig):
    """A Q-Former with its text branch, which reads [CLS], the instruction, [SEP].

    Attributes:
        reads_text: False leaves the instruction to the language model and builds no text branch (the paper's ablation,
            table 2, ``qformer_text_input``).
        instruction_length: Most ids of an instruction, cut from the left.
    """

    text: bool = True
    reads_text: bool = True
    instruction_length: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.instruction_length < 3:
            raise ValueError(
                f"instruction_length = {self.instruction_length} leaves no room for text: expected 3 or more"
            )
        if self.reads_text and not self.text:
            raise ValueError("text = false leaves nothing to read an instruction with: set reads_text = false too")

    def build(self, *, in_width: int, in_tokens: int, out_width: int) -> QFormer:
        built = QFormer(self if self.reads_text else dataclasses.replace(self, text=False), in_width, out_width)
        built.reads_text = self.reads_text
        return built
