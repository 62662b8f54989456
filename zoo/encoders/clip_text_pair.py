"""Two of CLIP's text transformers side by side, as SDXL reads text (arXiv 2307.01952, section 2.1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from zoo.encoders.base import Encoder, TextEncoderConfig
from zoo.encoders.open_clip import OpenCLIPTextConfig
from zoo.part import Features


@dataclass(frozen=True, kw_only=True)
class CLIPTextPairConfig(TextEncoderConfig):
    """The states before the last block of both, side by side; of the second one the projected end of text as well.

    Attributes:
        width, depth, heads, ffn, quick_gelu: Of the first transformer. ``depth`` counts the blocks that are read: CLIP
            ViT-L/14's without its last.
        second_width, second_depth, second_heads, second_ffn, second_quick_gelu: Of the second one, all of whose blocks
            count; OpenCLIP ViT-bigG/14's.
        projected: Width of the projected end of text.
        second_pad: Id that stands behind a text where the second one reads it (its own tokenizer's pad).
        eps: Of every LayerNorm.
        eos_id: Id of the end of text.
    """

    scale_settles: ClassVar[frozenset[str]] = frozenset(
        {"second_width", "second_depth", "second_heads", "second_ffn", "projected"}
    )

    width: int = 768
    depth: int = 11
    heads: int = 12
    ffn: int = 3072
    quick_gelu: bool = True
    second_width: int = 1280
    second_depth: int = 32
    second_heads: int = 20
    second_ffn: int = 5120
    second_quick_gelu: bool = False
    projected: int = 1280
    second_pad: int = 0
    eps: float = 1e-5
    eos_id: int = 49407

    def __post_init__(self) -> None:
        if self.second_depth < 2 or self.depth < 1:
            raise ValueError(f"depth = {self.depth} must be 1 or more and second_depth = {self.second_depth} 2 or more")
        self.halves()

    def halves(self) -> tuple[OpenCLIPTextConfig, OpenCLIPTextConfig]:
        """Both transformers as parts of their own."""
        shared: dict[str, Any] = {
            key: getattr(self, key) for key in ("tokenizer", "vocab_size", "context_length", "eps", "eos_id")
        }
        own = {key: (getattr(self, key), getattr(self, f"second_{key}")) for key in OWN}
        first, second = ({key: values[n] for key, values in own.items()} for n in (0, 1))
        return OpenCLIPTextConfig(**shared, **first), OpenCLIPTextConfig(**shared, **second)

    def scaled(self, sizes: Mapping[str, Any]) -> Self:
        """A scale's sizes for both, two blocks at least for the second."""
        small = super().scaled(sizes)
        same = {f"second_{key}": sizes[key] for key in ("width", "heads", "ffn") if key in sizes}
        if "depth" in sizes:
            same["second_depth"] = max(2, sizes["depth"])
        if "width" in sizes:
            same["projected"] = sizes["width"]
        return dataclasses.replace(small, **same)

    def build(self) -> CLIPTextPair:
        return CLIPTextPair(self)


OWN = ("width", "depth", "heads", "ffn", "quick_gelu")


class CLIPTextPair(Encoder):
    """``first`` (without a last norm, which nobody reads), ``second``, and ``projection``."""

    def __init__(self, config: CLIPTextPairConfig) -> None:
        super().__init__()
        self.config = config
        self.width, self.pooled_width = config.width + config.second_width, config.projected
        self.tokens = self.context_length = config.context_length
        first, second = config.halves()
        self.first, self.second = first.build(), second.build()
        self.first.tower.ln_final = nn.Identity()
        self.projection = nn.Linear(config.second_width, config.projected, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Features:
        """Encode token ids [B, T], T up to ``context_length``; pads must stand behind the text.

        Returns:
            ``tokens`` [B, T, width + second_width], their ``mask``, and ``pooled`` [B, projected], the end of text. On
            the CPU T shrinks to the longest text of the mask.
        """
        first = self.first(x, mask)
        length = first.tokens.shape[1]
        end = self.second._end(x, mask)  # [B]
        behind = torch.arange(length, device=x.device) > end[:, None]
        ids = x[:, :length].masked_fill(behind, self.config.second_pad)
        tower: Any = self.second.tower
        hidden = tower.token_embedding(ids)  # [B, T, second_width]
        hidden = before = hidden + tower.positional_embedding[:length].to(hidden.dtype)
        for block in tower.transformer.resblocks:
            before, hidden = hidden, block(hidden, attn_mask=tower.attn_mask[:length, :length])
        last = tower.ln_final(hidden[torch.arange(len(x), device=x.device), end])
        return Features(torch.cat([first.tokens, before], -1), first.mask, self.projection(last))
