"""The segmentation codebook's tokens of a target, weighed into one vector a scale (PixelLM, arXiv 2312.02228, section
3.2), and the weights of the scales' masks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

FUSIONS = ("released", "learned", "mean")


class TokenFusion(nn.Module):
    """Weighted sums over the tokens of a scale, and over the scales' masks.

    ``released``: the constants of the released code, which holds its weights in plain lists, so that they neither
    learn nor are saved: 1 / (scales x tokens) for a token, of which it adds up the first ``tokens``, and 1 / scales for
    a mask. A scale's vector is thus the mean of its tokens divided by the number of scales. ``learned``: the same at
    first, as parameters (``tokens`` [tokens], ``scales`` [scales]), which is what the paper describes. ``mean``: the
    mean of a scale's tokens; masks as released.
    """

    token_weights: Tensor
    scale_weights: Tensor

    def __init__(self, scales: int, tokens: int, how: str) -> None:
        super().__init__()
        self.shape = (scales, tokens)
        each = torch.full((tokens,), 1 / tokens if how == "mean" else 1 / (scales * tokens))
        masks = torch.full((scales,), 1 / scales)
        if how == "learned":
            self.token_weights, self.scale_weights = nn.Parameter(each), nn.Parameter(masks)
        else:  # constants: nothing of them is in a checkpoint
            self.register_buffer("token_weights", each, persistent=False)
            self.register_buffer("scale_weights", masks, persistent=False)

    def forward(self, prompts: Tensor) -> Tensor:
        """Prompts [M, scales * tokens, C], scale by scale, to one vector a scale: [M, scales, C]."""
        tokens = prompts.reshape(len(prompts), *self.shape, prompts.shape[2])  # [M, scales, tokens, C]
        return torch.einsum("mstc,t->msc", tokens, self.token_weights.to(tokens.dtype))
