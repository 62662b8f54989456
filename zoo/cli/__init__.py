"""The ``zoo`` command. Each sub-command is one file; this one only finds it, so that ``zoo list`` imports no torch.

Plugins add words of their own by components of kind ``command``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

COMMANDS = {
    "list": ("zoo.cli.commands.list", "names of models, parts, datasets and tasks"),
    "show": ("zoo.cli.commands.show", "what a model is made of: parts, parameters, FLOPs, attention layout"),
    "train": ("zoo.cli.commands.train", "train and evaluate: zoo train model=clip scale=tiny (-m sweeps)"),
    "compare": ("zoo.cli.commands.compare", "a sweep, its evaluation and one page about it; resumes, repeats nothing"),
    "eval": ("zoo.cli.commands.eval", "evaluate a finished run or a checkpoint"),
    "generate": ("zoo.cli.commands.generate", "text for images, or images from texts (--text, --edit, --mask)"),
    "chat": ("zoo.cli.commands.chat", "talk with a model about images in the terminal"),
    "report": ("zoo.cli.commands.report", "leaderboard and one HTML page over runs"),
    "claims": ("zoo.cli.commands.claims", "claims of papers: run their comparisons and say what they show here"),
    "demo": ("zoo.cli.commands.demo", "CLIP and three connectors compared on real images, in minutes on a CPU"),
    "data": ("zoo.cli.commands.data", "make datasets: zoo data capfilt cleans captions with a trained BLIP"),
    "doctor": ("zoo.cli.commands.doctor", "versions, devices, plugins, and what is wrong with them"),
    "plugin": ("zoo.cli.commands.plugin", "write the skeleton of a plugin: zoo plugin new NAME"),
}


def usage() -> str:
    from zoo.plugin import catalogue

    known = [
        *((name, text) for name, (_, text) in COMMANDS.items()),
        *((c.name, c.summary) for c in catalogue()["command"]),
    ]
    width = max(len(name) for name, _ in known)
    lines = [f"  {name:<{width}}  {text}" for name, text in known]
    return "usage: zoo COMMAND ...\n\n" + "\n".join(lines) + "\n\nzoo COMMAND --help tells more."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; errors of the input are one line on stderr and status 2."""
    import importlib

    from zoo import __version__
    from zoo.errors import ConfigError, ZooError, near

    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"zoo {__version__}")
        return 0
    name = arguments.pop(0)
    try:
        if name in COMMANDS:
            status: int = importlib.import_module(COMMANDS[name][0]).main(arguments)
            return status
        from zoo.plugin import catalogue

        words = catalogue()["command"]
        if name not in words:
            raise ConfigError(f"unknown command {name!r}{near(name, (*COMMANDS, *words.names()))}")
        status = words.load(name)(arguments)
        return status
    except ZooError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `zoo list | head`
        sys.stderr.close()
        return 0
