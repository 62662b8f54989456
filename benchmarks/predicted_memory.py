"""What ``zoo show --memory`` predicts against what torch's allocator hands out in a training step on a CPU.

python benchmarks/predicted_memory.py
"""

from __future__ import annotations

from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from zoo.api import build_module
from zoo.compare.memory import predict_recipe
from zoo.nn.cpu_attention import full_precision_attention
from zoo.recipe import Recipe, resolve

RUNS = (
    ("clip", "tiny", 64),
    ("llava", "tiny", 32),
    ("coca", "tiny", 64),
    ("coca", "small", 16),
    ("blip2-opt", "tiny", 16),
    ("vlmo", "small", 8),
    ("transfusion", "tiny", 32),
    ("transfusion", "small", 8),
)


def measured(recipe: Recipe, batch_size: int, bf16: bool) -> int:
    """Peak bytes of a second step: what stands before it, and the largest sum of what is handed out and taken back."""
    module = build_module(recipe, seed=0)
    module.set_stage(0)
    module.train()
    batch = module.model.example_batch(batch_size)
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step() -> None:
        with full_precision_attention(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss, _ = module.losses(batch)
        optimizer.zero_grad()
        loss.backward()
        del loss
        optimizer.step()

    step()
    standing: list[Any] = [*module.parameters(), *module.buffers(), *batch.values()]
    standing += [p.grad for p in trained if p.grad is not None]
    standing += [value for state in optimizer.state.values() for value in state.values()]
    held = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in standing}.values())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    now = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return held + most


def main() -> None:
    print("| model | scale | batch | precision | predicted MB | measured MB | ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, scale, batch_size in RUNS:
        for precision in ("fp32", "bf16"):
            recipe = resolve(name, scale=scale)
            predicted = predict_recipe(recipe, batch_size, precision, "cpu")[0].peak
            took = measured(recipe, batch_size, precision == "bf16")
            cells = (name, scale, batch_size, precision, f"{predicted / 1e6:.1f}", f"{took / 1e6:.1f}")
            print("| " + " | ".join(map(str, cells)) + f" | {predicted / took:.3f} |", flush=True)


if __name__ == "__main__":
    main()
