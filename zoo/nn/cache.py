"""Keys and values of the rows already computed."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.errors import ConfigError

Pair = tuple[Tensor, Tensor]


class KVCache:
    """Keys and values of every layer, which append, truncate and reorder.

    Self-attention pairs are ``[B, T, kv_heads, head]`` after rotary. Without gradients they live in buffers that double
    when full; with gradients (BLIP-2 trains its caption loss over cached queries) they are concatenated and keep their
    graph. Cross-attention pairs are computed from the first context given and read from then on: a new context needs a
    new cache.

    Example::

        cache = KVCache()
        trunk(prefix, layout, cache=cache)
        layout = layout.append("text")
        trunk(next_token, layout, cache=cache)      # x holds the last row only
    """

    def __init__(self) -> None:
        self._pairs: dict[int, Pair] = {}  # buffers, longer than what is in use
        self._used: dict[int, int] = {}
        self.cross: dict[int, Pair] = {}
        self.context_mask: Tensor | None = None

    @property
    def length(self) -> int:
        """Number of cached tokens (of the fullest layer, where only a range of layers has run)."""
        return max(self._used.values(), default=0)

    def used(self, layer: int) -> int:
        """Number of cached tokens of one layer."""
        return self._used.get(layer, 0)

    def append(self, layer: int, key: Tensor, value: Tensor) -> Pair:
        """Add keys and values ``[B, T, kv_heads, head]`` and return all of the layer's."""
        used = self.used(layer)
        new = used + key.shape[1]
        self._used[layer] = new
        if used == 0:
            self._pairs[layer] = (key, value)
            return key, value
        if torch.is_grad_enabled() and (key.requires_grad or self._pairs[layer][0].requires_grad):
            old = self._pairs[layer]
            self._pairs[layer] = (torch.cat([old[0][:, :used], key], 1), torch.cat([old[1][:, :used], value], 1))
            return self._pairs[layer]
        both = []
        for old_one, fresh in zip(self._pairs[layer], (key, value), strict=True):
            room = old_one
            # what came in from outside is never written to: it may still be somebody's activation
            if old_one.shape[1] < new or used == old_one.shape[1]:
                room = old_one.new_empty(old_one.shape[0], max(2 * used, new), *old_one.shape[2:])
                room[:, :used] = old_one[:, :used]
            room[:, used:new] = fresh
            both.append(room)
        self._pairs[layer] = (both[0], both[1])
        return both[0][:, :new], both[1][:, :new]

    def get(self, layer: int) -> Pair:
        """Return the layer's keys and values in use."""
        key, value = self._pairs[layer]
        return key[:, : self.used(layer)], value[:, : self.used(layer)]

    def truncate(self, length: int) -> None:
        """Forget all tokens from ``length`` on (an image overwritten while denoising)."""
        if not 0 <= length <= self.length:
            raise ConfigError(f"cannot cut a cache of {self.length} tokens to {length}")
        for layer in self._pairs:
            self._used[layer] = min(self._used[layer], length)
            # later writes go to fresh buffers: views of the forgotten part may still be in use
            self._pairs[layer] = self.get(layer)

    def reorder(self, index: Tensor) -> None:
        """Make batch row i what row ``index[i]`` was (beams); ``index`` may be longer or shorter than the batch."""
        self._pairs = {layer: self._chosen(self.get(layer), index) for layer in self._pairs}
        self.cross = {layer: self._chosen(pair, index) for layer, pair in self.cross.items()}
        if self.context_mask is not None and self.context_mask.shape[0] > 1:
            self.context_mask = self.context_mask.index_select(0, index)

    @staticmethod
    def _chosen(pair: Pair, index: Tensor) -> Pair:
        return pair[0].index_select(0, index), pair[1].index_select(0, index)
