"""The zoo's own transformer: one class whose rules are data."""

from __future__ import annotations

from zoo.nn.cache import KVCache
from zoo.nn.config import TrunkConfig
from zoo.nn.embeddings import PatchEmbedding, TokenEmbedding, resize_positions
from zoo.nn.heads import MLMHead
from zoo.nn.init import copy_expert_, init_clip_, init_xavier_, share_, start_std
from zoo.nn.trunk import Trunk

__all__ = [
    "KVCache",
    "MLMHead",
    "PatchEmbedding",
    "TokenEmbedding",
    "Trunk",
    "TrunkConfig",
    "copy_expert_",
    "init_clip_",
    "init_xavier_",
    "resize_positions",
    "share_",
    "start_std",
]
