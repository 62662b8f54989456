"""Graphs: a token a node and a token an edge, that know each other by identifiers of nodes (TokenGT, arXiv 2207.02505,
section 3.1; Data2Seq/Graph.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from zoo.data.images import uniforms
from zoo.data.sample import Sample
from zoo.data_tokenizers.base import DataTokenizer, DataTokenizerConfig, DataTokens
from zoo.errors import DataError
from zoo_modalities.meta_transformer.reading import draws_of, item_of


@dataclass(frozen=True, slots=True, eq=False)
class Graph:
    """What ``Sample.meta["modalities"]["graph"]`` holds.

    Attributes:
        nodes: [n, features] int, values of each node.
        edges: [2, m] int, the nodes that each edge joins.
        edge_values: [m, features] int.
    """

    nodes: NDArray[Any]
    edges: NDArray[Any]
    edge_values: NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class GraphTokensConfig(DataTokenizerConfig):
    """Node and edge tokens.

    Attributes:
        node_values, edge_values: Rows of the tables of values (OGB's PCQM4Mv2: 512 for each of 9 and 3 features).
        nodes, edges: Of the largest graph; larger ones are refused.
        eigenvectors: Identifiers from so many eigenvectors of the normalised Laplacian, smallest first; in training
            their signs are drawn. 0 = none.
        orthogonal: Identifiers from rows of a random orthogonal matrix, cut or padded to this width. 0 = none.
        random: Identifiers of so many random numbers (uniform and of unit length: not orthogonal). 0 = none.
        loops_as_nodes: An edge from a node to itself counts as a node, as in the release.
    """

    modality: ClassVar[str] = "graph"

    node_values: int = 4608
    edge_values: int = 1536
    nodes: int = 64
    edges: int = 160
    eigenvectors: int = 16
    orthogonal: int = 0
    random: int = 0
    loops_as_nodes: bool = False

    def __post_init__(self) -> None:
        if min(self.eigenvectors, self.orthogonal, self.random) < 0:
            raise ValueError("eigenvectors, orthogonal and random must be 0 or more")
        if not self.eigenvectors + self.orthogonal + self.random:
            raise ValueError("nodes need identifiers: give eigenvectors, orthogonal or random")
        if min(self.nodes, self.node_values, self.edge_values) < 1 or self.edges < 0:
            raise ValueError("nodes, node_values and edge_values must be 1 or more, edges 0 or more")

    def build(self, width: int) -> GraphTokens:
        return GraphTokens(width, self)

    def read(self, sample: Sample) -> Graph:
        """The graph of a sample.

        Raises:
            DataError: It is none, it is too large, or it holds numbers that no table or node has.
        """
        graph = item_of(sample, "graph")
        what = f"sample {sample.id!r}: graph"
        if not isinstance(graph, Graph):
            raise DataError(f"{what}: a {type(graph).__name__}, expected a zoo_modalities Graph")
        nodes, edges = np.asarray(graph.nodes), np.asarray(graph.edges)
        values = np.asarray(graph.edge_values)
        if nodes.ndim != 2 or edges.ndim != 2 or edges.shape[0] != 2 or len(values) != edges.shape[1]:
            raise DataError(
                f"{what}: nodes {nodes.shape}, edges {edges.shape}, edge_values {values.shape}: expected [n, features],"
                " [2, m], [m, features]"
            )
        if not 1 <= len(nodes) <= self.nodes or edges.shape[1] > self.edges:
            raise DataError(
                f"{what}: {len(nodes)} nodes and {edges.shape[1]} edges, expected at most {self.nodes} and"
                f" {self.edges} (data_tokenizer.nodes, .edges)"
            )
        for name, array, limit in (
            ("node value", nodes, self.node_values),
            ("edge value", values, self.edge_values),
            ("end of an edge", edges, len(nodes)),
        ):
            if array.size and (array.dtype.kind not in "iu" or array.min() < 0 or array.max() >= limit):
                raise DataError(f"{what}: a {name} is no whole number from 0 to {limit - 1}")
        return Graph(nodes, edges, values)

    def collate(
        self, samples: Sequence[Sample], train: bool = False, draws: Sequence[int] | None = None, seed: int = 0
    ) -> dict[str, Tensor]:
        """``nodes`` [B, n, F], ``node_mask`` [B, n], ``edges`` [B, m, 2], ``edge_values`` [B, m, G], ``edge_mask``
        [B, m], and of each kind of identifier that is used its numbers [B, n, width]."""
        graphs = [self.read(sample) for sample in samples]
        keys = [(seed, s.id, d) if train else (s.id,) for s, d in zip(samples, draws_of(samples, draws), strict=True)]
        batch: dict[str, Tensor] = {
            "nodes": _padded([g.nodes for g in graphs]),
            "node_mask": _padded([np.ones(len(g.nodes), np.bool_) for g in graphs]),
            "edges": _padded([g.edges.T for g in graphs]),
            "edge_values": _padded([g.edge_values for g in graphs]),
            "edge_mask": _padded([np.ones(g.edges.shape[1], np.bool_) for g in graphs]),
        }
        both = list(zip(graphs, keys, strict=True))
        if self.random:
            drawn = [uniforms(len(g.nodes) * self.random, "ids", *k).reshape(-1, self.random) for g, k in both]
            batch["random"] = _padded([unit_rows(rows) for rows in drawn]).float()
        if self.orthogonal:
            batch["orthogonal"] = _padded(
                [fitted(orthogonal_rows(len(g.nodes), *k), self.orthogonal) for g, k in both]
            ).float()
        if self.eigenvectors:
            vectors = [laplacian_vectors(g, self.eigenvectors) for g in graphs]
            if train:
                vectors = [
                    v * np.where(uniforms(v.shape[1], "signs", *k) < 0.5, -1.0, 1.0)
                    for v, k in zip(vectors, keys, strict=True)
                ]
            batch["eigenvectors"] = _padded(vectors).float()
        return batch

    def example(self, batch_size: int = 1) -> dict[str, Tensor]:
        batch = self.collate(self.examples(1))
        return {key: value.expand(batch_size, *value.shape[1:]).contiguous() for key, value in batch.items()}

    def examples(self, count: int) -> list[Sample]:
        """Rings of different lengths with a chord, as large as fits."""
        samples = []
        for i in range(count):
            n = max(1, min(self.nodes, self.edges) // 2 - i)
            ends = np.stack([np.arange(n), (np.arange(n) + 1) % n])
            edges = np.concatenate([ends, [[0], [n // 2]]], 1)[:, : self.edges]
            nodes = (np.arange(n)[:, None] * (i + 1)) % self.node_values
            values = (np.arange(edges.shape[1])[:, None] + i) % self.edge_values
            samples.append(Sample(f"example-{i}", meta={"modalities": {"graph": Graph(nodes, edges, values)}}))
        return samples


def _padded(rows: Sequence[NDArray[Any]]) -> Tensor:
    """Arrays of different lengths as one tensor, zeros behind the shorter ones."""
    tensors = [torch.from_numpy(np.ascontiguousarray(row)) for row in rows]
    out = tensors[0].new_zeros(len(tensors), max(map(len, tensors)), *tensors[0].shape[1:])
    for i, row in enumerate(tensors):
        out[i, : len(row)] = row
    return out


def unit_rows(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rows of length 1."""
    unit: NDArray[np.float64] = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return unit


def fitted(rows: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Rows [n, k] cut, or padded with zeros, to ``width`` and of length 1 again: orthonormal where width >= n."""
    rows = np.pad(rows, ((0, 0), (0, max(0, width - rows.shape[1]))))[:, :width]
    return unit_rows(rows)


def orthogonal_rows(count: int, *key: object) -> NDArray[np.float64]:
    """A random orthogonal matrix [count, count]: Q of a Gaussian matrix, with the signs that make it uniform."""
    generator = np.random.Generator(np.random.PCG64(int(2**53 * uniforms(1, "orthogonal", *key)[0])))
    q, r = np.linalg.qr(generator.standard_normal((count, count)))
    signed: NDArray[np.float64] = q * np.sign(np.diagonal(r))
    return signed


def laplacian_vectors(graph: Graph, count: int) -> NDArray[np.float64]:
    """[n, count]: eigenvectors of I - D^-1/2 A D^-1/2, smallest eigenvalue first, zeros where the graph has fewer.

    A is symmetric and without weights; degrees are at least 1. Of each vector the largest entry (the first such) is
    positive, so that equal graphs have equal identifiers.
    """
    n = len(graph.nodes)
    adjacency = np.zeros((n, n))
    adjacency[graph.edges[0], graph.edges[1]] = adjacency[graph.edges[1], graph.edges[0]] = 1
    scale = np.maximum(adjacency.sum(1), 1) ** -0.5
    _, vectors = np.linalg.eigh(np.eye(n) - scale[:, None] * adjacency * scale)
    top = np.abs(vectors).round(6).argmax(0)
    vectors = vectors * np.where(vectors[top, np.arange(n)] < 0, -1.0, 1.0)
    padded: NDArray[np.float64] = np.pad(vectors, ((0, 0), (0, max(0, count - n))))
    return padded[:, :count]


class GraphTokens(DataTokenizer):
    """``node`` and ``edge`` tables (the sum over features), a matrix without bias for each kind of identifier, ``kind``
    of edges (0) and nodes (1), ``graph_token`` and ``null_token`` first."""

    def __init__(self, width: int, config: GraphTokensConfig) -> None:
        super().__init__()
        c = self.config = config
        self.width, self.cls, self.tokens = width, True, 2 + c.nodes + c.edges

        def table(rows: int) -> nn.Embedding:
            return nn.Embedding(rows, width, _weight=0.02 * torch.randn(rows, width))

        self.node, self.edge, self.kind = table(c.node_values), table(c.edge_values), table(2)
        kinds = {"random": c.random, "orthogonal": c.orthogonal, "eigenvectors": c.eigenvectors}
        self.identifiers = nn.ModuleDict(
            {kind: nn.Linear(2 * size, width, bias=False) for kind, size in kinds.items() if size}
        )
        self.graph_token = nn.Parameter(0.02 * torch.randn(1, width))
        self.null_token = nn.Parameter(0.02 * torch.randn(1, width))

    def forward(self, inputs: Mapping[str, Tensor]) -> DataTokens:
        """Tokens [B, 2 + n + m, D]: [graph], [null], nodes, edges; pads are zero and masked."""
        nodes, edges = inputs["nodes"], inputs["edges"]
        batch, n = nodes.shape[:2]
        own = torch.arange(n, device=nodes.device)[None, :, None].expand(batch, -1, 2)
        ends = torch.cat([own, edges], 1)  # [B, n + m, 2]
        x = torch.cat([self.node(nodes).sum(2), self.edge(inputs["edge_values"]).sum(2)], 1)  # [B, n + m, D]
        for kind, matrix in self.identifiers.items():
            rows = inputs[kind].gather(1, ends.flatten(1)[..., None].expand(-1, -1, inputs[kind].shape[2]))
            x = x + matrix(rows.view(batch, ends.shape[1], -1).to(x.dtype))
        same = ends[..., 0] == ends[..., 1]
        is_node = torch.arange(ends.shape[1], device=nodes.device) < n
        x = x + self.kind((same if self.config.loops_as_nodes else is_node.expand_as(same)).long())
        mask = torch.cat([inputs["node_mask"], inputs["edge_mask"]], 1)
        first = torch.cat([self.graph_token, self.null_token])  # [2, D]
        x = torch.cat([first.expand(batch, -1, -1), x * mask[..., None]], 1)
        mask = torch.cat([mask.new_ones(batch, 2), mask], 1)
        place = torch.where(is_node, ends[..., 0], -1)
        return DataTokens(x, mask, place=torch.cat([place.new_full((batch, 2), -1), place], 1))
