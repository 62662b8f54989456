"""The KL autoencoder: sizes, scale and shift applied once, measured unit variance, its loss, and diffusers' folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import zoo
from zoo.capabilities import EncodeImages, ReconstructImages
from zoo.errors import ConfigError
from zoo.plugin import catalogue
from zoo.testing.config import shake
from zoo.tokenizers.kl import DECAY, KLConfig, KLTokenizer, Posterior

TINY: dict[str, Any] = {"image_size": 32, "patch_size": 4, "width": 32, "mult": [1, 2, 2], "blocks": 1, "groups": 4}


def made(seed: int = 0, **fields: Any) -> KLTokenizer:
    """A small tokenizer whose every weight matters: gains are not 1, biases not 0."""
    torch.manual_seed(seed)
    tokenizer = KLConfig(**{**TINY, "channels": 3, **fields}).build()
    shake(tokenizer, seed)
    return tokenizer


def pictures(count: int = 6) -> list[Image.Image]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 4, 4, 3), generator=generator, dtype=torch.uint8)
    return [Image.fromarray(p.numpy()).resize((64, 64), Image.Resampling.NEAREST) for p in pixels]


def test_published_sizes_are_those_of_the_papers() -> None:
    for name, parameters, channels in (
        ("kl-f8-8ch", 83_709_419, 8),
        ("sd-vae", 83_653_863, 4),
        ("sdxl-vae", 83_653_863, 4),
        ("flux-vae", 83_819_683, 16),
        ("sd3-vae", 83_819_683, 16),
    ):
        config = catalogue()["image_tokenizer"].parse(name)
        with torch.device("meta"):
            tokenizer = config.build()
        assert sum(p.numel() for p in tokenizer.parameters()) == parameters, name
        assert tokenizer.channels == channels
        assert tokenizer.grid == (config.image_size // 8,) * 2
        assert not tokenizer.discrete
        assert config.widths == (128, 256, 512, 512)


def test_tiny_form_keeps_the_downsampling() -> None:
    recipe = zoo.build("kl-tokenizer", scale="tiny").recipe
    config: Any = recipe.parts["image_tokenizer"][1]
    assert (config.image_size, config.patch_size, config.channels, config.grid) == (64, 8, 8, (8, 8))
    assert recipe.image_size == 64


@pytest.mark.parametrize("fields", [{"scaling": 0.18215}, {"scaling": 0.3611, "shift": 0.1159}, {}])
def test_scale_and_shift_are_applied_exactly_once_each_way(fields: dict[str, float]) -> None:
    tokenizer, pixels = made(**fields), torch.randn(2, 3, 32, 32)
    if not fields:  # as if measured
        tokenizer.moments.copy_(torch.tensor([[0.5, -1.0, 2.0], [4.25, 2.0, 4.25]]) * 0.75)
        tokenizer.measured.fill_(0.75)
    with torch.no_grad():
        latents, plain = tokenizer.encode(pixels), tokenizer.vae.encode(pixels).latent_dist.mode()
        drawn, straight = tokenizer.decode(latents), tokenizer.vae.decode(plain).sample
    shift, scaling = fields.get("shift", 0.0), fields.get("scaling", 1.0)
    wanted = (plain - shift) * scaling
    if not fields:
        mean, std = torch.tensor([0.5, -1.0, 2.0]).view(3, 1, 1), torch.tensor([2.0, 1.0, 0.5]).view(3, 1, 1)
        wanted = (plain - mean) / std
    torch.testing.assert_close(latents, wanted)
    torch.testing.assert_close(drawn, straight, atol=1e-5, rtol=1e-5)


def test_samples_scatter_around_the_mean_with_the_scaled_deviation() -> None:
    tokenizer, pixels = made(scaling=0.25, shift=0.5), torch.randn(1, 3, 32, 32)
    mean, std = tokenizer.statistics(pixels).chunk(2, 1)
    posterior = tokenizer.posterior(pixels)
    torch.testing.assert_close(std, 0.25 * (0.5 * posterior.logvar).exp())
    torch.testing.assert_close(tokenizer.encode(pixels), mean)
    first = tokenizer.encode(pixels, sample=True, generator=torch.Generator().manual_seed(3))
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(first, mean + std * noise)
    torch.manual_seed(5)
    before = tokenizer.encode(pixels, sample=True)
    torch.manual_seed(5)
    assert torch.equal(before, tokenizer.encode(pixels, sample=True))
    assert not before.requires_grad
    state = torch.get_rng_state()
    tokenizer.encode(pixels)
    tokenizer.encode(pixels, sample=True, generator=torch.Generator().manual_seed(3))
    assert torch.equal(state, torch.get_rng_state())


def test_moments_are_the_bias_corrected_running_averages_of_draws() -> None:
    tokenizer = made().train()
    batches = [torch.randn(4, 3, 32, 32) * scale for scale in (1.0, 2.0, 0.5)]
    mean, square, weight = torch.zeros(3), torch.zeros(3), 0.0
    for pixels in batches:
        posterior = tokenizer.posterior(pixels)
        tokenizer(pixels)
        mean = DECAY * mean + (1 - DECAY) * posterior.mean.detach().mean((0, 2, 3))
        now = posterior.mean.square() + posterior.std.square()
        square = DECAY * square + (1 - DECAY) * now.detach().mean((0, 2, 3))
        weight = DECAY * weight + 1 - DECAY
    shift, scaling = tokenizer.factors()
    torch.testing.assert_close(shift.flatten(), mean / weight)
    torch.testing.assert_close(scaling.flatten(), (square / weight - (mean / weight).square()).rsqrt())
    before = tokenizer.moments.clone()
    with torch.no_grad():
        tokenizer(batches[0])
    tokenizer.eval()(batches[0])
    tokenizer.train().encode(batches[0])
    assert torch.equal(tokenizer.moments, before)


def test_measured_latents_have_unit_variance_in_every_channel() -> None:
    tokenizer = made(channels=4).train()
    pixels = torch.nn.functional.interpolate(torch.randn(64, 3, 8, 8), 32)
    for _ in range(3):
        tokenizer(pixels)
    tokenizer.eval()
    raw = tokenizer.posterior(pixels)
    assert float((raw.mean.detach().std((0, 2, 3)) - 1).abs().min()) > 0.05  # it was not so before
    latents = tokenizer.encode(pixels, sample=True)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), atol=0.03, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), atol=0.03, rtol=0)
    state = {k: v.clone() for k, v in tokenizer.state_dict().items()}
    other = made(1, channels=4)
    other.load_state_dict(state)
    assert torch.equal(other.encode(pixels), tokenizer.encode(pixels))  # the factors travel with the weights


def test_training_draws_latents_and_evaluation_takes_their_mean() -> None:
    tokenizer, pixels = made(), torch.randn(2, 3, 32, 32)
    drawn, posterior = tokenizer.eval()(pixels)
    torch.testing.assert_close(drawn, tokenizer.vae.decode(posterior.mean).sample)
    torch.manual_seed(0)
    sampled, _ = tokenizer.train()(pixels)
    torch.manual_seed(0)
    again, _ = tokenizer(pixels)
    assert torch.equal(sampled, again)
    assert float((sampled - drawn).detach().abs().max()) > 1e-3


def test_other_sizes_and_wrong_ones() -> None:
    tokenizer = made()
    assert tokenizer.encode(torch.zeros(1, 3, 64, 40)).shape == (1, 3, 16, 10)
    assert tokenizer.decode(torch.zeros(1, 3, 16, 10)).shape == (1, 3, 64, 40)
    for shape in ((1, 3, 30, 32), (1, 1, 32, 32)):
        with pytest.raises(ConfigError, match="multiples of 4"):
            tokenizer.encode(torch.zeros(shape))


def test_upcast_computes_in_fp32_under_autocast() -> None:
    pixels = torch.randn(1, 3, 32, 32)
    for upcast in (True, False):
        tokenizer = made(scaling=1.0, upcast=upcast)
        plain = tokenizer.encode(pixels)
        with torch.autocast("cpu", torch.bfloat16):
            lower = tokenizer.encode(pixels)
            drawn = tokenizer.decode(plain)
        assert lower.dtype == drawn.dtype == torch.float32
        assert torch.equal(lower, plain) is upcast


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch_size": 8}, "2 to the number of steps"),
        ({"image_size": 30}, "multiple of patch_size"),
        ({"width": 33}, "multiple of mult"),
        ({"groups": 7}, "groups"),
        ({"channels": 0}, "1 or more"),
        ({"scaling": -1.0}, "scaling"),
        ({"mult": []}, "mult"),
    ],
)
def test_wrong_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KLConfig(**{**TINY, **fields})


# -- through the module ------------------------------------------------------------------------------------------------


def test_loss_is_l1_plus_divergence_by_hand() -> None:
    module = zoo.build("kl-tokenizer", scale="tiny", seed=1, objective={"kl-reconstruction": {"kl": 0.5}}).eval()
    shake(module.model)
    batch = {"pixel_values": module.processor.encode_images(pictures())}
    outputs = module.model(batch)
    loss, report = module.objectives["kl-reconstruction"](module.model, batch, outputs)
    mean, logvar = outputs["latent_mean"], outputs["latent_logvar"]
    own = torch.distributions.Normal(mean, Posterior(mean, logvar).std)
    unit = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    kl = torch.distributions.kl_divergence(own, unit).sum((1, 2, 3)).mean()
    l1 = (outputs["reconstruction"] - batch["pixel_values"]).abs()
    torch.testing.assert_close(loss, l1.mean() + 0.5 * kl / (3 * 64 * 64))
    torch.testing.assert_close(loss * 3 * 64 * 64, l1.sum((1, 2, 3)).mean() + 0.5 * kl)  # the ratio of the paper's sums
    torch.testing.assert_close(report["kl"], kl.detach())
    error = (l1 * 0.5).square().mean()
    torch.testing.assert_close(report["psnr"], -10 * error.log10().detach())


def test_training_draws_better_and_the_capabilities_fit() -> None:
    module = zoo.build("kl-tokenizer", scale="tiny", seed=1)
    images = pictures()
    batch = {"pixel_values": module.processor.encode_images(images)}
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    module.train()
    torch.manual_seed(0)
    losses = []
    for _ in range(25):
        loss, _ = module.losses(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]
    assert isinstance(module.model, ReconstructImages)
    assert not isinstance(module.model, EncodeImages)
    latents = module.model.image_latents(images)
    drawn = module.reconstruct_images(images)
    assert latents.shape == (6, 8, 8, 8)
    assert drawn.shape == (6, 3, 64, 64)
    module.eval()
    own = module.model.image_tokenizer.decode(latents)
    torch.testing.assert_close(drawn, (own * 0.5 + 0.5).clamp(0, 1).detach(), atol=1e-5, rtol=0)


def test_a_saved_tokenizer_keeps_its_factors(tmp_path: Path) -> None:
    module = zoo.build("kl-tokenizer", scale="tiny", seed=1).train()
    batch = {"pixel_values": module.processor.encode_images(pictures())}
    module.losses(batch)
    module.eval()
    from zoo.weights import save

    save(module, module.recipe, tmp_path / "weights")
    other = zoo.from_pretrained(tmp_path / "weights")
    assert float(other.model.image_tokenizer.measured) == pytest.approx(1 - DECAY)
    assert torch.equal(other.model.image_latents(pictures()), module.model.image_latents(pictures()))
