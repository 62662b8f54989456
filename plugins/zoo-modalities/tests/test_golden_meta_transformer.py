"""Meta-Transformer against its released code: the encoder, the tokenizers that run there, and one classifier."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from zoo_modalities.meta_transformer import keymaps
from zoo_modalities.meta_transformer.graphs import GraphTokensConfig, fitted, unit_rows
from zoo_modalities.meta_transformer.images import ImageTokens, zero_padded
from zoo_modalities.meta_transformer.model import (
    MetaTransformerConfig,
    MetaTransformerLabels,
    SharedEncoder,
    shared_trunk,
    together,
)
from zoo_modalities.meta_transformer.sequences import (
    CALENDAR,
    HyperspectralTokensConfig,
    SeriesTokensConfig,
    band_groups,
    sinusoid,
)

from zoo.data_tokenizers.base import DataTokens
from zoo.encoders.vit import ViTConfig
from zoo.weights.keymaps import load_into

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
CLOSE = {"atol": 1e-6, "rtol": 1e-5}


@pytest.fixture
def g(golden: Callable[[str], Any]) -> Any:
    return golden("meta_transformer")


def of(g: Any, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in g.weights.items() if name.startswith(prefix)}


@pytest.fixture
def encoder(g: Any) -> SharedEncoder:
    c = g.config
    vit = ViTConfig(
        image_size=c["image"],
        patch_size=c["patch"],
        width=c["width"],
        depth=c["layers"],
        heads=c["heads"],
        ffn=4 * c["width"],
        eps=1e-5,
    )
    built = SharedEncoder(shared_trunk(vit)).eval()
    load_into(built, of(g, "encoder."), keymaps.ENCODER.under("", "trunk."))
    return built


@torch.no_grad()
def test_every_block(g: Any, encoder: SharedEncoder) -> None:
    trunk = encoder.trunk
    assert trunk.config.eps == 1e-5
    assert trunk.final_norm is None
    out, taps = trunk(g.inputs["tokens"], taps=True)
    for i, seen in enumerate(taps):
        torch.testing.assert_close(seen, g.outputs[f"encoder/after_block_{i}"], **TOLERANCE)
    assert torch.equal(out, taps[-1])


@torch.no_grad()
def test_layers_run_one_at_a_time(g: Any, encoder: SharedEncoder) -> None:
    """Point clouds add their positions before every block: a range of layers is enough for that."""
    x = g.inputs["tokens"]
    zero = encoder(DataTokens(x, positions=torch.zeros_like(x)))
    torch.testing.assert_close(zero, g.outputs[f"encoder/after_block_{g.config['layers'] - 1}"], **TOLERANCE)


def test_the_encoder_file_round_trips(g: Any, encoder: SharedEncoder) -> None:
    saved, unknown = keymaps.ENCODER.under("", "trunk.").save(encoder.state_dict())
    assert unknown == []
    assert set(saved) == set(of(g, "encoder."))
    assert all(torch.equal(saved[name], value) for name, value in of(g, "encoder.").items())


@pytest.fixture
def tokens(g: Any) -> dict[str, DataTokens]:
    """What the tokenizers make of the golden's image, series and text vector."""
    c = g.config
    image = ImageTokens(c["width"], c["image"], c["patch"], 3, cls=False, positions=False)
    load_into(image, of(g, "image."), keymaps.IMAGE)
    series = SeriesTokensConfig(channels=c["series_channels"], steps=c["series_len"]).build(c["width"]).eval()
    load_into(series, of(g, "series."), keymaps.SERIES, allow_ignored=("temporal_embedding.{**}",))
    with torch.no_grad():
        return {
            "image": image({"pixel_values": g.inputs["image"]}),
            "series": series({"series": g.inputs["series"]}),
            "text": DataTokens(zero_padded(g.inputs["text_vectors"], c["width"])),
        }


@torch.no_grad()
def test_modalities_alone_and_together(g: Any, encoder: SharedEncoder, tokens: dict[str, DataTokens]) -> None:
    torch.testing.assert_close(tokens["image"].tokens, g.outputs["image/tokens"], **CLOSE)
    torch.testing.assert_close(tokens["series"].tokens, g.outputs["series/tokens"], **CLOSE)
    assert torch.equal(tokens["text"].tokens[:, 0], g.outputs["text/zero_padded"])
    for name in ("image", "series"):
        torch.testing.assert_close(encoder(tokens[name]), g.outputs[f"{name}/encoded"], **TOLERANCE)
    mixed = together(encoder, list(tokens.values()))
    torch.testing.assert_close(mixed, g.outputs["mixed/encoded"], **TOLERANCE)
    apart = torch.cat([encoder(made) for made in tokens.values()], 1)
    assert apart.shape == mixed.shape
    assert float((apart - mixed).abs().max()) > 0.1, "attention mixes what stands in one sequence"


@torch.no_grad()
def test_series_with_calendars_and_patches(g: Any) -> None:
    c, width = g.config, g.config["width"]
    torch.testing.assert_close(sinusoid(c["series_len"], width), g.outputs["series/sinusoid"], **CLOSE)
    for name, rows in CALENDAR:
        table = g.weights[f"series.temporal_embedding.{name}_embed.emb.weight"]
        torch.testing.assert_close(sinusoid(rows, width), table, **CLOSE)
    sizes = {"channels": c["series_channels"], "steps": c["series_len"]}
    fixed = SeriesTokensConfig(**sizes, calendar="fixed").build(width).eval()
    load_into(fixed, of(g, "series."), keymaps.SERIES, allow_ignored=("temporal_embedding.{**}",))
    made = fixed({"series": g.inputs["series"], "calendar": g.inputs["series_mark"]})
    torch.testing.assert_close(made.tokens, g.outputs["series/tokens_with_calendar"], **CLOSE)
    features = SeriesTokensConfig(**sizes, calendar="features").build(width).eval()
    load_into(features, of(g, "series_timef."), keymaps.SERIES)
    made = features({"series": g.inputs["series"], "calendar": g.inputs["series_mark_timef"]})
    torch.testing.assert_close(made.tokens, g.outputs["series/tokens_timef"], **CLOSE)
    config = SeriesTokensConfig(**sizes, patch=c["patch_len"], stride=c["patch_stride"])
    patches = config.build(width).eval()
    load_into(patches, of(g, "series_patch."), keymaps.SERIES_PATCHES)
    made = patches({"series": g.inputs["series"]})
    released = g.outputs["series/patch_tokens"]  # [B C, patches, D]
    assert patches.tokens == made.tokens.shape[1] == c["series_channels"] * released.shape[1]
    torch.testing.assert_close(made.tokens.view_as(released), released, **CLOSE)


@torch.no_grad()
def test_graph_tokens(g: Any) -> None:
    c, inputs = g.config, g.inputs
    nodes, edges = c["node_num"], c["edge_num"]
    config = GraphTokensConfig(
        node_values=c["num_atoms"],
        edge_values=c["num_edges"],
        random=c["rand_dim"],
        orthogonal=c["orf_dim"],
        eigenvectors=c["lap_k"],
        loops_as_nodes=True,
    )
    tokenizer = config.build(c["width"]).eval()
    load_into(tokenizer, of(g, "graph."), keymaps.GRAPH)

    def padded(rows: Tensor, counts: list[int]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(rows.split(counts)), batch_first=True)

    orthogonal = [
        torch.from_numpy(fitted(matrix[:n].double().numpy(), c["orf_dim"])).float()
        for matrix, n in zip(inputs["graph_orthogonal"], nodes, strict=True)
    ]
    batch = {
        "nodes": padded(inputs["graph_node_data"], nodes),
        "node_mask": padded(torch.ones(sum(nodes), dtype=torch.bool), nodes),
        "edges": padded(inputs["graph_edge_index"].T, edges),
        "edge_values": padded(inputs["graph_edge_data"], edges),
        "edge_mask": padded(torch.ones(sum(edges), dtype=torch.bool), edges),
        "random": padded(torch.from_numpy(unit_rows(inputs["graph_rand_uniform"].double().numpy())).float(), nodes),
        "orthogonal": torch.nn.utils.rnn.pad_sequence(orthogonal, batch_first=True),
        "eigenvectors": padded(inputs["graph_lap_eigvec"][:, : c["lap_k"]], nodes),
    }
    made = tokenizer(batch)
    released, pads = g.outputs["graph/tokens"], g.outputs["graph/padding_mask"].bool()
    pads = torch.cat([pads.new_zeros(len(pads), released.shape[1] - pads.shape[1]), pads], 1)
    assert made.mask is not None
    for row in range(len(nodes)):  # ours has the pads of the nodes behind the nodes
        torch.testing.assert_close(made.tokens[row][made.mask[row]], released[row][~pads[row]], **CLOSE)
    assert float(made.tokens[~made.mask].abs().max()) == 0


@pytest.fixture
def classifier(g: Any) -> MetaTransformerLabels:
    c, width = g.config, g.config["hyper_width"]
    depth = 1 + max(int(name.split(".")[2]) for name in g.weights if name.startswith("hyper.transformer."))
    vit = ViTConfig(width=width, depth=depth, heads=c["hyper_heads"], ffn=4 * width, eps=1e-5)
    config = MetaTransformerConfig(classes=c["hyper_classes"], norm_eps=1e-5)
    # the golden's two near bands are no middle and neighbours, but as many values: one token is one matrix's input
    bands = HyperspectralTokensConfig(bands=c["hyper_bands"], pixels=c["hyper_image"], near=1)
    model = MetaTransformerLabels(config, bands, vit, seed=0).eval()
    tokenizer: Any = model.data_tokenizer
    tokenizer.patch = torch.nn.Linear(c["hyper_image"] ** 2 * c["hyper_near"], width)
    load_into(model, of(g, "hyper."), keymaps.HYPERSPECTRAL)
    return model


@torch.no_grad()
def test_hyper_spectral_classifier(g: Any, classifier: MetaTransformerLabels) -> None:
    batch = {"hyperspectral": g.inputs["hyper"], "label_targets": torch.zeros(2, g.config["hyper_classes"])}
    torch.testing.assert_close(classifier(batch)["label_logits"], g.outputs["hyper/logits"], **TOLERANCE)
    saved, unknown = keymaps.HYPERSPECTRAL.save(classifier.state_dict())
    assert unknown == []
    assert set(saved) == set(of(g, "hyper."))


def test_groups_of_bands_go_around_the_ends() -> None:
    cubes = torch.arange(5.0)[None, :, None, None].expand(2, 5, 2, 2)
    groups = band_groups(cubes, 3)
    assert groups.shape == (2, 5, 12)
    assert groups[0, 0].tolist() == [4.0] * 4 + [0.0] * 4 + [1.0] * 4
    assert groups[1, 2].tolist() == [1.0] * 4 + [2.0] * 4 + [3.0] * 4
