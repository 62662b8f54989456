"""D3PM against explicit matrix products, discrete flow matching against its library's numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.errors import ConfigError
from zoo.sampling.discrete_diffusion import (
    MixturePath,
    absorbing_posterior,
    elbo_weight,
    posterior,
    reverse_step,
    transition,
)
from zoo.sampling.text import streams

BETAS = (0.1, 0.25, 0.4, 0.3)


def chain(kind: str, classes: int, steps: int) -> Tensor:
    product = torch.eye(classes, dtype=torch.float64)
    for beta in BETAS[:steps]:
        product = product @ transition(kind, beta, classes)
    return product


@pytest.mark.parametrize("kind", ["uniform", "absorbing"])
@pytest.mark.parametrize("classes", [2, 5, 8])
def test_transitions_and_posterior_by_enumeration(kind: str, classes: int) -> None:
    whole, alive = chain(kind, classes, 4), torch.tensor([1 - b for b in BETAS], dtype=torch.float64).prod()
    torch.testing.assert_close(whole.sum(1), torch.ones(classes, dtype=torch.float64))
    if kind == "uniform":
        closed = alive * torch.eye(classes, dtype=torch.float64) + (1 - alive) / classes
    else:
        closed = alive * torch.eye(classes, dtype=torch.float64)
        closed[:, -1] += 1 - alive
    torch.testing.assert_close(whole, closed)
    step, before = transition(kind, BETAS[3], classes), chain(kind, classes, 3)
    p0 = torch.rand(classes, classes, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p0[:, -1] = 0 if kind == "absorbing" else p0[:, -1]
    x_t = torch.arange(classes)
    if kind == "absorbing":  # an unmasked token was itself
        p0[:-1] = torch.eye(classes, dtype=torch.float64)[:-1]
    p0 /= p0.sum(1, keepdim=True)
    ours = posterior(x_t, p0, step, before)
    for now in range(classes):
        expected = torch.zeros(classes, dtype=torch.float64)
        for x_0 in range(classes):
            if p0[now, x_0] > 0:
                joint = before[x_0] * step[:, now]  # over x_{t-1}
                expected += p0[now, x_0] * joint / joint.sum()
        torch.testing.assert_close(ours[now], expected)
    torch.testing.assert_close(ours.sum(1), torch.ones(classes, dtype=torch.float64))
    if kind == "absorbing":
        earlier = float(alive) / (1 - BETAS[3])
        torch.testing.assert_close(absorbing_posterior(x_t, p0, float(alive), earlier), ours)


def test_weights_of_the_bound() -> None:
    t = torch.arange(1, 11, dtype=torch.float64)
    torch.testing.assert_close(elbo_weight(1 - t / 10, 1 - (t - 1) / 10), 1 / t)


def test_reverse_steps_reveal_a_share_of_one_over_t() -> None:
    """abar_t = 1 - t/T: revealed tokens never change, 1/t of the masks goes in every step, none is left."""
    steps, mask = 8, 5
    x = torch.full((4, 4000), mask)
    p0 = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.0, 0.0]).expand(4, 4000, 6)
    generators = streams(0, 0, 4)
    for t in range(steps, 0, -1):
        new = reverse_step(x, p0, 1 - t / steps, 1 - (t - 1) / steps, generators)
        assert torch.equal(new[x != mask], x[x != mask])
        share = ((x == mask) & (new != mask)).sum() / (x == mask).sum()
        assert abs(float(share) - 1 / t) < 0.02
        x = new
    assert not (x == mask).any()
    torch.testing.assert_close(torch.bincount(x.flatten(), minlength=6) / 16000, p0[0, 0], atol=0.02, rtol=0)
    again = reverse_step(torch.full((1, 9), mask), p0[:1, :9], 0.0, 0.5, streams(0, 2, 1))
    together = reverse_step(torch.full((4, 9), mask), p0[:, :9], 0.0, 0.5, streams(0, 0, 4))
    assert torch.equal(together[2:3], again)


def test_flow_matching(golden: Callable[[str], Any]) -> None:
    g = golden("discrete_diffusion")
    path, time, x_1 = MixturePath(g.config["loops"]["flow"]["n"]), g.inputs["fm_t"], g.inputs["fm_x1"]
    torch.testing.assert_close(path.kappa(time), g.outputs["fm_alpha"])
    torch.testing.assert_close(path.rate(time), g.outputs["fm_d_alpha"] / g.outputs["fm_sigma"])
    x_0 = torch.full_like(x_1, g.config["vocabulary"])
    x_t = path.noised(x_0, x_1, time, g.inputs["fm_uniform"])
    assert torch.equal(x_t, g.outputs["fm_x_t"])
    logits = g.inputs["fm_logits"]
    velocity = path.velocity(x_t, logits.softmax(-1), time)
    torch.testing.assert_close(velocity, g.outputs["fm_velocity"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(path.loss(logits, x_1, x_t, time), g.outputs["fm_generalized_kl"], atol=1e-4, rtol=1e-4)


def test_euler_steps_end_in_the_data() -> None:
    path, p1 = MixturePath(2.0), torch.tensor([0.2, 0.8, 0.0]).expand(2, 6000, 3)
    x, generators = torch.full((2, 6000), 2), streams(1, 0, 2)
    for step in range(20):
        new = path.euler_step(x, p1, step / 20, 1 / 20, generators)
        x = new
        if step == 9:  # kappa(1/2) = 1/4
            assert abs(float((x != 2).float().mean()) - 0.25) < 0.05
    torch.testing.assert_close(torch.bincount(x.flatten(), minlength=3) / 12000, p1[0, 0], atol=0.02, rtol=0)


def test_bad_values() -> None:
    with pytest.raises(ConfigError, match="kind = 'masked'"):
        transition("masked", 0.1, 4)
    with pytest.raises(ConfigError, match=r"beta = 1\.5"):
        transition("uniform", 1.5, 4)
    with pytest.raises(ConfigError, match=r"power = 0\.0"):
        MixturePath(0.0)
