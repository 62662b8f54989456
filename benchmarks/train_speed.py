"""Training speed at ``scale=tiny`` beside the public implementation, and as a share of the machine's fp32 matmul rate.

    python benchmarks/train_speed.py            # a Markdown table; about two minutes on two cores

Each row runs the same architecture, batch and optimizer twice in one process, alternating: as the zoo trains it (model,
objective, AdamW, clipping) and as the public classes do (open_clip's CLIP with its ClipLoss; transformers'
LlavaForConditionalGeneration). Data loading is left out on both sides. The matmul rate is that of a 1024 x 1024 fp32
product.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import zoo
from zoo.api import build_module
from zoo.compare.flops import count_recipe
from zoo.compare.record import git_state, hardware, versions
from zoo.recipe import resolve
from zoo.torchvision_ops import ensure

ensure()


def matmul_rate(seconds: float = 2.0) -> float:
    """Floating point operations a second of a 1024 x 1024 fp32 product."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    for _ in range(3):
        a @ b
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        a @ b
        count += 1
    return 2 * 1024**3 * count / (time.perf_counter() - started)


def timed(steps: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each step function, run in alternation so that the machine's moods meet both."""
    for step in steps.values():
        step()
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def stepper(parameters: list[torch.nn.Parameter], loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return step


def clip(batch: int) -> tuple[Any, dict[str, Callable[[], None]]]:
    import open_clip

    recipe = resolve("clip", scale="tiny", values={"stages": "joint"})
    module = build_module(recipe, seed=0).train()
    data = module.model.example_batch(batch)
    data["pixel_values"] = torch.randn_like(data["pixel_values"])
    image, text = recipe.parts["encoder"][1], recipe.parts["text_encoder"][1]
    ids = data["input_ids"]
    peer = open_clip.CLIP(
        embed_dim=128,
        vision_cfg={
            "image_size": image.image_size, "patch_size": image.patch_size, "width": image.width, "layers": image.depth,
            "head_width": image.width // image.heads, "mlp_ratio": image.ffn / image.width,
        },
        text_cfg={
            "context_length": ids.shape[1], "vocab_size": text.vocab_size, "width": text.width, "heads": text.heads,
            "layers": text.depth, "mlp_ratio": text.ffn / text.width,
        },
        quick_gelu=True,
    ).train()  # fmt: skip
    criterion = open_clip.ClipLoss()

    def peer_loss() -> torch.Tensor:
        return criterion(*peer(data["pixel_values"], ids))

    own = [p for p in module.parameters() if p.requires_grad]
    steps = {"zoo": stepper(own, lambda: module.losses(data)[0]), "peer": stepper(list(peer.parameters()), peer_loss)}
    return recipe, steps


def llava(batch: int) -> tuple[Any, dict[str, Callable[[], None]]]:
    import transformers

    recipe = resolve("llava", choices={"connector": "mlp"}, scale="tiny", values={"stages": "joint"})
    module = build_module(recipe, seed=0).train()
    data = module.model.example_batch(batch)
    data["pixel_values"] = torch.randn_like(data["pixel_values"])
    image, text = recipe.parts["encoder"][1], recipe.parts["decoder"][1]
    image_id = int(module.model.image_token_id)  # a row of the peer's table, none of ours
    vision = transformers.CLIPVisionConfig(
        image_size=image.image_size, patch_size=image.patch_size, hidden_size=image.width,
        intermediate_size=image.ffn, num_hidden_layers=image.depth, num_attention_heads=image.heads,
    )  # fmt: skip
    language = transformers.LlamaConfig(
        vocab_size=max(text.vocab_size, image_id + 1), hidden_size=text.width, intermediate_size=text.ffn,
        num_hidden_layers=text.depth, num_attention_heads=text.heads, num_key_value_heads=text.kv_heads,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=language, image_token_index=image_id,
        vision_feature_layer=-2,
    )  # fmt: skip
    ids = data["input_ids"].clone()
    peer = transformers.LlavaForConditionalGeneration(config).train()
    peer.requires_grad_(True)

    def peer_loss() -> torch.Tensor:
        out = peer(
            input_ids=ids, pixel_values=data["pixel_values"], attention_mask=data["attention_mask"].long(),
            labels=data["labels"],
        )  # fmt: skip
        return out.loss

    own = [p for p in module.parameters() if p.requires_grad]
    steps = {"zoo": stepper(own, lambda: module.losses(data)[0]), "peer": stepper(list(peer.parameters()), peer_loss)}
    return recipe, steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=8)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rate = matmul_rate()
    rows = []
    for name, make in (("clip", clip), ("llava connector=mlp", llava)):
        recipe, steps = make(arguments.batch)
        flops = count_recipe(recipe)[0].per_sample
        seconds = timed(steps, arguments.rounds)
        own, peer = arguments.batch / seconds["zoo"], arguments.batch / seconds["peer"]
        rows.append(f"| {name} | {own:.0f} | {peer:.0f} | {own / peer:.2f} | {own * flops / rate:.0%} |")
    state = git_state() or {"commit": "installed", "dirty": False}
    machine = hardware()
    commit = state["commit"][:12] + (" (dirty)" if state["dirty"] else "")
    print(f"commit {commit}; {machine['cpu']}, {machine['threads']} threads; torch {versions()['torch']}; fp32;")
    print(f"batch {arguments.batch}; matmul {rate / 1e9:.0f} GFLOP/s; zoo {zoo.__version__}\n")
    print("| model, scale=tiny | zoo samples/s | public class samples/s | ratio | share of matmul rate |")
    print("| --- | --- | --- | --- | --- |")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
