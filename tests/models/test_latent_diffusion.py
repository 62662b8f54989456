"""Latent diffusion: the list of traps of its card, and what a wiring promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import zoo
from zoo.denoisers.dit import DiTConfig
from zoo.denoisers.unet import UNetConfig
from zoo.diffusion.noising import DDPM, Flow
from zoo.errors import ConfigError
from zoo.part import Features
from zoo.recipe import resolve
from zoo.sampling.guidance import rescaled
from zoo.testing.config import shake

FIELDS: dict[str, Any] = {"wiring": {"drawing_steps": 3}}


@pytest.fixture(scope="module")
def model() -> Any:
    """With weights drawn at random, large enough to matter."""
    module = zoo.build(
        "latent-diffusion", scale="tiny", objective={"diffusion": {"prediction": "v_prediction"}}, **FIELDS
    )
    shake(module.model)
    return module.model


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def picture(seed: int) -> Image.Image:
    pixels = torch.randint(0, 256, (64, 64, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def batch(count: int = 3) -> dict[str, Tensor]:
    ids = torch.randint(5, 900, (count, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(6) < torch.tensor([[6], [4], [3]])[:count]
    return {
        "image_latents": draws(count, 8, 8, 8), "input_ids": ids, "attention_mask": mask,
        "image_noise": draws(count, 8, 8, 8, seed=2), "image_time": torch.tensor([10, 500, 990])[:count],
    }  # fmt: skip


# -- training ----------------------------------------------------------------------------------------------------------


def test_what_is_predicted_of_noisy_latents(model: Any) -> None:
    rows = batch()
    with torch.no_grad():
        out = model(rows)
        process = model.process
        noisy = process.corrupt(rows["image_latents"], rows["image_noise"], rows["image_time"])
        features = model.text_encoder(rows["input_ids"], rows["attention_mask"])
        expected = model.denoiser(noisy, rows["image_time"].float(), features.tokens, rows["attention_mask"])
    assert process == DDPM(prediction="v_prediction")
    torch.testing.assert_close(out["prediction"], expected)
    target = process.target(rows["image_latents"], rows["image_noise"], rows["image_time"])
    assert torch.equal(out["denoising_target"], target)
    assert out["level"].tolist() == [10, 500, 990]
    assert bool(out["noised"].all())
    with torch.no_grad():
        assert model({**rows, "valid": torch.tensor([True, False, True])})["noised"].tolist() == [True, False, True]


def test_dropped_captions_are_the_empty_text(model: Any) -> None:
    rows = batch()
    empty = model.processor.encode_texts([""])["input_ids"]
    model.train()
    try:
        torch.manual_seed(0)
        with torch.no_grad():
            out = model({**rows, "drop_draw": torch.tensor([0.05, 0.5, 0.99])})["prediction"]
    finally:
        model.eval()
    alone = {name: value[:1] for name, value in rows.items()}
    alone |= {"input_ids": empty, "attention_mask": torch.ones_like(empty, dtype=torch.bool)}
    with torch.no_grad():
        torch.testing.assert_close(out[:1], model(alone)["prediction"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(out[1:], model(rows)["prediction"][1:], atol=1e-5, rtol=1e-5)
        assert float((out[:1] - model(rows)["prediction"][:1]).abs().max()) > 1e-3


def test_no_condition_may_be_zeros() -> None:
    module = zoo.build("latent-diffusion", scale="tiny", wiring={"unconditional": "zeros"})
    rows = batch()
    with torch.no_grad():
        features = module.model.condition(rows, torch.tensor([True, False, False]))
        nothing = module.model.no_condition()
    assert not bool(features.tokens[0].any())
    assert features.mask is not None
    assert bool(features.mask[0].all())
    assert features.mask[1].tolist() == [True] * 4 + [False] * 2
    assert bool(features.tokens[1, 0].any())
    assert not bool(nothing.tokens.any())


def test_pads_are_read_where_stable_diffusion_reads_them() -> None:
    """With ``pad_id`` every text has the encoder's length and no mask; otherwise pads change nothing."""
    module = zoo.build("latent-diffusion", scale="tiny", wiring={"pad_id": 3})
    with torch.no_grad():
        filled = module.model.condition(module.model.prompt_rows(["a cat"]))
        plain = zoo.build("latent-diffusion", scale="tiny").model
        short = plain.condition(plain.prompt_rows(["a cat", "a very long-winded description of a cat"]))
    assert filled.mask is None
    assert filled.tokens.shape[1] == 128
    assert short.mask is not None
    assert short.mask.sum(1)[0] < short.mask.sum(1)[1] == short.tokens.shape[1]


def test_a_condition_may_be_given(model: Any) -> None:
    """MiniGPT-5's mapper, say: tokens in place of a text, in training and in drawing; its gradient flows back."""
    rows = batch()
    with torch.no_grad():
        features = model.condition(rows)
        given = {**rows, "condition": features.tokens, "condition_mask": features.mask}
        del given["input_ids"], given["attention_mask"]
        torch.testing.assert_close(model(given)["prediction"], model(rows)["prediction"])
    tokens = features.tokens.clone().requires_grad_()
    model({**given, "condition": tokens})["prediction"].square().mean().backward()
    assert tokens.grad is not None
    assert bool((tokens.grad.abs().amax(-1) > 0)[features.mask].all())
    texts = ["a cat", "a red apple on a table", "an owl"]
    with torch.no_grad():
        condition = model.condition(model.prompt_rows(texts))
    drawn = model.draw(condition, seed=4)
    torch.testing.assert_close(drawn, model.generate_images(texts, seed=4), atol=1e-5, rtol=1e-5)
    later = Features(condition.tokens[1:], None if condition.mask is None else condition.mask[1:])
    torch.testing.assert_close(model.draw(later, seed=4, first=1), drawn[1:], atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match="the denoiser reads"):
        model.draw(Features(torch.zeros(1, 3, 7)), guidance=1.0)


# -- drawing -----------------------------------------------------------------------------------------------------------


def test_an_image_depends_on_its_number_and_nothing_else(model: Any) -> None:
    texts = ["a cat", "an owl", "a house with a garden"]
    whole = model.generate_images(texts, seed=3)
    torch.testing.assert_close(model.generate_images(texts, seed=3, together=1), whole, atol=1e-5, rtol=1e-5)
    assert torch.equal(model.generate_images(texts, seed=3), whole)
    assert float((model.generate_images(texts, seed=4) - whole).abs().max()) > 0.01
    assert float((model.generate_images(texts[::-1], seed=3)[1] - whole[1]).abs().max()) < 1e-5
    assert float((model.generate_images(["a dog", *texts[1:]], seed=3)[0] - whole[0]).abs().max()) > 1e-4
    assert model.generate_images([]).shape == (0, 3, 64, 64)


@pytest.mark.parametrize("sampler", DDPM.samplers)
def test_every_sampler_draws(model: Any, sampler: str) -> None:
    drawn = model.generate_images(["a cat"], sampler=sampler)
    assert drawn.shape == (1, 3, 64, 64)
    assert bool(torch.isfinite(drawn).all())
    assert float((drawn - model.generate_images(["a cat"], sampler=sampler, guidance=1.0)).abs().max()) > 1e-4


def test_known_latents_are_intact_after_the_last_step(model: Any) -> None:
    """Of every sampler; what is drawn anew reads the text, and the mask of pixels takes every latent it touches."""
    image, mask = picture(0), torch.zeros(1, 64, 64, dtype=torch.bool)
    mask[:, 20:30, 33:60] = True
    found: list[Tensor] = []
    decode = model._pictures
    known = model.image_tokenizer.encode(model._latent_pixels([image]))
    unknown = torch.zeros(8, 8, dtype=torch.bool)
    unknown[2:4, 4:8] = True
    model._pictures = lambda x: (found.append(x), decode(x))[1]
    try:
        for sampler in DDPM.samplers:
            model.inpaint_images([image], mask, ["a cat"], sampler=sampler)
        model.inpaint_images([image], mask, ["an owl with glasses"], sampler="ddpm")
        model.set_process(Flow(), 1.0)
        for sampler in ("euler", "midpoint"):
            model.inpaint_images([image], mask, ["a cat"], sampler=sampler)
        with pytest.raises(ConfigError, match="choose midpoint or euler"):
            model.inpaint_images([image], mask, ["a cat"], sampler="rk45")
    finally:
        del model._pictures
        model.set_process(DDPM(prediction="v_prediction"), 1.0)
    assert len(found) == len(DDPM.samplers) + 3
    for latents in found:
        assert torch.equal(latents[0, :, ~unknown], known[0, :, ~unknown].float())
        assert float((latents[0, :, unknown] - known[0, :, unknown]).abs().min()) > 0
    assert float((found[0] - found[len(DDPM.samplers)]).abs().max()) > 1e-4


def test_editing_keeps_as_much_as_strength_says(model: Any) -> None:
    """The fewer steps, the nearer to the image; at strength 1 nothing of it is left."""
    images = [picture(0), picture(1)]
    whole = model.edit_images(images, ["a cat", "an owl"], steps=10, strength=1.0, seed=2)
    torch.testing.assert_close(
        whole, model.generate_images(["a cat", "an owl"], steps=10, seed=2), atol=1e-5, rtol=1e-5
    )
    little = model.edit_images(images, ["a cat", "an owl"], steps=10, strength=0.1, seed=2, guidance=1.0)
    same = model.image_config.shown(
        model.image_tokenizer.decode(model.image_tokenizer.encode(model._latent_pixels(images)))
    )
    with torch.no_grad():
        assert (little - same).abs().mean() < 0.5 * (whole - same).abs().mean()
    with pytest.raises(ConfigError, match="leaves none to take"):
        model.edit_images(images, ["a cat", "an owl"], steps=5, strength=0.1)
    with pytest.raises(ConfigError, match=r"strength = 1\.5"):
        model.edit_images(images, ["a cat", "an owl"], strength=1.5)


def test_every_prediction_is_told_of(model: Any) -> None:
    heard: list[tuple[int, float]] = []
    model.generate_images(["a cat", "an owl"], sampler="ddim", steps=4, tell=lambda n, level: heard.append((n, level)))
    assert heard == [(0, 750.0), (1, 500.0), (2, 250.0), (3, 0.0)]


def test_rescaled_guidance_has_the_conditional_deviation() -> None:
    guided, conditional = 3 * draws(2, 4, 5, 5), draws(2, 4, 5, 5, seed=1)
    torch.testing.assert_close(rescaled(guided, conditional, 1.0).flatten(1).std(1), conditional.flatten(1).std(1))
    assert torch.equal(rescaled(guided, conditional, 0.0), guided)


def test_mistakes_are_one_line(model: Any) -> None:
    for call, message in (
        (lambda: model.generate_images("a cat"), "wrap it in a list"),
        (lambda: model.generate_images(["a cat"], sampler="midpoint"), "does not fit DDPM"),
        (lambda: model.generate_images(["a cat"], steps=0), "steps = 0"),
        (lambda: model.generate_images(["a cat"], guidance=-1.0), "guidance"),
        (lambda: model.generate_images(["a cat"], rescale=2.0), "rescale = 2"),
        (lambda: model.generate_images(["a cat " * 100]), "shorten it"),
        (lambda: model.edit_images([picture(0)], ["a", "b"]), "expected one each"),
        (lambda: model.inpaint_images([picture(0)], torch.zeros(1, 8, 8, dtype=torch.bool), ["a"]), "8x8 pixels"),
        (lambda: zoo.build("latent-diffusion", scale="tiny", image_tokenizer="vq"), "a denoiser reads latents"),
        (lambda: zoo.build("latent-diffusion", scale="tiny", wiring={"sampler": "dpm"}), "unknown sampler 'dpm'"),
        (lambda: zoo.build("latent-diffusion", scale="tiny", wiring={"pad_id": 5000}), "pad_id"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


# -- the parts ---------------------------------------------------------------------------------------------------------


def test_conditions_of_any_length_with_masks(model: Any) -> None:
    """Card, trap 8: 77, 64 and 576 tokens, and a masked one reads as a shorter one."""
    latents, time = draws(2, 8, 8, 8), torch.tensor([300.0, 300.0])
    width = model.denoiser.condition_width
    for length in (77, 64, 576):
        condition = draws(2, length, width)
        mask = torch.arange(length) < torch.tensor([[length], [length // 2]])
        with torch.no_grad():
            out = model.denoiser(latents, time, condition, mask)
            half = model.denoiser(latents[1:], time[1:], condition[1:, : length // 2])
        torch.testing.assert_close(out[1:], half, atol=1e-4, rtol=1e-4)


def test_a_unet_is_diffusers_unet() -> None:
    """Card, section 8: our configuration makes the module that diffusers makes of the published one's fields."""
    from diffusers import UNet2DConditionModel

    ours = UNetConfig(widths=[32, 64], depths=[1, 0], attention_heads=[8, 8], groups=8, blocks=2)
    made = ours.build(24, channels=4, grid=(16, 16))
    theirs = UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), norm_num_groups=8, cross_attention_dim=24,
    )  # fmt: skip
    shake(made)
    theirs.load_state_dict(made.net.state_dict(), strict=True)
    latents, condition = draws(2, 4, 16, 16), draws(2, 5, 24)
    with torch.no_grad():
        expected = theirs.eval()(latents, 371, condition).sample
        found = made(latents, torch.tensor([371.0, 371.0]), condition)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["unet-sd15", "dit-s"])
def test_a_condition_is_read_once_for_all_steps(kind: str) -> None:
    """Card, trap 9: keys and values that are kept are those computed anew, bit for bit; another condition is read."""
    denoiser: Any = shake(zoo.build("latent-diffusion", scale="tiny", denoiser=kind).model.denoiser)
    calls: list[int] = []
    maps = [module for name, module in denoiser.net.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))]
    for module in maps:
        linear = module.forward
        module.forward = lambda x, linear=linear: (calls.append(1), linear(x))[1]
    latents, times = draws(2, 8, 8, 8), [torch.full((2,), t) for t in (900.0, 500.0, 100.0)]
    one, other = draws(2, 7, denoiser.condition_width), draws(2, 7, denoiser.condition_width, seed=1)
    with torch.no_grad():
        plain = [denoiser(latents, time, one) for time in times]
        assert len(calls) == 3 * len(maps) > 0
        calls.clear()
        with denoiser.remembering():
            kept = [denoiser(latents, time, one) for time in times]
            assert len(calls) == len(maps)
            moved = denoiser(latents, times[0], other)
        assert len(calls) == 2 * len(maps)
        assert all(torch.equal(a, b) for a, b in zip(plain, kept, strict=True))
        assert torch.equal(moved, denoiser(latents, times[0], other))
        assert float((moved - kept[0]).abs().max()) > 1e-4
    assert len(calls) == 3 * len(maps)
    learned = one.clone().requires_grad_()
    with denoiser.remembering():
        for time in times[:2]:
            denoiser(latents, time, learned).sum().backward()
    assert learned.grad is not None


def test_denoisers_predict_nothing_at_first_and_a_dits_blocks_change_nothing() -> None:
    """Card, trap 12."""
    latents, time, condition = draws(2, 4, 8, 8), torch.tensor([3.0, 800.0]), draws(2, 5, 24)
    unet = UNetConfig(widths=[32, 64], depths=[1, 0], attention_heads=[4, 4], groups=8, blocks=1).build(24)
    dit = DiTConfig(width=32, depth=2, heads=4).build(24, grid=(8, 8))
    seen: list[Tensor] = []
    for block in dit.net.transformer_blocks:
        block.register_forward_hook(lambda m, args, out: seen.extend([args[0], out]))
    with torch.no_grad():
        assert not bool(unet(latents, time, condition).any())
        assert not bool(dit(latents, time, condition).any())
    assert len(seen) == 4
    assert torch.equal(seen[0], seen[3])
    assert bool(seen[0].any())


@pytest.mark.parametrize(("kind", "sides"), [("unet-sd15", {1, 2}), ("dit-s", {2})])
def test_attention_levels_count_the_tokens(kind: str, sides: set[int]) -> None:
    model = zoo.build("latent-diffusion", scale="tiny", denoiser=kind).model
    denoiser = model.denoiser
    levels = denoiser.attention_levels()
    tokens: dict[str, int] = {}
    processors = denoiser.attention_processors()

    def heard(name: str) -> Any:
        def call(attention: Any, hidden: Tensor, *more: Any, **other: Any) -> Any:
            tokens[name] = hidden.shape[1] if hidden.ndim == 3 else hidden.shape[2] * hidden.shape[3]
            return processors[name](attention, hidden, *more, **other)

        return call

    denoiser.set_attention_processors({name: heard(name) for name in processors})
    with torch.no_grad():
        denoiser(draws(1, 8, 8, 8), torch.tensor([5.0]), draws(1, 3, denoiser.condition_width))
    assert set(levels.values()) == sides
    assert tokens == {name: 64 // side**2 for name, side in levels.items()}
    with pytest.raises(ConfigError, match="attention processors are expected"):
        denoiser.set_attention_processors({"attn": None})


def test_published_sizes_are_the_cards() -> None:
    """Card, section 2: 859.5M, 865.9M and 2,567M parameters, 16 and 70 self-attentions."""
    expected = {
        "stable-diffusion-v1-5": (859_520_964, 16),
        "stable-diffusion-2-1": (865_910_724, 16),
        "stable-diffusion-xl": (2_567_463_684, 70),
    }
    for name, (parameters, attentions) in expected.items():
        recipe = resolve(name)
        with torch.device("meta"):
            model = recipe.wiring[1].build(recipe.parts, 0)
        assert sum(p.numel() for p in model.denoiser.parameters()) == parameters
        assert sum("attn1" in key for key in model.denoiser.attention_processors()) == attentions


def test_latents_are_scaled_once_each_way(model: Any) -> None:
    """Card, trap 1: from pixels to latents and back is the plain autoencoder."""
    tokenizer = model.image_tokenizer
    pixels = draws(2, 3, 64, 64).clamp(-1, 1)
    tokenizer.moments.copy_(torch.stack([torch.full((8,), 0.3), torch.full((8,), 4.0)]))
    tokenizer.measured.fill_(1.0)
    with torch.no_grad():
        plain = tokenizer.vae.decode(tokenizer.vae.encode(pixels).latent_dist.mode()).sample
        torch.testing.assert_close(tokenizer.decode(tokenizer.encode(pixels)), plain, atol=1e-4, rtol=1e-4)
        moved = tokenizer.vae.encode(pixels).latent_dist.mode()
        assert float((tokenizer.encode(pixels) - moved).abs().max()) > 0.05
    tokenizer.measured.zero_()
