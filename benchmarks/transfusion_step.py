"""Transfusion's training step and sampling beside the public ``transfusion-pytorch`` package: tokens and sequences a
second at equal parameters.

    pip install --no-deps --target PLACE transfusion-pytorch==0.20.0 axial-positional-embedding beartype einops einx \\
        ema-pytorch jaxtyping loguru rotary-embedding-torch torch-einops-utils torchdiffeq frozendict wadler-lindig
    PYTHONPATH=PLACE python benchmarks/transfusion_step.py
    PYTHONPATH=PLACE python benchmarks/transfusion_step.py --clock cpu     # on a machine with other work on it

Both are flow models with a linear patch codec over the same latents: an image is 16 x 16 patches of 32 numbers, behind
a text. The package's layers carry adaptive norms, gates and skips, about three times the parameters of a plain layer of
their width: the zoo's trunk has the same depth and is wider (``--match depth``), or the same width and is deeper
(``--match width``), and its feed-forward width closes what is left between the counts. One process, alternating rounds,
medians.

- training: a batch of such rows, forward, backward and AdamW.
- sampling: a text is read, an image drawn with guidance in 15 midpoint steps (30 evaluations, the package's default),
  and as many words written behind it as it has patches (the paper trains on both one to one); the same counts for all.
  ``default`` is the package's ``sample_one`` as it comes (``cache_kv=False``), ``cached`` the same with
  ``cache_kv=True``. Neither decodes latents to pixels.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from typing import Any

import torch
from coca_step import timed
from torch import Tensor

import zoo
from zoo.compare.record import git_state, hardware, versions
from zoo.data.sequences import Image, Text, collate, write_row

PATCHES, NUMBERS = 256, 32
TEXT = 1024
GUIDANCE = 3.0


def theirs(arguments: argparse.Namespace) -> Any:
    import transfusion_pytorch.transfusion as package
    from loguru import logger

    logger.remove()
    package.tqdm = partial(package.tqdm, disable=True)
    torch.manual_seed(0)
    heads = arguments.width // 64
    model = package.Transfusion(
        num_text_tokens=TEXT, dim_latent=NUMBERS, modality_default_shape=(PATCHES,),
        transformer={"dim": arguments.width, "depth": arguments.depth, "dim_head": 64, "heads": heads},
    )  # fmt: skip
    model.eos_id = -1  # every row writes to its end
    return model


def ours(arguments: argparse.Namespace, parameters: int) -> Any:
    """The zoo's model of as many parameters, but for the frozen autoencoder that nothing here uses."""

    def build(width: int, depth: int, ffn: int, device: str = "cpu") -> Any:
        with torch.device(device):
            return zoo.build(
                "transfusion-flow", scale="tiny", seed=0,
                decoder={
                    "width": width, "depth": depth, "heads": width // 64, "kv_heads": width // 64, "ffn": ffn,
                    "vocab_size": TEXT, "context_length": 1024,
                },
                patch_codec={"patch": 2}, image_tokenizer={"image_size": 256},
            )  # fmt: skip

    def count(width: int, depth: int, ffn: int = 0) -> int:
        return learned(build(width, depth, ffn or round(8 * width / 3), "meta").model)

    width, depth = arguments.width, arguments.depth
    if arguments.match == "width":
        depth = min(range(1, 6 * depth), key=lambda n: abs(count(width, n) - parameters))
    else:
        width = min(range(width, 4 * width, 64), key=lambda n: abs(count(n, depth) - parameters))
    wide = round(8 * width / 3)
    slope = count(width, depth, wide + 8) - count(width, depth, wide)
    return build(width, depth, wide + 8 * round((parameters - count(width, depth, wide)) / slope))


def learned(model: torch.nn.Module) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith("image_tokenizer."))


def sampled(arguments: argparse.Namespace, peer: Any, model: Any) -> dict[str, Any]:
    """One sequence a call: a prompt, an image, and ``written`` tokens of text."""
    prompt = torch.arange(arguments.prompt) % 200 + 20
    boi, written = model.vocabulary.id("boi"), arguments.written

    def package(cached: bool) -> list[Any]:
        return peer.sample_one(
            prompt=prompt, max_length=PATCHES + written - 2, cache_kv=cached, fixed_modality_shape=(PATCHES,),
            force_modality_at_start=0, modality_steps=16, cfg_scale=GUIDANCE, text_temperature=0.0,
        )  # fmt: skip

    inside, calls = model._next_token, [0]

    def scripted(hidden: Tensor, opens: bool, *others: Any) -> int:
        """The model's own choice is computed, and an image opened first and never again."""
        token = inside(hidden, False, *others)
        calls[0] += 1
        return boi if calls[0] == 1 else (token if token not in model.processor.stop_ids else 7)

    model._next_token, model._pictures = scripted, lambda latents: latents
    model.processor.text_ids = lambda text: tuple(prompt.tolist())
    how = {"steps": 15, "guidance": GUIDANCE, "sampler": "midpoint"}

    def zoo_() -> list[Any]:
        calls[0] = 0
        return model.generate_interleaved([["prompt"]], max_images=1, max_new_tokens=max(written, 1), **how)

    return {"zoo": zoo_, "default": lambda: package(False), "cached": lambda: package(True)}


def trained(arguments: argparse.Namespace, peer: Any, module: Any) -> dict[str, Any]:
    model = module.model
    latents = torch.randn(arguments.batch, 8, 32, 32)
    texts = torch.randint(20, TEXT - 20, (arguments.batch, arguments.prompt))
    rows = [
        write_row(
            model.style, model.vocabulary, model.processor.words, "t2i",
            [Text(tuple(text.tolist())), Image(PATCHES)], length=1024,
        )
        for text in texts
    ]  # fmt: skip
    batch = collate(rows, model.style, model.vocabulary, 0) | {"image_latents": latents}
    patches = torch.randn(arguments.batch, PATCHES, NUMBERS)
    samples = [[text, image] for text, image in zip(texts, patches, strict=True)]
    module.train()
    peer.train()
    mine = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    other = torch.optim.AdamW(peer.parameters(), lr=1e-4)

    def zoo_() -> None:
        mine.zero_grad()
        module.losses(batch)[0].backward()
        mine.step()

    def package() -> None:
        other.zero_grad()
        peer(samples).backward()
        other.step()

    return {"zoo": zoo_, "package": package}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=4, help="of the package's transformer")
    parser.add_argument("--match", choices=("depth", "width"), default="depth")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of text before the image")
    parser.add_argument("--written", type=int, default=256, help="tokens of text behind it, in sampling")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    arguments = parser.parse_args()
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time
    if arguments.clock == "cpu":
        torch.set_num_threads(1)
    peer = theirs(arguments)
    parameters = sum(p.numel() for p in peer.parameters())
    module = ours(arguments, parameters)
    trunk = module.model.decoder.trunk.config
    print(f"commit {git_state()}; {hardware()}; {versions()}")
    print(f"parameters: package {parameters:,}; zoo {learned(module.model):,}, {trunk.depth} layers of {trunk.width}")
    device = torch.device("cpu")

    steps = trained(arguments, peer, module)
    seconds = timed(steps, arguments.rounds, device, clock)
    tokens = arguments.batch * (arguments.prompt + PATCHES)
    ratio = statistics.median(b / a for a, b in zip(seconds["zoo"], seconds["package"], strict=True))
    for name, times in seconds.items():
        middle = statistics.median(times)
        print(f"training {name}: {tokens / middle:,.0f} tokens/s, {middle:.3f} s a step")
    print(f"training: the zoo is {ratio:.2f} times as fast")

    module.eval()
    peer.eval()
    calls = sampled(arguments, peer, module.model)
    out = calls["default"]()
    lengths = [part.numel() if torch.is_tensor(part) and not part.is_floating_point() else None for part in out]
    print(f"the package wrote {lengths[-1]} tokens behind the image, the zoo {arguments.written}")
    seconds = timed(calls, arguments.rounds, device, clock)
    for name, times in seconds.items():
        print(f"sampling {name}: {statistics.median(times):.3f} s a sequence")
    for name in ("default", "cached"):
        ratio = statistics.median(b / a for a, b in zip(seconds["zoo"], seconds[name], strict=True))
        print(f"sampling: the zoo is {ratio:.2f} times as fast as {name}")


if __name__ == "__main__":
    main()
