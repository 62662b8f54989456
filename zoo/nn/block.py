"""One layer of the trunk."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from zoo.nn.attention import Attention, Reading
from zoo.nn.config import TrunkConfig
from zoo.nn.experts import Route, expert_or_one, run
from zoo.nn.norm import ACTIVATIONS, Linear, make_norm


class FFN(nn.Module):
    """down(act(up(x))), or down(act(gate(x))·up(x)) where gated (SwiGLU with silu, arXiv 2002.05202)."""

    def __init__(self, config: TrunkConfig) -> None:
        super().__init__()
        c = config
        self.act = ACTIVATIONS[c.act]
        self.gate = Linear(c.width, c.ffn, c.ffn_bias, std=c.init_std) if c.gated else None
        self.up = Linear(c.width, c.ffn, c.ffn_bias, std=c.init_std)
        self.sub_norm = make_norm(c.norm, c.ffn, c.eps) if c.sub_norm else None
        self.down = Linear(c.ffn, c.width, c.ffn_bias, std=c.init_std)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)  # [B, T, ffn]
        hidden = self.act(up) if self.gate is None else self.act(self.gate(x)) * up
        if self.sub_norm is not None:
            hidden = self.sub_norm(hidden)
        down: Tensor = self.down(hidden)
        return down


class Block(nn.Module):
    """Self-attention, cross-attention and FFN in the order of the layer's block string, each with norm and residual.

    Args:
        config: of the trunk.
        layer: its number.
    """

    def __init__(self, config: TrunkConfig, layer: int) -> None:
        super().__init__()
        c = config
        self.steps, self.placement, self.scale = c.layers[layer], c.placement, c.residual_scale
        self.dropout = nn.Dropout(c.dropout)
        self.drop_path = c.drop_path * layer / max(c.depth - 1, 1)
        experts = max(c.tables[layer], default=-1) + 1

        def norm(name: str) -> nn.Module:
            return expert_or_one(lambda: make_norm(c.norm, c.width, c.eps), experts if name in c.routed else 0)

        def layer_scale() -> nn.Parameter | None:
            return None if c.layer_scale is None else nn.Parameter(torch.full((c.width,), c.layer_scale))

        self.attn = self.cross = self.ffn = None
        self.attn_norm = self.cross_norm = self.ffn_norm = None
        self.attn_scale = self.cross_scale = self.ffn_scale = None
        if "s" in self.steps:
            self.attn = Attention(c, layer, experts)
            self.attn_norm, self.attn_scale = norm("attn_norm"), layer_scale()
        if "c" in self.steps:
            self.cross = Attention(c, layer, cross=True)
            self.cross_norm, self.cross_scale = norm("cross_norm"), layer_scale()
        if "f" in self.steps:
            self.ffn = expert_or_one(lambda: FFN(c), experts if "ffn" in c.routed else 0)
            self.ffn_scale = layer_scale()
            if c.placement != "parallel":
                self.ffn_norm = norm("ffn_norm")

    def forward(self, x: Tensor, reading: Reading, route: Route, bias: Tensor | None = None) -> Tensor:
        """Return the rows after this layer.

        Args:
            x: ``[B, T, D]`` rows.
            reading: what the layers share.
            route: expert of every row.
            bias: relative position bias of this layer ``[1 | B, heads, T, K]``.
        """
        if self.placement == "parallel":
            assert self.attn is not None
            assert self.ffn is not None
            assert self.attn_norm is not None
            rows = run(self.attn_norm, x, route)
            attended = self._drop(self.attn(rows, reading, route, bias), self.attn_scale)
            return x + attended + self._drop(run(self.ffn, rows, route), self.ffn_scale)
        for step in self.steps:
            if step == "s":
                assert self.attn is not None
                assert self.attn_norm is not None
                attn = self.attn
                x = self._add(x, self.attn_norm, self.attn_scale, route, lambda y: attn(y, reading, route, bias))  # noqa: B023
            elif step == "c":
                x = self._cross(x, reading)
            else:
                assert self.ffn is not None
                assert self.ffn_norm is not None
                ffn = self.ffn
                x = self._add(x, self.ffn_norm, self.ffn_scale, route, lambda y: run(ffn, y, route))  # noqa: B023
        return x

    def _add(
        self, x: Tensor, norm: nn.Module, scale: Tensor | None, route: Route, branch: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Add a branch with the norm where the placement wants it."""
        if self.placement == "pre":
            return x + self._drop(branch(run(norm, x, route)), scale)
        if self.placement == "post":
            kept = x if self.scale == 1.0 else x * self.scale
            return run(norm, kept + self._drop(branch(x), scale), route)
        if self.placement == "branch":
            return x + self._drop(run(norm, branch(x), route), scale)
        normed = run(norm, x, route)  # scaled
        return normed * self.scale + self._drop(branch(normed), scale)

    def _cross(self, x: Tensor, reading: Reading) -> Tensor:
        """Cross-attend with the rows that may; the others skip the branch with its residual and norm."""
        assert self.cross is not None
        assert self.cross_norm is not None
        cross, norm, scale = self.cross, self.cross_norm, self.cross_scale
        cached = reading.cache is not None and cross.layer in reading.cache.cross
        rows = reading.cross_rows
        if (reading.context is None and not cached) or rows is False:
            return x

        def attended(some: Tensor) -> Tensor:
            return self._add(some, norm, scale, 0, lambda y: cross.read_context(y, reading))

        if rows is True:
            return attended(x)
        if isinstance(rows, Tensor):  # rows of the batch disagree: compute all, keep what was asked for
            return torch.where(rows[..., None], attended(x), x)
        some = (
            attended(torch.cat([x[:, a:b] for a, b in rows], 1)) if len(rows) > 1 else attended(x[:, slice(*rows[0])])
        )
        parts: list[Tensor] = []
        at = done = 0
        for a, b in rows:
            parts += [x[:, done:a], some[:, at : at + b - a]]
            at, done = at + b - a, b
        parts.append(x[:, done:])
        return torch.cat([part for part in parts if part.shape[1]], 1)

    def _drop(self, branch: Tensor, scale: Tensor | None) -> Tensor:
        if self.training and self.dropout.p:  # while writing token by token even a call that does nothing costs
            branch = self.dropout(branch)
        if scale is not None:
            branch = branch * scale
        if self.training and self.drop_path > 0.0:  # stochastic depth, a whole sample at once
            keep = 1.0 - self.drop_path
            branch = branch * (branch.new_empty(branch.shape[0], 1, 1).bernoulli_(keep) / keep)
        return branch
