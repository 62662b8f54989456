"""Next-token cross-entropy against its definition."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoo.objectives.next_token import NextTokenConfig


class Decoder(nn.Module):
    """Counts the rows that logits are computed for."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = self
        self.head = nn.Linear(6, 11)
        self.rows = 0

    def logits(self, hidden: Tensor) -> Tensor:
        self.rows = hidden.shape[0]
        logits: Tensor = self.head(hidden)
        return logits


def given() -> tuple[Decoder, Tensor, Tensor]:
    torch.manual_seed(0)
    targets = torch.randint(0, 11, (3, 5))
    targets[torch.rand(3, 5) < 0.5] = -100
    assert 3 < int((targets != -100).sum()) < 15
    return Decoder(), torch.randn(3, 5, 6, requires_grad=True), targets


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_equals_the_definition(smoothing: float, z_loss: float) -> None:
    model, hidden, targets = given()
    objective = NextTokenConfig(label_smoothing=smoothing, z_loss=z_loss).build()
    batch = {"text_bytes": torch.tensor([7, 9, 4])}
    loss, report = objective(model, batch, {"hidden": hidden, "targets": targets})
    total = penalty = 0.0
    count = int((targets != -100).sum())
    for row, wanted in zip(hidden.flatten(0, 1), targets.flatten().tolist(), strict=True):
        if wanted == -100:
            continue
        logits = model.head(row).tolist()
        norm = math.log(sum(math.exp(v) for v in logits))
        total += -(1 - smoothing) * (logits[wanted] - norm) - smoothing * sum(v - norm for v in logits) / 11
        penalty += norm**2
    assert model.rows == count  # no logits where nothing is predicted
    assert float(loss.detach()) == pytest.approx((total + z_loss * penalty) / count, rel=1e-5)
    assert float(report["next_token"]) == pytest.approx(total / count, rel=1e-5)
    assert float(report["bits_per_byte"]) == pytest.approx(total / math.log(2) / 20, rel=1e-5)
    assert int(report["tokens"]) == count
    assert not any(value.requires_grad for value in report.values())


def test_no_targets_give_a_zero_on_the_graph() -> None:
    model, hidden, targets = given()
    outputs: dict[str, Any] = {"hidden": hidden, "targets": torch.full_like(targets, -100)}
    loss, report = NextTokenConfig(z_loss=0.1).build()(model, {}, outputs)
    loss.backward()
    assert float(loss.detach()) == 0
    assert hidden.grad is not None
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert model.head.weight.grad is not None
    assert "bits_per_byte" not in report


def test_bad_values() -> None:
    with pytest.raises(ValueError, match="label_smoothing"):
        NextTokenConfig(label_smoothing=1.0)
