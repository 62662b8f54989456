"""StoryDiffusion's consistent self-attention against its released code: its masks as relations of kept and dropped
tokens, exactly, and what attention under them gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from zoo.layout import ALL, NEVER, Layout
from zoo.nn.attention import Attention, Reading
from zoo.weights.keymaps import load_into, storydiffusion

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
SIZES = ("small", "large")


def consistent(keep: Tensor, references: int) -> Layout:
    """Every image reads itself and the kept tokens of the other reference images.

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


@pytest.fixture
def g(golden: Callable[[str], Any]) -> Any:
    return golden("storydiffusion")


@pytest.fixture
def attention(g: Any) -> Attention:
    built = Attention(storydiffusion.attention_config(width=g.config["dim"], heads=g.config["heads"]), 0).eval()
    load_into(built, g.weights, storydiffusion.ATTENTION)
    return built


def drawn(g: Any, size: str, name: str = "mask") -> Tensor:
    rate = g.config[g.config[f"sa_for_{size}"]]
    return g.inputs[f"{name}_uniform_{size}"].view(g.config["total_length"], g.config[f"tokens_{size}"]) < rate


def read(attention: Attention, x: Tensor, layout: Layout) -> Tensor:
    mask = torch.zeros(layout.length, layout.length).masked_fill_(~layout.mask()[0, 0], -torch.inf)
    return attention(x, Reading(mask=mask[None, None]), 0)


@pytest.mark.parametrize("size", SIZES)
def test_masks(g: Any, size: str) -> None:
    layout = consistent(drawn(g, size), g.config["id_length"])
    if size == "small":
        expected = g.outputs["mask_small"]
    else:
        packed = np.unpackbits(g.outputs["mask_large_packed"].numpy(), axis=-1)
        expected = torch.from_numpy(packed).bool()[:, : layout.length]
    assert torch.equal(layout.mask()[0, 0], expected)
    assert torch.equal(drawn(g, size, "index"), g.outputs[f"keep_{size}"])


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("draw", "version"), [("mask", ""), ("index", "gather_")])
def test_write_and_read_passes(g: Any, attention: Attention, size: str, draw: str, version: str) -> None:
    count, tokens = g.config["id_length"], g.config[f"tokens_{size}"]
    write, new = g.inputs[f"{size}_write_hidden"], g.inputs[f"{size}_read_hidden"]
    keep, joint = drawn(g, size, draw), write.view(2, count * tokens, -1)  # the two guidance halves do not mix
    written = read(attention, joint, consistent(keep[:count], count)).view_as(write)
    torch.testing.assert_close(written, g.outputs[f"{size}_{version}write_out"], **TOLERANCE)
    both = torch.cat([joint, new], 1)
    seen = read(attention, both, consistent(keep, count))[:, -tokens:]
    torch.testing.assert_close(seen, g.outputs[f"{size}_{version}read_out"], **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
def test_gated_off_and_early_steps(g: Any, attention: Attention, size: str) -> None:
    count, tokens = g.config["id_length"], g.config[f"tokens_{size}"]
    write, new = g.inputs[f"{size}_write_hidden"], g.inputs[f"{size}_read_hidden"]
    joint = write.view(2, count * tokens, -1)
    nothing = torch.zeros(count, tokens, dtype=torch.bool)
    plain = read(attention, joint, consistent(nothing, count)).view_as(write)
    torch.testing.assert_close(plain, g.outputs[f"{size}_plain_out"], **TOLERANCE)
    everything = torch.ones(count + 1, tokens, dtype=torch.bool)
    early = read(attention, torch.cat([joint, new], 1), consistent(everything, count))[:, -tokens:]
    torch.testing.assert_close(early, g.outputs[f"{size}_read_early_out"], **TOLERANCE)


def test_saving_gives_the_official_names_back(g: Any, attention: Attention) -> None:
    saved, unknown = storydiffusion.ATTENTION.save(attention.state_dict())
    assert unknown == []
    assert set(saved) == set(g.weights)
    assert all(torch.equal(saved[name], g.weights[name]) for name in saved)
