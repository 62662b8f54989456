"""A training step of the zoo's CoCa beside open_clip's at equal size, and beside ALBEF's: time and peak memory.

    python benchmarks/coca_step.py                       # scale=tiny, batch 128; about three minutes on two cores
    python benchmarks/coca_step.py --model coca --scale published --batch 4 --rounds 2

One process, alternating rounds, medians; forward, both losses, backward, clipping and AdamW, without data loading.
Both read the same pixels and ids, once as texts that fill the context of both models (equal work by construction), once
as names padded to the context length, as both data pipelines hand them over (on the CPU the zoo cuts common pads).
Memory is the peak of what a step allocates beyond weights and optimizer state, as torch's profiler counts it on the CPU
and the allocator on a GPU.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zoo.torchvision_ops import ensure

ensure()

from zoo.api import build_module  # noqa: E402
from zoo.compare.record import git_state, hardware, versions  # noqa: E402
from zoo.recipe import Recipe, resolve  # noqa: E402

Step = Callable[[], None]
NAME = 10
"""Tokens of an icon's name with its start and end, in the padded rows."""


def timed(
    steps: dict[str, Step], rounds: int, device: torch.device, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each step function in every round; the order turns from round to round."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(-2, rounds):  # two rounds to warm up
        for name in list(steps)[:: 1 if turn % 2 else -1]:
            started = clock()
            steps[name]()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn >= 0:
                seconds[name].append(clock() - started)
    return seconds


def peak_bytes(step: Step, device: torch.device) -> int:
    """Most bytes that were allocated at once during a step, beyond those that were when it began."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def stepper(parameters: list[torch.nn.Parameter], loss: Callable[[], Tensor], after: Step | None = None) -> Step:
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def step() -> None:
        loss().backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()  # here, so that a step begins and ends with weights and optimizer state alone
        if after is not None:
            after()

    return step


def of_zoo(recipe: Recipe, data: dict[str, Tensor] | None, batch: int, device: torch.device) -> tuple[Any, Step]:
    module = build_module(recipe, seed=0).train().to(device)
    rows = data if data is not None else {k: v.to(device) for k, v in module.model.example_batch(batch).items()}

    def after() -> None:
        module.on_train_batch_end(None, None, 0)

    learned = [p for p in module.parameters() if p.requires_grad]
    return module, stepper(learned, lambda: module.training_step(rows, 0), after)


def of_open_clip(recipe: Recipe, data: dict[str, Tensor], device: torch.device) -> tuple[Any, Step]:
    from open_clip.coca_model import CoCa
    from open_clip.loss import CoCaLoss

    image, pooler, text, decoder = (recipe.parts[s][1] for s in ("encoder", "connector", "text_encoder", "decoder"))
    size: Any
    sizes: list[dict[str, Any]] = []
    for size in (text, decoder):
        sizes.append(
            {
                "width": size.width, "heads": size.heads, "layers": size.depth, "vocab_size": size.vocab_size,
                "context_length": data["input_ids"].shape[1], "mlp_ratio": size.ffn / size.width,
            }
        )  # fmt: skip
    tower: Any = image
    peer = CoCa(
        embed_dim=sizes[0]["width"],
        multimodal_cfg=sizes[1],
        text_cfg={**sizes[0], "embed_cls": True, "output_tokens": True},
        vision_cfg={
            "image_size": tower.image_size, "patch_size": tower.patch_size, "width": tower.width, "layers": tower.depth,
            "head_width": tower.width // tower.heads, "mlp_ratio": tower.ffn / tower.width, "attentional_pool": True,
            "attn_pooler_queries": pooler.queries, "attn_pooler_heads": pooler.heads,  # type: ignore[attr-defined]
            "output_tokens": True,
        },
    )  # fmt: skip
    with torch.no_grad():
        torch.nn.init.normal_(peer.text_decoder.text_projection, std=sizes[0]["width"] ** -0.5)  # uninitialised memory
    peer = peer.train().to(device)
    criterion = CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0)

    def loss() -> Tensor:
        out = peer(data["pixel_values"], data["input_ids"])
        names = ("image_features", "text_features", "logits", "labels", "logit_scale")
        contrast, caption = criterion(*(out[name] for name in names))
        return contrast + caption

    return peer, stepper(list(peer.parameters()), loss)


def rows(recipe: Recipe, batch: int, length: int, words: int, device: torch.device) -> dict[str, Tensor]:
    image, text = recipe.parts["encoder"][1], recipe.parts["text_encoder"][1]
    side, vocab = image.image_size, text.vocab_size  # type: ignore[attr-defined]
    mask = torch.arange(length).expand(batch, -1) < words
    ids = torch.randint(4, vocab, (batch, length)).masked_fill(~mask, 0)
    data = {"pixel_values": torch.randn(batch, 3, side, side), "input_ids": ids, "attention_mask": mask}
    return {key: value.to(device) for key, value in data.items()}


def line(name: str, steps: dict[str, Step], arguments: argparse.Namespace, device: torch.device) -> str:
    seconds = timed(steps, arguments.rounds, device)
    own, peer = steps
    ratio = statistics.median(a / b for a, b in zip(seconds[own], seconds[peer], strict=True))
    memory = {key: peak_bytes(step, device) / 2**20 for key, step in steps.items()}
    a, b = (statistics.median(seconds[key]) for key in steps)
    return (
        f"| {name} | {a * 1e3:.0f} | {b * 1e3:.0f} | {ratio:.2f} | {memory[own]:.0f} | {memory[peer]:.0f} |"
        f" {memory[own] / memory[peer]:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="coca", help="coca or coca-vit-l-14")
    parser.add_argument("--scale", default="tiny")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cls-mask", default="corrected", choices=("corrected", "legacy"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    values = {"text_encoder": {"cls_mask": arguments.cls_mask}}
    recipe = resolve(arguments.model, scale=arguments.scale, values=values)
    context = recipe.parts["text_encoder"][1].context_length  # type: ignore[attr-defined]
    lines = []
    for name, length, words in (
        ("full texts of 16 tokens, against open_clip", 16, 16),
        (f"names of {NAME} tokens padded to {context}, against open_clip", context, NAME),
    ):
        data = rows(recipe, arguments.batch, length, words, device)
        # with a context as long as its texts, neither library pads
        own = resolve(
            arguments.model,
            scale=arguments.scale,
            values={"text_encoder": {**values["text_encoder"], "context_length": length}},
        )
        ours, step = of_zoo(own, data, arguments.batch, device)
        peer, their_step = of_open_clip(recipe, data, device)
        sizes = [sum(p.numel() for p in m.parameters()) for m in (ours, peer)]
        assert sizes[0] == sizes[1], f"different sizes: {sizes}"
        lines.append(line(name, {"zoo": step, "open_clip": their_step}, arguments, device))
        del ours, peer, step, their_step
    if arguments.scale == "tiny":
        _, step = of_zoo(recipe, None, arguments.batch, device)
        queue = {"objective": {"momentum-contrastive": {"queue_size": 8 * arguments.batch}}}
        albef = resolve("albef", scale="tiny", values=queue)
        _, their_step = of_zoo(albef, None, arguments.batch, device)
        name = "16 tokens, against the zoo's ALBEF (several passes for three losses, and a momentum copy)"
        lines.append(line(name, {"coca": step, "albef": their_step}, arguments, device))
    state, machine = git_state() or {"commit": "installed", "dirty": False}, hardware()
    commit = state["commit"][:12] + (" (dirty)" if state["dirty"] else "")
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{machine['cpu']}, {machine['threads']} threads"
    print(f"commit {commit}; {where}; torch {versions()['torch']}; fp32; {recipe.name}, scale {recipe.scale};")
    print(f"batch {arguments.batch}; medians of {arguments.rounds} alternating rounds\n")
    print("| step | zoo's CoCa, ms | the other, ms | time ratio | zoo's CoCa, MiB | the other, MiB | memory ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
