"""The trunk's rules one by one, against plain formulas."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.layout import Layout, Segment, lay_out
from zoo.nn import KVCache, PatchEmbedding, TokenEmbedding, Trunk, TrunkConfig, copy_expert_, init_clip_, init_xavier_
from zoo.nn.positions import frequencies, rotary, rotate
from zoo.strategies import checkpoint_blocks

Shake = Callable[..., nn.Module]
SMALL: dict[str, Any] = {"width": 24, "depth": 2, "heads": 3, "ffn": 32}
CLOSE = {"atol": 2e-6, "rtol": 1e-5}
MIXED = [Segment("text", 4), Segment("image", 5, 1, "full"), Segment("more", 3)]


def rows(length: int = 12, batch: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(batch, length, 24, generator=torch.Generator().manual_seed(seed))


def without_spans(layout: Layout, batch: int) -> Layout:
    """The same layout, as if its rows disagreed about modalities."""
    modality = layout.modality.expand(batch, -1)
    other = Layout.from_ids(layout.segment.expand(batch, -1), layout.relation, modality=modality, names=layout.names)
    return type(other)(**{**other.__dict__, "spans": None})


def branch(trunk: Any, i: int, name: str, x: Tensor, layout: Layout) -> Tensor:
    from zoo.nn.attention import Reading

    if name == "ffn":
        return trunk.layers[i].ffn(x)
    mask = torch.zeros(layout.mask().shape).masked_fill(~layout.mask(), float("-inf"))
    return trunk.layers[i].attn(x, Reading(mask=mask), 0)


@pytest.mark.parametrize("placement", ["pre", "post", "parallel", "branch", "scaled"])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_placements_are_their_formulas(shake: Shake, placement: Any, norm: Any) -> None:
    scale = 2.5 if placement in ("post", "scaled") else 1.0
    trunk: Any = shake(Trunk(TrunkConfig(**SMALL, placement=placement, norm=norm, residual_scale=scale))).eval()
    layout, x = lay_out(MIXED), rows()
    got = trunk(x, layout)
    for i in range(2):
        layer = trunk.layers[i]
        if placement == "parallel":
            y = layer.attn_norm(x)
            x = x + branch(trunk, i, "attn", y, layout) + branch(trunk, i, "ffn", y, layout)
            continue
        for name in ("attn", "ffn"):
            n = getattr(layer, f"{name}_norm")
            if placement == "pre":
                x = x + branch(trunk, i, name, n(x), layout)
            elif placement == "post":
                x = n(scale * x + branch(trunk, i, name, x, layout))
            elif placement == "branch":
                x = x + n(branch(trunk, i, name, x, layout))
            else:
                x = n(x) * scale + branch(trunk, i, name, n(x), layout)
    torch.testing.assert_close(got, trunk.final_norm(x), **CLOSE)


def test_taps_ranges_and_final_norm(shake: Shake) -> None:
    trunk: Any = shake(Trunk(TrunkConfig(**{**SMALL, "depth": 4}))).eval()
    layout, x = lay_out(MIXED), rows()
    whole, taps = trunk(x, layout, taps=True)
    assert len(taps) == 4
    torch.testing.assert_close(trunk.final_norm(taps[-1]), whole)
    lower, below = trunk(x, layout, layers=slice(0, 2), final_norm=False, taps=True)
    torch.testing.assert_close(lower, taps[1])
    assert len(below) == 2
    torch.testing.assert_close(trunk(lower, layout, layers=slice(2, None)), whole)
    torch.testing.assert_close(trunk(x, layout, layers=slice(0, -1), final_norm=False), taps[-2])


ROUTED = {"routed": ("attn_norm", "qkv", "out", "ffn_norm", "ffn", "final_norm"), "routes": (0, 1)}


@pytest.mark.parametrize(
    "more", [{}, {"placement": "post"}, {"sub_norm": True, "qk_norm": "layer"}, {"kv_heads": 1, "rope": 8}]
)
def test_every_token_goes_through_its_own_expert(shake: Shake, more: dict[str, Any]) -> None:
    trunk: Any = shake(Trunk(TrunkConfig(**SMALL, **ROUTED, **more))).eval()
    layout, x = lay_out(MIXED), rows()
    mixed = trunk(x, layout)
    torch.testing.assert_close(trunk(x, without_spans(layout, 2)), mixed, **CLOSE)  # gathered
    for expert, modality in ((0, 0), (1, 1)):  # alone, each modality is a plain trunk with its own weights
        plain: Any = Trunk(TrunkConfig(**SMALL, **more)).eval()
        mine = {re.sub(rf"(?<=[a-z]\.){expert}\.(?!attn|ffn)", "", n): p for n, p in trunk.state_dict().items()}
        plain.load_state_dict({n: mine[n] for n in plain.state_dict()})
        alone = lay_out([Segment("one", 12, modality, "full")])
        torch.testing.assert_close(trunk(x, alone), plain(x, alone), **CLOSE)
    one = {"layers": slice(0, 1), "final_norm": False}
    before = trunk(x, layout, **one)
    trunk.layers[0].ffn[1].down.bias.data[::2] += 1.0  # the image's FFN moves image rows only
    moved = (trunk(x, layout, **one) - before).abs().amax((0, 2))
    assert (moved > 0.1).tolist() == [False] * 4 + [True] * 5 + [False] * 3
    assert moved[[0, 1, 2, 3, 9, 10, 11]].max() == 0


def test_routes_by_layer_and_shared_modalities(shake: Shake) -> None:
    """VLMo: text, image, text in a pair, image in a pair; a third expert from the second layer on."""
    config = TrunkConfig(**SMALL, routed=("ffn_norm", "ffn"), routes=((0, 1, 0, 1), (0, 1, 2, 2)), layer_scale=0.1)
    trunk: Any = shake(Trunk(config)).eval()
    assert [len(layer.ffn) for layer in trunk.layers] == [2, 3]
    x = rows(6)
    pair = lay_out([Segment("text", 2, 2, "full"), Segment("image", 4, 3, "full")], relation={("text", "image"): "all"})
    other = lay_out(
        [Segment("text", 2, 0, "full"), Segment("image", 4, 1, "full")], relation={("text", "image"): "all"}
    )
    lower = {"layers": slice(0, 1), "final_norm": False}
    torch.testing.assert_close(trunk(x, pair, **lower), trunk(x, other, **lower))
    assert not torch.allclose(trunk(x, pair), trunk(x, other), atol=1e-2)
    before = trunk(x, pair)
    trunk.layers[1].ffn[0].up.weight.data.zero_()
    trunk.layers[1].ffn[1].up.weight.data.zero_()
    torch.testing.assert_close(trunk(x, pair), before)
    trunk.layers[0].ffn_scale.data.zero_()
    trunk.layers[0].attn_scale.data.zero_()
    torch.testing.assert_close(trunk(x, pair, **lower), x)


def test_only_named_modalities_cross_attend(shake: Shake) -> None:
    config = TrunkConfig(**SMALL, blocks=("scf", "sf"), context_width=10, cross_modalities=(1,), context_norm=True)
    trunk: Any = shake(Trunk(config)).eval()
    context = torch.randn(2, 7, 10, generator=torch.Generator().manual_seed(3))
    layout = lay_out(MIXED, relation={("text", "image"): "never", ("more", "image"): "never"})
    x = rows()
    one = {"layers": slice(0, 1), "final_norm": False}
    alone, read = trunk(x, layout, **one), trunk(x, layout, context=context, **one)
    torch.testing.assert_close(read[:, :4], alone[:, :4])
    torch.testing.assert_close(read[:, 9:], alone[:, 9:])
    assert (read - alone)[:, 4:9].abs().amax(-1).min() > 1e-3
    torch.testing.assert_close(trunk(x, without_spans(layout, 2), context=context, **one), read, **CLOSE)
    there = torch.ones(2, 7, dtype=torch.bool)
    there[:, 4:] = False
    masked = trunk(x, layout, context=context, context_mask=there, **one)
    torch.testing.assert_close(masked, trunk(x, layout, context=context[:, :4], **one), **CLOSE)
    by_row = trunk(x, layout, context=context, context_mask=there[:, None].expand(-1, 5, -1), **one)
    torch.testing.assert_close(by_row, masked, **CLOSE)


def test_learned_key_and_value_are_a_key_everybody_reads(shake: Shake) -> None:
    trunk: Any = shake(Trunk(TrunkConfig(**{**SMALL, "depth": 1}, bias_kv=True, final_norm=False))).eval()
    x, layer = rows(), trunk.layers[0]
    y = layer.attn_norm(x)
    q, k, v = (getattr(layer.attn, n)(y).view(2, 12, 3, 8).transpose(1, 2) for n in "qkv")
    k = torch.cat([k, layer.attn.bias_k[None, :, None].expand(2, -1, -1, -1)], 2)
    v = torch.cat([v, layer.attn.bias_v[None, :, None].expand(2, -1, -1, -1)], 2)
    causal = F.pad(torch.ones(12, 12, dtype=torch.bool).tril(), (0, 1), value=True)
    for mask, layout in ((None, None), (causal, lay_out([Segment("text", 12)]))):
        read = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        after = x + layer.attn.out(read)
        torch.testing.assert_close(trunk(x, layout), after + layer.ffn(layer.ffn_norm(after)), **CLOSE)


def test_relative_bias_is_added_to_the_scores(shake: Shake) -> None:
    trunk: Any = shake(Trunk(TrunkConfig(**{**SMALL, "depth": 1}, rel_rows=5, final_norm=False, bias="qv"))).eval()
    assert trunk.layers[0].attn.k.bias is None
    x, layer = rows(), trunk.layers[0]
    index = torch.randint(0, 5, (12, 12), generator=torch.Generator().manual_seed(0))
    layout = lay_out(MIXED)
    y = layer.attn_norm(x)
    q, k, v = (getattr(layer.attn, n)(y).view(2, 12, 3, 8).transpose(1, 2) for n in "qkv")
    bias = trunk.rel_bias[index, 0].permute(2, 0, 1)[None].masked_fill(~layout.mask(), float("-inf"))
    after = x + layer.attn.out(F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2))
    torch.testing.assert_close(
        trunk(x, layout, relative_index=index), after + layer.ffn(layer.ffn_norm(after)), **CLOSE
    )


def test_rotary_on_two_axes_and_zero_rows() -> None:
    position = torch.tensor([[[3, -1, 0], [5, -1, 2]]])  # [B, axes, T]
    x = torch.randn(1, 3, 1, 10, generator=torch.Generator().manual_seed(0))
    got = rotate(x, rotary(position, 8, 100.0, 2, torch.float32))
    for t in (0, 2):
        angles = [int(position[0, a, t]) * 100.0 ** (-2 * i / 4) for a in range(2) for i in range(2)]
        for pair, angle in enumerate(angles):
            a, b = x[0, t, 0, pair], x[0, t, 0, pair + 4]
            turn = torch.tensor(angle)
            torch.testing.assert_close(got[0, t, 0, pair], a * turn.cos() - b * turn.sin())
            torch.testing.assert_close(got[0, t, 0, pair + 4], b * turn.cos() + a * turn.sin())
    assert got[0, 1, 0, :8].abs().max() == 0
    assert torch.equal(got[..., 8:], x[..., 8:])


def test_rotary_frequencies_are_kept_and_exact(shake: Shake) -> None:
    trunk = shake(Trunk(TrunkConfig(depth=1, width=16, heads=2, ffn=32, rope=8, rope_axes=2, rope_half=True)))
    x = torch.randn(2, 5, 16)
    with torch.inference_mode():
        first = trunk(x)
    kept = trunk._kept_frequencies
    assert kept is not None
    assert torch.equal(kept, frequencies(8, 10000.0, 2, half=True))
    assert not any("frequenc" in name for name in trunk.state_dict())
    with torch.inference_mode():
        assert torch.equal(trunk(x), first)
    assert trunk._kept_frequencies is kept
    trunk(x).sum().backward()  # training goes on from a first pass in inference mode
    assert all(p.grad is not None for p in trunk.parameters())
    trunk.to(torch.bfloat16)(x.bfloat16())
    assert trunk._kept_frequencies is kept  # not rounded with the weights


def test_cache_appends_truncates_and_reorders(shake: Shake) -> None:
    trunk: Any = shake(
        Trunk(TrunkConfig(**SMALL, **ROUTED, rope=4, kv_heads=1, qk_norm="rms", qk_norm_per_head=True))
    ).eval()
    layout, x = lay_out(MIXED, 2), rows()
    with torch.no_grad():
        whole = trunk(x, layout)
        cache, parts = KVCache(), []
        for start, stop in ((0, 4), (4, 9), (9, 10), (10, 11), (11, 12)):
            parts.append(trunk(x[:, start:stop], layout.truncate(stop), cache=cache))
        torch.testing.assert_close(torch.cat(parts, 1), whole, **CLOSE)
        cache.truncate(4)
        trunk(rows(5, seed=9), layout.truncate(9), cache=cache)  # a noisy image
        cache.truncate(4)
        torch.testing.assert_close(trunk(x[:, 4:], layout, cache=cache), whole[:, 4:], **CLOSE)

        cache.truncate(9)
        index = torch.tensor([1, 1, 0])
        cache.reorder(index)
        torch.testing.assert_close(trunk(x[index, 9:], layout.select(index), cache=cache), whole[index, 9:], **CLOSE)
        with pytest.raises(ConfigError, match="describes 12 tokens, but there are 12 cached and 1 new"):
            trunk(x[:, :1], layout, cache=cache)
        with pytest.raises(ConfigError, match="cannot cut a cache of 12 tokens to 13"):
            cache.truncate(13)


def test_padding_changes_nothing_for_real_rows(shake: Shake) -> None:
    trunk: Any = shake(Trunk(TrunkConfig(**SMALL, **ROUTED, rope=8))).eval()
    x = rows(12, 1)
    plain = trunk(x, lay_out(MIXED))
    real = torch.ones(1, 15, dtype=torch.bool)
    real[:, [0, 5, 14]] = False  # anywhere
    padded = torch.full((1, 15, 24), 7.0).masked_scatter(real[..., None], x)
    wider = [Segment("text", 6), Segment("image", 5, 1, "full"), Segment("more", 4)]
    layout = lay_out(wider, real=real, position="real")
    got = trunk(padded, layout)
    assert got.isfinite().all()
    torch.testing.assert_close(got[real], plain[0], **CLOSE)


@pytest.mark.parametrize(
    ("config", "layout"),
    [
        ({}, lay_out([Segment("text", 12)])),
        ({**ROUTED, "rope": 8, "qk_norm": "layer", "sub_norm": True}, lay_out(MIXED, 2)),
        (
            {"placement": "parallel", "act": "gelu_tanh", "kv_heads": 1},
            lay_out(MIXED, real=torch.arange(12).repeat(2, 1) < 10),
        ),
        ({**ROUTED, "placement": "post", "blocks": ("scf", "sf"), "cross_modalities": (1,)}, lay_out(MIXED)),
        ({"norm": "rms", "gated": True, "act": "silu", "bias": "", "bias_kv": True, "layer_scale": 0.1}, None),
    ],
)
def test_compiles_to_one_graph(shake: Shake, config: dict[str, Any], layout: Layout | None) -> None:
    trunk: Any = shake(Trunk(TrunkConfig(**SMALL, **config))).eval()
    context = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(2))
    torch._dynamo.reset()
    compiled = torch.compile(trunk, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(rows(), layout, context=context), trunk(rows(), layout, context=context))


def test_flex_attention_and_a_mask_built_outside(shake: Shake) -> None:
    trunk: Any = shake(Trunk(TrunkConfig(**SMALL, rope=8))).eval()
    layout, x = lay_out(MIXED, 2), rows()
    with torch.no_grad():  # FlexAttention has no backward pass on the CPU
        expected = trunk(x, layout)
        torch.testing.assert_close(trunk(x, layout, mask=layout.mask()), expected)
        torch.testing.assert_close(trunk(x, layout, mask=layout.block_mask()), expected, atol=1e-5, rtol=1e-4)


def test_checkpointing_gives_the_same_gradients(shake: Shake) -> None:
    layout, x, gradients = lay_out(MIXED), rows(), []
    for recompute in (False, True):
        trunk: Any = shake(Trunk(TrunkConfig(**SMALL, **ROUTED))).train()
        assert not recompute or checkpoint_blocks(trunk) == trunk.config.depth
        trunk(x, layout).square().sum().backward()
        gradients.append({n: p.grad for n, p in trunk.named_parameters()})
    assert all(g is not None and g.abs().max() > 0 for n, g in gradients[0].items() if not n.endswith(".k.bias"))
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_dropout_and_drop_path_act_in_training_only(shake: Shake) -> None:
    x = rows(batch=64)
    for name in ("dropout", "attention_dropout", "drop_path"):
        trunk: Any = shake(Trunk(TrunkConfig(**SMALL, **{name: 0.5}, final_norm=False)))
        plain: Any = shake(Trunk(TrunkConfig(**SMALL, final_norm=False))).eval()
        torch.testing.assert_close(trunk.eval()(x), plain(x))
        assert not torch.allclose(trunk.train()(x), plain(x))
    first, last = trunk.layers[0].drop_path, trunk.layers[1].drop_path
    assert (first, last) == (0.0, 0.5)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        branch = trunk.layers[1]._drop(torch.ones(4000, 1, 1), None)
    assert set(branch.flatten().tolist()) == {0.0, 2.0}
    assert 0.45 < (branch == 0).float().mean() < 0.55


def test_construction_is_seeded_by_the_global_generator_and_free_on_meta() -> None:
    config = TrunkConfig(**SMALL, **ROUTED, rel_rows=4, layer_scale=0.1)
    states = []
    for seed in (0, 0, 1):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            states.append(Trunk(config).state_dict())
    weight = "layers.0.attn.q.0.weight"
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])
    assert not torch.equal(states[0][weight], states[2][weight])
    assert 0.015 < states[0][weight].std() < 0.02  # a normal of 0.02 cut off at two standard deviations
    assert states[0][weight].abs().max() <= 0.04
    assert states[0]["layers.1.ffn.1.up.bias"].abs().max() == 0
    assert states[0]["rel_bias"].abs().max() == 0
    before = torch.get_rng_state()
    with torch.device("meta"):
        meta = Trunk(config)
    assert torch.equal(torch.get_rng_state(), before)
    assert {n: p.shape for n, p in meta.state_dict().items()} == {n: p.shape for n, p in states[0].items()}
    assert meta(torch.empty(2, 12, 24, device="meta"), lay_out(MIXED).to("meta")).shape == (2, 12, 24)


def test_other_initialisations() -> None:
    trunk: Any = Trunk(TrunkConfig(width=256, depth=3, heads=4, ffn=512, **ROUTED))
    copy_expert_(trunk, 0, 1)
    assert torch.equal(trunk.layers[2].attn.q[0].weight, trunk.layers[2].attn.q[1].weight)
    with pytest.raises(ConfigError, match="no routed unit"):
        copy_expert_(trunk, 0, 2)
    init_clip_(trunk)
    assert abs(float(trunk.layers[0].attn.q[0].weight.std()) * 16 - 1) < 0.05
    assert abs(float(trunk.layers[0].ffn[1].down.weight.std()) * 16 * 6**0.5 - 1) < 0.05
    assert abs(float(trunk.layers[0].ffn[1].up.weight.std()) * 512**0.5 - 1) < 0.05
    init_xavier_(trunk)
    assert trunk.layers[0].ffn[1].up.weight.abs().max() <= (6 / 768) ** 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5}, "width 24 is not divisible by 5 heads"),
        ({"kv_heads": 2}, "3 heads cannot share 2 kv_heads"),
        ({"rope": 10}, "rotates 10 of 8 head dimensions"),
        ({"rope": 6, "rope_axes": 2}, "multiple of 4"),
        ({"placement": "before"}, "placement is 'before'"),
        ({"act": "gelu_tan"}, "did you mean gelu_tanh"),
        ({"blocks": ("sf",)}, "1 block strings for a depth of 2"),
        ({"blocks": ("sf", "sx")}, "block 'sx'"),
        ({"placement": "parallel", "blocks": ("sf", "scf")}, "only 'sf' runs in parallel"),
        ({"routed": ("ffn",)}, "give both or neither"),
        ({"routed": ("fnn",), "routes": (0, 1)}, "did you mean ffn"),
        ({"routed": ("ffn",), "routes": (0, 2)}, "skips an expert"),
        ({"routed": ("ffn",), "routes": ((0, 1),)}, "1 route tables for a depth of 2"),
        ({"bias": "qx"}, "letters out of 'qkv'"),
        ({"dropout": 1.0}, "0 <= p < 1"),
        ({"residual_scale": 2.0}, "has no place in 'pre'"),
        ({"width": 0}, "width is 0"),
        ({"cross_modalities": (1,)}, "no block string has a c"),
    ],
)
def test_wrong_configurations_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrunkConfig(**{**SMALL, **change})


def test_wrong_calls_are_refused() -> None:
    trunk = Trunk(TrunkConfig(**SMALL, rope=4))
    with pytest.raises(ConfigError, match="describes 11 tokens, but there are 0 cached and 12 new"):
        trunk(rows(), lay_out([Segment("text", 11)]))
    with pytest.raises(ConfigError, match="the layout has 3 rows, the tokens 2"):
        trunk(rows(), lay_out([Segment("text", 12)], 3))
    with pytest.raises(ConfigError, match=r"positions have shape \(2, 11\)"):
        trunk(rows(), lay_out([Segment("text", 12)]), positions=torch.zeros(2, 11))
    with pytest.raises(ConfigError, match="30 is not a multiple of patch_size 8"):
        PatchEmbedding(24, 30, 8)
    with pytest.raises(ConfigError, match="9 tokens for 6 positions"):
        TokenEmbedding(10, 24, positions=8, first=2)(torch.zeros(1, 9, dtype=torch.long))
    with pytest.raises(ConfigError, match="image of 32x30 pixels"):
        PatchEmbedding(24, 32, 8)(torch.zeros(1, 3, 32, 30))


def test_patches_of_another_size_resize_the_positions() -> None:
    stem = PatchEmbedding(24, 32, 8, norm="layer")
    assert stem(torch.zeros(2, 3, 32, 32)).shape == (2, 17, 24)
    assert stem(torch.zeros(2, 3, 48, 16)).shape == (2, 13, 24)
    assert PatchEmbedding(24, 32, 8, cls=False, positions=False)(torch.zeros(2, 3, 32, 32)).shape == (2, 16, 24)
