"""zoo generate: text for images, and images from texts, masks and instructions."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    from zoo.cli.drawing import draw, examples, request

    parser = argparse.ArgumentParser(
        "zoo generate",
        description="Text for images, or pictures, from a run, a checkpoint, a hub id or a recipe's name.",
        epilog="examples:\n  " + "\n  ".join(examples()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", metavar="MODEL", help="run directory, checkpoint, official file, hub id, recipe")
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE", help="with a recipe's name, e.g. scale=tiny")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="may be given several times")
    parser.add_argument("--prompt", help="the question or instruction about images; default: the template's own")
    parser.add_argument("--max-new-tokens", type=int, default=None, help="of text (32; 64 between images)")
    parser.add_argument("--temperature", type=float, default=0.0, help="of text; 0 = greedy")
    parser.add_argument("--seed", type=int, default=0, help="of sampling, and of a recipe's new weights")
    parser.add_argument("--model", help="recipe of an official file")
    drawing = parser.add_argument_group("drawing")
    drawing.add_argument("--text", action="append", default=[], help="what to draw; may be given several times")
    drawing.add_argument("--mask", action="append", default=[], metavar="FILE", help="white = draw --image anew there")
    drawing.add_argument("--edit", action="append", default=[], metavar="TEXT", help="how to change --image")
    drawing.add_argument(
        "--part", action="append", default=[], metavar="TEXT|@FILE", help="texts and images, in order, to continue"
    )
    drawing.add_argument("--out", metavar="FILE.png", help="the picture, or a sheet of several")
    drawing.add_argument("--count", type=int, default=None, help="pictures of each text, with seeds one after another")
    drawing.add_argument("--steps", type=int, default=None, help="passes over an image; default: the model's")
    drawing.add_argument(
        "--guidance",
        type=float,
        default=None,
        help="weight of the text: w of (1 + w)c - wu (Show-o), s of u + s(c - u) (others); default: the model's",
    )
    drawing.add_argument("--max-images", type=int, default=4, help="that continue --part, at most")
    arguments = parser.parse_intermixed_args(argv)
    from zoo.cli.commands.chat import load
    from zoo.cli.images import open_image
    from zoo.errors import ConfigError

    wanted = request(arguments)
    if wanted is not None:
        print(draw(load(arguments.checkpoint, arguments.changes, arguments.model, arguments.seed), wanted))
        return 0
    if not arguments.image:
        raise ConfigError("nothing to do: give --image FILE to describe, or --text and --out FILE.png to draw")
    images = [open_image(path) for path in arguments.image]
    module = load(arguments.checkpoint, arguments.changes, arguments.model, arguments.seed)
    if not hasattr(module.model, "generate_text"):
        raise ConfigError(f"{module.recipe.name} writes no text: take a model with a decoder, e.g. llava")
    prompts = None if arguments.prompt is None else [arguments.prompt] * len(images)
    texts = module.generate_text(
        images,
        prompts,
        max_new_tokens=32 if arguments.max_new_tokens is None else arguments.max_new_tokens,
        temperature=arguments.temperature,
        seed=arguments.seed,
    )
    for path, text in zip(arguments.image, texts, strict=True):
        print(f"{path}\t{text}" if len(images) > 1 else text)
    return 0
