"""Show-o's text-to-image loop with what stands before the image computed once, beside the same loop without.

    python benchmarks/showo_sampling.py                  # depth 12, width 512
    python benchmarks/showo_sampling.py --clock cpu      # on a machine with other work on it (one thread)

The paper's layout at 256 px: 129 tokens of text with the task token, then start, 256 codes and end; 8,192 codes,
guidance 1.75 as (1 + w)c - wu, the cosine schedule. One process, alternating rounds, medians; random weights, equal
random numbers, and the ids of all loops are compared. The text vocabulary is small so that the head has about the share
of the work that it has in Show-o (8 %; here 11 %).

- ``released``: every step forwards 387 tokens of both branches, and the head runs on all of them and all ids.
- ``head``: the same, but the head runs on slots that are still unknown and on codes.
- ``cached``: what the zoo does; the prefix is forwarded once, the empty one once for the whole batch.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from coca_step import timed
from torch import Tensor

from zoo.compare.record import git_state, hardware, versions
from zoo.decoders.trunk_lm import TrunkLMConfig
from zoo.layout import TokenBatch
from zoo.models.unified import MaskedUnified, UnifiedConfig
from zoo.sampling.masked import MaskedDecoding, Streams
from zoo.sampling.text import streams
from zoo.tokenizers.lfq import LFQConfig

TEXT, SIDE = 128, 16
"""Longest text with its ends, and codes along the side of an image."""


def model_of(arguments: argparse.Namespace) -> MaskedUnified:
    """Show-o with a smaller trunk, and an image tokenizer that is not used."""
    a = arguments
    decoder = TrunkLMConfig(
        width=a.width, depth=a.depth, heads=a.width // 64, kv_heads=0, ffn=4 * a.width, norm="layer",
        placement="parallel", act="gelu_tanh", gated=False, bias=True, rope_share=0.5, qk_norm="layer", tie=False,
        head_bias=True, vocab_size=1024, context_length=2048,
    )  # fmt: skip
    image = LFQConfig(image_size=16 * SIDE, patch_size=16, vocab_size=8192)
    parts: Any = {"decoder": ("trunk-lm", decoder), "image_tokenizer": ("lfq", image)}
    model = UnifiedConfig(style="show-o", text_length=TEXT).build(parts, 0)
    assert isinstance(model, MaskedUnified)
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


def prompts(model: MaskedUnified, batch: int, words: int) -> tuple[Tensor, Tensor]:
    """Ids and segments of both branches, padded in front to the paper's 129 tokens."""
    vocabulary, bos, eos = model.vocabulary, 1, 2
    task, pad = vocabulary.id("t2i"), vocabulary.id("pad")
    rows = []
    for text in [*torch.randint(3, 1024, (batch, words)).tolist(), *[[]] * batch]:
        row = [task, bos, *text, eos]
        rows.append([pad] * (TEXT + 1 - len(row)) + row)
    ids = torch.tensor(rows)
    return ids, torch.where(ids == pad, -1, 0)


class Whole:
    """In place of a ``Prefix``: forwards the whole sequence for every block."""

    def __init__(self, model: MaskedUnified, ids: Tensor, segment: Tensor) -> None:
        self.model, self.ids = model, ids
        self.layout = model.layout_with(segment, [SIDE * SIDE + 2])

    def block(self, embeds: Tensor, segment: str) -> Tensor:
        decoder = self.model.decoder
        hidden: Tensor = decoder(TokenBatch(torch.cat([decoder.embed(self.ids), embeds], 1), self.layout))
        return hidden[:, self.ids.shape[1] :]


class Released(Whole):
    """And runs the head on every position and every id, of which the caller then picks."""

    def block(self, embeds: Tensor, segment: str) -> Tensor:
        decoder = self.model.decoder
        hidden: Tensor = decoder(TokenBatch(torch.cat([decoder.embed(self.ids), embeds], 1), self.layout))
        return decoder.logits(hidden)[:, self.ids.shape[1] :]


def loops(
    model: MaskedUnified, ids: Tensor, segment: Tensor, decoding: MaskedDecoding, seed: int
) -> dict[str, Callable[[], Tensor]]:
    """The three loops; each returns the codes."""
    batch, slots = len(ids) // 2, SIDE * SIDE
    codes = torch.zeros(batch, slots, dtype=torch.long, device=ids.device)
    unknown = torch.ones_like(codes, dtype=torch.bool)
    prefix, head = MaskedUnified.prefix, MaskedUnified.code_logits

    def run(kind: type[Whole] | None) -> Tensor:
        # the model's own loop, with the part that is measured exchanged
        own: Any = model
        if kind is not None:
            own.prefix = lambda *_: kind(model, ids, segment)
        if kind is Released:
            own.code_logits = lambda logits: logits[..., model.vocabulary.code_ids]
        try:
            return model.masked_codes(ids, segment, codes, unknown, decoding, Streams(streams(seed, 0, batch)))
        finally:
            own.prefix, own.code_logits = prefix.__get__(model), head.__get__(model)

    return {"released": lambda: run(Released), "head": lambda: run(Whole), "cached": lambda: run(None)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=18)
    parser.add_argument("--words", type=int, default=TEXT - 2, help="tokens of the prompts; fewer are padded to 129")
    parser.add_argument("--guidance", type=float, default=1.75)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"))
    arguments = parser.parse_args()
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time
    torch.manual_seed(0)
    model = model_of(arguments)
    ids, segment = prompts(model, arguments.batch, arguments.words)
    decoding = MaskedDecoding(steps=arguments.steps, guidance=arguments.guidance)
    runs = loops(model, ids, segment, decoding, 0)
    drawn = {name: run() for name, run in runs.items()}
    equal = {name: torch.equal(codes, drawn["released"]) for name, codes in drawn.items()}
    assert len(drawn["released"].unique()) > 20, "the codes hardly vary: no test of equality"

    def quiet(run: Callable[[], Tensor]) -> Callable[[], None]:
        def step() -> None:
            run()

        return step

    seconds = timed({name: quiet(run) for name, run in runs.items()}, arguments.rounds, torch.device("cpu"), clock)
    state, machine = git_state() or {"commit": "installed", "dirty": False}, hardware()
    commit = state["commit"][:12] + (" (dirty)" if state["dirty"] else "")
    print(f"commit {commit}; {machine['cpu']}, {torch.get_num_threads()} threads; torch {versions()['torch']}; fp32;")
    print(
        f"depth {arguments.depth}, width {arguments.width}, {model.vocabulary.size} ids; {arguments.batch} image(s) of",
        end=" ",
    )
    print(f"256 codes, {arguments.words} words, {arguments.steps} steps, guidance {arguments.guidance};")
    print(f"medians of {arguments.rounds} alternating rounds, {arguments.clock} time\n")
    print("| loop | ms a step | the released loop's time over it | ids equal |")
    print("| --- | --- | --- | --- |")
    for name in runs:
        step = statistics.median(seconds[name]) / arguments.steps
        ratio = statistics.median(a / b for a, b in zip(seconds["released"], seconds[name], strict=True))
        print(f"| {name} | {1000 * step:.0f} | {ratio:.2f} | {'yes' if equal[name] else 'NO'} |")


if __name__ == "__main__":
    main()
