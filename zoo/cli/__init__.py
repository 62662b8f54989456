"""The ``zoo`` command. Each sub-command is one file and a component of kind ``command``, a plugin's like the zoo's
own (zoo/builtin_commands.py); this file only finds it, so that ``zoo list`` imports no torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def usage() -> str:
    from zoo.builtin_commands import COMMANDS
    from zoo.plugin import catalogue

    own = {word.name: word for word in COMMANDS}  # in the order in which one meets them, then the plugins'
    words = [*own.values(), *(word for word in catalogue()["command"] if word.name not in own)]
    width = max(len(word.name) for word in words)
    lines = [f"  {word.name:<{width}}  {word.summary}" for word in words]
    return "usage: zoo COMMAND ...\n\n" + "\n".join(lines) + "\n\nzoo COMMAND --help tells more."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; errors of the input are one line on stderr and status 2."""
    from zoo import __version__
    from zoo.errors import ConfigError, ZooError, near

    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if not arguments or arguments[0] in ("-h", "--help", "help"):
            print(usage())
            return 0
        if arguments[0] in ("-V", "--version"):
            print(f"zoo {__version__}")
            return 0
        name = arguments.pop(0)
        from zoo.plugin import catalogue

        words = catalogue()["command"]
        if name not in words:
            raise ConfigError(f"unknown command {name!r}{near(name, words.names())}")
        status: int = words.load(name)(arguments)
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
