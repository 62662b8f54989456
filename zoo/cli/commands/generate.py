"""zoo generate: text for images."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        "zoo generate", description="Text for images from a run, a checkpoint or a hub id."
    )
    parser.add_argument("checkpoint", help="run directory, checkpoint folder, official file or hub id")
    parser.add_argument("--image", action="append", required=True, metavar="FILE", help="may be given several times")
    parser.add_argument("--prompt", help="the question or instruction; default: the template's own")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = greedy")
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    parser.add_argument("--model", help="recipe of an official file")
    arguments = parser.parse_args(argv)
    from zoo.cli.checkpoint import load
    from zoo.cli.images import open_image
    from zoo.errors import ConfigError

    images = [open_image(path) for path in arguments.image]
    module = load(arguments.checkpoint, arguments.model)
    if not hasattr(module.model, "generate_text"):
        raise ConfigError(f"{module.recipe.name} writes no text: take a model with a decoder, e.g. llava")
    prompts = None if arguments.prompt is None else [arguments.prompt] * len(images)
    texts = module.generate_text(
        images, prompts, max_new_tokens=arguments.max_new_tokens, temperature=arguments.temperature, seed=arguments.seed
    )
    for path, text in zip(arguments.image, texts, strict=True):
        print(f"{path}\t{text}" if len(images) > 1 else text)
    return 0
