"""The contract of denoisers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from zoo.part import seeded
from zoo.testing.config import check_config, check_construction, check_gradients, check_reload, close, expect, scaled
from zoo.testing.config import shake as shaken

if TYPE_CHECKING:
    from torch import Tensor, nn

CHANNELS, GRID, WIDTH, POOLED = 4, (8, 16), 24, 20


def check_denoiser(name: str, *, scale: str | None = "tiny") -> None:
    """Check a denoiser: noisy latents [N, C, h, w], their noise levels, and a condition of any length with its mask.

    The condition, the noise level and, where it is read, the pooled vector make a difference; what the mask hides makes
    none; the gradient reaches the condition, as whatever makes it has to learn through the denoiser; attention
    processors can be taken and put back.

    Raises:
        AssertionError: Naming the broken promise.
    """
    import torch

    what = f"denoiser {name!r}"
    check_config("denoiser", name)
    config = scaled("denoiser", name, scale)

    def build() -> nn.Module:
        module: nn.Module = config.build(WIDTH, channels=CHANNELS, grid=GRID, pooled_width=POOLED)
        return module

    check_construction(build, what)
    with seeded(0, what):
        module: Any = shaken(build())
    expect(
        (module.channels, module.condition_width) == (CHANNELS, WIDTH), f"{what}: channels or condition_width differ"
    )
    expect(module.pooled_width in (0, POOLED), f"{what}: pooled_width = {module.pooled_width}, expected 0 or {POOLED}")
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(3, CHANNELS, *GRID, generator=generator)
    condition = torch.randn(3, 9, WIDTH, generator=generator)
    mask = torch.arange(9) < torch.tensor([[9], [5], [1]])  # [N, S]
    time = torch.tensor([0.0, 400.0, 999.0])
    pooled = torch.randn(3, POOLED, generator=generator) if module.pooled_width else None

    def run(m: Any, rows: slice = slice(None), *, other: Mapping[str, Tensor] | None = None) -> Tensor:
        given = {"latents": latents, "time": time, "condition": condition, "condition_mask": mask, "pooled": pooled}
        prediction: Tensor = m(**{key: None if v is None else v[rows] for key, v in {**given, **(other or {})}.items()})
        return prediction

    with torch.no_grad():
        prediction = run(module)
    expect(prediction.shape == latents.shape, f"{what}: a prediction of shape {tuple(prediction.shape)} for latents of"
           f" {tuple(latents.shape)}")  # fmt: skip
    learned = condition.clone().requires_grad_()
    weighted = (run(module, other={"condition": learned}) * torch.randn(prediction.shape, generator=generator)).mean()
    check_gradients(module, weighted, what)
    seen = torch.zeros_like(condition) if learned.grad is None else learned.grad
    expect(bool((seen.abs().amax(2) > 0)[mask].all()), f"{what}: no gradient reaches the condition")
    expect(not bool(seen[~mask].any()), f"{what}: what the mask hides gets a gradient")
    with torch.no_grad():
        check_reload(module, build, run, what)
        close(prediction[:1], run(module, slice(0, 1)), f"{what}: row 0 depends on what shares its batch", 1e-5)
        hidden = torch.where(mask[..., None], condition, condition + 10)
        close(
            prediction,
            run(module, other={"condition": hidden}),
            f"{what}: what the mask hides makes a difference",
            1e-5,
        )
        short = module(latents[1:2], time[1:2], condition[1:2, :5], None, None if pooled is None else pooled[1:2])
        close(prediction[1:2], short, f"{what}: a shorter condition differs from a masked one", 1e-4)
        others: dict[str, dict[str, Tensor]] = {"condition": {"condition": condition.flip(0)}}
        others["noise level"] = {"time": time.flip(0)}
        if pooled is not None:
            others["pooled vector"] = {"pooled": pooled.flip(0)}
        for key, other in others.items():
            moved = float((run(module, other=other)[0] - prediction[0]).abs().max())
            expect(moved > 1e-4, f"{what}: the {key} makes no difference ({moved:.2g})")
        _check_processors(module, lambda: run(module), prediction, what)


def _check_processors(module: Any, run: Any, prediction: Tensor, what: str) -> None:
    processors = module.attention_processors()
    expect(set(module.attention_levels()) == set(processors), f"{what}: attention_levels names other processors")
    expect(all(GRID[0] % side == 0 for side in module.attention_levels().values()), f"{what}: a level does not divide")
    called: list[str] = []

    def heard(name: str, processor: Any) -> Any:
        def call(*inputs: Any, **more: Any) -> Any:
            called.append(name)
            return processor(*inputs, **more)

        return call

    module.set_attention_processors({name: heard(name, processor) for name, processor in processors.items()})
    close(prediction, run(), f"{what}: wrapped attention processors change the prediction", 1e-6)
    module.set_attention_processors(processors)
    expect(set(called) == set(processors), f"{what}: some attention processors are never called")
