"""Noising and the ways back: against the goldens, diffusers, and paths that are known in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)
from torch import Tensor

from zoo.diffusion import ode
from zoo.diffusion.noising import DDPM, PREDICTIONS, SCHEDULES, Flow, Process
from zoo.diffusion.times import LEVELS, sinusoid
from zoo.errors import ConfigError
from zoo.sampling.diffusion import SPACINGS, Denoising, denoise, gaussian
from zoo.sampling.text import streams

EXACT = {"atol": 1e-6, "rtol": 1e-6}
STEPS = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture
def g(golden: Callable[[str], Any]) -> Any:
    return golden("transfusion")


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def replayed(monkeypatch: pytest.MonkeyPatch, noises: Tensor) -> None:
    """Let the schedulers add recorded noise instead of their own."""
    left = list(noises)
    for module in ("ddpm", "ddim"):
        monkeypatch.setattr(f"diffusers.schedulers.scheduling_{module}.randn_tensor", lambda *_, **__: left.pop(0))


def test_schedule(g: Any) -> None:
    scheduler = DDPM().scheduler
    torch.testing.assert_close(scheduler.betas, g.outputs["betas"], **EXACT)
    torch.testing.assert_close(scheduler.alphas_cumprod, g.outputs["alphas_cumprod"], **EXACT)
    assert (scheduler.alphas_cumprod - g.outputs["plain_cosine"]).abs().max() < 0.0075
    assert scheduler.betas.max() <= 0.9991
    assert not scheduler.config.clip_sample  # latents are not pixels


def test_noise_at_every_time_is_the_golden(g: Any) -> None:
    clean, noise, time = g.inputs["x0"], g.inputs["noise"], g.inputs["t"]
    torch.testing.assert_close(DDPM().corrupt(clean, noise, time), g.outputs["x_t"], **EXACT)
    torch.testing.assert_close(Flow().corrupt(clean, noise, g.inputs["flow_t"]), g.outputs["flow_x_t"], **EXACT)
    torch.testing.assert_close(Flow().target(clean, noise, g.inputs["flow_t"]), g.outputs["flow_target"], **EXACT)


def test_time_embedding(g: Any) -> None:
    torch.testing.assert_close(sinusoid(g.inputs["t"], 16), g.outputs["time_embedding"], **EXACT)
    odd = sinusoid(torch.tensor([3.0, 8.0]), 5)
    assert odd.shape == (2, 5)
    assert torch.equal(odd[:, 4], torch.zeros(2))


@pytest.mark.parametrize(
    ("prediction", "eta", "spacing"), [("epsilon", 0.0, "trailing"), ("v_prediction", 0.5, "leading")]
)
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_steps_are_the_golden(
    g: Any, monkeypatch: pytest.MonkeyPatch, prediction: str, eta: float, spacing: str, sampler: str
) -> None:
    seen: list[Tensor] = []
    times: list[float] = []

    def predict(x: Tensor, level: Tensor) -> Tensor:
        seen.append(x)
        times.append(float(level[0]))
        return g.inputs["sampler_model_out"][len(times) - 1]

    replayed(monkeypatch, g.inputs["sampler_noise"])
    how = Denoising(sampler=sampler, steps=8, eta=eta if sampler == "ddim" else 0.0, spacing=spacing)
    last = denoise(DDPM(prediction=prediction), predict, g.inputs["sampler_x"], how, streams(0, 0, 2))
    expected = g.outputs[f"{sampler}_{prediction}_steps"]
    torch.testing.assert_close(torch.stack([*seen[1:], last]), expected, **STEPS)
    assert times == g.outputs[f"ddpm_{prediction}_timesteps"].tolist()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_ways_back_agree_with_diffusers(schedule: str, prediction: str, spacing: str, sampler: str) -> None:
    process = DDPM(schedule, prediction)
    x, weight = draws(3, 4, 2, 2), draws(4, 4, seed=1)

    def predict(x: Tensor, level: Tensor) -> Tensor:
        return torch.einsum("nchw,cd->ndhw", x, weight).tanh() + level[:, None, None, None] / LEVELS

    kind: Any = DDPMScheduler if sampler == "ddpm" else DDIMScheduler
    reference = kind(**process.fields(), timestep_spacing=spacing)
    reference.set_timesteps(7)
    rows = streams(5, 0, 3)
    expected = x
    for time in reference.timesteps:
        out = predict(expected, time.float().expand(3))
        expected = reference.step(out, time, expected, generator=rows).prev_sample
    found = denoise(process, predict, x, Denoising(sampler=sampler, steps=7, spacing=spacing), streams(5, 0, 3))
    torch.testing.assert_close(found, expected, **EXACT)
    alone = denoise(process, predict, x[1:2], Denoising(sampler=sampler, steps=7, spacing=spacing), streams(5, 1, 1))
    torch.testing.assert_close(alone, found[1:2], **STEPS)


FURTHER: dict[str, tuple[Any, tuple[str, ...]]] = {
    "dpm-solver": (DPMSolverMultistepScheduler, PREDICTIONS),
    "euler": (EulerDiscreteScheduler, ("epsilon", "v_prediction")),
    "pndm": (PNDMScheduler, ("epsilon", "v_prediction")),
}


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", FURTHER)
def test_multistep_ways_back_agree_with_diffusers(sampler: str, spacing: str) -> None:
    """With Stable Diffusion's schedule and offset, from an image as well as from noise."""
    kind, predictions = FURTHER[sampler]
    x, clean, weight = draws(2, 4, 2, 2), draws(2, 4, 2, 2, seed=2), draws(4, 4, seed=1)

    def predict(x: Tensor, level: Tensor) -> Tensor:
        return torch.einsum("nchw,cd->ndhw", x, weight).tanh() + level[:, None, None, None] / LEVELS

    for prediction in predictions:
        process = DDPM("scaled_linear", prediction)
        fields = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
        more = {"skip_prk_steps": True} if sampler == "pndm" else {}
        how = Denoising(sampler=sampler, steps=6, spacing=spacing, offset=1, clean_end=False)
        for first in (0, 2):
            reference = kind(**fields, **more, prediction_type=prediction, timestep_spacing=spacing)
            reference.set_timesteps(6)
            times = reference.timesteps[first:]
            expected = x * reference.init_noise_sigma
            if first:
                if hasattr(reference, "set_begin_index"):
                    reference.set_begin_index(first)
                expected = reference.add_noise(clean, x, times[:1])
            for time in times:
                out = predict(reference.scale_model_input(expected, time), time.float().expand(2))
                expected = reference.step(out, time, expected).prev_sample
            begun = {"known": clean, "strength": 4 / 6} if first else {}
            torch.testing.assert_close(denoise(process, predict, x, how, **begun), expected, **EXACT)  # type: ignore[arg-type]


def test_no_signal_is_left_at_the_last_level_with_zero_terminal_snr() -> None:
    """arXiv 2305.08891: v still tells the image there, predicted noise does not and is refused; trailing steps begin
    there."""
    process = DDPM("scaled_linear", "v_prediction", zero_snr=True)
    clean, noise, last = draws(2, 4, 3, 3), draws(2, 4, 3, 3, seed=1), torch.tensor([999, 999])
    torch.testing.assert_close(process.corrupt(clean, noise, last), noise, atol=1e-5, rtol=0)
    torch.testing.assert_close(process.target(clean, noise, last), -clean, atol=1e-5, rtol=0)
    assert float(DDPM("scaled_linear").snr(last.float())[0]) > 1e-3
    assert float(process.snr(last.float())[0]) < 1e-8
    levels: list[float] = []

    def exact(x: Tensor, level: Tensor) -> Tensor:
        levels.append(float(level[0]))
        a = process.scheduler.alphas_cumprod[int(level[0])]
        return ((a.sqrt() * x) - clean) / (1 - a).sqrt()  # the v of this image

    found = denoise(process, exact, noise, Denoising(sampler="ddim", steps=4, spacing="trailing"))
    torch.testing.assert_close(found, clean, atol=1e-4, rtol=1e-4)
    assert levels[0] == 999
    with pytest.raises(ValueError, match="zero_snr"):
        DDPM("scaled_linear", "epsilon", zero_snr=True)
    with pytest.raises(ConfigError, match="zero_snr"):
        denoise(process, exact, noise, Denoising(sampler="pndm", steps=4))


def test_signal_to_noise_is_the_schedules() -> None:
    process = DDPM("scaled_linear")
    level = torch.tensor([0.0, 250.0, 999.0])
    a = process.scheduler.alphas_cumprod[[0, 250, 999]]
    torch.testing.assert_close(process.snr(level), a / (1 - a))


@pytest.mark.parametrize("sampler", [*DDPM.samplers, "euler-flow", "midpoint"])
def test_what_is_known_stays(sampler: str) -> None:
    """Before the last step known latents are at the step's level, made of the noise it began with; then clean."""
    flow = sampler in ("euler-flow", "midpoint")
    process: Process = Flow() if flow else DDPM(prediction="v_prediction")
    how = Denoising(sampler=sampler.removesuffix("-flow"), steps=5)
    clean, noise = draws(2, 4, 4, 4), draws(2, 4, 4, 4, seed=1)
    unknown = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    unknown[0, :, :2], unknown[1, :, :, 3:] = True, True
    seen: list[tuple[Tensor, float]] = []

    def predict(x: Tensor, level: Tensor) -> Tensor:
        seen.append((x, float(level[0])))
        return x.tanh()

    found = denoise(process, predict, noise, how, streams(0, 0, 2), known=clean, unknown=unknown)
    there = ~unknown.expand_as(clean)
    assert torch.equal(found[there], clean[there])
    assert float((found[~there] - clean[~there]).abs().min()) > 0
    if sampler in ("ddpm", "ddim", "euler-flow"):
        x, level = seen[-1]
        time = torch.full((2,), 1 - level / LEVELS) if flow else torch.full((2,), int(level))
        torch.testing.assert_close(x[there], process.corrupt(clean, noise, time)[there], **STEPS)


def test_drawing_on_from_an_image_begins_where_strength_says() -> None:
    process, clean, noise = DDPM(prediction="v_prediction"), draws(1, 4, 3, 3), draws(1, 4, 3, 3, seed=1)
    begun: list[tuple[Tensor, float]] = []

    def predict(x: Tensor, level: Tensor) -> Tensor:
        begun.append((x, float(level[0])))
        return x * 0

    denoise(process, predict, noise, Denoising(sampler="ddim", steps=10), known=clean, strength=0.3)
    assert [level for _, level in begun] == [200.0, 100.0, 0.0]
    torch.testing.assert_close(begun[0][0], process.corrupt(clean, noise, torch.tensor([200])), **STEPS)
    begun.clear()
    denoise(Flow(), predict, noise, Denoising(sampler="euler", steps=10), known=clean, strength=0.3)
    assert len(begun) == 3
    torch.testing.assert_close(begun[0][0], 0.3 * noise + 0.7 * clean, **STEPS)
    for call in (
        lambda: denoise(process, predict, noise, Denoising(sampler="ddim", steps=3), known=clean, strength=0.2),
        lambda: denoise(process, predict, noise, Denoising(sampler="ddim", steps=3), strength=0.5),
        lambda: denoise(Flow(), predict, noise, Denoising(sampler="rk45"), known=clean, strength=0.5),
    ):
        with pytest.raises(ConfigError):
            call()


def test_predictions_that_agree_give_one_and_the_same_image() -> None:
    clean, noise, time = draws(2, 4, 3, 3), draws(2, 4, 3, 3, seed=1), torch.tensor([100, 100])
    found = []
    for prediction in PREDICTIONS:
        process = DDPM(prediction=prediction)
        noisy, target = process.corrupt(clean, noise, time), process.target(clean, noise, time)
        found.append(process.scheduler.step(target, 100, noisy, generator=streams(0, 0, 2)).pred_original_sample)
        assert (target - process.target(clean, noise, torch.tensor([900, 900]))).abs().max() > 0.1 or (
            prediction != "v_prediction"
        )
    for one in found:
        torch.testing.assert_close(one, clean, atol=1e-5, rtol=1e-4)


def test_ddim_with_eta_1_has_the_variance_of_ddpm_and_without_it_none() -> None:
    process = DDPM()
    out = draws(2, 4, 3, 3, seed=1)
    x = draws(2, 4, 3, 3)

    def run(sampler: str, eta: float, seed: int) -> Tensor:
        how = Denoising(sampler=sampler, steps=LEVELS, eta=eta)
        first: list[Tensor] = []

        def predict(x: Tensor, level: Tensor) -> Tensor:
            first.append(x)
            if len(first) == 3:
                raise StopIteration
            return out

        with pytest.raises(StopIteration):
            denoise(process, predict, x, how, streams(seed, 0, 2))
        return first[1]

    assert torch.equal(run("ddim", 0.0, 1), run("ddim", 0.0, 2))
    # at full steps the posterior variance is that of eta = 1, and so is the mean
    torch.testing.assert_close(run("ddim", 1.0, 3), run("ddpm", 0.0, 3), atol=2e-4, rtol=1e-3)
    assert (run("ddim", 1.0, 3) - run("ddim", 1.0, 4)).abs().max() > 1e-3


def test_ddim_up_and_down_again_returns_the_image() -> None:
    """Inversion by the same field, which here is that of one known image: 100 steps."""
    process, clean = DDPM(), draws(1, 4, 3, 3)
    alphas = process.scheduler.alphas_cumprod

    def predict(x: Tensor, level: Tensor) -> Tensor:
        a = alphas[int(level[0])]
        return (x - a.sqrt() * clean) / (1 - a).sqrt()

    times = list(range(9, LEVELS, 10))
    x = process.corrupt(clean, draws(1, 4, 3, 3, seed=1), torch.tensor([times[0]]))
    start = x
    for now, then in pairwise(times):
        eps = predict(x, torch.tensor([now]))
        x0 = (x - (1 - alphas[now]).sqrt() * eps) / alphas[now].sqrt()
        x = alphas[then].sqrt() * x0 + (1 - alphas[then]).sqrt() * eps
    found = denoise(process, predict, x, Denoising(sampler="ddim", steps=100))
    torch.testing.assert_close(found, clean, atol=2e-3, rtol=1e-2)
    assert (start - found).abs().max() > 0.02


@pytest.mark.parametrize("sampler", Flow.samplers)
def test_flow_with_the_exact_velocity_arrives_in_one_step(sampler: str) -> None:
    clean, noise = draws(2, 4, 3, 3), draws(2, 4, 3, 3, seed=1)
    levels: list[float] = []

    def predict(x: Tensor, level: Tensor) -> Tensor:
        levels.append(float(level[0]))
        return Flow().target(clean, noise, level)

    found = denoise(Flow(), predict, noise, Denoising(sampler=sampler, steps=1))
    torch.testing.assert_close(found, clean, atol=1e-5, rtol=1e-5)
    assert levels[0] == LEVELS  # it starts at noise alone


def test_euler_agrees_with_diffusers() -> None:
    weight = draws(4, 4, seed=1)

    def field(x: Tensor, time: Tensor) -> Tensor:
        return torch.einsum("nchw,cd->ndhw", x, weight).tanh() * (1 + time[:, None, None, None])

    x = draws(2, 4, 3, 3)
    reference = FlowMatchEulerDiscreteScheduler(shift=1.0)
    reference.set_timesteps(sigmas=[1 - n / 6 for n in range(6)])
    expected = x
    for time in reference.timesteps:  # runs from 1,000 to 0, and its velocity points to the noise
        out = -field(expected, (1 - time / 1000).expand(2))
        expected = reference.step(out, time, expected).prev_sample
    torch.testing.assert_close(ode.euler(field, x, 6), expected, **EXACT)


def spiral(x: Tensor, time: Tensor) -> Tensor:
    """dx/dt of x(t) = R(3 t) exp(-t^2 / 2) x(0): a turn and a decay that depends on time."""
    turn = torch.tensor([[0.0, -3.0], [3.0, 0.0]], dtype=x.dtype)
    return x @ turn.T - time[:, None] * x


def arrival(x: Tensor, time: float = 1.0) -> Tensor:
    c, s = math.cos(3 * time), math.sin(3 * time)
    return math.exp(-(time**2) / 2) * x @ torch.tensor([[c, -s], [s, c]], dtype=x.dtype).T


def error(solve: Callable[[Tensor, int], Tensor], steps: int) -> float:
    x = draws(5, 2).double()
    return float((solve(x, steps) - arrival(x)).abs().max())


def test_solvers_have_their_order() -> None:
    for solve, order in ((ode.euler, 1), (ode.midpoint, 2)):
        coarse, fine = (error(lambda x, n, solve=solve: solve(spiral, x, n), steps) for steps in (100, 200))
        assert order - 0.2 < math.log2(coarse / fine) < order + 0.2


@pytest.mark.parametrize("tolerance", [1e-3, 1e-6, 1e-9])
@pytest.mark.parametrize("first", [1, 40])
def test_adaptive_solver_keeps_its_tolerance(tolerance: float, first: int) -> None:
    found = error(lambda x, n: ode.rk45(spiral, x, n, rtol=tolerance, atol=tolerance), first)
    assert found < 20 * tolerance


def test_adaptive_solver_has_a_fifth_order_step() -> None:
    """One step that nothing refuses, halved: the error of a step falls by 2^6, of an arrival by 2^5."""
    x = draws(5, 2).double()

    def step(n: int) -> float:
        def slow(x: Tensor, time: Tensor) -> Tensor:
            return spiral(x, time / n) / n

        exact = arrival(x, 1 / n)
        return float((ode.rk45(slow, x, 1, rtol=1e9, atol=1e9) - exact).abs().max())

    assert 5.5 < math.log2(step(4) / step(8)) < 6.6


def test_adaptive_solver_treats_items_alone() -> None:
    x = torch.cat([draws(2, 2), 50 * draws(1, 2, seed=3)]).double()
    seen: list[int] = []

    def field(x: Tensor, time: Tensor) -> Tensor:
        seen.append(len(x))
        return spiral(x, time) * (1 + 10 * (x[:, :1].abs() > 20))

    together = ode.rk45(field, x, 10)
    for n in range(3):
        torch.testing.assert_close(ode.rk45(field, x[n : n + 1], 10), together[n : n + 1], atol=1e-12, rtol=1e-12)
    with pytest.raises(ConfigError, match="raise the tolerance"):
        ode.rk45(lambda x, time: 1e9 * torch.sin(1e9 * x), x, 10, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("process", [DDPM(), Flow()])
def test_times_stay_below_their_limit(process: Process) -> None:
    limit = torch.tensor([1.0, 0.5]).repeat(5000)
    uniform = torch.rand(10000, generator=torch.Generator().manual_seed(0))
    levels = process.level(process.times(uniform, limit)).view(-1, 2)
    assert len(levels[:, 0].unique()) > 900  # one an image
    assert levels.min() >= 0
    assert levels[:, 0].max() > 990
    assert levels[:, 0].max() <= LEVELS
    assert 490 < levels[:, 1].max() <= 500  # the paper's 1 to 500 are indices 0 to 499
    assert abs(levels[:, 0].mean() - 500) < 15
    assert abs(levels[:, 1].mean() - 250) < 8
    if isinstance(process, DDPM):
        assert levels[:, 1].max() == 499
        assert torch.equal(levels, levels.round())


def test_wrong_samplers_are_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match="unknown sampler 'dpm'"):
        Denoising(sampler="dpm")
    with pytest.raises(ConfigError, match="choose midpoint or euler or rk45"):
        denoise(Flow(), lambda x, t: x, draws(1, 1, 1, 1), Denoising(sampler="ddim"))
    with pytest.raises(ConfigError, match="choose ddpm or ddim"):
        Denoising(sampler="midpoint").of(DDPM())
    with pytest.raises(ConfigError, match="one generator an item"):
        denoise(DDPM(), lambda x, t: x, draws(1, 1, 1, 1), Denoising(sampler="ddpm", steps=2))
    with pytest.raises(ConfigError, match="steps = 0"):
        Denoising(steps=0)


def test_noise_is_an_items_own() -> None:
    both = gaussian(streams(4, 0, 2), (3, 2, 2), torch.device("cpu"))
    assert torch.equal(both[1:], gaussian(streams(4, 1, 1), (3, 2, 2), torch.device("cpu")))
    assert not torch.equal(both[0], both[1])
    assert gaussian([], (3, 2, 2), torch.device("cpu")).shape == (0, 3, 2, 2)
