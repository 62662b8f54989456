"""The perceptual loss: LPIPS by torchmetrics' own network, an encoder that the zoo trained, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from zoo import torchvision_ops
from zoo.cli.overrides import run_config
from zoo.compare.flops import count
from zoo.errors import ConfigError, WeightsError, ZooError
from zoo.objectives.perceptual import EncoderEye, PerceptualConfig, open_eye, shipped_linear, unit
from zoo.testing.config import shake
from zoo.train import run

CONFIG = {"width": 32, "groups": 2}


@pytest.fixture(scope="module")
def lpips(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """torchmetrics' LPIPS on a random VGG-16, and that network's file as torchvision names it."""
    torchvision_ops.ensure()
    from torchmetrics.functional.image.lpips import _LPIPS

    torch.manual_seed(0)
    network = _LPIPS(net="vgg", pnet_rand=True)
    with torch.no_grad():
        for name, parameter in network.net.named_parameters():
            if name.endswith("bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    names = {k.split(".", 1)[1]: v for k, v in network.net.state_dict().items()}
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save({f"features.{k}": v for k, v in names.items()}, path)
    return network, path


def images(seed: int) -> torch.Tensor:
    return torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(seed))


def test_values_and_gradients_are_those_of_lpips(lpips: tuple[Any, Path]) -> None:
    network, path = lpips
    eye = open_eye(PerceptualConfig(path=str(path)))
    a, b = images(0).requires_grad_(), images(1)
    loss = eye.distance(eye(a), eye(b))
    wanted = network(a, b, normalize=True).mean()
    torch.testing.assert_close(loss, wanted, atol=1e-6, rtol=1e-4)
    assert float(wanted.detach()) > 0.01
    ours, theirs = (torch.autograd.grad(x, a)[0] for x in (loss, wanted))
    torch.testing.assert_close(ours, theirs, atol=1e-7 + 1e-4 * float(theirs.abs().max()), rtol=0)
    assert float(eye.distance(eye(b), eye(b)).detach()) == 0


def test_lpips_own_names_and_an_own_linear_file(lpips: tuple[Any, Path], tmp_path: Path) -> None:
    network, path = lpips
    state = {f"net.{k}": v for k, v in network.net.state_dict().items()}
    torch.save(state, tmp_path / "lpips.pth")
    linear = torch.load(shipped_linear(), map_location="cpu", weights_only=True)
    torch.save({k: 2 * v for k, v in linear.items()}, tmp_path / "lin.pth")
    one = open_eye(PerceptualConfig(path=str(path)))
    two = open_eye(PerceptualConfig(path=str(tmp_path / "lpips.pth"), linear=str(tmp_path / "lin.pth")))
    a, b = images(0), images(1)
    torch.testing.assert_close(two.distance(two(a), two(b)), 2 * one.distance(one(a), one(b)))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("clip") / "weights"
    module = zoo.build("clip", scale="tiny", encoder={"width": 64, "depth": 4, "heads": 2, "ffn": 96})
    shake(module.model)
    from zoo.weights import save

    return save(module, module.recipe, folder)


def test_an_encoder_is_compared_block_by_block(clip: Path) -> None:
    eye = open_eye(PerceptualConfig(path=str(clip), layers=2))
    assert isinstance(eye, EncoderEye)
    found = eye(images(0))
    assert [f.shape for f in found] == [torch.Size([2, 17, 64])] * 2 + [found[2].shape]  # 64 px: resized from 48
    blocks = eye.encoder.tower.transformer.resblocks  # type: ignore[union-attr]
    assert eye.read == [blocks[1], blocks[3]]
    a, b = images(0).requires_grad_(), images(1)
    loss = eye.distance(eye(a), eye(b))
    by_hand = [
        (torch.nn.functional.normalize(x, dim=-1) - torch.nn.functional.normalize(y, dim=-1)).square().sum(-1).mean()
        for x, y in zip(eye(a), eye(b), strict=True)
    ]
    torch.testing.assert_close(loss, torch.stack(by_hand).mean(), atol=1e-5, rtol=1e-4)
    loss.backward()
    assert a.grad is not None
    assert float(a.grad.abs().max()) > 0
    torch.testing.assert_close(unit(found[0], -1).norm(dim=-1), torch.ones(2, 17))


def test_in_a_model_its_gradient_reaches_the_tokenizer_and_no_checkpoint_holds_it(clip: Path, tmp_path: Path) -> None:
    module = zoo.build(
        "kl-tokenizer", scale="tiny", image_tokenizer=CONFIG, objective=["kl-reconstruction", "perceptual"],
        **{"objective.perceptual": {"path": str(clip), "weight": 0.2}},
    )  # fmt: skip
    batch = {"pixel_values": torch.randn(2, 3, 64, 64).clamp(-1, 1)}
    module.eval()
    loss, report = module.losses(batch)
    torch.testing.assert_close(loss.detach(), report["kl-reconstruction"] + report["perceptual"])
    assert float(report["perceptual"]) > 0
    names = set(module.state_dict())
    assert not any("eye" in name or "objectives" in name for name in names)
    drawn = module.model(batch)["reconstruction"]
    same, _ = module.objectives["perceptual"](module.model, {"pixel_values": drawn.detach()}, {"reconstruction": drawn})
    assert float(same.detach()) < 1e-6
    from zoo.api import build_module

    with torch.device("meta"):
        other = build_module(module.recipe, 0)
    plain = zoo.build("kl-tokenizer", scale="tiny", image_tokenizer=CONFIG).recipe
    with torch.device("meta"):
        without = build_module(plain, 0)
    assert count(other).per_sample > count(without).per_sample


def test_a_run_trains_with_it(clip: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    config = run_config(
        [
            "model=kl-tokenizer", "scale=tiny", "image_tokenizer.width=32", "image_tokenizer.groups=2", "batch_size=4",
            "objective=[kl-reconstruction,perceptual]", f"++objective.perceptual.path={clip}", "budget.value=2",
            "trainer.accelerator=cpu", "trainer.log_every=1", "evaluation.split=val",
            "evaluation.tasks={reconstruction: {items: 3}}",
        ]
    )  # fmt: skip
    config.write(folder / "run.yaml")
    manifest = run(folder)
    assert manifest["status"] == "done"
    import json

    line = json.loads((folder / "curve.jsonl").read_text().splitlines()[-1])
    assert line["perceptual"] > 0
    metrics = json.loads((folder / "metrics.json").read_text())["reconstruction"]
    assert set(metrics) == {"psnr", "ssim", "l1", "images"}
    assert 0 < metrics["l1"] < 1
    assert metrics["ssim"] < 1
    assert metrics["images"] == 3
    samples = json.loads((folder / "samples.json").read_text())
    assert len(samples) == 3
    assert all(s["outputs"]["reconstruction"]["picture"] for s in samples)


def test_what_is_missing_is_said_in_one_line(clip: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs the weights") as caught:
        run_config(["model=kl-tokenizer", "scale=tiny", "objective=[kl-reconstruction,perceptual]"])
    assert "\n" not in str(caught.value)
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "part.pth")
    with pytest.raises(WeightsError, match=r"VGG-16's tensors are missing"):
        open_eye(PerceptualConfig(path=str(tmp_path / "part.pth")))
    with pytest.raises(ZooError, match="no folder or file"):
        open_eye(PerceptualConfig(path=str(tmp_path / "nothing")))
    module = zoo.build("kl-tokenizer", scale="tiny", image_tokenizer=CONFIG)
    from zoo.weights import save

    save(module, module.recipe, tmp_path / "blind")
    with pytest.raises(ConfigError, match="no image encoder"):
        open_eye(PerceptualConfig(path=str(tmp_path / "blind")))
