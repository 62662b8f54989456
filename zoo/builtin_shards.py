"""Data in shards and tables, of the zoo's own manifest (``zoo.builtin``). Data only."""

from __future__ import annotations

from zoo.registry import Component

SHARDS = (
    Component(
        kind="data",
        name="shards",
        ref="zoo.data.shards:ShardsConfig",
        summary="tar shards of zoo data pack, or WebDataset's from elsewhere (root=PATH)",
    ),
    Component(
        kind="data",
        name="hf",
        ref="zoo.data.hf:HfConfig",
        summary="a Hugging Face dataset: parquet, arrow, or by its id on the hub (path=PATH, and columns)",
        extra="datasets",
    ),
)
