"""What ``zoo show --memory`` predicts against what torch's allocator hands out in a training step on a CPU.

python benchmarks/predicted_memory.py
"""

from __future__ import annotations

from zoo.compare.memory import measure_recipe, predict_recipe
from zoo.recipe import resolve

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


def main() -> None:
    print("| model | scale | batch | precision | predicted MB | measured MB | ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, scale, batch_size in RUNS:
        for precision in ("fp32", "bf16"):
            recipe = resolve(name, scale=scale)
            predicted = predict_recipe(recipe, batch_size, precision, "cpu")[0].peak
            took = measure_recipe(recipe, batch_size, precision)
            cells = (name, scale, batch_size, precision, f"{predicted / 1e6:.1f}", f"{took / 1e6:.1f}")
            print("| " + " | ".join(map(str, cells)) + f" | {predicted / took:.3f} |", flush=True)


if __name__ == "__main__":
    main()
