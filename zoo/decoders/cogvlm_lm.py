"""CogVLM's language model: a Llama whose every matrix exists twice, once for image tokens (the visual experts)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.decoders.trunk_lm import TrunkLM, TrunkLMConfig
from zoo.errors import near
from zoo.layout import MODALITIES, Layout, Segment, lay_out
from zoo.layout_facts import look_for_spans
from zoo.nn import TrunkConfig, copy_expert_

TEXT, VISUAL = MODALITIES["text"], MODALITIES["image"]
"""Modality ids of the two kinds of rows, which are also the numbers of their experts."""

UNITS = ("qkv", "out", "ffn")

EXPERT = re.compile(rf"(\.(?:attn\.(?:q|k|v|out)|ffn))\.{TEXT}(?=\.)")
"""The name of a language's matrix up to its expert's number."""


@dataclass(frozen=True, kw_only=True)
class CogVLMConfig(TrunkLMConfig):
    """Vicuna-7B with a visual expert of q, k, v, output projection and SwiGLU in every layer (arXiv 2311.03079, section
    2.1); norms and embeddings are shared.

    Attributes:
        experts: Units that have a visual expert: qkv, out, ffn. The paper's ablation (table 4) leaves out attention.
        expert_every: Visual experts in layers 0, n, 2n, ...; the ablation's other form has 4.
    """

    width: int = 4096
    depth: int = 32
    heads: int = 32
    kv_heads: int = 0
    ffn: int = 11008
    tie: bool = False
    dropout: float = 0.1
    experts: list[str] = field(default_factory=lambda: list(UNITS))
    expert_every: int = 1

    def __post_init__(self) -> None:
        unknown = [unit for unit in self.experts if unit not in UNITS]
        if unknown or not self.experts or len(set(self.experts)) != len(self.experts):
            hint = near(unknown[0], UNITS) if unknown else ""
            raise ValueError(f"experts = {list(self.experts)} must be one or more of {', '.join(UNITS)}{hint}")
        if self.expert_every < 1:
            raise ValueError(f"expert_every = {self.expert_every} must be 1 or more")
        if self.width % max(self.heads, 1):
            raise ValueError(f"width = {self.width} must be a multiple of heads = {self.heads}")

    def trunk(self) -> TrunkConfig:
        both, one = (TEXT, VISUAL), (TEXT, TEXT)
        tables = tuple(one if i % self.expert_every else both for i in range(self.depth))
        return replace(super().trunk(), routed=tuple(self.experts), routes=tables)

    def build(self) -> CogVLMLM:
        return CogVLMLM(self)


class CogVLMLM(TrunkLM):
    """``embedding``, ``trunk`` and ``lm_head``; of every routed unit, 0 is the language's and 1 the image's.

    The visual experts start as copies of the language's, so that an image is at first read as a Llama would.
    """

    def __init__(self, config: CogVLMConfig) -> None:
        super().__init__(config)
        self.experts = tuple(config.experts)
        self.start_experts()

    @torch.no_grad()
    def start_experts(self) -> None:
        """Copy the language's matrices into the visual experts, as training starts (section 2.1)."""
        if self.embedding.tokens.weight.device.type != "meta":
            copy_expert_(self.trunk, TEXT, VISUAL)

    def load_llama(self, state: Mapping[str, Tensor]) -> None:
        """Start from a Llama: the tensors of ``LlamaForCausalLM`` in the text's place and in the visual experts.

        Raises:
            WeightsError: Names or shapes that do not fit.
        """
        from zoo.weights.keymaps import cogvlm, load_into

        load_into(self, state, cogvlm.llama_keymap(self.experts), allow_new=cogvlm.VISUAL_EXPERTS)
        self.start_experts()

    def adopt(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors to start from; those of a Llama (``causal-lm``) in the text's place and in the visual experts, which
        start as its copies."""
        from zoo.weights.keymaps import cogvlm

        llama = {name.removeprefix("lm."): tensor for name, tensor in stored.items() if name.startswith("lm.model.")}
        if not llama:
            return dict(stored)
        llama |= {name.removeprefix("lm."): t for name, t in stored.items() if name.startswith("lm.lm_head.")}
        found, _ = cogvlm.llama_keymap(self.experts).load(llama)
        own = self.state_dict()
        copies = {EXPERT.sub(rf"\1.{VISUAL}", name): tensor for name, tensor in found.items()}
        return {**{name: tensor for name, tensor in copies.items() if name in own}, **found}

    def arrange(self, layout: Layout, ids: Tensor, slots: Tensor) -> Layout:
        """Routes and positions of rows whose images stand at ``slots`` as [boi, patches, eoi].

        Boi and patches pass the visual expert, eoi does not. The patches of an image share one position, and the next
        token counts on from it (the released build_position_ids and get_expert_mask). Attention stays causal, patches
        included. Images may touch where the wiring has said how many slots each takes.
        """
        place = slots.long().cumsum(1) - 1  # [B, T] number of a slot in its image
        eoi = slots & ~F.pad(slots[:, 1:], (0, 1))
        if self.image_tokens:
            place = place % self.image_tokens
            eoi = slots & (place == self.image_tokens - 1)
        visual = slots & ~eoi
        counted = layout.real & ~(visual & (place > 1))  # boi 0, the first patch 1
        position = (counted.long().cumsum(1) - 1).clamp(min=0)
        modality = torch.where(visual, VISUAL, TEXT)
        spans: tuple[tuple[int, int, int], ...] | None
        if ids.device.type == "meta":  # nothing to look at: one image, then text, as an example batch has them
            image = min(max(self.image_tokens - 1, 1), layout.length - 1)
            spans = ((0, image, VISUAL), (image, layout.length, TEXT))
        else:  # one look for all layers; without it each would look at every token's route
            spans = look_for_spans(modality)
        return replace(layout, modality=modality, position=position, spans=spans)

    def sketch(self, segments: Sequence[Segment]) -> Layout:
        parts: list[Segment] = []
        for segment in segments:
            if segment.name == "image" and segment.length > 1:
                parts += [
                    replace(segment, name="boi, patches", length=segment.length - 1),
                    replace(segment, name="eoi", length=1, modality=TEXT),
                ]
            else:
                parts.append(segment)
        layout = lay_out(parts)
        at = [int(i) for i, s in enumerate(parts) for _ in range(s.length)]
        slots = torch.tensor([[parts[i].name in ("boi, patches", "eoi") for i in at]])
        return self.arrange(layout, torch.zeros_like(slots, dtype=torch.long), slots)
