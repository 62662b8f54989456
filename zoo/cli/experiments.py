"""What a file of conf/experiment asks for beside settings: sweeps, and runs that others start from or are judged by.

    sweep:                      axes of every run: key -> values; an axis the user writes is the user's
      seed: [0, 1, 2]
    sweeps:                     where not every combination makes sense: parts, each with axes (lists) and settings
      - {model: [show-o, chameleon], init: "@codes"}
      - {model: [transfusion], init: "@latents"}        # "@eye + @latents" starts from both
    first:                      name -> overrides of a run that is trained before; "@name" stands for its directory
      codes: [model=lfq-tokenizer, budget.value=1500]

``first.codes.budget.value=100`` on the command line changes such a run; one that nothing names any more is not trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from zoo.errors import ConfigError, near
from zoo.plugin import catalogue
from zoo.recipe_files import read_yaml
from zoo.run_config import starts

PASSED_ON = ("scale", "out", "trainer", "tracking")
"""Keys of a command that its first runs share, unless they write their own."""


@dataclass(frozen=True)
class Experiment:
    """The part of an experiment file that Hydra does not read."""

    name: str = ""
    sweep: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    sweeps: Sequence[Mapping[str, Any]] = ()
    first: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def commands(self, overrides: Sequence[str]) -> list[list[str]]:
        """The overrides of every sweep: what the user wrote, and what the file adds to it.

        Raises:
            ConfigError: The user narrowed an axis to values that no part has.
        """
        from zoo.cli.overrides import parsed, values_of, with_quotes

        overrides = with_quotes(overrides)
        written = {o.key_or_group: (text, o) for text, o in zip(overrides, parsed(overrides), strict=True)}
        found = []
        for part in self.sweeps or [{}]:
            own, added, fits = list(overrides), [], True
            for key, value in {**self.sweep, **part}.items():
                if key not in written:
                    added.append(f"{key}={','.join(map(str, value)) if isinstance(value, list) else value}")
                elif key in part and isinstance(value, list):
                    text, override = written[key]
                    kept = [v for v in values_of(override) if v in value]
                    fits = fits and bool(kept)
                    own[own.index(text)] = f"{key}={','.join(map(str, kept))}"
            if fits:
                found.append([*own, *with_quotes(added)])
        if not found:
            axes = [(key, values) for part in self.sweeps for key, values in part.items() if isinstance(values, list)]
            said = "; ".join(f"{key}={','.join(map(str, values))}" for key, values in axes if key in written)
            raise ConfigError(f"no part of experiment {self.name!r} has what was asked for; it has {said}")
        return found

    def first_command(self, name: str, overrides: Sequence[str], changes: Mapping[str, Sequence[str]]) -> list[str]:
        """The overrides of a first run of the command ``overrides``."""
        own = list(self.first[name])
        changed = {text.partition("=")[0] for text in changes.get(name, ())}
        own = [text for text in own if text.partition("=")[0] not in changed] + list(changes.get(name, ()))
        keys = {text.partition("=")[0] for text in own}
        shared = [
            text
            for text in overrides
            if (key := text.partition("=")[0].lstrip("+")).split(".")[0] in PASSED_ON and key not in keys
        ]
        return [*shared, *own]


def read_experiment(overrides: Sequence[str]) -> Experiment:
    """The experiment that a command names; an empty one where it names none.

    Raises:
        ConfigError: An unknown name, or a file whose ``sweep``, ``sweeps`` or ``first`` has another shape.
    """
    from zoo.cli.overrides import options, parsed, with_quotes

    chosen = next((o for o in parsed(with_quotes(overrides)) if o.key_or_group == "experiment"), None)
    if chosen is None or chosen.is_sweep_override():
        return Experiment()
    name = str(chosen.value())
    files = [folder / "experiment" / f"{name}.yaml" for folder in catalogue().conf_dirs]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise ConfigError(f"unknown experiment {name!r}{near(name, options('experiment'))}")
    body = read_yaml(found)
    sweep, sweeps, first = body.get("sweep") or {}, body.get("sweeps") or [], body.get("first") or {}
    if not isinstance(sweep, dict) or not all(isinstance(values, list) and values for values in sweep.values()):
        raise ConfigError(f"{found.name}: sweep must map keys to lists of values")
    if not isinstance(sweeps, list) or not all(isinstance(part, dict) and part for part in sweeps):
        raise ConfigError(f"{found.name}: sweeps must be a list of mappings, keys to values or lists of values")
    if not isinstance(first, dict) or not all(
        isinstance(run, list) and all(isinstance(text, str) and "=" in text for text in run) for run in first.values()
    ):
        raise ConfigError(f"{found.name}: first must map names to lists of KEY=VALUE")
    return Experiment(name, sweep, tuple(sweeps), first)


def split_first(overrides: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Tell ``first.NAME.KEY=VALUE`` from other overrides: (others, name -> overrides)."""
    others: list[str] = []
    changes: dict[str, list[str]] = {}
    for text in overrides:
        head, dot, rest = text.lstrip("+").partition(".")
        name, inner, setting = rest.partition(".")
        if head == "first" and dot and inner:
            changes.setdefault(name, []).append(setting)
        else:
            others.append(text)
    return others, changes


def references(plain: Any) -> list[str]:
    """Names of first runs (``"@name"``) that a composed configuration's ``init`` and ``evaluation`` hold, in order."""
    if isinstance(plain, Mapping):
        return [name for value in plain.values() for name in references(value)]
    parts = starts(plain) if isinstance(plain, str) else []
    return [part[1:] for part in parts if part.startswith("@") and len(part) > 1]


def placed(plain: Any, places: Mapping[str, str]) -> Any:
    """``plain`` with the directories of first runs in place of their names.

    Raises:
        ConfigError: A name that no first run has.
    """
    if isinstance(plain, Mapping):
        return {key: placed(value, places) for key, value in plain.items()}
    for name in references(plain):
        if name not in places:
            known = ", ".join(f"@{place}" for place in places) or "none"
            raise ConfigError(f"'@{name}': the experiment has no first run of this name; known: {known}")
    if references(plain):
        return " + ".join(places[part[1:]] if part.startswith("@") else part for part in starts(plain))
    return plain
