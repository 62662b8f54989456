"""Consistent self-attention against the released code: kept sets, and the write, read, plain and early passes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from zoo_stories.attention import Cast, ConsistentAttention, Passes
from zoo_stories.consistency import Consistency, kept_below

from zoo.layout import ALL, NEVER, Layout
from zoo.nn.attention import Attention, Reading
from zoo.nn.config import TrunkConfig
from zoo.weights.keymaps import KeyMap, load_into, rename

LAYER = KeyMap(*(rename(f"{old}.{{p}}", f"{new}.{{p}}") for old, new in
               (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "out"))))  # fmt: skip
"""diffusers' ``Attention`` to the zoo's."""
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
SIZES = ("small", "large")
DRAWS = [("mask", ""), ("index", "gather_")]


def consistent_layout(keep: Tensor, references: int) -> Layout:
    """The dense reference: every image reads itself and the kept tokens of the other reference images.

    Args:
        keep: [images, tokens] bool.
        references: the first images, whose kept tokens the others read.
    """
    images, tokens = keep.shape
    image = torch.arange(images)[:, None].expand(images, tokens)
    segment = 2 * image + (~keep).long()  # kept, dropped, kept, ...
    of = torch.arange(2 * images)
    same = of[:, None] // 2 == of // 2
    offered = (of % 2 == 0) & (of // 2 < references)
    names = [f"{kind} {i}" for i in range(images) for kind in ("kept", "dropped")]
    return Layout.from_ids(segment.reshape(1, -1), torch.where(same | offered, ALL, NEVER), names=names)


class Drawn(Passes):
    """Passes whose uniform draws are those of the release, [images, tokens]."""

    def __init__(self, consistency: Consistency, uniform: Tensor) -> None:
        super().__init__(consistency)
        self.uniform = uniform

    def places(self, number: int, tokens: int) -> Tensor:
        return kept_below(self.uniform[number], self.consistency.share(tokens))


@pytest.fixture
def layer(golden: Any) -> Any:
    from diffusers.models.attention_processor import Attention as Diffusers

    dim, heads = golden.config["dim"], golden.config["heads"]
    built = Diffusers(query_dim=dim, heads=heads, dim_head=dim // heads).eval()
    built.load_state_dict(golden.weights)
    return built


@pytest.fixture
def own_layer(golden: Any) -> Attention:
    dim, heads = golden.config["dim"], golden.config["heads"]
    config = TrunkConfig(width=dim, depth=1, heads=heads, ffn=dim, bias="", out_bias=True, blocks=("s",))
    built = Attention(config, 0).eval()
    load_into(built, golden.weights, LAYER)
    return built


def uniform(golden: Any, size: str, draw: str) -> Tensor:
    return golden.inputs[f"{draw}_uniform_{size}"].view(golden.config["total_length"], golden.config[f"tokens_{size}"])


def share(golden: Any, size: str) -> float:
    return float(golden.config[golden.config[f"sa_for_{size}"]])


def passes_of(golden: Any, layer: Any, size: str, draw: str, **changes: Any) -> tuple[Drawn, ConsistentAttention]:
    rules = Consistency(rates={golden.config[f"tokens_{size}"]: share(golden, size)}, rate=1.0, **changes)
    passes = Drawn(rules, uniform(golden, size, draw))
    return passes, ConsistentAttention(passes, "up_blocks.0.attn1", layer.processor)


def write_then_read(golden: Any, layer: Any, size: str, draw: str, **changes: Any) -> tuple[Tensor, Tensor]:
    """The released two passes: id_length images at once, then one further image that reads their bank."""
    count = golden.config["id_length"]
    passes, processor = passes_of(golden, layer, size, draw, **changes)
    cast = Cast.together(count)
    passes.begin(cast.writing([["who"]] * count))
    passes.see(900.0, (2, 3))
    written = processor(layer, golden.inputs[f"{size}_write_hidden"].clone())
    passes.begin(Cast((count,), ((),), banks=(("who",),)))
    passes.see(900.0, (2, 3))
    return written, processor(layer, golden.inputs[f"{size}_read_hidden"].clone())


@pytest.mark.parametrize("size", SIZES)
def test_masks_and_kept_sets(golden: Any, size: str) -> None:
    rate = share(golden, size)
    layout = consistent_layout(uniform(golden, size, "mask") < rate, golden.config["id_length"])
    if size == "small":
        expected = golden.outputs["mask_small"]
    else:
        packed = np.unpackbits(golden.outputs["mask_large_packed"].numpy(), axis=-1)
        expected = torch.from_numpy(packed).bool()[:, : layout.length]
    assert torch.equal(layout.mask()[0, 0], expected)
    for row, expected_row in zip(uniform(golden, size, "index"), golden.outputs[f"keep_{size}"], strict=True):
        assert torch.equal(kept_below(row, rate), expected_row.nonzero().flatten())


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("draw", "version"), DRAWS)
def test_write_and_read_passes(golden: Any, layer: Any, size: str, draw: str, version: str) -> None:
    written, read = write_then_read(golden, layer, size, draw, start_step=0)
    torch.testing.assert_close(written, golden.outputs[f"{size}_{version}write_out"], **TOLERANCE)
    torch.testing.assert_close(read, golden.outputs[f"{size}_{version}read_out"], **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
def test_plain_and_early_steps(golden: Any, layer: Any, size: str) -> None:
    plain = golden.outputs[f"{size}_plain_out"]
    written, read = write_then_read(golden, layer, size, "mask", start_step=5, early="bank")
    torch.testing.assert_close(written, plain, **TOLERANCE)
    torch.testing.assert_close(read, golden.outputs[f"{size}_read_early_out"], **TOLERANCE)
    gated, alone = write_then_read(golden, layer, size, "mask", start_step=0, chances=(0.0, 0.0))
    torch.testing.assert_close(gated, plain, **TOLERANCE)
    torch.testing.assert_close(alone, layer.processor(layer, golden.inputs[f"{size}_read_hidden"]), **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("draw", "version"), DRAWS)
def test_the_dense_mask_gives_the_same(golden: Any, own_layer: Attention, size: str, draw: str, version: str) -> None:
    """The release's other form, by the zoo's own attention under a dense mask."""

    def attend(x: Tensor, layout: Layout) -> Tensor:
        mask = torch.zeros(layout.length, layout.length).masked_fill_(~layout.mask()[0, 0], -torch.inf)
        return own_layer(x, Reading(mask=mask[None, None]), 0)

    count, tokens = golden.config["id_length"], golden.config[f"tokens_{size}"]
    write, new = golden.inputs[f"{size}_write_hidden"], golden.inputs[f"{size}_read_hidden"]
    keep, joint = uniform(golden, size, draw) < share(golden, size), write.view(2, count * tokens, -1)
    written = attend(joint, consistent_layout(keep[:count], count)).view_as(write)
    torch.testing.assert_close(written, golden.outputs[f"{size}_{version}write_out"], **TOLERANCE)
    seen = attend(torch.cat([joint, new], 1), consistent_layout(keep, count))[:, -tokens:]
    torch.testing.assert_close(seen, golden.outputs[f"{size}_{version}read_out"], **TOLERANCE)


def test_saving_gives_the_official_names_back(golden: Any, own_layer: Attention) -> None:
    saved, unknown = LAYER.save(own_layer.state_dict())
    assert unknown == []
    assert set(saved) == set(golden.weights)
    assert all(torch.equal(saved[name], golden.weights[name]) for name in saved)
