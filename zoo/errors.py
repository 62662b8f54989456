"""Errors a user can cause. Each carries one line: what was wrong, what was expected, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ZooError(Exception):
    """Base of every error that is the input's fault; the CLI prints it in one line and exits with 2."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class ConfigError(ZooError):
    """A recipe, field, value or name is wrong."""


class DataError(ZooError):
    """A dataset, image or caption file cannot be used."""


class WeightsError(ZooError):
    """A checkpoint cannot be loaded: unsafe, incomplete, or of another model."""


class RunError(ZooError):
    """A run directory cannot be written, resumed or read."""


class MissingExtra(ZooError):
    """A package is not installed: ``extra`` of mmzoo brings it, or mmzoo itself (None), which is then broken."""

    def __init__(self, package: str, extra: str | None, needed_for: str) -> None:
        what = f"mmzoo[{extra}]" if extra else "mmzoo"
        super().__init__(f"{needed_for} needs the package {package}, which is not installed: pip install '{what}'")


def near(name: str, options: Iterable[str], most: int = 3) -> str:
    """Return ``"; did you mean a, b?"`` for the options closest to ``name``, or the whole (short) list, or ``""``."""
    known = sorted(set(options))
    close = difflib.get_close_matches(name.lower(), known, n=most, cutoff=0.5)
    if not close:  # a prefix or infix is as good a hint as a typo
        close = [o for o in known if name.lower() in o.lower() or o.lower() in name.lower()][:most]
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f"; known: {', '.join(known)}" if 0 < len(known) <= 12 else ""
