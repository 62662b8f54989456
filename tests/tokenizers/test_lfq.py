"""Lookup-free tokenizers: signs and their order, entropies, sizes, any image shape, what they refuse."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import zoo
from zoo.errors import ConfigError
from zoo.objectives.vq_reconstruction import VQReconstructionConfig
from zoo.plugin import catalogue
from zoo.tokenizers import entropy, lfq
from zoo.tokenizers.conv import Down, Levels, Residual
from zoo.tokenizers.lfq import LFQConfig, LFQTokenizer, LookupFree

SMALL: dict[str, Any] = {"image_size": 32, "patch_size": 8, "vocab_size": 64, "width": 32, "groups": 4}


def made(seed: int = 0, **fields: Any) -> LFQTokenizer:
    """A small tokenizer with drawn weights, gains away from 1 and biases away from 0."""
    tokenizer = LFQConfig(**{**SMALL, **fields}).build()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tokenizer.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter + 0.3 * noise if parameter.ndim < 2 else parameter + 0.05 * noise)
    return tokenizer.eval()


def pixels(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- codes -------------------------------------------------------------------------------------------------------------


def test_a_known_pattern_of_signs_in_both_orders() -> None:
    x = torch.tensor([0.3, -2.0, 0.0, 1e-9, -1e-9, 5.0])  # signs + - - + - +, zero counts as -
    assert int(LookupFree(6).codes(x)) == 0b100101
    assert int(LookupFree(6, "lsb").codes(x)) == 0b101001
    assert LookupFree(6).signs(x).tolist() == [1, -1, -1, 1, -1, 1]


@pytest.mark.parametrize("order", ["msb", "lsb"])
def test_all_codes_of_13_bits_round_trip(order: str) -> None:
    quantizer, codes = LookupFree(13, order), torch.arange(2**13)
    signs = quantizer.vectors(codes)
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(quantizer.codes(signs), codes)
    assert len(torch.unique(signs, dim=0)) == 2**13


def test_the_orders_are_reversals_of_each_other() -> None:
    x = pixels(50, 9)
    reversed_bits = [int(f"{code:09b}"[::-1], 2) for code in LookupFree(9).codes(x).tolist()]
    assert LookupFree(9, "lsb").codes(x).tolist() == reversed_bits
    assert len(set(reversed_bits)) > 30


def test_parts_of_a_code_are_the_first_bits_and_the_rest_in_either_order() -> None:
    x = pixels(40, 9)
    for order in ("msb", "lsb"):
        codes = LookupFree(9, order).codes(x)
        first, rest = lfq.factorised(codes, [3, 6], order)
        assert torch.equal(first, LookupFree(3, order).codes(x[:, :3]))
        assert torch.equal(rest, LookupFree(6, order).codes(x[:, 3:]))
    with pytest.raises(ConfigError, match="8 bits"):
        lfq.factorised(torch.tensor([300]), [4, 4])


@torch.no_grad()
def test_drawing_codes_is_drawing_signs_bit_for_bit() -> None:
    tokenizer, images = made(code_convs=True), pixels(2, 3, 32, 32)
    codes = tokenizer.encode(images)
    assert codes.shape == (2, 16)
    assert codes.dtype == torch.int64
    assert len(codes.unique()) > 4
    signs = tokenizer.quantizer.signs(tokenizer.latents(images))
    assert torch.equal(tokenizer.decode(codes), tokenizer.draw(signs))
    drawn, quantized = tokenizer(images)
    assert torch.equal(quantized.codes.flatten(1), codes)
    torch.testing.assert_close(drawn, tokenizer.decode(codes), atol=1e-4, rtol=1e-4)


def test_gradient_passes_the_signs_and_there_is_no_codebook() -> None:
    tokenizer = made()
    assert not list(tokenizer.quantizer.parameters())
    assert not [name for name in tokenizer.state_dict() if name.startswith("quantizer")]
    drawn, _ = tokenizer(pixels(2, 3, 32, 32))
    drawn.square().mean().backward()
    assert tokenizer.encoder.stem.weight.grad is not None
    assert float(tokenizer.encoder.stem.weight.grad.abs().max()) > 0
    h = pixels(5, 6).requires_grad_()
    weight = pixels(5, 6, seed=2)
    (LookupFree(6)(h).vectors * weight).sum().backward()
    torch.testing.assert_close(h.grad, weight)


def test_codes_are_those_of_fp32_under_autocast() -> None:
    tokenizer, images = made(), pixels(8, 3, 32, 32)
    codes = tokenizer.encode(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tokenizer.encode(images), codes)
        _, quantized = tokenizer(images)
    assert quantized.latents.dtype == quantized.vectors.dtype == torch.float32
    rounded = (quantized.latents - tokenizer.latents(images)).detach().abs().max()
    assert float(rounded) > 1e-3  # what 16 bits make of them: near zero a sign turns


@torch.no_grad()
def test_any_shape_of_whole_patches() -> None:
    tokenizer = made()
    wide = pixels(1, 3, 32, 48)
    codes = tokenizer.encode(wide)
    assert codes.shape == (1, 24)
    assert tokenizer.decode(codes, (4, 6)).shape == (1, 3, 32, 48)
    assert not torch.equal(tokenizer.decode(codes, (4, 6)), tokenizer.decode(codes, (6, 4)).transpose(2, 3))
    large = tokenizer.encode(pixels(1, 3, 512, 512))
    assert large.shape == (1, 64 * 64)
    assert tokenizer.decode(large).shape == (1, 3, 512, 512)  # a square needs no grid
    for shape in ((1, 3, 32, 30), (1, 1, 32, 32), (3, 32, 32)):
        with pytest.raises(ConfigError, match="multiples of 8"):
            tokenizer.encode(torch.zeros(shape))
    with pytest.raises(ConfigError, match="do not fill a grid"):
        tokenizer.decode(codes)
    with pytest.raises(ConfigError, match="outside a codebook of 64"):
        tokenizer.decode(torch.full((1, 16), 64))


def test_encoding_and_drawing_compute_no_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("loss maths at inference")

    for name in ("code_entropies", "bit_entropies"):
        monkeypatch.setattr(lfq, name, refuse)
    tokenizer, images = made(), pixels(1, 3, 32, 32)
    monkeypatch.setattr(LFQTokenizer, "quantise", refuse)
    assert tokenizer.decode(tokenizer.encode(images)).shape == images.shape


# -- entropies ---------------------------------------------------------------------------------------------------------


def explicit(x: Tensor, tau: float, floor: str) -> tuple[Tensor, Tensor]:
    """Both entropies from the table of all vectors by all codes."""
    codes = LookupFree(x.shape[1]).vectors(torch.arange(2 ** x.shape[1])).to(x)
    p = F.softmax(-torch.cdist(x, codes).square() / tau, -1)
    mean = p.mean(0)
    if floor == "clamp":
        return -(p * p.clamp(min=1e-5).log()).sum(1).mean(), -(mean * mean.clamp(min=1e-5).log()).sum()
    return -(p * p.clamp(min=1e-300).log()).sum(1).mean(), -(mean * (mean + 1e-5).log()).sum()


@pytest.mark.parametrize("bits", [1, 4, 7])
@pytest.mark.parametrize("floor", ["add", "clamp"])
def test_entropies_over_codes_are_those_of_the_whole_table(bits: int, floor: str, monkeypatch: Any) -> None:
    x = 0.3 * pixels(11, bits).double()
    tau, one, other = 0.7, x.clone().requires_grad_(), x.clone().requires_grad_()
    monkeypatch.setattr(entropy, "DISTANCES", 3 * 2**bits)  # in parts of three vectors
    found, wanted = entropy.code_entropies(one, tau, floor), explicit(other, tau, floor)
    for term, value in zip((found.sample, found.batch), wanted, strict=True):
        torch.testing.assert_close(term, value, atol=1e-10, rtol=1e-10)
        (a,), (b,) = (
            torch.autograd.grad(term, one, retain_graph=True),
            torch.autograd.grad(value, other, retain_graph=True),
        )
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-8)
    assert bool(found.batch > found.sample - 1e-3)


def test_gradients_of_the_entropies_are_right() -> None:
    x = (0.4 * pixels(4, 3).double()).requires_grad_()
    assert torch.autograd.gradcheck(lambda h: entropy.code_entropies(h, 0.9).sample, x)
    assert torch.autograd.gradcheck(lambda h: entropy.code_entropies(h, 0.9).batch, x)
    assert torch.autograd.gradcheck(lambda h: entropy.bit_entropies(h, 1.0).batch, x)
    table = pixels(5, 3, seed=3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda h, c: entropy.softmax_entropies(h, c, 0.9, 2).sample, (x, table))
    assert torch.autograd.gradcheck(lambda h, c: entropy.softmax_entropies(h, c, 0.9, 2).batch, (x, table))


def test_in_parts_as_at_once() -> None:
    x, table = pixels(20, 4).double().requires_grad_(), pixels(9, 4, seed=3).double().requires_grad_()
    results = []
    for chunk in (1, 7, 100):
        found = entropy.softmax_entropies(x, table, 0.5, chunk)
        results.append((found.sample, found.batch, *torch.autograd.grad(found.sample - 2 * found.batch, (x, table))))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)
    p = F.softmax(-torch.cdist(x, table).square() / 0.5, -1)
    torch.testing.assert_close(results[0][0], -(p * p.log()).sum(1).mean())


def test_an_even_use_of_sure_codes_has_the_least_loss() -> None:
    all_codes = LookupFree(5).vectors(torch.arange(32))
    even = entropy.code_entropies(all_codes, 0.01)
    assert float(even.sample) == pytest.approx(0, abs=1e-6)
    assert float(even.batch) == pytest.approx(math.log(32), abs=1e-3)
    one = entropy.code_entropies(all_codes[:1].repeat(32, 1), 0.01)
    assert float(one.batch) == pytest.approx(0, abs=1e-3)
    unsure = entropy.code_entropies(torch.zeros(7, 5), 0.01)
    assert float(unsure.sample) == pytest.approx(math.log(32), abs=1e-5)
    saturated = torch.tensor([[30.0, -30.0, 0.001]]).requires_grad_()
    entropy.code_entropies(saturated, 0.01).sample.backward()
    assert bool(torch.isfinite(saturated.grad).all())


# -- the objective -----------------------------------------------------------------------------------------------------


def test_terms_of_the_objective_add_up_and_pull_opposite_ways() -> None:
    module = zoo.build("lfq-tokenizer", scale="tiny", seed=1)
    batch = {"pixel_values": pixels(3, 3, 64, 64)}
    outputs = module.model(batch)
    c = module.objectives["lfq-reconstruction"].config
    assert (c.absolute, c.beta, c.entropy, c.temperature) == (1.0, 0.25, 0.1, 0.01)
    loss, report = module.objectives["lfq-reconstruction"](module.model, batch, outputs)
    error = (outputs["reconstruction"] - batch["pixel_values"]).abs().mean()
    wanted = error + 0.25 * outputs["commitment"] + 0.1 * (report["sample_entropy"] - report["batch_entropy"])
    torch.testing.assert_close(loss, wanted)
    assert {"psnr", "codes_used", "perplexity", "commitment"} <= set(report)
    found = {}
    for diversity in (0.0, 1.0):
        objective = VQReconstructionConfig(beta=0.0, absolute=1.0, entropy=1.0, diversity=diversity).build()
        assert objective.needs == {"reconstruction", "latents"}
        found[diversity] = objective(module.model, batch, outputs)[0] - error
    torch.testing.assert_close(found[0.0], report["sample_entropy"])
    torch.testing.assert_close(found[0.0] - found[1.0], report["batch_entropy"])
    assert VQReconstructionConfig(beta=0.0).build().needs == {"reconstruction"}
    assert VQReconstructionConfig(codebook=1.0).build().needs == {"reconstruction", "commitment", "codebook_loss"}


def test_a_table_of_codes_has_no_entropy_over_bits() -> None:
    module = zoo.build(
        "vq-tokenizer", scale="tiny", objective={"vq-reconstruction": {"entropy": 0.1, "entropy_over": "bits"}}
    )
    batch = {"pixel_values": pixels(1, 3, 64, 64)}
    with pytest.raises(ConfigError, match="entropy_over=codes"):
        module.losses(batch)


def test_training_draws_better_and_uses_codes() -> None:
    module = zoo.build("lfq-tokenizer", scale="tiny", image_tokenizer={"width": 64, "groups": 4}, seed=1)
    colours = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    batch = {"pixel_values": F.interpolate(colours, scale_factor=16)}
    optimizer = torch.optim.AdamW(module.parameters(), lr=2e-3)
    module.train()
    reports = []
    for _ in range(30):
        loss, report = module.losses(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        reports.append(report)
    first, last = reports[0], reports[-1]
    assert last["lfq-reconstruction/psnr"] > first["lfq-reconstruction/psnr"] + 3
    assert last["lfq-reconstruction/codes_used"] > 24
    assert last["lfq-reconstruction/commitment"] < first["lfq-reconstruction/commitment"]


# -- sizes -------------------------------------------------------------------------------------------------------------


def count(module: torch.nn.Module | None) -> int:
    return sum(p.numel() for p in module.parameters()) if module is not None else 0


@pytest.mark.parametrize(
    ("name", "encoder", "decoder"),
    [
        ("magvitv2", 55_439_171, 39_947_833),  # 1 x 1 convolutions included
        ("open-magvit2", 49_751_442, 65_376_387),
        ("llamagen-vq-16", 29_300_232, 42_452_099),
        ("llamagen-vq-8", 28_561_288, 41_417_475),
    ],
)
def test_published_sizes(name: str, encoder: int, decoder: int) -> None:
    with torch.device("meta"):
        tokenizer: Any = catalogue()["image_tokenizer"].parse(name).build()
    assert count(tokenizer.encoder) + count(tokenizer.to_code) == encoder
    assert count(tokenizer.decoder) + count(tokenizer.from_code) == decoder


def test_show_os_halves_are_no_mirror_images() -> None:
    config: Any = catalogue()["image_tokenizer"].parse("magvitv2")
    assert config.encoder.widths == (128, 256, 256, 512, 512)
    assert config.decoder.widths == (128, 128, 256, 256, 512)
    assert config.encoder.blocks == (4, 3, 4, 3, 4)
    assert config.decoder.blocks == (4, 4, 3, 4, 3)
    assert config.bits == 13
    assert not any(config.encoder.attention)
    assert config.middle_attention


def test_going_down_pads_right_and_bottom_alone() -> None:
    torch.manual_seed(0)
    x, down = pixels(1, 4, 6, 6), Down(4, even=False)
    wanted = F.conv2d(F.pad(x, (0, 1, 0, 1)), down.conv.weight, down.conv.bias, stride=2)
    torch.testing.assert_close(down(x), wanted)
    even = F.conv2d(x, down.conv.weight, down.conv.bias, stride=2, padding=1)
    assert even.shape == wanted.shape
    assert bool((even - wanted).abs().max() > 0.1)
    for name, pads_evenly in (("magvitv2", False), ("llamagen-vq-16", False), ("open-magvit2", True)):
        config: Any = catalogue()["image_tokenizer"].parse(name)
        assert config.even is pads_evenly


def test_lists_are_read_from_the_code_grid() -> None:
    config: Any = catalogue()["image_tokenizer"].parse("open-magvit2-8")
    assert config.levels == 4
    assert config.encoder.widths == (128, 256, 256, 512)
    assert config.grid == (16, 16)


@pytest.mark.parametrize("name", ["lfq", "magvitv2", "open-magvit2", "llamagen-vq-16", "llamagen-vq-8", "chameleon-vq"])
def test_a_scale_leaves_several_channels_a_group(name: str) -> None:
    from zoo.recipe import read_scale

    small: Any = catalogue()["image_tokenizer"].parse(name).scaled(read_scale("tiny").sizes)
    assert small.vocab_size == 1024
    assert small.grid == (4, 4)
    assert small.base // small.groups == 4
    assert set(small.encoder_blocks) == {1}


def test_biases_before_a_norm_matter_with_several_channels_a_group() -> None:
    levels = Levels(base=8, widths=(8,), blocks=(1,), attention=(False,), groups=2)
    torch.manual_seed(0)
    block, x = Residual(levels, 8, 8), pixels(1, 8, 5, 5)
    before = block(x)
    with torch.no_grad():
        block.conv1.bias += torch.linspace(-1, 1, 8)
    assert float((block(x) - before).abs().max()) > 0.05
    with pytest.raises(ValueError, match="groups of 2 or more"):
        LFQConfig(**{**SMALL, "groups": 8})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 1000}, "power of two"),
        ({"bit_order": "big"}, "msb or lsb"),
        ({"patch_size": 24, "image_size": 48}, "power of two"),
        ({"encoder_mult": [4]}, "needs 2 levels"),
        ({"patch_size": 64, "image_size": 64}, "needs 5 levels"),
        ({"width": 30}, "multiple of the last entry"),
        ({"groups": 3}, "groups"),
        ({"kernel": 2}, "1 or 3"),
        ({"middle": 0, "middle_attention": True}, "middle"),
    ],
)
def test_wrong_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LFQConfig(**{**SMALL, **fields})


@torch.no_grad()
def test_one_code_alone_has_no_deviation_and_is_drawn_all_the_same() -> None:
    tokenizer = made(adaptive=True)
    assert bool(torch.isfinite(tokenizer.decode(torch.tensor([[5]]))).all())
