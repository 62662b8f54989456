"""Where the released tensors live: the encoder file, Data2Seq's tokenizers, and the hyper-spectral classifier."""

from __future__ import annotations

from zoo.weights.keymaps import KeyMap, rename, vit

ENCODER = vit.BLOCK.under("", "layers.")
"""The released encoder files (``0.norm1.weight``, ...) to a trunk: timm's blocks without anything around them."""
IMAGE = KeyMap(rename("proj.{p}", "embed.patch.{p}"))
"""Data2Seq/Image.py to ``ImageTokens`` without class token and positions."""
SERIES = KeyMap(
    rename("value_embedding.tokenConv.{p}", "value.{p}"), rename("temporal_embedding.embed.{p}", "calendar.{p}")
)
"""Data2Seq/Time_Series.py, ``DataEmbedding``, to ``SeriesTokens``; its fixed tables are computed."""
SERIES_PATCHES = KeyMap(rename("value_embedding.{p}", "value.{p}"))
"""``PatchEmbedding`` of the same file."""
GRAPH = KeyMap(
    rename("atom_encoder.{p}", "node.{p}"),
    rename("edge_encoder.{p}", "edge.{p}"),
    rename("order_encoder.{p}", "kind.{p}"),
    rename("graph_token.weight", "graph_token"),
    rename("null_token.weight", "null_token"),
    rename("rand_encoder.{p}", "identifiers.random.{p}"),
    rename("orf_encoder.{p}", "identifiers.orthogonal.{p}"),
    rename("lap_encoder.{p}", "identifiers.eigenvectors.{p}"),
)
"""Data2Seq/Graph.py, ``GraphFeatureTokenizer``, to ``GraphTokens``."""
HYPERSPECTRAL = KeyMap(
    rename("cls_token", "data_tokenizer.sequence.cls"),
    rename("pos_embedding", "data_tokenizer.sequence.positions"),
    rename("patch_to_embedding.{p}", "data_tokenizer.patch.{p}"),
    rename("mlp_head.0.{p}", "head.norm.{p}"),
    rename("mlp_head.1.{p}", "head.out.{p}"),
) + ENCODER.under("transformer.", "encoder.trunk.")
"""Hyper-spectrum/metatransformer.py to a whole model of this plugin."""
