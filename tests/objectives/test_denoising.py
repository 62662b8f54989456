"""Errors of what is predicted of noisy images, and how images are weighed by their noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import zoo
from zoo.diffusion.noising import PREDICTIONS
from zoo.errors import ConfigError
from zoo.objectives.denoising import DiffusionConfig, snr_weights
from zoo.registry import to_plain


def test_min_snr_weights() -> None:
    """Card, trap 10, at t = 0, in the middle and at the end: arXiv 2303.09556, and each prediction's weight is that
    of x_0's error in the same latents."""
    process = DiffusionConfig(schedule="scaled_linear").process()
    snr = process.snr(torch.tensor([0.0, 400.0, 999.0]))
    assert snr[0] > 1000
    assert 0.1 < snr[1] < 5
    assert snr[2] < 0.01
    least = snr.clamp(max=5.0)
    torch.testing.assert_close(snr_weights(snr, 5.0, "sample"), least)
    torch.testing.assert_close(snr_weights(snr, 5.0, "epsilon"), least / snr)
    torch.testing.assert_close(snr_weights(snr, 5.0, "v_prediction"), least / (snr + 1))
    assert snr_weights(torch.zeros(1), 5.0, "epsilon").item() == 1.0
    assert snr_weights(torch.zeros(1), 5.0, "v_prediction").item() == 0.0
    # one wrong image x_0 + d is an error in every prediction: d, d sqrt(snr), d sqrt(snr + 1)
    time = torch.tensor([5, 400, 950])
    clean, other, noise = (torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(n)) for n in range(3))
    weighed = []
    for prediction in PREDICTIONS:
        one = DiffusionConfig(schedule="scaled_linear", prediction=prediction).process()
        noisy = one.corrupt(clean, noise, time)
        a = one.scheduler.alphas_cumprod[time].view(-1, 1, 1, 1)
        implied = (noisy - a.sqrt() * other) / (1 - a).sqrt()  # the noise, were the other image right
        error = (one.target(clean, noise, time) - one.target(other, implied, time)).square().flatten(1).mean(1)
        weighed.append(error * snr_weights(one.snr(time.float()), 5.0, prediction))
    torch.testing.assert_close(weighed[0], weighed[1], rtol=2e-3, atol=1e-5)
    torch.testing.assert_close(weighed[0], weighed[2], rtol=2e-3, atol=1e-5)


def outputs(model: Any, level: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    prediction, target = (torch.randn(3, 4, 2, 2, generator=generator) for _ in range(2))
    return {
        "prediction": prediction, "denoising_target": target, "level": level,
        "noised": torch.tensor([True, True, False]),
    }  # fmt: skip


def test_the_loss_weighs_images_by_their_level() -> None:
    module = zoo.build("latent-diffusion", scale="tiny", denoiser="dit-s", objective={"diffusion": {"min_snr": 5.0}})
    plain = zoo.build("latent-diffusion", scale="tiny", denoiser="dit-s")
    out = outputs(module.model, torch.tensor([3.0, 800.0, 500.0]))
    errors = (out["prediction"] - out["denoising_target"]).square().flatten(1).mean(1)
    loss, report = module.objectives["diffusion"](module.model, {}, out)
    snr = module.model.process.snr(out["level"])
    torch.testing.assert_close(loss, ((5 / snr).clamp(max=1) * errors)[:2].mean())
    assert int(report["noised"]) == 2
    assert "level" in module.objectives["diffusion"].needs
    without, _ = plain.objectives["diffusion"](plain.model, {}, {k: v for k, v in out.items() if k != "level"})
    torch.testing.assert_close(without, errors[:2].mean())
    assert float((loss - without).abs()) > 0.1


def test_runs_from_before_keep_their_hash_and_mistakes_are_refused() -> None:
    assert set(to_plain(DiffusionConfig())) == {"weight", "noise_limit", "schedule", "prediction"}
    assert to_plain(DiffusionConfig(min_snr=5.0))["min_snr"] == 5.0
    for field in ({"min_snr": -1.0}, {"zero_snr": True, "prediction": "epsilon"}):
        with pytest.raises(ConfigError, match=next(iter(field))):
            zoo.build("latent-diffusion", scale="tiny", objective={"diffusion": field})
