"""The mechanism of key maps, and rotary orders."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from zoo.errors import WeightsError
from zoo.nn.positions import rotary, rotate
from zoo.weights.keymaps import KeyMap, drop, load_into, merge, regroup, rename, split, tie
from zoo.weights.keymaps.rotary import axes_to_two_halves, half_to_neighbours, neighbours_to_half, two_halves_to_axes


def test_every_rule_can_be_undone() -> None:
    torch.manual_seed(0)
    official = {
        "blocks.0.qkv.weight": torch.randn(12, 4),
        "blocks.0.kv.bias": torch.randn(8),
        "blocks.10.a": torch.randn(2, 3),
        "blocks.10.b": torch.randn(2, 3),
        "blocks.1.heads": torch.randn(6, 2),
        "out.weight": torch.randn(3, 4),
        "table": torch.randn(3),
        "copy": torch.zeros(0),
        "steps": torch.arange(3),
    }
    official["copy"] = official["table"].clone()
    keymap = KeyMap(
        split("blocks.{i}.qkv.{p}", ["l.{i}.q.{p}", "l.{i}.k.{p}", "l.{i}.v.{p}"]),
        split("blocks.{i}.kv.{p}", ["l.{i}.k2.{p}", "l.{i}.v2.{p}"], sizes=(2, 6)),
        merge(["blocks.{i}.a", "blocks.{i}.b"], "l.{i}.ab"),
        regroup(
            "blocks.{i}.heads",
            ["l.{i}.even", "l.{i}.odd"],
            lambda t: (t[::2], t[1::2]),
            lambda a, b: torch.stack([a, b], 1).flatten(0, 1),
        ),
        rename("out.weight", "head", lambda t: t.T, lambda t: t.T),
        tie("copy", "table"),
        rename("table", "tokens"),
        drop("steps"),
    )
    ours, unknown = keymap.load(official)
    assert unknown == []
    assert torch.equal(ours["l.0.k.weight"], official["blocks.0.qkv.weight"][4:8])
    assert ours["l.0.v2.bias"].shape == (6,)
    assert ours["l.10.ab"].shape == (4, 3)
    assert ours["head"].shape == (4, 3)
    back, unknown = keymap.save(ours)
    assert unknown == []
    assert set(back) == set(official) - {"steps"}
    assert all(torch.equal(back[name], official[name]) for name in back)
    below = keymap.under("model.", "trunk.")
    moved, unknown = below.load({f"model.{n}": t for n, t in official.items()})
    assert unknown == []
    assert set(moved) == {f"trunk.{n}" for n in ours}
    assert keymap.load({"else": torch.zeros(1), **official})[1] == ["else"]
    assert keymap.save({"else": torch.zeros(1), **ours})[1] == ["else"]


def test_half_a_group_a_false_copy_and_a_collision_are_refused() -> None:
    one = torch.ones(2)
    with pytest.raises(WeightsError, match="has a but not b"):
        KeyMap(merge(["a", "b"], "c")).load({"a": one})
    with pytest.raises(WeightsError, match="copy differs from table"):
        KeyMap(tie("copy", "table"), rename("table", "t")).load({"copy": one, "table": one * 2})
    with pytest.raises(WeightsError, match="two tensors of the checkpoint land on c"):
        KeyMap(rename("a", "c"), rename("b", "c")).load({"a": one, "b": one})
    with pytest.raises(WeightsError, match="cannot be cut into 3 equal parts"):
        KeyMap(split("a", ["x", "y", "z"])).load({"a": one})
    with pytest.raises(ValueError, match="together"):
        rename("a", "b", lambda t: t)


def test_tied_parameters_are_filled_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight

    model, table = Tied(), torch.randn(5, 3)
    load_into(model, {"tokens": table}, KeyMap(rename("tokens", "embed.weight")))
    assert torch.equal(model.head.weight, table)


def scores(q: Tensor, k: Tensor) -> Tensor:
    return torch.einsum("bqhd,bkhd->bhqk", q, k)


def test_neighbouring_pairs_become_half_split() -> None:
    torch.manual_seed(0)
    position = torch.arange(5)[None]
    weight = torch.randn(2, 3 * 8, 6)  # q and k of three heads of width 8, of which 6 dimensions turn
    x = torch.randn(1, 5, 6)
    cos, sin = rotary(position, 6, 100.0, 1, torch.float32)

    def neighbours(t: Tensor) -> Tensor:
        a, b = t[..., 0:6:2], t[..., 1:6:2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
        return torch.cat([turned, t[..., 6:]], -1)

    expected = scores(*(neighbours((x @ w.T).view(1, 5, 3, 8)) for w in weight))
    ours = [neighbours_to_half(w, 8, 6) for w in weight]
    got = scores(*(rotate((x @ w.T).view(1, 5, 3, 8), (cos, sin)) for w in ours))
    torch.testing.assert_close(got, expected)
    assert not torch.allclose(scores(*(rotate((x @ w.T).view(1, 5, 3, 8), (cos, sin)) for w in weight)), expected)
    assert torch.equal(half_to_neighbours(ours[0], 8, 6), weight[0])
    bias = torch.randn(24)
    assert torch.equal(half_to_neighbours(neighbours_to_half(bias, 8), 8), bias)


def test_two_rotated_halves_become_two_axes() -> None:
    torch.manual_seed(0)
    position = torch.stack([torch.arange(5), torch.tensor([0, 0, 3, 1, 2])])[None]  # [B, axes, T]
    weight, x = torch.randn(2, 2 * 8, 6), torch.randn(1, 5, 6)
    halves = [rotary(position[:, a], 4, 100.0, 1, torch.float32) for a in range(2)]

    def two(t: Tensor) -> Tensor:
        return torch.cat([rotate(part, turn) for part, turn in zip(t.chunk(2, -1), halves, strict=True)], -1)

    expected = scores(*(two((x @ w.T).view(1, 5, 2, 8)) for w in weight))
    ours = [two_halves_to_axes(w, 8) for w in weight]
    turn = rotary(position, 8, 100.0, 2, torch.float32)
    torch.testing.assert_close(scores(*(rotate((x @ w.T).view(1, 5, 2, 8), turn) for w in ours)), expected)
    assert torch.equal(axes_to_two_halves(ours[0], 8), weight[0])
