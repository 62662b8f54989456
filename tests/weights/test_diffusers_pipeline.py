"""diffusers' pipeline folders: what they draw is drawn here as well, in fp32 from the same noise."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import zoo
from zoo import torchvision_ops
from zoo.errors import WeightsError
from zoo.sampling.guidance import weights
from zoo.sampling.latents import branches, draw_latents
from zoo.sampling.text import streams
from zoo.weights import save

torchvision_ops.ensure()

LENGTH, SIDE, CHANNELS = 14, 8, 4
TEXTS = ["a red cat", "an owl"]
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
STABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}


def tokenizer(pad: str) -> Any:
    """Letters, letters that end a word, and CLIP's two tokens."""
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz!"
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {word: n for n, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocab, merges=[], pad_token=pad, model_max_length=LENGTH)


def text_encoder(seed: int, projected: int = 0, **sizes: int) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=56, max_position_embeddings=LENGTH, eos_token_id=55, bos_token_id=54, num_attention_heads=2,
        projection_dim=projected or 16, hidden_act="gelu" if projected else "quick_gelu",
        **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, **sizes},
    )  # fmt: skip
    torch.manual_seed(seed)
    return CLIPTextModelWithProjection(config) if projected else CLIPTextModel(config)


def autoencoder() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=CHANNELS, norm_num_groups=4, layers_per_block=1,
        sample_size=2 * SIDE, scaling_factor=0.3,
    )  # fmt: skip


def unet(width: int, **more: Any) -> Any:
    from diffusers import UNet2DConditionModel

    fields: dict[str, Any] = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 4,
    }
    return UNet2DConditionModel(
        sample_size=SIDE, in_channels=CHANNELS, out_channels=CHANNELS, block_out_channels=(16, 32),
        layers_per_block=1, norm_num_groups=4, cross_attention_dim=width, **{**fields, **more},
    )  # fmt: skip


def drawn(draw: Callable[..., Any], *models: Any) -> list[Any]:
    return [draw(model, seed) for seed, model in enumerate(models)]


@pytest.fixture(scope="module")
def stable(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A pipeline with weights drawn at random, and its folder."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    from tests.weights.conftest import _draw

    text, vae, net = drawn(_draw, text_encoder(0), autoencoder(), unet(32))
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text, unet=net, tokenizer=tokenizer("<|endoftext|>"),
        scheduler=DDIMScheduler(**STABLE, clip_sample=False, set_alpha_to_one=False), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    folder = tmp_path_factory.mktemp("stable")
    pipeline.save_pretrained(folder)
    return pipeline, folder


def noise(count: int) -> Tensor:
    return torch.randn(count, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(7))


SCHEDULERS: list[tuple[str, dict[str, Any]]] = [
    ("DDIMScheduler", {"set_alpha_to_one": False}),
    ("DDIMScheduler", {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}),
    ("DDPMScheduler", {}),
    ("DDPMScheduler", {"prediction_type": "sample", "timestep_spacing": "linspace"}),
    ("DDPMScheduler", {"prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2"}),
    ("PNDMScheduler", {"skip_prk_steps": True}),
    ("DPMSolverMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {"prediction_type": "v_prediction", "timestep_spacing": "leading"}),
    ("EulerDiscreteScheduler", {"timestep_spacing": "leading"}),
    ("EulerDiscreteScheduler", {"prediction_type": "v_prediction"}),
    ("DDIMScheduler", {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "fields"), SCHEDULERS)
def test_stable_diffusion_draws_what_the_pipeline_draws(stable: Any, name: str, fields: dict[str, Any]) -> None:
    import diffusers

    pipeline, folder = stable
    more = {"clip_sample": False} if name in ("DDIMScheduler", "DDPMScheduler") else {}
    scheduler = getattr(diffusers, name)(**{**STABLE, **more, **fields})
    scheduler.save_pretrained(folder / "scheduler")
    pipeline.scheduler = scheduler
    given = {"num_inference_steps": 4, "guidance_scale": 7.5, "latents": noise(2)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        latents = pipeline(TEXTS, **given, generator=streams(3, 0, 2), output_type="latent").images
        pixels = pipeline(TEXTS, **given, generator=streams(3, 0, 2), output_type="pt").images
    module = zoo.from_pretrained(folder)
    model = module.model
    found: list[Tensor] = []
    decode = model._pictures
    model._pictures = lambda x: (found.append(x), decode(x))[1]  # type: ignore[method-assign,func-returns-value]
    rows = model.prompt_rows(TEXTS)
    with torch.no_grad():
        condition = model.condition(rows)
    images = model.draw(condition, noise=noise(2), seed=3, steps=4, guidance=7.5)
    torch.testing.assert_close(found[0], latents, **CLOSE)
    torch.testing.assert_close(images, pixels, **CLOSE)
    assert float((pixels[0] - pixels[1]).abs().max()) > 0.01
    other = model.draw(condition, noise=noise(2), seed=3, steps=4, guidance=1.0)
    assert float((other - images).abs().max()) > 0.01


def test_a_seed_is_the_pipelines_generators(stable: Any) -> None:
    """One generator an image, ``streams(seed, n, 1)``, draws its noise and what the sampler adds on both sides."""
    import diffusers

    pipeline, folder = stable
    pipeline.scheduler = diffusers.DDPMScheduler(**STABLE, clip_sample=False)
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    expected = pipeline(
        TEXTS, num_inference_steps=3, guidance_scale=2.0, generator=streams(11, 0, 2), output_type="pt",
        guidance_rescale=0.7,
    ).images  # fmt: skip
    model = zoo.from_pretrained(folder)
    found = model.generate_images(TEXTS, seed=11, steps=3, guidance=2.0, rescale=0.7)
    torch.testing.assert_close(found, expected, **CLOSE)
    torch.testing.assert_close(
        model.generate_images(TEXTS, seed=11, steps=3, guidance=2.0, rescale=0.7, together=1), found
    )


def test_an_image_is_drawn_on_as_by_the_pipeline(stable: Any) -> None:
    """Image-to-image of the pipeline begins at the same step with the same noise."""
    import diffusers

    pipeline, folder = stable
    pipeline.scheduler = diffusers.DDIMScheduler(**STABLE, clip_sample=False, set_alpha_to_one=False)
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    model = zoo.from_pretrained(folder).model
    other = diffusers.StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    start = noise(2) * 0.5
    expected = other(
        TEXTS, image=start, strength=0.6, num_inference_steps=5, guidance_scale=3.0, generator=streams(5, 0, 2),
        output_type="latent",
    ).images  # fmt: skip
    with torch.no_grad():
        condition = branches([model.condition(model.prompt_rows(TEXTS)), model.no_condition()])
        found = draw_latents(
            model.denoiser, model.process, condition, model.config.denoising(steps=5), weights(3.0, "scale"),
            streams(5, 0, 2), grid=(SIDE, SIDE), known=start, strength=0.6,
        )  # fmt: skip
    torch.testing.assert_close(found, expected, **CLOSE)


def test_sdxl_draws_what_the_pipeline_draws(tmp_path: Path, draw: Callable[..., Any]) -> None:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    net = unet(
        32 + 24, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=(2, 4),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2),
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=20 + 6 * 8,
    )  # fmt: skip
    second = text_encoder(1, projected=20, hidden_size=24, intermediate_size=40, num_hidden_layers=4)
    text, second, vae, net = drawn(draw, text_encoder(0), second, autoencoder(), net)
    pipeline = StableDiffusionXLPipeline(
        vae=vae, text_encoder=text, text_encoder_2=second, unet=net, tokenizer=tokenizer("<|endoftext|>"),
        tokenizer_2=tokenizer("!"), scheduler=EulerDiscreteScheduler(**STABLE, timestep_spacing="leading"),
        add_watermarker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path)
    expected = pipeline(TEXTS, num_inference_steps=3, guidance_scale=5.0, latents=noise(2), output_type="pt").images
    module = zoo.from_pretrained(tmp_path)
    model = module.model
    assert module.recipe.model == "stable-diffusion-xl"
    with torch.no_grad():
        condition = model.condition(model.prompt_rows(TEXTS))
    found = model.draw(condition, noise=noise(2), steps=3, guidance=5.0)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert condition.pooled is not None
    moved = model.draw(
        type(condition)(condition.tokens, condition.mask, condition.pooled + 1), noise=noise(2), steps=3, guidance=5.0
    )
    assert float((moved - found).abs().max()) > 1e-3


def test_a_saved_model_comes_back(stable: Any, tmp_path: Path) -> None:
    """What was read from diffusers is written and read in the zoo's own layout."""
    _, folder = stable
    module = zoo.from_pretrained(folder)
    save(module, module.recipe, tmp_path / "own")
    again = zoo.from_pretrained(tmp_path / "own")
    torch.testing.assert_close(
        again.generate_images(TEXTS, steps=2), module.generate_images(TEXTS, steps=2), atol=0, rtol=0
    )


MISTAKES: list[tuple[str, dict[str, Any], str]] = [
    ("model_index.json", {"_class_name": "FluxPipeline"}, "class 'FluxPipeline', which the zoo does not read"),
    ("model_index.json", {"unet": ["diffusers", "UNet3DConditionModel"]}, "unet is a UNet3DConditionModel"),
    ("scheduler/scheduler_config.json", {"_class_name": "LCMScheduler"}, "no sampler for 'LCMScheduler'"),
    ("scheduler/scheduler_config.json", {"thresholding": True}, "thresholding = True"),
    ("scheduler/scheduler_config.json", {"beta_end": 0.05}, "the zoo's goes from 0.00085 to 0.012"),
    ("unet/config.json", {"in_channels": 9}, "reads 9 channels"),
    ("unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type = 'timestep'"),
    ("unet/config.json", {"cross_attention_dim": 40}, "reads states of width 40"),
    ("text_encoder/config.json", {"use_attention_mask": True}, "hides pads"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "change", "message"), MISTAKES)
def test_what_is_not_read_is_refused_in_one_line(
    stable: Any, tmp_path: Path, file: str, change: dict[str, Any], message: str
) -> None:
    import diffusers

    diffusers.DDIMScheduler(**STABLE, clip_sample=False).save_pretrained(stable[1] / "scheduler")
    folder = tmp_path / "copy"
    shutil.copytree(stable[1], folder)
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(WeightsError, match=message) as caught:
        zoo.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_refused(stable: Any, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(stable[1], folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(WeightsError, match="convert it to safetensors"):
        zoo.from_pretrained(folder)
