"""Transfusion by parts: library masks and Llama, packing, and a cache that is overwritten while denoising."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layout import Layout, Segment, lay_out
from zoo.nn import KVCache, TokenEmbedding, Trunk
from zoo.weights.keymaps import load_into, transfusion

HIDDEN = {"atol": 2e-5, "rtol": 1e-5}
LOSSES = {"atol": 1e-5, "rtol": 1e-5}
KEYMAP = transfusion.keymap()


@pytest.fixture
def g(golden: Callable[[str], Any]) -> Any:
    return golden("transfusion")


@pytest.fixture
def model(g: Any) -> nn.ModuleDict:
    c = g.config["llama"]
    width, latent = c["hidden_size"], g.config["patch"] ** 2 * g.config["latent_channels"]
    built = nn.ModuleDict(
        {
            "trunk": Trunk(
                transfusion.trunk_config(
                    width=width,
                    depth=c["layers"],
                    heads=c["heads"],
                    kv_heads=c["kv_heads"],
                    ffn=c["intermediate_size"],
                    eps=c["rms_norm_eps"],
                    rope_theta=c["rope_theta"],
                )
            ),
            "embed": TokenEmbedding(c["vocab_size"], width),
            "head": nn.Linear(width, c["vocab_size"], bias=False),
            "patch_in": nn.Linear(latent, width),
            "patch_out": nn.Linear(width, latent),
        }
    ).eval()
    load_into(built, g.weights, KEYMAP)
    return built


def by_token(spans: Tensor, length: int) -> Layout:
    """Lay out ``[B, M, 3]`` spans (type, offset, length): rows disagree, so tokens name their segments."""
    segment = torch.zeros(len(spans), length, dtype=torch.long)
    for row, own in enumerate(spans.tolist()):
        for number, (_, offset, count) in enumerate(own):
            segment[row, offset : offset + count] = number + 1
    images = spans.shape[1]
    relation = torch.ones(images + 1, images + 1).long() + F.pad(torch.eye(images).long(), (1, 0, 1, 0))
    names = ["text", *(f"image{i}" for i in range(images))]
    return Layout.from_ids(segment, relation, modality=(segment > 0).long(), names=names)


def by_segment(spans: Tensor, length: int) -> Layout:
    """Lay out one row, ``[M, 3]``, as segments one after the other."""
    segments, at = [], 0
    for number, (_, offset, count) in enumerate(spans.tolist()):
        if count:
            segments.append(Segment(f"text{number}", offset - at, "text"))
            segments.append(Segment(f"image{number}", count, "image", "full"))
            at = offset + count
    return lay_out([*segments, Segment("rest", length - at, "text")])


@pytest.mark.parametrize("name", ["", "_b"])
def test_masks(g: Any, name: str) -> None:
    spans, expected = g.inputs[f"spans{name}"], g.outputs[f"mask{name}"]
    length = expected.shape[-1]
    assert torch.equal(by_token(spans, length).mask()[:, 0], expected)
    for row in range(len(spans)):
        assert torch.equal(by_segment(spans[row], length).mask()[0, 0], expected[row])


@torch.no_grad()
def test_embeddings(g: Any, model: nn.ModuleDict) -> None:
    ids, expected = g.inputs["ids"], g.outputs["inputs_embeds"]
    x = model["embed"](ids.clamp(min=0))
    images = model["patch_in"](g.outputs["patches"] + g.outputs["time_embedding"][:, None])
    for image, (row, first) in zip(images, g.inputs["image_rows"].tolist(), strict=True):
        x[row, first : first + len(image)] = image
    torch.testing.assert_close(x, expected, **HIDDEN)


@torch.no_grad()
def test_hidden_states_and_losses(g: Any, model: nn.ModuleDict) -> None:
    assert model["trunk"].config.eps == 1e-5
    assert model["trunk"].config.keys < model["trunk"].config.heads
    x = g.outputs["inputs_embeds"]
    hidden = model["trunk"](x, by_token(g.inputs["spans"], x.shape[1]))
    torch.testing.assert_close(hidden, g.outputs["hidden"], **HIDDEN)
    logits = model["head"](hidden)
    torch.testing.assert_close(logits, g.outputs["logits"], **HIDDEN)
    lm = F.cross_entropy(logits.flatten(0, 1), g.outputs["lm_targets"].flatten())
    torch.testing.assert_close(lm, g.outputs["lm_loss"], **LOSSES)
    count = g.config["patches_per_image"]
    patches = torch.stack([hidden[row, first : first + count] for row, first in g.inputs["image_rows"].tolist()])
    torch.testing.assert_close(model["patch_out"](patches), g.outputs["eps_pred"], **HIDDEN)


@torch.no_grad()
def test_two_documents_packed_in_one_row(g: Any, model: nn.ModuleDict) -> None:
    x, expected = g.outputs["inputs_embeds"], g.outputs["hidden"]
    documents, length = x.shape[:2]
    # every document's images are segments of their own; positions start again
    spans = g.inputs["spans"] + torch.tensor([0, length, 0]) * torch.arange(documents)[:, None, None]
    packed = by_token(spans.flatten(0, 1)[None], documents * length)
    document = torch.arange(documents).repeat_interleave(length)[None]
    packed = packed.separate(document)
    place = torch.arange(length).repeat(documents)[None]
    hidden = model["trunk"](x.flatten(0, 1)[None], packed, positions=place)
    torch.testing.assert_close(hidden.view_as(expected), expected, **HIDDEN)
    blocks = packed.mask()[0, 0].view(documents, length, documents, length)
    for reader in range(documents):
        assert torch.equal(blocks[reader, :, reader], g.outputs["mask"][reader])
        assert not any(blocks[reader, :, other].any() for other in range(documents) if other != reader)


@torch.no_grad()
@pytest.mark.parametrize("row", [0, 1])
def test_denoising_over_a_cache_and_going_on(g: Any, model: nn.ModuleDict, row: int) -> None:
    """Noisy patches are run over the cached prefix and forgotten; the clean ones stay, and text goes on."""
    x, expected = g.outputs["inputs_embeds"][row : row + 1], g.outputs["hidden"][row]
    layout, cache, at = by_segment(g.inputs["spans"][row], x.shape[1]), KVCache(), 0
    generator = torch.Generator().manual_seed(0)
    parts = []

    def read(rows: Tensor, stop: int) -> Tensor:
        return model["trunk"](rows, layout.truncate(stop), cache=cache)[0]

    for _, offset, count in g.inputs["spans"][row].tolist():
        if not count:
            continue
        parts.append(read(x[:, at:offset], offset))
        stop, clean = offset + count, x[:, offset : offset + count]
        for _ in range(3):
            noisy = read(torch.randn(clean.shape, generator=generator), stop)
            assert (noisy - expected[offset:stop]).abs().max() > 0.1
            cache.truncate(offset)
        parts.append(read(clean, stop))
        at = stop
    for stop in range(at + 1, x.shape[1] + 1):  # token by token
        parts.append(read(x[:, stop - 1 : stop], stop))
    torch.testing.assert_close(torch.cat(parts), expected, **HIDDEN)


def test_the_paper_sizes() -> None:
    """Table 2 of the paper, counted without a tensor: vocabulary 32k and an untied head."""
    table = {162: (768, 16, 12), 374: (1024, 24, 16), 778: (1536, 24, 24), 1364: (2048, 24, 16), 6738: (4096, 32, 32)}
    for millions, (width, depth, heads) in table.items():
        with torch.device("meta"):
            trunk = Trunk(transfusion.trunk_config(width=width, depth=depth, heads=heads))
        count = sum(p.numel() for p in trunk.parameters()) + 2 * 32000 * width
        assert round(count / 1e6) == millions


def test_saving_gives_the_official_names_back(g: Any, model: nn.ModuleDict) -> None:
    saved, unknown = KEYMAP.save(model.state_dict())
    assert unknown == []
    assert set(saved) == set(g.weights)
    assert all(torch.equal(saved[name], g.weights[name]) for name in saved)
