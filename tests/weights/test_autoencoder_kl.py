"""Folders that diffusers saved: every tensor arrives, and pixels, latents and reconstructions are the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import zoo
from zoo import torchvision_ops
from zoo.errors import WeightsError
from zoo.testing.config import shake

SD: dict[str, Any] = {"scaling_factor": 0.18215}
FLUX: dict[str, Any] = {
    "latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False,
    "use_post_quant_conv": False,
}  # fmt: skip


def official(folder: Path, **fields: Any) -> Any:
    torchvision_ops.ensure()
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(0)
    model = AutoencoderKL(
        block_out_channels=(16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=32,
        **fields,
    )
    shake(model)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("fields", [SD, FLUX])
def test_a_diffusers_folder_draws_what_diffusers_draws(fields: dict[str, Any], tmp_path: Path) -> None:
    model = official(tmp_path, **fields)
    module = zoo.from_pretrained(tmp_path)
    tokenizer: Any = module.eval().model.image_tokenizer
    assert len(module.load_report.loaded) == len(model.state_dict())
    assert module.load_report.ignored == []
    assert tokenizer.channels == fields.get("latent_channels", 4)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        posterior = model.encode(pixels).latent_dist
        ours = tokenizer.posterior(pixels)
        torch.testing.assert_close(ours.mean, posterior.mean, atol=1e-5, rtol=0)
        torch.testing.assert_close(ours.std, posterior.std, atol=1e-5, rtol=0)
        plain, shift = posterior.mode(), fields.get("shift_factor", 0.0)
        scaled = (plain - shift) * fields["scaling_factor"]  # as the pipelines of diffusers do
        torch.testing.assert_close(tokenizer.encode(pixels), scaled, atol=1e-5, rtol=0)
        drawn = tokenizer.decode(tokenizer.encode(pixels))
        torch.testing.assert_close(drawn, model.decode(plain).sample, atol=1e-5, rtol=0)
        torch.manual_seed(1)
        sample = posterior.sample()
        torch.manual_seed(1)
        own = tokenizer.encode(pixels, sample=True)
        torch.testing.assert_close(own, (sample - shift) * fields["scaling_factor"], atol=1e-5, rtol=0)
    image = Image.new("RGB", (40, 40), (200, 30, 90))
    assert module.reconstruct_images([image]).shape == (1, 3, 32, 32)
    again = zoo.from_pretrained(save(module, tmp_path / "zoo"))
    assert torch.equal(again.eval().model.image_tokenizer.encode(pixels), tokenizer.encode(pixels))


def save(module: Any, folder: Path) -> Path:
    from zoo.weights import save as write

    return write(module, module.recipe, folder)


def test_old_names_of_the_attention_are_known(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = official(tmp_path, **SD)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for now, then in old.items():
        state = {k.replace(f"attentions.0.{now}.", f"attentions.0.{then}."): v for k, v in state.items()}
    save_file(state, path, metadata={"format": "pt"})
    module = zoo.from_pretrained(tmp_path).eval()
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        wanted = model.encode(pixels).latent_dist.mode() * 0.18215
        torch.testing.assert_close(module.model.image_tokenizer.encode(pixels), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("act_fn", "relu", "act_fn"),
        ("in_channels", 4, "in_channels"),
        ("latents_mean", [0.0], "latents_mean"),
        ("sample_size", 30, "sample_size"),
        ("use_quant_conv", False, "differ"),
        ("scaling_factor", 0.0, "scaling_factor"),
        ("down_block_types", ["AttnDownEncoderBlock2D"] * 3, "down_block_types"),
    ],
)
def test_what_the_zoo_does_not_have_is_refused(key: str, value: Any, message: str, tmp_path: Path) -> None:
    official(tmp_path, **SD)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(WeightsError, match=message) as caught:
        zoo.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)
