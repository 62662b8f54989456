"""A training step of the zoo's BLIP-2 (stage 2) beside transformers' at equal sizes and weights: time and peak memory.

    python benchmarks/blip2_step.py                      # ViT of depth 12, width 384; about two minutes on one core
    python benchmarks/blip2_step.py --clock cpu          # on a machine with other work on it (one thread)

One process, alternating rounds, medians; forward, loss, backward, clipping and AdamW, without data loading. The eye and
OPT are frozen, the Q-Former, its norm of the image and its projection learn, in both. transformers'
``Blip2ForConditionalGeneration`` is saved and loaded by ``zoo.from_pretrained``'s loader, so that both start from the
same weights; their first losses are compared. Then the zoo's step with the feature cache, reading its tokens from
the cache's file in every step, against the step without; the last column is how much of its time a step loses, over
the frozen eye's share of its FLOPs, as ``zoo.compare.flops`` counts them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from coca_step import Step, peak_bytes, stepper, timed  # declares torchvision's operations, which transformers imports
from torch import Tensor, nn

from zoo.api import build_module
from zoo.compare.flops import Flops, count
from zoo.compare.record import git_state, hardware, versions
from zoo.data.feature_cache import FeatureStore
from zoo.module import ZooModule
from zoo.weights import load_model

WORDS = 16
"""Text tokens of a row, every one a target."""


def peer_of(arguments: argparse.Namespace) -> Any:
    """transformers' model with random weights, the eye and the language model frozen."""
    vision = transformers.Blip2VisionConfig(
        hidden_size=arguments.eye_width, intermediate_size=4 * arguments.eye_width,
        num_hidden_layers=arguments.eye_depth, num_attention_heads=arguments.eye_width // 64,
        image_size=arguments.image_size, patch_size=16,
    )  # fmt: skip
    qformer = transformers.Blip2QFormerConfig(
        hidden_size=256, num_hidden_layers=6, num_attention_heads=4, intermediate_size=1024,
        encoder_hidden_size=arguments.eye_width, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    vocab = arguments.vocab
    text = transformers.OPTConfig(
        vocab_size=vocab, hidden_size=arguments.width, word_embed_proj_dim=arguments.width,
        num_hidden_layers=arguments.depth, ffn_dim=4 * arguments.width, num_attention_heads=arguments.width // 64,
        max_position_embeddings=128, dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    config = transformers.Blip2Config(
        vision_config=vision, qformer_config=qformer, text_config=text, num_query_tokens=32, image_token_index=vocab - 1
    )
    peer = transformers.Blip2ForConditionalGeneration(config)
    with torch.no_grad():
        peer.query_tokens.normal_(std=0.5)  # zeros otherwise
    peer.train().requires_grad_(False)
    for part in (peer.qformer, peer.language_projection, peer.vision_model.post_layernorm):
        part.requires_grad_(True)
    peer.query_tokens.requires_grad_(True)
    return peer


def rows(arguments: argparse.Namespace) -> dict[str, Tensor]:
    """Pixels, 32 image slots and a text that fills its row, as ``example_batch`` has it."""
    ids = torch.randint(3, arguments.vocab - 1, (arguments.batch, 32 + WORDS))
    ids[:, :32] = arguments.vocab - 1
    side = arguments.image_size
    return {
        "pixel_values": torch.randn(arguments.batch, 3, side, side),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids, dtype=torch.bool),
        "labels": ids.masked_fill(ids == arguments.vocab - 1, -100),
    }


def stored(module: Any, pixels: Tensor, folder: Path) -> tuple[FeatureStore, list[int]]:
    """A store with the eye's tokens of ``pixels``, and their rows."""
    with torch.no_grad():
        tokens = module.model.encode_images(pixels).tokens
    store = FeatureStore(folder, {}, tuple(tokens.shape[1:]), tokens.dtype)
    keys = [n.to_bytes(16, "big") for n in range(len(tokens))]
    with store.filling():
        store.reserve(len(keys), 10**10)
        store.append(keys, tokens)
    return store, list(range(len(keys)))


def flops_of(recipe: Any) -> tuple[Flops, Flops]:
    """FLOPs of a sample without and with the cache, on the meta device."""
    with torch.device("meta"):
        module = build_module(recipe, 0)
    return count(module), count(module, cached=True)


def learned(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eye-width", type=int, default=384)
    parser.add_argument("--eye-depth", type=int, default=12)
    parser.add_argument("--image-size", type=int, default=160)
    parser.add_argument("--width", type=int, default=512, help="of OPT")
    parser.add_argument("--depth", type=int, default=6, help="of OPT")
    parser.add_argument("--vocab", type=int, default=8192, help="of OPT; its own is 50272")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"))
    arguments = parser.parse_args()
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time
    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    peer, data = peer_of(arguments), rows(arguments)
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(folder)
        network, recipe, _ = load_model(folder)
        module = ZooModule(network, recipe).train()
        store, places = stored(module, data["pixel_values"], Path(folder) / "features")
        others = {key: value for key, value in data.items() if key != "pixel_values"}
        own, theirs = (sum(p.numel() for p in learned(m)) for m in (module, peer))
        assert own == theirs, f"different sizes learn: {own} and {theirs}"

        def with_pixels() -> Tensor:
            return module.losses(data)[0]

        def with_cache() -> Tensor:
            return module.losses({**others, "image_tokens": store.read(places)})[0]

        def of_peer() -> Tensor:
            loss: Tensor = peer(**data).loss
            return loss

        losses = [f"{float(loss().detach()):.5f}" for loss in (with_pixels, with_cache, of_peer)]
        steps: dict[str, Step] = {
            "zoo": stepper(learned(module), with_pixels),
            "cached": stepper(learned(module), with_cache),
            "transformers": stepper(learned(peer), of_peer),
        }
        cpu = torch.device("cpu")
        seconds = timed(steps, arguments.rounds, cpu, clock)
        memory = {key: peak_bytes(step, cpu) / 2**20 for key, step in steps.items()}
    plain, cached = flops_of(recipe)
    share = 1 - cached.per_sample / plain.per_sample
    fall = 1 - statistics.median(a / b for a, b in zip(seconds["cached"], seconds["zoo"], strict=True))
    faster = statistics.median(b / a for a, b in zip(seconds["zoo"], seconds["transformers"], strict=True))
    rate = {key: arguments.batch / statistics.median(values) for key, values in seconds.items()}
    state, machine = git_state() or {"commit": "installed", "dirty": False}, hardware()
    commit = state["commit"][:12] + (" (dirty)" if state["dirty"] else "")
    print(f"commit {commit}; {machine['cpu']}, {torch.get_num_threads()} threads; torch {versions()['torch']}; fp32;")
    print(f"eye: depth {arguments.eye_depth}, width {arguments.eye_width}, {arguments.image_size} px;", end=" ")
    print(f"OPT: depth {arguments.depth}, width {arguments.width}, {arguments.vocab} tokens; batch {arguments.batch};")
    print(f"medians of {arguments.rounds} alternating rounds, {arguments.clock} time;", end=" ")
    print(f"first losses {', '.join(losses)} (zoo, cached, transformers)\n")
    print("| | zoo | transformers | ratio |")
    print("| --- | --- | --- | --- |")
    print(f"| samples/s | {rate['zoo']:.2f} | {rate['transformers']:.2f} | {faster:.2f} |")
    print(f"| peak memory of a step, MiB | {memory['zoo']:.0f} | {memory['transformers']:.0f} |", end=" ")
    print(f"{memory['zoo'] / memory['transformers']:.2f} |\n")
    print("| | without cache | with cache | the step's time falls by | the eye's share of the FLOPs | ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    print(f"| samples/s | {rate['zoo']:.2f} | {rate['cached']:.2f} | {fall:.1%} | {share:.1%} | {fall / share:.2f} |")
    print(f"| MiB | {memory['zoo']:.0f} | {memory['cached']:.0f} | | | |")


if __name__ == "__main__":
    main()
