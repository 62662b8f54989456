"""zoo chat: a dialogue about images in the terminal, answers as they are written."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.errors import ConfigError, ZooError

if TYPE_CHECKING:
    from zoo.module import ZooModule

COMMANDS = ("/image", "/reset", "/quit")

HELP = "/image FILE shows another image and starts again, /reset forgets the turns, /quit ends"

LARGEST = 1_000_000_000
"""New weights that a recipe's name alone may ask for."""


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("zoo chat", description=f"Talk with a model about images. {HELP}.")
    parser.add_argument("model", metavar="MODEL", help="run directory, checkpoint folder, hub id, or a recipe's name")
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE", help="with a recipe's name, e.g. scale=tiny")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="may be given several times")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = greedy")
    parser.add_argument("--seed", type=int, default=0, help="of sampling, and of a recipe's new weights")
    parser.add_argument("--recipe", metavar="NAME", help="recipe of an official file")
    arguments = parser.parse_intermixed_args(argv)
    from zoo.cli.images import open_image
    from zoo.sampling.chat import Chat
    from zoo.sampling.text import Decoding

    images = [open_image(path) for path in arguments.image]
    decoding = Decoding(max_new_tokens=arguments.max_new_tokens, temperature=arguments.temperature, seed=arguments.seed)
    module = load(arguments.model, arguments.changes, arguments.recipe, arguments.seed)
    if not hasattr(module.model, "generate_text"):
        raise ConfigError(f"{module.recipe.name} writes no text: take a model with a decoder, e.g. llava")
    talk(Chat(module.model, decoding, images))
    return 0


def load(name: str, changes: Sequence[str], recipe: str | None, seed: int) -> ZooModule:
    """What ``zoo generate`` loads, or a recipe's model with new weights beside its pretrained parts.

    Raises:
        ConfigError: Changes of a checkpoint, or more new weights than a terminal can wait for.
        WeightsError: As ``zoo.from_pretrained``.
    """
    from zoo.plugin import catalogue

    if name not in catalogue()["model"] or Path(name).exists():
        if changes:
            raise ConfigError(f"{name!r} is a checkpoint: {changes[0]!r} can be said of a recipe's name only")
        from zoo.cli import checkpoint

        return checkpoint.load(name, recipe)
    import torch

    from zoo.api import build_module
    from zoo.cli.overrides import composed, prepare, to_recipe, written_keys
    from zoo.compare.wiring import short

    plain, choices = composed(prepare([f"model={name}", *changes]))
    resolved = to_recipe(plain, choices, written_keys(changes))
    with torch.device("meta"):
        size = sum(p.numel() for p in build_module(resolved, 0).parameters())
    if size > LARGEST:
        raise ConfigError(
            f"{resolved.name} has {short(size)} parameters and none of them trained: give a checkpoint of it, or"
            " scale=tiny"
        )
    print(f"{resolved.name}: new weights; only pretrained parts know anything", file=sys.stderr)
    return build_module(resolved, seed).to("cuda" if torch.cuda.is_available() else "cpu").eval()


def talk(chat: Any) -> None:
    """Read lines and answer them, until they end or ``/quit``.

    Where the input is a terminal, a mistake is told and the dialogue goes on; piped, it ends the command.

    Raises:
        ZooError: A mistake in piped input.
    """
    asked = sys.stdin.isatty()
    if asked:
        print(HELP)
    for line in lines(asked):
        try:
            if not answer(chat, line):
                return
        except ZooError as error:
            if not asked:
                raise
            print(f"error: {error}", file=sys.stderr)


def lines(asked: bool) -> Iterator[str]:
    """Lines of the input that are not blank; with a prompt where someone types them."""
    while True:
        try:
            line = input("> " if asked else "").strip()
        except EOFError:
            if asked:
                print()
            return
        if line:
            yield line


def answer(chat: Any, line: str) -> bool:
    """Do what one line says; False to end.

    Raises:
        ZooError: An unknown command, an image that cannot be read, a dialogue that grew too long.
    """
    from zoo.cli.images import open_image
    from zoo.errors import near

    command, _, rest = line.partition(" ")
    if command == "/quit":
        return False
    if command == "/reset":
        chat.reset()
    elif command == "/image":
        if not rest.strip():
            raise ConfigError("/image needs a FILE")
        chat.show(open_image(rest.strip()))
    elif command.startswith("/"):
        raise ConfigError(f"unknown command {command!r}{near(command, COMMANDS)}")
    else:
        chat.ask(line, lambda piece: print(piece, end="", flush=True))
        print()
    return True
