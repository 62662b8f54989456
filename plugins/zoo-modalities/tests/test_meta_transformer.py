"""Meta-Transformer's tokenizers, shared encoder and heads: what its card promises."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from zoo_modalities.data.signal import Signal
from zoo_modalities.meta_transformer.graphs import Graph, GraphTokensConfig, laplacian_vectors
from zoo_modalities.meta_transformer.model import MetaTransformer, share_encoder, together
from zoo_modalities.meta_transformer.points import farthest_points, nearest_points
from zoo_modalities.meta_transformer.sequences import AudioTokensConfig, Row, TabularTokensConfig

import zoo
from zoo import torchvision_ops
from zoo.data.sample import Sample
from zoo.errors import ConfigError, WeightsError
from zoo.plugin import catalogue
from zoo.testing import check_data_tokenizer
from zoo.weights.save import save

TWELVE = (
    "image", "text", "point-cloud", "audio", "video", "infrared", "hyperspectral", "x-ray", "time-series", "tabular",
    "imu", "graph",
)  # fmt: skip
SMALL = {"encoder.depth": 2, "encoder.width": 32, "encoder.heads": 2, "encoder.ffn": 64}


def built(tokenizer: str, seed: int = 0, **changes: Any) -> Any:
    wiring = {"labels": ["a", "b", "c"], **changes.pop("wiring", {})}
    return zoo.build(
        "meta-transformer", data_tokenizer=tokenizer, scale="tiny", seed=seed, wiring=wiring, **SMALL, **changes
    )


def digest(module: nn.Module) -> str:
    state = {name: value.numpy().tobytes() for name, value in module.state_dict().items()}
    return hashlib.sha256(b"".join(name.encode() + state[name] for name in sorted(state))).hexdigest()


def shaken(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module


# -- traps 1, 2, 3, 12: what is frozen stays, all else learns --------------------------------------------------------


@pytest.mark.parametrize("name", TWELVE)
def test_each_tokenizer_learns_and_the_encoder_stays(name: str) -> None:
    check_data_tokenizer(name)
    module = built(name)
    shaken(module.model)
    module.set_stage(0)
    module.train()
    before = digest(module.model.encoder)
    kept = {n: p.detach().clone() for n, p in module.model.named_parameters()}
    learns = {n for n, p in module.model.named_parameters() if p.requires_grad}
    assert learns == {n for n in kept if n.startswith(("data_tokenizer.", "head."))}
    samples = module.example_samples(3)
    batch = module.model.tokenizer_config.collate(samples, train=True, draws=[0, 1, 2])
    made = module.model.data_tokenizer(batch)
    assert made.tokens.shape[0] == 3
    assert made.tokens.shape[2] == 32
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        loss, _ = module.losses({**batch, "label_targets": torch.eye(3)})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert digest(module.model.encoder) == before
    assert not any(p.grad is not None for p in module.model.encoder.parameters())
    moved = {n for n, p in module.model.named_parameters() if not torch.equal(p, kept[n])}
    assert {n.split(".")[0] for n in moved} == {"data_tokenizer", "head"}
    assert len(optimizer.state) <= len(learns)


def test_a_tuned_encoder_changes() -> None:
    module = built("tabular", stages="joint")
    module.set_stage(0)
    before = digest(module.model.encoder)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    module.losses(module.model.example_batch(2))[0].backward()
    optimizer.step()
    assert digest(module.model.encoder) != before


# -- traps 4 and 11: one encoder for several modalities --------------------------------------------------------------


def test_modalities_share_one_encoder() -> None:
    modules = [built(name, seed=3) for name in ("image", "point-cloud", "text")]
    models: list[MetaTransformer] = [m.model for m in modules]
    encoder = share_encoder(models)
    assert all(model.encoder is encoder for model in models)
    whole = nn.ModuleList(models)
    own = sum(p.numel() for m in models for n, p in m.named_parameters() if not n.startswith("encoder."))
    assert sum(p.numel() for p in whole.parameters()) == own + sum(p.numel() for p in encoder.parameters())
    with torch.no_grad():
        made = [m.data_tokenizer(m.tokenizer_config.collate(m.example_samples(2))) for m in models]
        mixed = together(encoder, made)
        apart = torch.cat([encoder(one) for one in made], 1)
    assert mixed.shape == apart.shape
    assert mixed.shape[1] == sum(one.tokens.shape[1] for one in made)
    assert float((mixed - apart).abs().max()) > 1e-3
    shaken(models[1].encoder)
    other = built("image", seed=4).model
    with pytest.raises(ConfigError, match="is not that before"):
        share_encoder([models[0], other])


def test_padding_of_a_neighbour_does_not_reach_a_mixture() -> None:
    model = built("text").model
    texts = [Sample("a", texts=("sun",)), Sample("b", texts=("a much longer text about a red apple",))]
    both = model.tokenizer_config.collate(texts)
    alone = model.tokenizer_config.collate(texts[:1])
    with torch.no_grad():
        padded = together(model.encoder, [model.data_tokenizer(both)] * 2)[:1]
        short = together(model.encoder, [model.data_tokenizer(alone)] * 2)
    length = short.shape[1] // 2
    torch.testing.assert_close(padded[:, :length], short[:, :length], atol=1e-5, rtol=1e-5)


# -- trap 5 and section 8: timm --------------------------------------------------------------------------------------


def test_the_released_encoder_is_timms_blocks(tmp_path: Any) -> None:
    torchvision_ops.ensure()
    from timm.models.vision_transformer import Block

    torch.manual_seed(1)
    blocks = nn.Sequential(*[Block(64, 4, qkv_bias=True, norm_layer=nn.LayerNorm) for _ in range(3)]).eval()
    shaken(blocks, 2)
    path = tmp_path / "Meta-Transformer_base_patch16_encoder.pth"
    torch.save(blocks.state_dict(), path)
    module = zoo.from_pretrained(path, model="meta-transformer", encoder={"heads": 4})
    encoder = module.model.encoder
    assert encoder.trunk.config.eps == 1e-5
    assert digest(blocks) != ""
    x = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(encoder.trunk(x), blocks(x), atol=1e-5, rtol=1e-5)
    torch.save({k: v for k, v in blocks.state_dict().items() if not k.startswith("1.")}, path)
    with pytest.raises(WeightsError, match="without block 1"):
        zoo.from_pretrained(path, model="meta-transformer", encoder={"heads": 4})


def test_image_path_equals_a_timm_vit() -> None:
    torchvision_ops.ensure()
    import timm
    from zoo_modalities.meta_transformer.keymaps import ENCODER

    from zoo.weights.keymaps import KeyMap, load_into, rename

    torch.manual_seed(1)
    vit = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=64,
        embed_dim=48,
        depth=2,
        num_heads=4,
        num_classes=5,
        norm_layer=nn.LayerNorm,
        block_fn=timm.models.vision_transformer.Block,
    ).eval()
    shaken(vit, 3)
    module = zoo.build(
        "meta-transformer",
        scale="tiny",
        wiring={"classes": 5, "norm_eps": 1e-5},
        **{"encoder.depth": 2, "encoder.width": 48, "encoder.heads": 4, "encoder.ffn": 192},
    )
    keymap = KeyMap(
        rename("cls_token", "data_tokenizer.embed.cls"),
        rename("pos_embed", "data_tokenizer.embed.positions"),
        rename("patch_embed.proj.{p}", "data_tokenizer.embed.patch.{p}"),
        rename("norm.{p}", "head.norm.{p}"),
        rename("head.{p}", "head.out.{p}"),
    ) + ENCODER.under("blocks.", "encoder.trunk.")
    load_into(module.model, vit.state_dict(), keymap)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    module.eval()
    with torch.no_grad():
        logits = module.model({"pixel_values": x, "label_targets": torch.zeros(2, 5)})["label_logits"]
        torch.testing.assert_close(logits, vit(x), atol=1e-5, rtol=1e-5)


# -- trap 6: point clouds --------------------------------------------------------------------------------------------


def test_farthest_points_are_greedy_and_distinct() -> None:
    cloud = torch.rand(2, 40, 3, generator=torch.Generator().manual_seed(0))
    found = farthest_points(cloud, 10)
    for row, points in zip(found.tolist(), cloud.double().numpy(), strict=True):
        assert len(set(row)) == 10
        chosen = [int(((points - points.mean(0)) ** 2).sum(1).argmax())]
        while len(chosen) < 10:
            far = ((points[:, None] - points[chosen]) ** 2).sum(2).min(1)
            chosen.append(int(far.argmax()))
        assert row == chosen


def test_neighbours_are_the_nearest_and_hold_the_point_itself() -> None:
    cloud = torch.rand(2, 30, 3, generator=torch.Generator().manual_seed(1))
    near = nearest_points(cloud[:, :5], cloud, 6)
    distance = ((cloud[:, :5, None] - cloud[:, None]) ** 2).sum(3)
    assert torch.equal(near, torch.sort(distance, dim=2, stable=True).indices[..., :6])
    assert near[..., 0].tolist() == [[0, 1, 2, 3, 4]] * 2


def test_the_order_of_points_makes_no_difference() -> None:
    module = built("point-cloud", wiring={"pool": "cls-max"})
    shaken(module.model)
    cloud = np.random.Generator(np.random.PCG64(0)).normal(size=(256, 3)).astype(np.float32)
    order = np.random.Generator(np.random.PCG64(1)).permutation(256)
    samples = [Sample("a", meta={"modalities": {"points": Signal(c)}}) for c in (cloud, cloud[order])]
    first, second = module.classify_samples(samples)
    torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)
    moved = cloud * np.array([1, 1, 0.3], np.float32)
    (other,) = module.classify_samples([Sample("a", meta={"modalities": {"points": Signal(moved)}})])
    assert float((other - first).abs().max()) > 1e-3


def test_positions_of_points_are_added_before_every_block() -> None:
    model = built("point-cloud").model
    shaken(model)
    made = model.data_tokenizer(model.tokenizer_config.example(2))
    trunk = model.encoder.trunk
    with torch.no_grad():
        x = made.tokens
        for i in range(2):
            x = trunk(x + made.positions, layers=slice(i, i + 1))
        torch.testing.assert_close(model.encoder(made), x)
        once = trunk(made.tokens + made.positions)
    assert float((once - x).abs().max()) > 1e-2


# -- traps 7, 8, 9 ---------------------------------------------------------------------------------------------------


def test_audio_patches_are_asts() -> None:
    from transformers import ASTConfig
    from transformers.models.audio_spectrogram_transformer.modeling_audio_spectrogram_transformer import (
        ASTPatchEmbeddings,
    )

    config = AudioTokensConfig(frames=98, cls=False)
    assert config.grid == (12, 9)
    tokenizer = config.build(32)
    assert tokenizer.tokens == 12 * 9
    assert tokenizer.sequence.positions is not None
    assert tokenizer.sequence.positions.shape == (1, 108, 32)
    theirs = ASTPatchEmbeddings(ASTConfig(hidden_size=32, frequency_stride=10, time_stride=10))
    theirs.projection.load_state_dict(tokenizer.patch.state_dict())
    x = torch.randn(2, 128, 98, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = tokenizer({"audio": x}).tokens - tokenizer.sequence.positions
        torch.testing.assert_close(ours, theirs(x.transpose(1, 2)), atol=1e-5, rtol=1e-5)


def test_video_boxes_have_three_sizes() -> None:
    model = built("video").model
    assert model.data_tokenizer.patch.weight.shape == (32, 3, 2, 16, 16)
    batch = model.tokenizer_config.collate(model.example_samples(2))
    assert batch["video"].shape == (2, 3, 8, 64, 64)
    assert model.data_tokenizer(batch).tokens.shape == (2, 1 + 4 * 16, 32)
    later = {"video": batch["video"].clone()}
    later["video"][:, :, 6:] += 1
    change = (model.data_tokenizer(later).tokens - model.data_tokenizer(batch).tokens).abs().amax((0, 2))
    assert int((change > 1e-6).sum()) == 16, "the last two frames are the last box of each place, time first"
    assert bool((change[-16:] > 1e-6).all())


def test_series_go_around_and_keep_their_length() -> None:
    tokenizer = built("time-series").model.data_tokenizer.eval()
    x = torch.randn(2, 96, 7, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        place = tokenizer.get_buffer("positions")
        tokens = tokenizer({"series": x}).tokens - place
        shifted = tokenizer({"series": x.roll(5, 1)}).tokens - place
    assert tokens.shape == (2, 96, 32)
    torch.testing.assert_close(shifted, tokens.roll(5, 1), atol=1e-5, rtol=1e-5)


# -- trap 10: graphs -------------------------------------------------------------------------------------------------


def graph(edges: list[tuple[int, int]], nodes: int) -> Graph:
    ends = np.array(edges, np.int64).reshape(-1, 2).T
    return Graph(np.zeros((nodes, 1), np.int64), ends, np.zeros((ends.shape[1], 1), np.int64))


def of_graph(*graphs: Graph) -> list[Sample]:
    return [Sample(f"g{i}", meta={"modalities": {"graph": g}}) for i, g in enumerate(graphs)]


def test_orthogonal_identifiers_are_orthonormal_where_they_fit() -> None:
    config = GraphTokensConfig(eigenvectors=0, orthogonal=6)
    batch = config.collate(of_graph(graph([(0, 1), (1, 2)], 5), graph([(0, 1)], 6)))
    for row, nodes in enumerate((5, 6)):
        rows = batch["orthogonal"][row, :nodes]
        torch.testing.assert_close(rows @ rows.T, torch.eye(nodes), atol=1e-5, rtol=0)
    cut = GraphTokensConfig(eigenvectors=0, orthogonal=3).collate(of_graph(graph([(0, 1)], 6)))["orthogonal"][0]
    torch.testing.assert_close(cut.norm(dim=1), torch.ones(6))
    assert float((cut @ cut.T - torch.eye(6)).abs().max()) > 0.1


def test_eigenvectors_are_the_laplacians() -> None:
    ring = graph([(i, (i + 1) % 6) for i in range(6)], 6)
    vectors = laplacian_vectors(ring, 8)
    assert vectors.shape == (6, 8)
    assert not vectors[:, 6:].any()
    adjacency = np.zeros((6, 6))
    for i in range(6):
        adjacency[i, (i + 1) % 6] = adjacency[(i + 1) % 6, i] = 1
    laplacian = np.eye(6) - adjacency / 2
    values = np.diagonal(vectors[:, :6].T @ laplacian @ vectors[:, :6])
    np.testing.assert_allclose(laplacian @ vectors[:, :6], vectors[:, :6] * values, atol=1e-9)
    np.testing.assert_allclose(values, sorted(1 - np.cos(2 * np.pi * np.arange(6) / 6)), atol=1e-9)
    trained = GraphTokensConfig(eigenvectors=4).collate(of_graph(ring) * 8, train=True, draws=range(8))["eigenvectors"]
    still = GraphTokensConfig(eigenvectors=4).collate(of_graph(ring))["eigenvectors"]
    assert torch.equal(trained.abs(), still.abs().expand(8, -1, -1))
    assert len({tuple(torch.sign((row * still[0]).sum(0)).tolist()) for row in trained}) > 1


def test_an_edge_carries_both_its_ends_and_nodes_their_kind() -> None:
    config = GraphTokensConfig(eigenvectors=4, node_values=3, edge_values=3)
    tokenizer = shaken(config.build(32)).eval()
    ring = graph([(i, (i + 1) % 5) for i in range(5)] + [(2, 2)], 5)
    batch = config.collate(of_graph(ring, graph([(0, 1), (1, 2)], 3)))
    with torch.no_grad():
        made = tokenizer(batch)
        assert made.mask is not None
        assert made.tokens.shape == (2, 2 + 5 + 6, 32)
        assert made.mask.sum(1).tolist() == [13, 2 + 3 + 2]
        assert not made.tokens[1][~made.mask[1]].any()
        for node, expected in ((0, {0, 4}), (2, {1, 2, 5})):  # edges that end there
            moved = {**batch, "eigenvectors": batch["eigenvectors"].clone()}
            moved["eigenvectors"][0, node] += 1
            change = (tokenizer(moved).tokens - made.tokens)[0].abs().amax(1)
            assert {i for i in range(6) if float(change[7 + i]) > 1e-6} == expected
            assert [i for i in range(5) if float(change[2 + i]) > 1e-6] == [node]
        kinds = tokenizer.kind.weight.clone()
        tokenizer.kind.weight[1] += 1
        change = (tokenizer(batch).tokens - made.tokens)[0].abs().amax(1) > 1e-6
        assert change.tolist() == [False] * 2 + [True] * 5 + [False] * 6, "a loop is an edge"
        tokenizer.kind.weight.copy_(kinds)


# -- trap 13: tables -------------------------------------------------------------------------------------------------


def row(numbers: list[float], categories: list[int]) -> Sample:
    return Sample("r", meta={"modalities": {"tabular": Row(np.array(numbers), np.array(categories, np.int64))}})


def test_missing_and_unknown_categories_share_a_row_of_their_own() -> None:
    config = TabularTokensConfig(numeric=2, categories=[3, 2], dropout=0.0)
    batch = config.collate([row([1, 2], [0, 1]), row([1, 2], [-1, 1]), row([1, 2], [7, 1])])
    assert batch["categories"].tolist() == [[1, 2], [0, 2], [0, 2]]
    tokenizer = config.build(16)
    with torch.no_grad():
        known, missing, unknown = tokenizer(batch).tokens
    assert known.shape == (1 + 4, 16)
    assert torch.equal(missing, unknown)
    assert [i for i in range(5) if not torch.equal(known[i], missing[i])] == [3]
    assert tokenizer.table.num_embeddings == 4 + 3


# -- heads -----------------------------------------------------------------------------------------------------------


def test_pads_reach_no_head() -> None:
    texts = [Sample("a", texts=("sun",)), Sample("b", texts=("a much longer text about a red apple",))]
    for pool in ("mean", "max", "cls-max-mean"):
        module = built("text", wiring={"pool": pool})
        shaken(module.model)
        torch.testing.assert_close(
            module.classify_samples(texts)[:1], module.classify_samples(texts[:1]), atol=1e-5, rtol=1e-5
        )


def test_hidden_layers_of_the_head() -> None:
    module = built("point-cloud", wiring={"pool": "cls-max", "hidden": [24, 16]})
    widths = [layer.weight.shape for layer in module.model.head.hidden if isinstance(layer, nn.Linear)]
    assert widths == [(24, 64), (16, 24)]
    assert module.model.head.out.weight.shape == (3, 16)
    loss, _ = module.losses(module.model.example_batch(4))
    assert bool(torch.isfinite(loss))


def test_elements_get_the_labels_of_the_points_they_stand_for() -> None:
    module = zoo.build("meta-transformer-segmentation", scale="tiny", **SMALL)
    source = catalogue()["data"].parse("icon-points", {"points": 300}).build()
    samples = [source.sample(i) for i in source.ids("train")[:2]]
    batch = module.processor(samples, True, [0, 0])
    assert batch["points"].shape == (2, 256, 3)
    with torch.no_grad():
        out = module.model(batch)
        made = module.model.data_tokenizer(batch)
    names = ("front", "back", "side")
    assert out["element_logits"].shape == (2, 65, 3)
    for sample, place, targets in zip(samples, made.place.tolist(), out["element_targets"].tolist(), strict=True):
        assert targets[0] == -100
        assert targets[1:] == [names.index(sample.meta["element_labels"][p]) for p in place[1:]]
    assert {names[t] for t in out["element_targets"][:, 1:].flatten().tolist()} == set(names)
    assert module.predict_samples(samples).shape == (2, 64, 3)


def test_forecasts_are_compared_with_what_came() -> None:
    module = zoo.build("meta-transformer-forecasting", scale="tiny", **SMALL)
    source = catalogue()["data"].parse("processes", {}).build()
    samples = [source.sample(i) for i in source.ids("train")[:3]]
    batch = module.processor(samples, True, [0, 0, 0])
    expected = torch.tensor(np.stack([s.meta["future"] for s in samples]))
    assert torch.equal(batch["value_targets"], expected)
    module.eval()
    with torch.no_grad():
        out = module.model(batch)
        loss, report = module.losses(batch)
    torch.testing.assert_close(loss, (out["values"] - expected).square().mean())
    torch.testing.assert_close(report["regression/mean_loss"], (expected - expected.mean(0)).square().mean())
    torch.testing.assert_close(module.predict_samples(samples), out["values"], atol=1e-5, rtol=1e-5)


def test_a_tower_gives_its_blocks_to_every_modality(tmp_path: Path) -> None:
    """What a contrastive run learned of images is where the frozen encoder starts from."""
    towers = zoo.build("clip", encoder="meta-transformer-b16", scale="tiny", stages="joint", seed=5)
    shaken(towers.model)
    save(towers, towers.recipe, tmp_path / "weights")
    module = zoo.build(
        "meta-transformer", data_tokenizer="graph", scale="tiny", wiring={"classes": 3}, init=tmp_path / "weights"
    )
    theirs = towers.model.encoder.trunk.state_dict()
    own = module.model.encoder.trunk.state_dict()
    assert len(own) == len(theirs) - 2, "all but the final norm"
    assert all(torch.equal(value, theirs[name]) for name, value in own.items())


def positions(module: Any, batch: dict[str, Tensor]) -> list[int]:
    from zoo.positions import positions as counted

    return [int(v) for v in counted(module.model, batch)]


def test_positions_are_counted_whatever_the_modality() -> None:
    module = built("tabular")
    assert positions(module, module.model.example_batch(4)) == [0, 4 * 31]
    module = built("text")
    assert positions(module, module.model.example_batch(2)) == [32, 0]
