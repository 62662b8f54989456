"""MiniGPT-5's mapper (arXiv 2310.02239, section 3.2): an encoder-decoder whose learned queries read the states."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from zoo.connectors.simple import mlp
from zoo.nn import Trunk
from zoo.nn.config import Act
from zoo.nn.init import start_std
from zoo.output_connectors.base import OutputConnector, OutputConnectorConfig, Unconditional
from zoo.weights.keymaps.torch_transformer import trunk_configs


@dataclass(frozen=True, kw_only=True)
class MapperConfig(OutputConnectorConfig):
    """Two linear maps with GELU between, then a transformer encoder and decoder; as released: 4 layers each of width
    1024, 8 heads, ReLU, norms first, 77 queries, no map behind it.

    Attributes:
        queries: Learned queries, the tokens of the condition.
        width: Width it works at. Where the condition's differs, a linear map follows.
        depth: Layers of the encoder, and of the decoder.
        heads: Attention heads.
        ffn: Width of the feed-forward layers.
        dropout: Dropout while training.
        act: Activation of the feed-forward layers.
        inputs: Linear maps of the states, GELU between.
        project: A linear map follows whatever the widths.
        query_std: Standard deviation of the queries' start.
    """

    queries: int = 77
    width: int = 1024
    depth: int = 4
    heads: int = 8
    ffn: int = 4096
    dropout: float = 0.0
    act: Act = "relu"
    inputs: int = 2
    project: bool = False
    query_std: float = 1.0

    def __post_init__(self) -> None:
        if min(self.queries, self.width, self.depth, self.heads, self.ffn, self.inputs) < 1 or self.query_std < 0:
            raise ValueError("queries, width, depth, heads, ffn and inputs must be 1 or more, query_std 0 or more")
        if self.width % self.heads:
            raise ValueError(f"width = {self.width} must be a multiple of heads = {self.heads}")

    def build(
        self, *, in_width: int, in_tokens: int, out_width: int, image_width: int = 0, image_tokens: int = 0
    ) -> Mapper:
        return Mapper(self, in_width, out_width)


class Mapper(OutputConnector):
    """``fc`` over the states, ``encoder``, ``decoder`` over ``queries``, and ``out`` where the condition is of another
    width. No attention is masked but for states that are not there."""

    unconditional: ClassVar[Unconditional] = "states"

    def __init__(self, config: MapperConfig, in_width: int, out_width: int) -> None:
        super().__init__()
        width, self.width, self.outputs = config.width, out_width, config.queries
        self.aligned = (config.queries, out_width)
        fc = mlp([in_width, *[width] * config.inputs])
        self.fc: nn.Module = fc if config.inputs > 1 else fc[0]
        trunks = trunk_configs(
            width=width, heads=config.heads, ffn=config.ffn, encoder_depth=config.depth, decoder_depth=config.depth,
            act=config.act, dropout=config.dropout,
        )  # fmt: skip
        self.encoder, self.decoder = (Trunk(replace(trunk, init_std=start_std(width))) for trunk in trunks)
        self.queries = nn.Embedding(config.queries, width)
        nn.init.normal_(self.queries.weight, std=config.query_std)
        self.out = nn.Linear(width, out_width) if config.project or width != out_width else nn.Identity()

    def align(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """The condition itself, [N, outputs, width]: MiniGPT-5 compares it with Stable Diffusion's text states."""
        read = self.encoder(self.fc(states), mask=_keys(mask))  # [N, S, D]
        queries = self.queries.weight.to(read.dtype).expand(len(states), -1, -1)  # [N, n, D]
        out: Tensor = self.out(self.decoder(queries, context=read, context_mask=mask))
        return out


def _keys(mask: Tensor | None) -> Tensor | None:
    """A key mask [N, S] for self-attention, [N, 1, S, S]; who is not there reads itself, so that no row is empty."""
    if mask is None:
        return None
    own = torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
    return (mask[:, None, :].bool() | own)[:, None]
