"""The multiway trunk: which experts and positions take which tokens, and positions of images of another size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoo.errors import ConfigError, WeightsError
from zoo.part import seeded
from zoo.plugin import catalogue
from zoo.trunks.multiway import Multiway, MultiwayConfig
from zoo.trunks.resize import geometric, resize_relative, spline

Shake = Callable[[nn.Module], nn.Module]
SIZES: dict[str, Any] = {
    "image_size": 32, "patch_size": 8, "width": 32, "depth": 4, "heads": 4, "ffn": 64, "vocab_size": 50,
    "context_length": 8, "text_rows": 12, "drop_path": 0.0,
}  # fmt: skip


def built(shake: Shake, **fields: Any) -> Multiway:
    with seeded(0, "trunk"):
        trunk = MultiwayConfig(**{**SIZES, **fields}).build()
    trunk = shake(trunk).eval()
    assert isinstance(trunk, Multiway)
    return trunk


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Pixels, ids, and which are real."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 50, (3, 8), generator=generator)
    mask = torch.arange(8) < torch.tensor([8, 5, 3])[:, None]
    return torch.randn(3, 3, 32, 32, generator=generator), ids, mask


def everything(trunk: Multiway, inputs: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    pixels, ids, mask = inputs
    image, text = trunk.embed_image(pixels), trunk.embed_text(ids)
    pair = trunk(image, text, mask)
    out = {
        "image": trunk(image=image).image,
        "text": trunk(text=text, mask=mask).text * mask[..., None],
        "image of a pair": pair.image,
        "text of a pair": pair.text * mask[..., None],
    }
    return {name: rows for name, rows in out.items() if rows is not None}


def moved(trunk: Multiway, inputs: tuple[Tensor, Tensor, Tensor], part: str) -> set[str]:
    """The outputs that change when the parameters of ``part`` (a piece of their names) do."""
    before = everything(trunk, inputs)
    found = [p for name, p in trunk.named_parameters() if part in name]
    assert found
    for parameter in found:
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    after = everything(trunk, inputs)
    return {name for name in before if not torch.equal(before[name], after[name])}


PAIR = {"image of a pair", "text of a pair"}


@torch.no_grad()
@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("layers.0.ffn.0.", {"text", *PAIR}),
        ("layers.0.ffn_norm.0.", {"text", *PAIR}),
        ("layers.0.ffn.1.", {"image", *PAIR}),
        ("layers.3.ffn.0.", {"text"}),
        ("layers.3.ffn.1.", {"image"}),
        ("layers.3.ffn.2.", PAIR),
        ("layers.3.ffn_norm.2.", PAIR),
        ("attn.q.bias", {"image", "text", *PAIR}),
        ("attn.q.weight", {"image", "text", *PAIR}),
        ("attn_scale", {"image", "text", *PAIR}),
        ("ffn_scale", {"image", "text", *PAIR}),
        ("final_norm", {"image", "text", *PAIR}),
        ("stem", {"image", *PAIR}),
        ("text.", {"text", *PAIR}),
    ],
)
def test_what_each_unit_moves(
    shake: Shake, inputs: tuple[Tensor, Tensor, Tensor], part: str, expected: set[str]
) -> None:
    assert moved(built(shake), inputs, part) == expected


@torch.no_grad()
def test_below_the_pair_experts_each_token_takes_its_own(shake: Shake, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    """A naive layer: attention over all rows, then the expert of each position by itself."""
    trunk = built(shake, pair_layers=2)
    pixels, ids, mask = inputs
    x = torch.cat([trunk.embed_text(ids), trunk.embed_image(pixels)], 1)
    real = torch.cat([mask, torch.ones(3, trunk.tokens, dtype=torch.bool)], 1)
    rows = trunk(x[:, 8:], x[:, :8], mask, taps=True, final_norm=False)
    index, table = trunk.relative_index(trunk.tokens, 8), trunk.trunk.rel_bias
    assert index is not None
    assert table is not None
    for number, layer in enumerate(trunk.trunk.layers):
        normed = layer.attn_norm(x)
        q, k, v = (m(normed).view(3, -1, 4, 8) for m in (layer.attn.q, layer.attn.k, layer.attn.v))
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * 8**-0.5 + table[index, number].permute(2, 0, 1)
        weights = scores.masked_fill(~real[:, None, None], -torch.inf).softmax(-1)
        read = torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2)
        x = x + layer.attn_scale * layer.attn.out(read)
        pieces = []
        for position in range(x.shape[1]):
            expert = 2 if number >= 2 else int(position >= 8)
            row = x[:, position]
            pieces.append(layer.ffn_scale * layer.ffn[expert](layer.ffn_norm[expert](row)))
        x = x + torch.stack(pieces, 1)
        torch.testing.assert_close(rows.taps[number][real], x[real], atol=2e-5, rtol=1e-4)
    assert len(rows.taps) == 4


@torch.no_grad()
def test_pads_reach_nobody(shake: Shake, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    trunk = built(shake)
    pixels, ids, mask = inputs
    before = everything(trunk, inputs)
    after = everything(trunk, (pixels, torch.where(mask, ids, (ids + 7) % 50), mask))
    assert not torch.equal(ids, torch.where(mask, ids, (ids + 7) % 50))
    for name, rows in before.items():
        torch.testing.assert_close(rows, after[name], atol=1e-6, rtol=0, msg=name)


@torch.no_grad()
def test_the_order_of_a_pair_is_only_an_order(shake: Shake, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    first, last = built(shake), built(shake, text_first=False)
    a, b = everything(first, inputs), everything(last, inputs)
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_causal_text_reads_the_image_and_the_image_no_text(
    shake: Shake, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    trunk = built(shake)
    pixels, ids, _ = inputs
    other = ids.clone()
    other[:, 5:] = (ids[:, 5:] + 1) % 50
    image = trunk.embed_image(pixels)
    one, two = (trunk(image, trunk.embed_text(i), causal=True) for i in (ids, other))
    assert torch.equal(one.image, two.image)
    torch.testing.assert_close(one.text[:, :5], two.text[:, :5], atol=1e-6, rtol=0)
    assert (one.text[:, 5:] - two.text[:, 5:]).abs().max() > 1e-2
    moved_by_image = trunk(trunk.embed_image(pixels + 1), trunk.embed_text(ids), causal=True).text - one.text
    assert moved_by_image.abs().max() > 1e-2


@pytest.mark.parametrize(
    ("name", "experts", "rows", "blocks", "words"),
    [("vlmo-base", 2, 1126, 151.8, 23.4), ("vlmo-large", 3, 1126, 529.8, 31.3), ("vlmo-base-plus", 3, 0, 149.9, 16.6)],
)
def test_published_sizes(name: str, experts: int, rows: int, blocks: float, words: float) -> None:
    config = catalogue()["trunk"].parse(name)
    with torch.device("meta"):
        trunk = config.build()
    owned = [len(layer.ffn) for layer in trunk.trunk.layers]
    assert owned == [2] * (config.depth - experts) + [3] * experts
    assert not any("attn.k.bias" in key for key in trunk.state_dict())
    head = config.width // config.heads
    if rows:
        assert trunk.trunk.rel_bias.shape == (rows, config.depth, config.heads)
        assert trunk.stem.positions is None
        assert trunk.text.positions is None
        assert (head, trunk.trunk.layers[0].attn_scale.shape) == (64, (config.width,))
        assert (trunk.trunk.config.layer_scale, trunk.trunk.config.init_std) == (0.1, 0.02)
    else:
        assert trunk.trunk.rel_bias is None
        assert trunk.stem.positions.shape == (1, 197, 544)
        assert trunk.text.positions.weight.shape == (40, 544)
        assert (head, trunk.trunk.layers[0].attn_scale) == (34, None)
    sizes = {key: p.numel() / 1e6 for key, p in trunk.named_parameters()}
    inside = sum(n for key, n in sizes.items() if key.startswith(("trunk.", "stem.")) and key != "trunk.rel_bias")
    assert inside == pytest.approx(blocks, abs=0.1)
    assert sizes["text.tokens.weight"] == pytest.approx(words, abs=0.1)


def test_a_small_trunk_starts_with_branches_that_matter() -> None:
    """By width and depth; the published sizes start as published (test above)."""
    small = MultiwayConfig(**{**SIZES, "width": 128, "depth": 4}).trunk()
    assert small.layer_scale == 1
    assert small.init_std == pytest.approx(128**-0.5)
    told = MultiwayConfig(**{**SIZES, "init_std": 0.01, "layer_scale": None}).trunk()
    assert (told.init_std, told.layer_scale) == (0.01, None)


def test_all_pairs_across_share_one_row(shake: Shake) -> None:
    index = built(shake).relative_index(17, 8)
    assert index is not None
    image_rows = 7 * 7 + 3
    assert index[:8, 8:].unique().tolist() == [image_rows]
    assert index[8:, :8].unique().tolist() == [image_rows + 1]
    assert int(index[8:, 8:].max()) < image_rows
    assert int(index[:8, :8].min()) > image_rows + 1


def test_what_cannot_be_read_is_said() -> None:
    trunk = MultiwayConfig(**SIZES).build()
    with pytest.raises(ConfigError, match=r"48x48 pixels, expected 32x32: load the weights with trunk=\{'image_size'"):
        trunk.embed_image(torch.zeros(1, 3, 48, 48))
    with pytest.raises(ConfigError, match="9 tokens, the trunk reads 8"):
        trunk.embed_text(torch.zeros(1, 9, dtype=torch.long))
    with pytest.raises(ConfigError, match="nothing to read"):
        trunk()
    for wrong, message in (
        ({"pair_layers": 5}, "pair_layers = 5 must lie in"),
        ({"routed": ["fnn"]}, "routed"),
        ({"image_size": 30}, "no multiple of patch_size"),
        ({"heads": 5}, "not divisible"),
    ):
        with pytest.raises(ValueError, match=message):
            MultiwayConfig(**{**SIZES, **wrong})


# -- positions of another size -----------------------------------------------------------------------------------------


def test_spline_reproduces_cubics() -> None:
    """A not-a-knot spline through values of a cubic polynomial is this polynomial."""
    x = geometric(9, 15)
    at = torch.linspace(float(x[0]), float(x[-1]), 23, dtype=torch.float64)

    def cubic(t: Tensor) -> Tensor:
        return 0.3 * t**3 - 2 * t**2 + t + 5

    torch.testing.assert_close(spline(x, at) @ cubic(x), cubic(at), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(spline(x, x), torch.eye(9, dtype=torch.float64), atol=1e-12, rtol=0)
    bend = torch.sin(x / 4)  # no cubic: followed, not reproduced
    assert 0 < float((spline(x, at) @ bend - torch.sin(at / 4)).abs().max()) < 0.02
    straight = spline(x[:3], at.clamp(x[0], x[2])) @ x[:3]
    torch.testing.assert_close(straight, at.clamp(x[0], x[2]))


@pytest.mark.parametrize(("source", "target"), [(27, 47), (13, 29), (27, 59)])
def test_geometric_places_span_the_new_offsets(source: int, target: int) -> None:
    places = geometric(source, target)
    assert places.shape == (source,)
    torch.testing.assert_close(places, -places.flip(0))
    steps = places[source // 2 + 1 :] - places[source // 2 : -1]
    ratio = steps[1:] / steps[:-1]
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
    assert float(steps[0]) == 1
    assert float(places[-1]) == pytest.approx(target // 2, abs=1e-3)


def test_resized_table_keeps_what_is_no_offset_and_near_offsets_their_places() -> None:
    y, x = torch.meshgrid(geometric(7, 11), geometric(7, 11), indexing="ij")
    surface = (x**3 - 2 * x * y**2 + y + 4).flatten()  # cubic in each direction
    table = torch.cat([surface, torch.tensor([7.0, 8.0, 9.0, 1.0, 2.0])]).float()[:, None, None].repeat(1, 2, 3)
    new = resize_relative(table, 4, 6)
    assert new.shape == (11 * 11 + 5, 2, 3)
    assert torch.equal(new[121:], table[49:])
    reach = float(geometric(7, 11)[-1])  # a little below 5: offsets beyond it read the border
    b, a = torch.meshgrid(*[torch.arange(-5.0, 6).clamp(-reach, reach)] * 2, indexing="ij")
    expected = (a**3 - 2 * a * b**2 + b + 4).flatten()[:, None, None].expand(-1, 2, 3)
    torch.testing.assert_close(new[:121], expected, atol=2e-3, rtol=1e-4)
    assert resize_relative(table, 4, 4) is table


@pytest.mark.parametrize("relative", [True, False])
def test_stored_positions_fit_another_image_size(shake: Shake, relative: bool) -> None:
    small, large = built(shake, relative=relative), built(shake, relative=relative, image_size=48)
    name = "trunk.rel_bias" if relative else "positions"
    part: Any = large if relative else large.stem
    stored = (small if relative else small.stem).state_dict()[name]
    fitted = part.fit_stored({name: stored})
    assert fitted[name].shape == part.state_dict()[name].shape != stored.shape
    with pytest.raises(WeightsError, match=r"trunk.text.tokens.weight is \(51, 32\).*only image_size may differ"):
        large.fit_stored({"text.tokens.weight": torch.zeros(51, 32)})
    with pytest.raises(WeightsError, match="only image_size"):
        built(shake).fit_stored({"trunk.rel_bias": torch.zeros(101, 4, 4)})
