"""ChatGLM-6B as VisualGLM carries it: a prefix that reads all of itself, an answer behind it, two position streams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from zoo.adapters import AdapterFields, add_adapters
from zoo.decoders.base import DecoderConfig
from zoo.decoders.trunk_lm import TrunkLM
from zoo.layout import ALL, PAST, Layout, Segment, lay_out
from zoo.nn import TrunkConfig

SOP = {130528: 130004}
"""Size of a published vocabulary -> its start-of-piece id, which its tokenizer calls BOS."""


@dataclass(frozen=True, kw_only=True)
class GLMConfig(AdapterFields, DecoderConfig):
    """ChatGLM-6B (the released modeling_chatglm.py); GLM's autoregressive blank filling is arXiv 2103.10360.

    Attributes:
        width: Hidden size.
        depth: Layers.
        heads: Attention heads.
        ffn: Width of the feed-forward layers, which are not gated.
        eps: Of the norms.
        residual_scale: Factor of the normalised residual: sqrt(2 * 28), a class default of the release that does not
            follow the depth.
        rope_theta: Base of the rotary frequencies, half of each head for either position.
        rope_half: Round the frequencies to half precision, as the release's table is.
        sop_id: The id that starts the answer; everything before it is the prefix. -1 = the published one of the
            vocabulary's size, else the tokenizer's BOS.
        tie: The output matrix is the embedding table.
        dropout: On the output of every branch while training.
        lora_every: Adapters in layers 0, n, 2n, ... only; ``lora_targets`` are then names inside a layer, by default
            those of its attention, as in the released finetuning, where n is 14.
    """

    width: int = 4096
    depth: int = 28
    heads: int = 32
    ffn: int = 16384
    eps: float = 1e-5
    residual_scale: float = 56**0.5
    rope_theta: float = 10000.0
    rope_half: bool = True
    sop_id: int = -1
    tie: bool = False
    dropout: float = 0.0
    lora_every: int = 1

    def __post_init__(self) -> None:
        self.check_adapters()
        if self.lora_every < 1:
            raise ValueError(f"lora_every = {self.lora_every} must be 1 or more")
        if self.heads < 1 or self.width % (4 * self.heads):
            raise ValueError(
                f"width = {self.width} must be a multiple of 4 x heads = {4 * self.heads}: two positions turn half of a"
                " head each, in pairs"
            )
        if self.sop_id >= self.vocab_size:
            raise ValueError(f"sop_id = {self.sop_id} must be below vocab_size = {self.vocab_size}")

    def trunk(self) -> TrunkConfig:
        """The trunk: norm(x) * scale + f(norm(x)), tanh GELU, rotary on (position, block position).

        The release divides queries by (layer + 1) and multiplies scores by it again, which cancels.
        """
        return TrunkConfig(
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            ffn=self.ffn,
            eps=self.eps,
            placement="scaled",
            residual_scale=self.residual_scale,
            act="gelu_tanh",
            rope=self.width // self.heads,
            rope_theta=self.rope_theta,
            rope_axes=2,
            rope_half=self.rope_half,
            dropout=self.dropout,
        )

    def adapters(self) -> AdapterFields:
        """The adapters' fields, the layers that have them written out."""
        if self.lora_every == 1:
            return self
        inside = self.lora_targets or [f"attn.{part}" for part in ("q", "k", "v", "out")]
        names = [f"layers.{i}.{name}" for i in range(0, self.depth, self.lora_every) for name in inside]
        return replace(self, lora_targets=names)

    def build(self) -> GLMLM:
        return GLMLM(self)


class GLMLM(TrunkLM):
    """``embedding``, ``trunk`` and, untied, ``lm_head``."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__(config)
        add_adapters(self, config.adapters())

    @cached_property
    def sop_id(self) -> int:
        """The id that starts an answer; looks at the tokenizer where the configuration does not say it."""
        if self.config.sop_id >= 0:
            return int(self.config.sop_id)
        if self.vocab_size in SOP:
            return SOP[self.vocab_size]
        from zoo.data.text import named_tokenizer

        return named_tokenizer(self.config.tokenizer).bos_id

    def arrange(self, layout: Layout, ids: Tensor, slots: Tensor) -> Layout:
        """Prefix and answer: what stands before the first sop reads all of itself, sop and the answer are causal.

        Positions [B, 2, T] (the released get_position_ids with position_encoding_2d): the place in the prefix, then for
        all of the answer the place of the last token of the prefix, which is [gMASK]; and 0 in the prefix, 1, 2, ...
        from sop on. A row without sop is all prefix.
        """
        real = layout.real
        answer = (real & (ids == self.sop_id) & ~slots).long().cumsum(1) > 0  # [B, T] sop and what follows
        place = (real.long().cumsum(1) - 1).clamp(min=0)  # [B, T]
        prefix = (real & ~answer).long().sum(1, keepdim=True)  # [B, 1] length of the prefix
        first = torch.where(answer, (prefix - 1).clamp(min=0), place)
        position = torch.stack([first, torch.where(answer, place - prefix + 1, 0)], 1)  # [B, 2, T]
        return Layout.from_ids(
            torch.where(real, answer.long(), -1),
            [[ALL, PAST], [PAST, PAST]],
            modality=layout.modality.expand_as(ids),
            position=position,
            names=("prefix", "answer"),
            padding=layout.padding,
            predicted=("answer",),
        )

    def grow(self, layout: Layout) -> Layout:
        """One token more: the place of [gMASK] again, the next block position."""
        if layout.position.ndim != 3:
            return super().grow(layout)
        step = torch.tensor([[0], [1]], device=layout.position.device)
        return layout.append(layout.names[-1], position=layout.position[..., -1:] + step)

    def sketch(self, segments: Sequence[Segment]) -> Layout:
        """All but the last segment are the prefix."""
        *prefix, answer = segments
        names = [segment.name for segment in prefix]
        full = [Segment(s.name, s.length, s.modality, "full") for s in prefix]
        return lay_out([*full, answer], relation={(a, b): "all" for a in names for b in names})
