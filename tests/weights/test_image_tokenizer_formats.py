"""Released image tokenizers load by their recipe, sizes from the tensors, completely or with a line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import zoo
from zoo.errors import WeightsError
from zoo.tokenizers.vqgan import VQGANConfig
from zoo.weights.keymaps import image_tokenizers as maps

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
GROUPS = {"image_tokenizer": {"groups": 8}}
"""Of the goldens, which no tensor tells."""


def written(path: Path, state: dict[str, Tensor], **more: Any) -> Path:
    if path.suffix == ".safetensors":
        save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, path)
    else:
        torch.save(more | {"model": state} if more else state, path)
    return path


def drawn(module: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, and what is drawn of them."""
    tokenizer = module.eval().model.image_tokenizer
    codes = tokenizer.encode(pixels)
    patch = tokenizer.config.patch_size
    with torch.no_grad():
        return codes, tokenizer.decode(codes, (pixels.shape[2] // patch, pixels.shape[3] // patch))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_show_os_file(name: str, golden: Callable[[str], Any], tmp_path: Path) -> None:
    g = golden("magvit2_lfq")
    path = written(tmp_path / name, g.weights)
    module = zoo.from_pretrained(path, model="magvitv2", **GROUPS)
    codes, image = drawn(module, g.inputs["pixels"])
    assert torch.equal(codes, g.outputs["indices"])
    torch.testing.assert_close(image, g.outputs["pixels_decoded"], **CLOSE)
    report = module.load_report
    assert report.form == "Show-o's MAGVIT-v2"
    assert not report.new
    assert len(report.loaded) == len(module.model.state_dict())


@pytest.mark.parametrize("config", [{"_class_name": "MAGVITv2", "_diffusers_version": "0.1"}, {}])
def test_show_os_folder(config: dict[str, str], golden: Callable[[str], Any], tmp_path: Path) -> None:
    g = golden("magvit2_lfq")
    (tmp_path / "config.json").write_text(json.dumps(config))
    written(tmp_path / "diffusion_pytorch_model.safetensors", g.weights)
    model = None if config else "magvitv2"
    codes, _ = drawn(zoo.from_pretrained(tmp_path, model=model, **GROUPS), g.inputs["pixels_nonsquare"])
    assert torch.equal(codes, g.outputs["indices_nonsquare"])


@pytest.mark.parametrize("averaged", [True, False])
def test_open_magvit2s_file_and_its_averaged_copies(
    averaged: bool, golden: Callable[[str], Any], tmp_path: Path
) -> None:
    g = golden("open_magvit2")
    state = dict(g.weights)
    if averaged:
        copies = {"model_ema." + name.replace(".", ""): tensor for name, tensor in state.items()}
        noise = {name: torch.randn_like(tensor) for name, tensor in state.items()}  # must not be read
        counters = {"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(-1)}
        state = noise | copies | counters | {"model_ema.lossdiscriminatormain0weight": torch.ones(2)}
    state |= {"loss.discriminator.main.0.weight": torch.ones(2)}
    path = tmp_path / "imagenet_256_L.ckpt"
    torch.save({"state_dict": state, "global_step": 3}, path)
    module = zoo.from_pretrained(path, model="open-magvit2", **GROUPS)
    codes, image = drawn(module, g.inputs["pixels"])
    assert torch.equal(codes, g.outputs["indices"])
    torch.testing.assert_close(image, g.outputs["pixels_decoded"], **CLOSE)
    assert ("averaged" in module.load_report.form) == averaged
    assert "loss.discriminator.main.0.weight" in module.load_report.ignored
    if averaged:
        del state["model_ema.decoderconv_outbias"]
        torch.save({"state_dict": state}, path)
        with pytest.raises(WeightsError, match=r"none of decoder\.conv_out\.bias"):
            zoo.from_pretrained(path, model="open-magvit2", **GROUPS)


def test_llamagens_file(golden: Callable[[str], Any], tmp_path: Path) -> None:
    g = golden("llamagen_vq")
    state = g.weights | {"quantize.codebook_used": torch.zeros(65536)}
    path = written(tmp_path / "vq_ds2.pt", state, steps=7)
    module = zoo.from_pretrained(path, model="llamagen-vq-16", **GROUPS)
    assert module.model.image_config.patch_size == 2
    codes, image = drawn(module, g.inputs["pixels"])
    assert torch.equal(codes, g.outputs["indices"])
    torch.testing.assert_close(image, g.outputs["pixels_decoded"], **CLOSE)


def test_chameleons_file_with_and_without_its_decoder(golden: Callable[[str], Any], tmp_path: Path) -> None:
    g = golden("chameleon")
    prefix, official = "model.vqmodel.", "official_vqgan."
    state = {n.removeprefix(prefix): t for n, t in g.weights.items() if n.startswith(prefix)}
    whole = state | {n.removeprefix(official): t for n, t in g.weights.items() if n.startswith(official)}
    module = zoo.from_pretrained(written(tmp_path / "a.safetensors", whole), model="chameleon-vq", **GROUPS)
    codes, image = drawn(module, g.inputs["pixels"])
    assert torch.equal(codes, g.outputs["vq_codes"])
    torch.testing.assert_close(image, g.outputs["pixels_decoded"], **CLOSE)
    half = zoo.from_pretrained(written(tmp_path / "b.safetensors", state), model="chameleon-vq", **GROUPS)
    assert torch.equal(half.eval().model.image_tokenizer.encode(g.inputs["pixels"]), g.outputs["vq_codes"])
    assert half.load_report.new
    assert all(name.startswith("image_tokenizer.decoder.") for name in half.load_report.new)


def test_a_first_level_of_128_channels_has_32_groups(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = VQGANConfig(
        image_size=8, patch_size=2, vocab_size=11, code_width=3, latent=4, width=128,
        encoder_mult=[1, 1], decoder_mult=[1, 1], encoder_blocks=[1, 1], decoder_blocks=[1, 2], attention=[True],
    ).build().eval()  # fmt: skip
    state, left = maps.llamagen_vq(2).save(made.state_dict())
    assert not left
    module = zoo.from_pretrained(written(tmp_path / "vq.pt", state), model="llamagen-vq-8")
    assert module.model.image_config.groups == 32
    pixels = torch.randn(1, 3, 8, 8)
    assert torch.equal(drawn(module, pixels)[0], made.encode(pixels))


def test_what_does_not_fit_is_a_line(golden: Callable[[str], Any], tmp_path: Path) -> None:
    show_o, vq = golden("magvit2_lfq").weights, golden("llamagen_vq").weights
    path = written(tmp_path / "a.safetensors", show_o)
    with pytest.raises(WeightsError, match=r"tensors do not tell image_tokenizer\.groups"):
        zoo.from_pretrained(path, model="magvitv2")
    with pytest.raises(WeightsError, match="layout of Show-o's MAGVIT-v2"):
        zoo.from_pretrained(path, model="open-magvit2", **GROUPS)
    with pytest.raises(WeightsError, match="layout of LlamaGen's VQ"):
        zoo.from_pretrained(written(tmp_path / "b.pt", vq), model="chameleon-vq", **GROUPS)
    broken = {name: tensor for name, tensor in show_o.items() if name != "encoder.conv_in.weight"}
    with pytest.raises(WeightsError, match=r"no encoder\.conv_in\.weight: is it whole"):
        zoo.from_pretrained(written(tmp_path / "c.safetensors", broken), model="magvitv2", **GROUPS)
    lacking = {name: tensor for name, tensor in show_o.items() if name != "decoder.norm_out.bias"}
    with pytest.raises(WeightsError, match=r"lacks 1 tensors .*decoder\.norm\.bias"):
        zoo.from_pretrained(written(tmp_path / "e.safetensors", lacking), model="magvitv2", **GROUPS)
    strange = show_o | {"encoder.extra.weight": torch.ones(1)}
    with pytest.raises(WeightsError, match=r"encoder\.extra\.weight"):
        zoo.from_pretrained(written(tmp_path / "d.safetensors", strange), model="magvitv2", **GROUPS)
    (tmp_path / "config.json").write_text("{}")
    written(tmp_path / "model.safetensors", show_o)
    with pytest.raises(WeightsError, match="does not read"):
        zoo.from_pretrained(tmp_path)
