"""The moving average of the weights is what a run saves, and what draws images afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import zoo
from zoo.cli.overrides import run_config
from zoo.resuming import Keeper
from zoo.train import run

SMALL = [
    "model=latent-diffusion", "scale=tiny", "denoiser=dit-s", "denoiser.depth=1", "denoiser.width=32",
    "denoiser.heads=2", "text_encoder.depth=1", "image_tokenizer.width=16", "image_tokenizer.groups=4", "batch_size=4",
    "budget.value=4", "optimizer.lr=0.01", "trainer.accelerator=cpu", "trainer.ema=0.5", "evaluation.split=val",
    "evaluation.tasks={}", "wiring.drop=0.5",
]  # fmt: skip


def test_the_average_is_saved_and_drawn_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[dict[str, Tensor]] = []
    original = Keeper.on_train_batch_end

    def patched(self: Keeper, trainer: Any, module: Any, *rest: Any) -> None:
        steps.append({name: p.detach().clone() for name, p in module.model.named_parameters() if p.requires_grad})
        original(self, trainer, module, *rest)

    monkeypatch.setattr(Keeper, "on_train_batch_end", patched)
    config = run_config(SMALL)
    config.write(tmp_path / "run.yaml")
    run(tmp_path)
    assert len(steps) == 4
    model = zoo.from_pretrained(tmp_path / "weights").model
    own = dict(model.named_parameters())
    moved = 0.0
    for name, first in steps[0].items():
        average = first
        for step in steps[1:]:
            average = 0.5 * average + 0.5 * step[name]
        torch.testing.assert_close(own[name].detach(), average, atol=1e-6, rtol=1e-5)
        moved = max(moved, float((own[name].detach() - steps[-1][name]).abs().max()))
    assert moved > 1e-3
    drawn = model.generate_images(["a cat"], steps=2)
    model.load_state_dict(steps[-1], strict=False)
    assert float((model.generate_images(["a cat"], steps=2) - drawn).abs().max()) > 1e-4
