"""Consistent self-attention over the images of a story beside the plain processors: memory and time of a forward pass.

    python benchmarks/consistent_attention.py                 # 8 images, 32 x 32 latents, both branches of guidance
    python benchmarks/consistent_attention.py --images 12 --window 4 --rounds 1

``--clock cpu`` counts the time of this process alone, for a machine with other work on it (one thread). Memory is the
peak of what a pass allocates beyond weights and inputs, as torch's profiler counts it on the CPU. The U-Net is Stable
Diffusion 1.5's in form, with a fraction of its widths: levels, blocks, heads and places of attention are the published
ones, so that attention has its published share of the tokens (1,024, 256 and 64 an image).

``dense`` is joint attention under a mask over all pairs of tokens, as the release has it: what gathering replaces.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from coca_step import peak_bytes  # declares torchvision's operations, which diffusers imports
from torch import Tensor
from zoo_stories.attention import Cast, ConsistentAttention, Passes
from zoo_stories.consistency import Consistency, choose_layers
from zoo_stories.together import consistent

from zoo.compare.record import git_state, hardware, versions
from zoo.denoisers.unet import UNetConfig

TEXT = 77
BRANCHES = 2


class Dense:
    """The release's form: one sequence of all images under a mask of all pairs, rate 0.5."""

    def __init__(self, images: int, layer: str, rules: Consistency) -> None:
        self.images, self.layer, self.rules = images, layer, rules

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        tokens = hidden_states.shape[1]
        keep = torch.zeros(self.images, tokens, dtype=torch.bool)
        for image in range(self.images):
            keep[image, self.rules.kept(image, tokens, 0)] = True
        of = torch.arange(self.images).repeat_interleave(tokens)
        mask = keep.flatten()[None] | (of[:, None] == of[None])  # [m n, m n]
        joint = hidden_states.view(BRANCHES, self.images * tokens, -1)
        q, k, v = (
            project(joint).unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out = attn.to_out[0](out.transpose(1, 2).flatten(2)).view_as(hidden_states)
        return out / attn.rescale_output_factor


def unet(width: int) -> Any:
    config = UNetConfig(widths=[width, 2 * width, 4 * width, 4 * width], groups=min(32, width // 4))
    torch.manual_seed(0)
    return config.build(768, grid=(32, 32)).eval().requires_grad_(False)


def passes(images: int, window: int, size: int, width: int, layers: str) -> dict[str, Callable[[], Tensor]]:
    denoiser = unet(width)
    latents = torch.randn(images, 4, size, size).repeat(BRANCHES, 1, 1, 1)
    times, text = torch.full((len(latents),), 500.0), torch.randn(len(latents), TEXT, 768)
    cast = Cast.together(images)

    def plain() -> Tensor:
        out: Tensor = denoiser(latents, times, text)
        return out

    def reading(**changes: Any) -> Callable[[], Tensor]:
        def forward() -> Tensor:
            with consistent(denoiser, Consistency(start_step=0, layers=layers, **changes)) as state:
                state.begin(cast)
                return plain()

        return forward

    def dense() -> Tensor:
        rules = Consistency(layers=layers)
        before = denoiser.attention_processors()
        new = {name: Dense(images, name, rules) for name in choose_layers(before, layers)}
        denoiser.set_attention_processors({**before, **new})
        try:
            return plain()
        finally:
            denoiser.set_attention_processors(before)

    found = {"plain": plain, "rate 0.5": reading(), "rate 1": reading(rate=1.0)}
    if window:
        found[f"rate 0.5, window {window} over passes"] = reading(window=window, stride=max(1, window // 2))
    return {**found, "dense mask": dense}


def attention(images: int, size: int, width: int) -> dict[str, Callable[[], Tensor]]:
    """One self-attention layer of the finest level alone."""
    layer = unet(width).net.up_blocks[-1].attentions[0].transformer_blocks[0].attn1
    x = torch.randn(BRANCHES * images, size * size, width)
    state = Passes(Consistency(start_step=0))
    state.begin(Cast.together(images))
    state.see(500.0, (size, size))
    own, joint = ConsistentAttention(state, "layer", layer.processor), Dense(images, "layer", Consistency())
    return {
        "plain": lambda: layer.processor(layer, x),
        "rate 0.5": lambda: own(layer, x),
        "dense mask": lambda: joint(layer, x),
    }


def measure(steps: dict[str, Callable[[], Tensor]], rounds: int, clock: Callable[[], float]) -> None:
    cpu = torch.device("cpu")
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    with torch.inference_mode():
        memory = {name: peak_bytes(step, cpu) / 2**20 for name, step in steps.items()}
        for turn in range(rounds):
            for name in list(steps)[:: 1 if turn % 2 else -1]:
                started = clock()
                steps[name]()
                seconds[name].append(clock() - started)
    print("| | MiB | memory over plain | ms | time over plain |\n| --- | --- | --- | --- | --- |")
    for name in steps:
        ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds["plain"], strict=True))
        print(
            f"| {name} | {memory[name]:.0f} | {memory[name] / memory['plain']:.2f} |"
            f" {1e3 * statistics.median(seconds[name]):.0f} | {ratio:.2f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--size", type=int, default=32, help="of the latents")
    parser.add_argument("--width", type=int, default=64, help="of the finest level; Stable Diffusion's is 320")
    parser.add_argument("--window", type=int, default=4, help="0 = none")
    parser.add_argument("--layers", default="auto")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    given = parser.parse_args()
    clock = time.process_time if given.clock == "cpu" else time.perf_counter
    if given.clock == "cpu":
        torch.set_num_threads(1)
    print(versions(), hardware(), git_state(), sep="\n")
    print(
        f"\n{given.images} images, {given.size} x {given.size} latents, both branches, layers {given.layers}; U-Net:\n"
    )
    measure(passes(given.images, given.window, given.size, given.width, given.layers), given.rounds, clock)
    print(f"\none layer, {given.size**2} tokens an image, width {given.width}:\n")
    measure(attention(given.images, given.size, given.width), given.rounds, clock)


if __name__ == "__main__":
    main()
