"""One checkpoint evaluated several times, each time with another value of one field: quality against sampling steps."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.errors import ConfigError, RunError

SWEEP_FILE = "sweep.json"
"""Beside metrics.json: what was set, and the hash of all other conditions."""

ALL_CODES = "all"
"""The value of ``steps`` where a model draws its codes one after the other and leaves no choice."""


@dataclass(frozen=True)
class Sweep:
    """A field of tasks and the values it takes, in order."""

    field: str
    values: tuple[Any, ...]

    @classmethod
    def parse(cls, text: str) -> Sweep:
        """``"steps=8,16,32"``; values are read as JSON where they can be.

        Raises:
            ConfigError: No field, no values, or one twice.
        """
        field, equals, rest = text.partition("=")
        values = []
        for value in rest.split(",") if rest else []:
            try:
                values.append(json.loads(value))
            except json.JSONDecodeError:
                values.append(value)
        if not (field and equals and values) or len({json.dumps(v) for v in values}) < len(values):
            raise ConfigError(f"--sweep: expected FIELD=VALUE,VALUE,... with each value once, got {text!r}")
        return cls(field, tuple(values))

    def tasks(self, tasks: Mapping[str, Mapping[str, Any]], config_class: Callable[[str], Any]) -> dict[str, Any]:
        """The tasks that have the field; the others would only repeat themselves.

        Raises:
            ConfigError: None has it.
        """
        kept = {n: dict(f) for n, f in tasks.items() if self.field in config_class(n).__dataclass_fields__}
        if not kept:
            raise ConfigError(
                f"--sweep {self.field}: none of the tasks {', '.join(tasks)} has this field; give one that has, as in"
                " --task text-to-image,evaluator=RUN"
            )
        return kept

    def jobs(self, model: Any) -> list[tuple[str, dict[str, Any]]]:
        """A folder's name and the field, for every evaluation: one alone where a model has no choice of steps."""
        if self.field == "steps" and getattr(model, "draws_code_by_code", False):
            return [(f"steps={ALL_CODES}", {})]
        return [(f"{self.field}={value}", {self.field: value}) for value in self.values]


def write_sweep(folder: Path, field: str, value: Any, conditions: Mapping[str, str], tasks: Sequence[str]) -> None:
    """Write `SWEEP_FILE`.

    Args:
        value: Of the field; None where the model took its own.
        conditions: Task -> hash of its spec with the field left at its default: what points of one curve, and curves
            of one chart, share.

    Raises:
        RunError: The folder cannot be written.
    """
    content = {"field": field, "value": value, "conditions": {task: conditions[task] for task in tasks}}
    try:
        (folder / SWEEP_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise RunError(
            f"cannot write to {folder}: {error.strerror or error}; choose a folder you can write to"
        ) from error
