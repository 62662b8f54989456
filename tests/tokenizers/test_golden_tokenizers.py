"""The discrete image tokenizers against what the released code computed: codes, pixels, losses, gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.tokenizers.convolutional import ConvTokenizer
from zoo.tokenizers.entropy import code_entropies
from zoo.tokenizers.lfq import LFQConfig, LookupFree, factorised
from zoo.tokenizers.vqgan import VQGANConfig
from zoo.weights.keymaps import image_tokenizers as maps
from zoo.weights.keymaps import load_into

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def near(found: Tensor, wanted: Tensor, share: float = 1e-5) -> None:
    """Equal up to a share of the largest entry."""
    assert found.shape == wanted.shape
    assert float((found.detach() - wanted).abs().max()) <= share * float(wanted.abs().max())


def show_o(g: Any) -> ConvTokenizer:
    c = g.config
    config = LFQConfig(
        image_size=16,
        patch_size=c["downsample"],
        vocab_size=2 ** c["bits"],
        width=c["ch"] * c["encoder_ch_mult"][-1],
        encoder_mult=c["encoder_ch_mult"],
        decoder_mult=c["decoder_ch_mult"],
        encoder_blocks=c["encoder_res_blocks"],
        decoder_blocks=c["decoder_res_blocks"],
        middle_attention=True,
        groups=c["norm_groups"],
        fold=1,
        code_convs=True,
    )
    made = config.build().eval()
    load_into(made, g.weights, maps.magvitv2())
    return made


def open_magvit2(g: Any) -> ConvTokenizer:
    c = g.config
    config = LFQConfig(
        image_size=c["resolution"],
        patch_size=2 ** (len(c["ch_mult"]) - 1),
        vocab_size=2 ** c["bits"],
        width=c["ch"] * c["ch_mult"][-1],
        encoder_mult=c["ch_mult"],
        decoder_mult=c["ch_mult"],
        encoder_blocks=[c["num_res_blocks"]] * len(c["ch_mult"]),
        decoder_blocks=[c["num_res_blocks"]] * len(c["ch_mult"]),
        middle=c["num_res_blocks"],
        middle_attention=False,
        groups=c["norm_groups"],
        bias=False,
        even=True,
        depth_to_space=True,
        fold=1,
        bit_order="lsb",
        kernel=1,
        adaptive=True,
    )
    made = config.build().eval()
    load_into(made, g.weights, maps.open_magvit2())
    return made


def llamagen(g: Any) -> ConvTokenizer:
    c, blocks = g.config, g.config["num_res_blocks"]
    config = VQGANConfig(
        image_size=16,
        patch_size=2 ** (len(c["encoder_ch_mult"]) - 1),
        vocab_size=c["codebook_size"],
        code_width=c["codebook_embed_dim"],
        latent=c["z_channels"],
        width=c["ch"] * c["encoder_ch_mult"][-1],
        encoder_mult=c["encoder_ch_mult"],
        decoder_mult=c["decoder_ch_mult"],
        encoder_blocks=[blocks] * len(c["encoder_ch_mult"]),
        decoder_blocks=[blocks + 1] * len(c["decoder_ch_mult"]),
        attention=[True],
        groups=c["norm_groups"],
    )
    made = config.build().eval()
    load_into(made, g.weights, maps.llamagen_vq(config.levels))
    return made


def chameleon(g: Any) -> ConvTokenizer:
    c = g.config["vq"]
    mult, blocks = c["channel_multiplier"], c["num_res_blocks"]
    config = VQGANConfig(
        image_size=c["resolution"],
        patch_size=2 ** (len(mult) - 1),
        vocab_size=c["num_embeddings"],
        code_width=c["embed_dim"],
        latent=c["latent_channels"],
        width=c["base_channels"] * mult[-1],
        encoder_mult=mult,
        decoder_mult=mult,
        encoder_blocks=[blocks] * len(mult),
        decoder_blocks=[blocks + 1] * len(mult),
        attention=[c["resolution"] // 2**i in c["attn_resolutions"] for i in range(len(mult))],
        groups=c["norm_groups"],
        unit=False,
    )
    made = config.build().eval()
    prefix, decoder = "model.vqmodel.", "official_vqgan."
    state = {n.removeprefix(prefix): t for n, t in g.weights.items() if n.startswith(prefix)}
    state |= {n.removeprefix(decoder): t for n, t in g.weights.items() if n.startswith(decoder)}
    load_into(made, state, maps.chameleon_vq())
    return made


# -- whole tokenizers --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_show_os_tokenizer(golden: Callable[[str], Any]) -> None:
    g = golden("magvit2_lfq")
    made = show_o(g)
    for name in ("", "_nonsquare"):
        pixels = g.inputs[f"pixels{name}"]
        hidden = made.latents(pixels).permute(0, 3, 1, 2)
        torch.testing.assert_close(hidden, g.outputs[f"hidden{name}"], **CLOSE)
        codes = made.encode(pixels)
        assert torch.equal(codes, g.outputs[f"indices{name}"])
        drawn = made.decode(codes, None if not name else tuple(hidden.shape[2:]))
        torch.testing.assert_close(drawn, g.outputs["pixels_nonsquare_decoded" if name else "pixels_decoded"], **CLOSE)
    vectors = made.quantise(made.latents(g.inputs["pixels"])).vectors.permute(0, 3, 1, 2)
    torch.testing.assert_close(vectors, g.outputs["quantized"], **CLOSE)
    table = g.outputs["codebook"]
    assert torch.equal(made.vectors(torch.arange(len(table))), table)


@torch.no_grad()
def test_open_magvit2s_tokenizer(golden: Callable[[str], Any]) -> None:
    g = golden("open_magvit2")
    made, pixels = open_magvit2(g), g.inputs["pixels"]
    hidden = made.latents(pixels).permute(0, 3, 1, 2)
    torch.testing.assert_close(hidden, g.outputs["hidden"], **CLOSE)
    codes = made.encode(pixels)
    assert torch.equal(codes, g.outputs["indices"])
    drawn, quantized = made(pixels)
    torch.testing.assert_close(quantized.vectors.permute(0, 3, 1, 2), g.outputs["quantized"], **CLOSE)
    torch.testing.assert_close(drawn, g.outputs["pixels_decoded"], **CLOSE)
    torch.testing.assert_close(made.decode(codes, tuple(hidden.shape[2:])), g.outputs["pixels_decoded"], **CLOSE)


def test_llamagens_tokenizer(golden: Callable[[str], Any]) -> None:
    g = golden("llamagen_vq")
    made, pixels = llamagen(g), g.inputs["pixels"]
    with torch.no_grad():
        hidden = made.latents(pixels)
        torch.testing.assert_close(hidden.permute(0, 3, 1, 2), g.outputs["hidden"], **CLOSE)
        codes = made.encode(pixels)
        assert torch.equal(codes, g.outputs["indices"])
        torch.testing.assert_close(made.decode(codes, tuple(hidden.shape[1:3])), g.outputs["pixels_decoded"], **CLOSE)
    c, given = g.config, g.outputs["hidden"].permute(0, 2, 3, 1).clone().requires_grad_()
    out = made.quantise(given)
    torch.testing.assert_close(out.vectors.permute(0, 3, 1, 2), g.outputs["quantized"], **CLOSE)
    found = made.entropies(out.latents, c["entropy_temperature"])
    losses = {
        "vq_loss": out.codebook_loss,
        "commit_loss": c["commit_loss_beta"] * out.commitment,
        "entropy_loss": c["entropy_loss_ratio"] * (found.sample - found.batch),
    }
    for name, loss in losses.items():
        torch.testing.assert_close(loss, g.outputs[name], **CLOSE)
    of_input, of_codes = torch.autograd.grad(sum(losses.values()), [given, made.quantizer.codebook], retain_graph=True)
    near(of_input.permute(0, 3, 1, 2), g.outputs["grad_hidden"], 2e-5)
    near(of_codes, g.outputs["grad_codebook"], 2e-5)
    through = (out.vectors.permute(0, 3, 1, 2) * g.inputs["st_cotangent"]).sum()
    near(torch.autograd.grad(through, given)[0].permute(0, 3, 1, 2), g.outputs["grad_straight_through"])


@torch.no_grad()
def test_chameleons_tokenizer(golden: Callable[[str], Any]) -> None:
    g = golden("chameleon")
    made, pixels = chameleon(g), g.inputs["pixels"]
    hidden = made.latents(pixels)
    torch.testing.assert_close(hidden.permute(0, 3, 1, 2), g.outputs["vq_hidden"], **CLOSE)
    codes = made.encode(pixels)
    assert torch.equal(codes, g.outputs["vq_codes"])
    out = made.quantise(hidden)
    torch.testing.assert_close(out.vectors.permute(0, 3, 1, 2), g.outputs["vq_quantized"], **CLOSE)
    torch.testing.assert_close(out.commitment + 0.25 * out.codebook_loss, g.outputs["vq_loss"], **CLOSE)
    torch.testing.assert_close(made.decode(codes), g.outputs["pixels_decoded"], **CLOSE)


# -- the losses of three lookup-free quantizers ------------------------------------------------------------------------


@pytest.fixture
def signs(golden: Callable[[str], Any]) -> tuple[Any, Tensor]:
    """The golden, and its input [B, h, w, K] with a gradient."""
    g = golden("magvit2_lfq")
    return g, g.inputs["lfq_input"].permute(0, 2, 3, 1).clone().requires_grad_()


def compare(loss: Tensor, x: Tensor, g: Any, value: str, gradient: str, share: float = 1e-5) -> None:
    torch.testing.assert_close(loss.detach(), g.outputs[value], **CLOSE)
    near(torch.autograd.grad(loss, x, retain_graph=True)[0].permute(0, 3, 1, 2), g.outputs[gradient], share)


def test_codes_of_the_three_implementations_and_of_zero(signs: tuple[Any, Tensor]) -> None:
    g, x = signs
    assert (x == 0).sum() == 1
    msb, lsb = LookupFree(6)(x), LookupFree(6, "lsb")(x)
    assert torch.equal(msb.codes, g.outputs["showo_indices"])
    assert torch.equal(msb.codes, g.outputs["vqp_indices"])
    assert torch.equal(lsb.codes, g.outputs["open_indices"])
    torch.testing.assert_close(msb.vectors.permute(0, 3, 1, 2), g.outputs["showo_quantized"], **CLOSE)
    parts = factorised(lsb.codes.flatten(1), g.config["factorized_bits"])
    assert torch.equal(parts[0], g.outputs["open_factor_pre"])
    assert torch.equal(parts[1], g.outputs["open_factor_post"])


def test_losses_of_show_os_class(signs: tuple[Any, Tensor]) -> None:
    g, x = signs
    c, out = g.config, LookupFree(6)(x)
    loss = c["commit_loss_multiplier"] * (out.commitment + c["beta"] * out.codebook_loss)
    compare(loss, x, g, "showo_quantizer_loss", "showo_grad_quantizer_loss")
    # without a codebook the second term cancels a quarter of the commitment's gradient
    (whole,) = torch.autograd.grad(loss, x, retain_graph=True)
    (commitment,) = torch.autograd.grad(c["commit_loss_multiplier"] * out.commitment, x, retain_graph=True)
    torch.testing.assert_close(whole, 0.75 * commitment, **CLOSE)
    found = LookupFree.entropies(out.latents, 1.0, over="bits")
    loss = c["entropy_multiplier"] * (found.sample - found.batch)
    compare(loss, x, g, "showo_entropy_loss", "showo_grad_entropy_loss")


def test_losses_of_open_magvit2(signs: tuple[Any, Tensor]) -> None:
    """The gradient of the stored entropy has the rounding of logits near 1,000 in it: 1.6e-5 from the exact one."""
    g, x = signs
    out, tau = LookupFree(6, "lsb")(x), g.config["open_tau"]
    compare(out.commitment, x, g, "open_commit_loss", "open_grad_commit")
    found = LookupFree.entropies(out.latents, tau)
    torch.testing.assert_close(found.sample.detach(), g.outputs["open_sample_entropy"], **CLOSE)
    torch.testing.assert_close(found.batch.detach(), g.outputs["open_batch_entropy"], **CLOSE)
    compare(found.sample - found.batch, x, g, "open_entropy_loss", "open_grad_entropy", 3e-5)
    precise = x.detach().double().requires_grad_()
    exact = code_entropies(precise.flatten(0, -2), tau)
    (wanted,) = torch.autograd.grad(exact.sample - exact.batch, precise)
    (own,) = torch.autograd.grad(found.sample - found.batch, x)
    near(own.double(), wanted, 3e-6)


def test_losses_of_vector_quantize_pytorch(signs: tuple[Any, Tensor]) -> None:
    g, x = signs
    c, out = g.config["vqp"], LookupFree(6)(x)
    found = LookupFree.entropies(out.latents, 1 / c["inv_temperature"], floor="clamp")
    torch.testing.assert_close(found.sample.detach(), g.outputs["vqp_sample_entropy"], **CLOSE)
    torch.testing.assert_close(found.batch.detach(), g.outputs["vqp_batch_entropy"], **CLOSE)
    loss = c["entropy_loss_weight"] * (found.sample - c["diversity_gamma"] * found.batch)
    loss = loss + c["commitment_loss_weight"] * out.commitment
    compare(loss, x, g, "vqp_aux_loss", "vqp_grad_aux")
