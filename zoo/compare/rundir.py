"""Reading run directories (docs/architecture.md). What is missing or broken is reported on the `Run`, never fatal."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zoo.compare.cost import with_cost
from zoo.errors import RunError

HASHES = ("data", "evaluation", "budget", "order")
"""The hashes of a manifest that two runs must share to be compared."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run directory, read.

    Attributes:
        path: the directory.
        manifest: manifest.json as written; of a run from before there was one, with a ``cost`` (``zoo.compare.cost``).
        config: run.yaml as written.
        metrics: task -> metric -> value; only finite numbers.
        curve: the lines of curve.jsonl that could be read.
        samples: samples.json as written.
        problems: what could not be read, one line each.
    """

    path: Path
    manifest: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    curve: tuple[Mapping[str, Any], ...] = ()
    samples: tuple[Mapping[str, Any], ...] = ()
    problems: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: Path | str) -> Run:
        """Read the directory ``path``; never raises for what is in it."""
        path = Path(path)
        problems: list[str] = []
        manifest = _mapping(_json(path / "manifest.json", problems, needed=True), "manifest.json", problems)
        done = manifest.get("status") == "done"
        config = _mapping(_yaml(path / "run.yaml", problems), "run.yaml", problems)
        found = _mapping(_json(path / "metrics.json", problems, needed=done), "metrics.json", problems)
        metrics = {
            str(task): {str(k): float(v) for k, v in values.items() if _finite(v)}
            for task, values in found.items()
            if isinstance(values, Mapping)
        }
        samples = _json(path / "samples.json", problems, needed=False)
        if samples is not None and not isinstance(samples, list):
            problems.append("samples.json is not a list")
            samples = []
        return cls(
            path=path,
            manifest=with_cost(manifest),
            config=config,
            metrics=metrics,
            curve=_curve(path / "curve.jsonl", problems),
            samples=tuple(s for s in samples or [] if isinstance(s, Mapping)),
            problems=tuple(problems),
        )

    @property
    def name(self) -> str:
        """The run's name, ``model+part=choice``; the folder's name where the manifest has none."""
        return str(self.manifest.get("name") or self.path.parent.name)

    @property
    def seed(self) -> str:
        seed = self.manifest.get("seed", self.config.get("seed"))
        return "?" if seed is None else str(seed)

    @property
    def status(self) -> str:
        return str(self.manifest.get("status") or "unknown")

    @property
    def control(self) -> bool:
        """Whether the run is a control (its images were blank)."""
        return bool(self.manifest.get("control", False))

    @property
    def hashes(self) -> Mapping[str, str]:
        found = self.manifest.get("hashes")
        return {str(k): str(v) for k, v in found.items() if v} if isinstance(found, Mapping) else {}

    def number(self, *keys: str) -> float | None:
        """Return a number of the manifest by its path, as ``number("cost", "flops", "total")``; ``None`` if absent."""
        value: Any = self.manifest
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return float(value) if _finite(value) else None


def find_runs(paths: Iterable[Path | str]) -> list[Run]:
    """Read every run directory at or below ``paths``, each once, in the order of paths and then of names.

    Hidden folders below them (trials of a learning-rate search) are left out.

    Raises:
        RunError: a path does not exist, or no run was found at all.
    """
    wanted = [Path(p) for p in paths]
    found: dict[Path, Path] = {}
    for path in wanted:
        if not path.exists():
            raise RunError(f"{path} does not exist: give a run directory or a folder of runs, such as outputs")
        if path.is_file():
            path = path.parent
        here = [path] if _is_run(path) else sorted(p.parent for p in path.rglob("manifest.json") if _shown(p, path))
        found.update({p.resolve(): p for p in here if p.resolve() not in found})
    if not found:
        raise RunError(f"no run (a folder with a manifest.json) below {', '.join(map(str, wanted))}: train one first")
    return [Run.read(path) for path in found.values()]


def _is_run(path: Path) -> bool:
    return (path / "manifest.json").is_file()


def _shown(file: Path, top: Path) -> bool:
    """Whether no folder between is hidden: trials of a learning-rate search are in one that is."""
    return not any(part.startswith(".") for part in file.relative_to(top).parts)


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _mapping(value: Any, name: str, problems: list[str]) -> Mapping[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        problems.append(f"{name} is not a mapping")
    return value if isinstance(value, Mapping) else {}


def _text(path: Path, problems: list[str], needed: bool) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        if needed:
            problems.append(f"{path.name} is missing")
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{path.name} cannot be read: {error}")
    return None


def _json(path: Path, problems: list[str], needed: bool) -> Any:
    text = _text(path, problems, needed)
    if text is None:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        problems.append(f"{path.name} is not JSON: {error}")
        return None


def _yaml(path: Path, problems: list[str]) -> Any:
    text = _text(path, problems, needed=False)
    if text is None:
        return None
    import yaml

    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problems.append(f"{path.name} is not YAML: {' '.join(str(error).split())}")
        return None


def _curve(path: Path, problems: list[str]) -> tuple[Mapping[str, Any], ...]:
    """Read the loss curve; a run killed while writing leaves half a last line, which is not a problem."""
    text = _text(path, problems, needed=False) or ""
    lines = text.splitlines()
    points, broken = [], 0
    for number, line in enumerate(lines):
        try:
            point = json.loads(line) if line.strip() else None
        except ValueError:
            broken += number < len(lines) - 1
            continue
        if isinstance(point, Mapping):
            points.append(point)
    if broken:
        problems.append(f"{path.name}: {broken} lines are not JSON")
    return tuple(points)
