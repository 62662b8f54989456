"""Greedy text decoding of the zoo beside ``generate`` of transformers with the same weights: tokens per second.

    python benchmarks/text_decoding.py                   # Phi with QK-norm, depth 8, width 512
    python benchmarks/text_decoding.py --family llama
    python benchmarks/text_decoding.py --clock cpu       # on a machine with other work on it (one thread)

transformers' model is saved with random weights and read back by the zoo twice: on the zoo's own trunk (``trunk``, what
Show-o, Transfusion and Chameleon write with), and as transformers' own modules behind the zoo's decoding (``wrapped``).
One process, alternating rounds, medians. Batch 1, and a batch of prompts of equal length and of unequal ones. All write
the same number of tokens, and the ids of all three are compared.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from coca_step import timed  # declares torchvision's operations, which transformers imports
from safetensors.torch import load_file
from torch import Tensor, nn

from zoo.compare.record import git_state, hardware, versions
from zoo.decoders.base import Decoder
from zoo.decoders.causal_lm import CausalLMConfig
from zoo.decoders.trunk_lm import TrunkLMConfig
from zoo.layout import Segment, lay_out
from zoo.sampling.text import Decoding, write
from zoo.weights.keymaps import llama, load_into, phi

PAD = 0


def peer_of(arguments: argparse.Namespace) -> Any:
    """transformers' model with random weights, large enough that its greedy ids vary."""
    a = arguments
    sizes = {
        "vocab_size": a.vocab, "hidden_size": a.width, "intermediate_size": 4 * a.width, "num_hidden_layers": a.depth,
        "num_attention_heads": a.width // 64, "max_position_embeddings": 2048, "tie_word_embeddings": False,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": PAD,
    }  # fmt: skip
    if a.family == "phi":
        config = transformers.PhiConfig(**sizes, qk_layernorm=True)
        peer: Any = transformers.PhiForCausalLM(config)
    else:
        peer = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        peer.get_input_embeddings().weight.normal_()  # else the biases decide, and every row repeats one id
    return peer.eval()


def on_trunk(arguments: argparse.Namespace, folder: Path) -> Decoder:
    """The zoo's trunk with the folder's weights."""
    a = arguments
    sizes = {
        "width": a.width, "depth": a.depth, "heads": a.width // 64, "kv_heads": 0, "ffn": 4 * a.width,
        "vocab_size": a.vocab, "context_length": 2048, "tie": False,
    }  # fmt: skip
    keys: Any
    if a.family == "phi":
        config = TrunkLMConfig(
            **sizes, norm="layer", placement="parallel", act="gelu_tanh", gated=False, bias=True, rope_share=0.5,
            qk_norm="layer", head_bias=True,
        )  # fmt: skip
        keys = phi
    else:
        config, keys = TrunkLMConfig(**sizes, eps=1e-6), llama
    model = config.build()
    parts = nn.ModuleDict({"trunk": model.trunk, "embed": model.embedding, "head": model.lm_head})
    load_into(parts, load_file(folder / "model.safetensors"), keys.keymap())
    return model.eval()


def wrapped(arguments: argparse.Namespace, folder: Path) -> Decoder:
    """transformers' modules behind the zoo's decoder interface."""
    a = arguments
    options: dict[str, Any] = {"tie_word_embeddings": False}
    model = CausalLMConfig(
        family=a.family, width=a.width, depth=a.depth, heads=a.width // 64, ffn=4 * a.width, vocab_size=a.vocab,
        context_length=2048, options=options | ({"qk_layernorm": True} if a.family == "phi" else {}),
    ).build()  # fmt: skip
    model.lm.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


def of_zoo(model: Decoder, ids: Tensor, real: Tensor, count: int) -> Callable[[], Tensor]:
    """Write greedily behind prompts with pads in front."""
    layout = lay_out([Segment("text", ids.shape[1])], real=real, position="real")
    decoding = Decoding(max_new_tokens=count)

    def run() -> Tensor:
        with torch.inference_mode():
            return write(model, model.embed(ids), layout, decoding, stop_ids=[], pad_id=PAD)

    return run


def of_peer(model: Any, ids: Tensor, real: Tensor, count: int) -> Callable[[], Tensor]:
    """``generate`` over the same prompts."""

    def run() -> Tensor:
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids, attention_mask=real.long(), max_new_tokens=count, min_new_tokens=count, do_sample=False,
                pad_token_id=PAD,
            )  # fmt: skip
        written: Tensor = out[:, ids.shape[1] :]
        return written

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="phi", choices=("phi", "llama"))
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the longest prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens to write")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"))
    arguments = parser.parse_args()
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time
    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    peer = peer_of(arguments)
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(folder)
        trunk, library = on_trunk(arguments, Path(folder)), wrapped(arguments, Path(folder))
    ids = torch.randint(1, arguments.vocab, (arguments.batch, arguments.prompt))
    unequal = torch.arange(arguments.prompt) >= torch.arange(arguments.batch)[:, None] * (
        arguments.prompt // (2 * arguments.batch)
    )
    cases = {
        "one prompt": (ids[:1], torch.ones(1, arguments.prompt, dtype=torch.bool)),
        f"{arguments.batch} prompts of one length": (ids, torch.ones_like(unequal)),
        f"{arguments.batch} prompts, padded": (ids.masked_fill(~unequal, PAD), unequal),
    }
    lines = []
    for name, (rows, real) in cases.items():
        runs = {
            "trunk": of_zoo(trunk, rows, real, arguments.new),
            "wrapped": of_zoo(library, rows, real, arguments.new),
            "transformers": of_peer(peer, rows, real, arguments.new),
        }
        written = {key: run() for key, run in runs.items()}
        assert written["transformers"].shape == (len(rows), arguments.new), written["transformers"].shape
        equal = all(torch.equal(ids, written["transformers"]) for ids in written.values())
        assert len(written["trunk"].unique()) > arguments.new // 4, "the ids hardly vary: no test of equality"
        seconds = timed({key: _quiet(run) for key, run in runs.items()}, arguments.rounds, torch.device("cpu"), clock)
        rate = {key: len(rows) * arguments.new / statistics.median(values) for key, values in seconds.items()}
        ratio = {
            key: statistics.median(b / a for a, b in zip(seconds[key], seconds["transformers"], strict=True))
            for key in ("trunk", "wrapped")
        }
        lines.append(
            f"| {name} | {rate['trunk']:.0f} | {rate['wrapped']:.0f} | {rate['transformers']:.0f} |"
            f" {ratio['trunk']:.2f} | {ratio['wrapped']:.2f} | {'yes' if equal else 'NO'} |"
        )
    state, machine = git_state() or {"commit": "installed", "dirty": False}, hardware()
    commit = state["commit"][:12] + (" (dirty)" if state["dirty"] else "")
    print(
        f"commit {commit}; {machine['cpu']}, {torch.get_num_threads()} threads; torch {versions()['torch']};", end=" "
    )
    print(f"transformers {transformers.__version__}; fp32; {arguments.family}, depth {arguments.depth},", end=" ")
    print(f"width {arguments.width}, {arguments.vocab} ids; {arguments.prompt} tokens read, {arguments.new} written;")
    print(f"medians of {arguments.rounds} alternating rounds, {arguments.clock} time; tokens/s\n")
    print("| | zoo's trunk | transformers' modules, zoo's decoding | generate | ratio | ratio | ids equal |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    print("\n".join(lines))


def _quiet(run: Callable[[], Tensor]) -> Callable[[], None]:
    def step() -> None:
        run()

    return step


if __name__ == "__main__":
    main()
