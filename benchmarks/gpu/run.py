"""Builds, checks and times on a CUDA device, and writes one Markdown table with the device's name.

    python benchmarks/gpu/run.py --out table.md              # everything, at published sizes with random weights
    python benchmarks/gpu/run.py --parts attention sampling
    python benchmarks/gpu/run.py --tiny --device cpu         # every part at toy size: does the script work

- ``attention``: FlexAttention against SDPA with the layout's dense mask, over packed rows of Transfusion, packed rows
  of text alone, and a text before a full image; the largest difference over the largest value, of the outputs and (on
  CUDA) of the gradients.
- ``precision``: the losses of one model over equal batches in fp32 and under bf16 autocast, from the same weights.
- ``transfusion``: a training step of Transfusion 0.76B on packed sequences of 4,096 tokens with FlexAttention and with
  dense masks; the autoencoder is frozen and its latents are given.
- ``blip2``: a training step of BLIP-2's stage 2, ViT-g/14, Q-Former and OPT-2.7B, of which the Q-Former learns.
- ``sampling``: Show-o's loop (1.3B) with what stands before the image computed once, and without.

Model FLOP utilisation is what a step must compute over what the device could have. Transfusion: 6 for each weight of
the trunk, head and codec and each token, and 12 times depth and width for each pair of tokens that the mask lets read
(a third of it forward: QK and PV, two FLOPs a number); pads and pairs that nobody reads do not count. BLIP-2: what
the zoo counts of a sample (``zoo.compare.flops``). The device could: the published dense bf16 rate of its chip where it
is one of ``PEAKS``, else that of a large product, measured here; the table says which.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import showo_sampling

import zoo
from zoo.api import build_module
from zoo.compare.flops import count_recipe
from zoo.compare.record import git_state, hardware, versions
from zoo.data.packing import pack
from zoo.data.sequences import Image, Text, collate, layout_of, write_row
from zoo.layout import Layout, Segment, lay_out
from zoo.nn import flex
from zoo.nn.cpu_attention import full_precision_attention
from zoo.recipe import resolve
from zoo.sampling.masked import MaskedDecoding

PEAKS = (("H200", 989e12), ("H100 PCIe", 756e12), ("H100", 989e12), ("A100", 312e12), ("L40S", 362e12))
"""Part of a device's name -> its dense bf16 FLOPs a second, as NVIDIA's data sheets have them."""

PARTS = ("attention", "precision", "transfusion", "blip2", "sampling")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(step: Callable[[], Any], device: torch.device, rounds: int) -> float:
    """Median seconds of a step, after two to warm up."""
    taken = []
    for turn in range(-2, rounds):
        synchronize(device)
        started = time.perf_counter()
        step()
        synchronize(device)
        if turn >= 0:
            taken.append(time.perf_counter() - started)
    return statistics.median(taken)


@contextmanager
def bf16(device: torch.device, on: bool = True) -> Iterator[None]:
    with torch.autocast(device.type, torch.bfloat16, enabled=on), full_precision_attention():
        yield


def peak_rate(device: torch.device) -> tuple[float, str]:
    """FLOPs a second of dense bf16 products, and where the number is from."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, rate in PEAKS:
            if part in name:
                return rate, "data sheet"
    side = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / seconds(lambda: a @ b, device, 10), f"measured, {side} x {side} product"


class Table:
    """Rows of what was measured, written as they come."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.lines = path, []  # type: ignore[var-annotated]

    def add(self, *lines: str) -> None:
        for line in lines:
            print(line, flush=True)
        self.lines += lines
        if self.path is not None:
            self.path.write_text("\n".join(self.lines) + "\n", encoding="utf-8")


# -- packed rows -------------------------------------------------------------------------------------------------------


def packed_rows(model: Any, sequences: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    """Pairs of a caption of 8 to 64 tokens and an image, four in five caption first, and texts of 64 to 512, packed
    into about ``sequences`` sequences (random ids and latents)."""
    generator = torch.Generator().manual_seed(seed)
    words, vocabulary = model.processor_words, model.vocabulary
    room, rows = sequences * length, []

    def text(low: int, high: int) -> Text:
        count = int(torch.randint(low, high + 1, (), generator=generator))
        return Text(tuple(torch.randint(3, model.decoder_config.vocab_size, (count,), generator=generator).tolist()))

    long = max(8, min(512, length // 4))
    while room > 0:
        kind = float(torch.rand((), generator=generator))
        image = Image(model.places)
        parts: list[Text | Image] = [text(8, min(64, long)), image] if kind < 0.6 else [image, text(8, min(64, long))]
        task = "t2i" if kind < 0.6 else "mmu" if kind < 0.75 else "lm"
        rows.append(
            write_row(
                model.style, vocabulary, words, task, [text(long // 8, long)] if task == "lm" else parts,
                length=model.row_length,
            )
        )  # fmt: skip
        room -= len(rows[-1].ids)
    batch = collate(rows[:-1], model.style, vocabulary, words.pad)
    shape = (len(batch["image_given"]), model.image_tokenizer.channels, *model.image_config.grid)
    batch["image_latents"] = torch.randn(shape, generator=generator)
    return pack(batch, length)


def transfusion(tiny: bool) -> Any:
    """Transfusion 0.76B with random weights (the pretrained tokenizer is not needed: ids are random)."""
    from zoo.data.sequences import Words

    more: dict[str, Any] = {"scale": "tiny"} if tiny else {"decoder": "transfusion-0.76b"}
    module = zoo.build("transfusion", seed=0, **more)
    module.set_stage(0)
    module.model.processor_words = Words(1, 2, 0)
    return module.train()


def layout_in(model: Any, batch: dict[str, Tensor]) -> Layout:
    return layout_of(
        batch["segment"], model.style, slots=batch["image_slots"], padding="right", document=batch["document"]
    )


def pairs(layout: Layout) -> int:
    """How many tokens read how many, over the whole batch, pads left out."""
    total = 0
    for row in range(layout.batch):
        one = layout.select(torch.tensor([row], device=layout.segment.device))
        total += int((one.mask()[0, 0] & one.real[0][:, None]).sum())
    return total


# -- the parts ---------------------------------------------------------------------------------------------------------


def attention(table: Table, device: torch.device, tiny: bool, rounds: int) -> None:
    length, heads, width = (256, 2, 32) if tiny else (4096, 24, 64)
    batch = 1 if tiny else 4
    model = transfusion(True).model
    rows = packed_rows(model, batch, length)
    text = torch.arange(length)[None] // (length // 8)
    layouts = {
        "packed rows of Transfusion": layout_in(model, rows),
        "eight packed texts": lay_out([Segment("text", length)]).separate(text),
        "text, then a full image": lay_out([Segment("text", length // 2), Segment("image", length // 2, 1, "full")]),
    }
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    learns = device.type == "cuda"  # FlexAttention has no backward pass on a CPU
    table.add(
        "",
        f"## Attention, {batch} rows of {length}, {heads} heads of {width}, {str(dtype).removeprefix('torch.')}"
        + (", forward and backward" if learns else ", forward"),
        "",
        "| layout | pairs read | dense SDPA ms | FlexAttention ms | times | largest difference |",
        "| --- | --- | --- | --- | --- | --- |",
    )
    for name, layout in layouts.items():
        size = max(layout.batch, batch)
        layout = layout.to(device)
        read = pairs(layout) / (layout.batch * length**2)
        q, k, v = (
            torch.randn(size, heads, length, width, device=device, dtype=dtype, requires_grad=learns) for _ in range(3)
        )
        keep = layout.real.expand(size, -1)[:, None, :, None]
        masks: dict[str, Any] = {"flex": flex.block_mask(layout)}
        dense = layout.mask()
        masks["dense"] = torch.zeros(dense.shape, dtype=dtype, device=device).masked_fill_(~dense, -math.inf)

        def run(kind: str, masks: Any = masks, q: Tensor = q, k: Tensor = k, v: Tensor = v, keep: Any = keep) -> Any:
            with torch.set_grad_enabled(learns):
                if kind == "flex":
                    out = flex.attend(q, k, v, masks[kind], False)
                else:
                    out = F.scaled_dot_product_attention(q, k, v, masks[kind])
                out = out.masked_fill(~keep, 0)  # what pads read means nothing
                if not learns:
                    return [out]
                return [out.detach(), *torch.autograd.grad(out.float().square().sum(), (q, k, v))]

        apart = max(
            float((a - b).float().abs().max() / b.float().abs().max())
            for a, b in zip(run("flex"), run("dense"), strict=True)
        )
        took = {kind: seconds(lambda kind=kind, run=run: run(kind), device, rounds) for kind in ("dense", "flex")}
        table.add(
            f"| {name} | {read:.1%} | {1e3 * took['dense']:.2f} | {1e3 * took['flex']:.2f} |"
            f" {took['dense'] / took['flex']:.2f} | {apart:.1e} |"
        )


def precision(table: Table, device: torch.device, tiny: bool, rounds: int) -> None:
    steps = 4 if tiny else 100
    losses: dict[str, list[float]] = {}
    for kind in ("fp32", "bf16"):
        torch.manual_seed(0)
        module = zoo.build("transfusion", scale="tiny" if tiny else "small", seed=0)
        module.set_stage(0)
        module.train().to(device)
        from zoo.data.sequences import Words

        module.model.processor_words = Words(1, 2, 0)
        optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=3e-4)
        losses[kind] = []
        for step in range(steps):
            batch = packed_rows(module.model, 1 if tiny else 8, 2 * module.model.row_length, seed=step % 8)
            generator = torch.Generator().manual_seed(step)  # times and noise drawn on the CPU: equal for both
            images = len(batch["image_given"])
            batch["image_time"] = torch.randint(0, 1000, (images,), generator=generator)
            batch["image_noise"] = torch.randn(batch["image_latents"].shape, generator=generator)
            with bf16(device, kind == "bf16"):
                loss, _ = module.losses({name: value.to(device) for name, value in batch.items()})
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[kind].append(float(loss.detach()))
        assert all(math.isfinite(loss) for loss in losses[kind]), f"{kind}: a loss is not finite"
    apart = [abs(a - b) / abs(a) for a, b in zip(losses["fp32"], losses["bf16"], strict=True)]
    table.add(
        "",
        f"## Losses in fp32 and bf16: transfusion, scale={'tiny' if tiny else 'small'}, {steps} steps of AdamW",
        "",
        "| precision | first loss | last loss |",
        "| --- | --- | --- |",
        *(f"| {kind} | {values[0]:.4f} | {values[-1]:.4f} |" for kind, values in losses.items()),
        "",
        f"Relative difference of a step's losses: mean {statistics.mean(apart):.1e}, largest {max(apart):.1e}.",
    )


def trainer(module: Any, batch: dict[str, Tensor], device: torch.device) -> Callable[[], float]:
    """A training step: forward under bf16 autocast, backward, AdamW."""
    fused = {"fused": True} if device.type == "cuda" else {}
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-4, **fused)

    def step() -> Tensor:
        with bf16(device):
            loss, _ = module.losses(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step  # type: ignore[return-value]


def peak_gb(device: torch.device) -> str:
    return f"{torch.cuda.max_memory_allocated(device) / 1e9:.1f}" if device.type == "cuda" else "-"


def train_transfusion(table: Table, device: torch.device, tiny: bool, rounds: int) -> None:
    module = transfusion(tiny).to(device)
    model = module.model
    length = 2 * model.row_length if tiny else 4096
    batch = packed_rows(model, 2 if tiny else 4, length)
    config = model.decoder.trunk.config
    read = pairs(layout_in(model, batch))
    batch = {name: value.to(device) for name, value in batch.items()}
    tokens = int(batch["attention_mask"].sum())
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    weights = sum(p.numel() for n, p in named if "embedding" not in n)  # a table is looked up, not multiplied
    flops = 6 * weights * tokens + 12 * config.depth * config.width * read
    rate, source = peak_rate(device)
    table.add(
        "",
        f"## Training: {'transfusion, scale=tiny' if tiny else 'Transfusion 0.76B'},"
        f" {sum(p.numel() for _, p in named) / 1e6:,.1f} M parameters learn, bf16",
        "",
        f"{len(batch['document'])} packed sequences of {length}, {tokens} tokens"
        f" ({tokens / batch['document'].numel():.1%} of the positions), {len(batch['image_given'])} images; the"
        f" device's rate is {rate / 1e12:.1f} TFLOP/s ({source}).",
        "",
        "| attention | ms a step | tokens/s | TFLOP a step | model FLOP utilisation | peak memory GB | loss |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    )
    for kernel in ("sdpa", "auto") if device.type == "cuda" else ("sdpa",):
        flex.use_kernel(model, kernel)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        step = trainer(module, batch, device)
        took = seconds(step, device, rounds)
        loss = float(step())
        assert math.isfinite(loss), "the loss is not finite"
        name = "dense SDPA" if kernel == "sdpa" else "FlexAttention"
        table.add(
            f"| {name} | {1e3 * took:.1f} | {tokens / took:,.0f} | {flops / 1e12:.3g} |"
            f" {flops / took / rate:.1%} | {peak_gb(device)} | {loss:.3f} |"
        )


def train_blip2(table: Table, device: torch.device, tiny: bool, rounds: int) -> None:
    scale, size = ("tiny", 4) if tiny else (None, 64)
    recipe = resolve("blip2-opt", scale=scale)
    per_sample = count_recipe(recipe)[0].per_sample
    module = build_module(recipe, seed=0).to(device)
    module.set_stage(0)
    module.train()
    batch = module.model.example_batch(size)
    batch["pixel_values"] = torch.randn_like(batch["pixel_values"])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step = trainer(module, batch, device)
    took = seconds(step, device, rounds)
    loss = float(step())
    assert math.isfinite(loss), "the loss is not finite"
    rate, source = peak_rate(device)
    total, learn = (
        sum(p.numel() for p in module.parameters() if test(p)) for test in (lambda p: True, lambda p: p.requires_grad)
    )
    tokens = int(batch["attention_mask"].sum())
    table.add(
        "",
        f"## Training: {'blip2-opt, scale=tiny' if tiny else 'BLIP-2 stage 2 (ViT-g/14, Q-Former, OPT-2.7B)'}, bf16",
        "",
        f"{total / 1e6:,.1f} M parameters, of which {learn / 1e6:,.1f} M learn; batch {size}; the device's rate is"
        f" {rate / 1e12:.1f} TFLOP/s ({source}).",
        "",
        "| ms a step | images/s | language model tokens/s | TFLOP a step | model FLOP utilisation | peak memory GB |",
        "| --- | --- | --- | --- | --- | --- |",
        f"| {1e3 * took:.1f} | {size / took:,.1f} | {tokens / took:,.0f} | {size * per_sample / 1e12:.3g} |"
        f" {size * per_sample / took / rate:.1%} | {peak_gb(device)} |",
    )


@torch.inference_mode()
def sampling(table: Table, device: torch.device, tiny: bool, rounds: int) -> None:
    sizes = {"width": 64, "depth": 2, "batch": 1, "words": 20} if tiny else {}
    arguments = argparse.Namespace(**({"width": 2048, "depth": 24, "batch": 4, "words": 126} | sizes))
    torch.manual_seed(0)
    model = showo_sampling.model_of(arguments).to(device)
    ids, segment = (x.to(device) for x in showo_sampling.prompts(model, arguments.batch, arguments.words))
    decoding = MaskedDecoding(steps=2 if tiny else 18, guidance=1.75)
    runs = showo_sampling.loops(model, ids, segment, decoding, 0)
    table.add(
        "",
        f"## Drawing: Show-o's loop, depth {arguments.depth}, width {arguments.width}, {arguments.batch} image(s) of"
        f" 256 codes, {decoding.steps} steps, guidance 1.75, bf16",
        "",
        "| loop | seconds | images/s | times as fast | codes equal to the released loop's |",
        "| --- | --- | --- | --- | --- |",
    )
    with bf16(device):
        drawn = {name: run() for name, run in runs.items()}
        took = {name: seconds(run, device, max(2, rounds // 4)) for name, run in runs.items()}
    for name in runs:
        equal = float((drawn[name] == drawn["released"]).float().mean())
        table.add(
            f"| {name} | {took[name]:.3f} | {arguments.batch / took[name]:.2f} | {took['released'] / took[name]:.2f} |"
            f" {equal:.1%} |"
        )


STEPS: dict[str, Callable[[Table, torch.device, bool, int], None]] = {
    "attention": attention,
    "precision": precision,
    "transfusion": train_transfusion,
    "blip2": train_blip2,
    "sampling": sampling,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes: does the script work")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, help="also write the table here")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "no CUDA device here: run this where one is, or try the script itself with --tiny --device cpu"
        )
    if device.type == "cpu" and not arguments.tiny:
        raise SystemExit("published sizes take days on a CPU: add --tiny")
    state, machine = git_state() or {"commit": "installed", "dirty": False}, hardware()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else machine["cpu"]
    commit = state["commit"][:12] + (" (dirty)" if state["dirty"] else "")
    table = Table(arguments.out)
    size = "toy sizes, which say nothing of speed" if arguments.tiny else "published sizes, random weights"
    table.add(
        f"# {name}",
        "",
        f"Commit {commit}; torch {versions()['torch']}{f', CUDA {torch.version.cuda}' if torch.version.cuda else ''};"
        f" {size}; medians of {arguments.rounds} rounds.",
    )
    for part in arguments.parts:
        STEPS[part](table, device, arguments.tiny, 2 if arguments.tiny else arguments.rounds)
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
