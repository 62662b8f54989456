"""Which runs a claim has: written by ``zoo claims run``, read by ``zoo claims list`` and ``report`` without Hydra.

``OUT/.claims/SCALE/NAME.json``; the folder is hidden, so that reports over OUT do not look into it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from zoo.claims.claim import Claim
from zoo.compare.rundir import Run
from zoo.errors import RunError

FOLDER = ".claims"

ONE = ""
"""The point of an arm that has only one."""


@dataclass(frozen=True)
class Plan:
    """The runs of one claim.

    Attributes:
        claim: Its name.
        digest: Of the claim when it was run; another one means other runs.
        scale: They were run at.
        runs: Role -> point (a budget, or ``ONE``) -> seed -> run directory relative to OUT.
        first: Name -> run directory, relative to OUT, of what was trained before.
        settings: What the user changed in every run, as KEY=VALUE.
    """

    claim: str
    digest: str
    scale: str
    runs: Mapping[str, Mapping[str, Mapping[str, str]]]
    first: Mapping[str, str] = field(default_factory=dict)
    settings: Sequence[str] = ()

    def write(self, out: Path) -> None:
        """Write the file; seeds that were run before, of the same claim and settings, are kept.

        Raises:
            RunError: The folder cannot be written.
        """
        path = _file(out, self.scale, self.claim)
        before = _read(path)
        runs = {role: {point: dict(seeds) for point, seeds in points.items()} for role, points in self.runs.items()}
        if before is not None and (before.digest, before.settings) == (self.digest, list(self.settings)):
            for role, points in before.runs.items():
                for point, seeds in points.items():
                    runs[role][point] = {**seeds, **runs[role][point]}
        plain = {**asdict(self), "runs": runs, "settings": list(self.settings)}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(path.name + ".partial")
            partial.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
            partial.replace(path)
        except OSError as error:
            raise RunError(f"cannot write {path}: {error.strerror}; choose another folder with --out") from error

    def read_runs(self, out: Path) -> dict[str, dict[str, dict[str, Run]]]:
        """Role -> point -> seed -> the run directory as it stands."""
        return {
            role: {
                point: {seed: Run.read(out / folder) for seed, folder in seeds.items()}
                for point, seeds in points.items()
            }
            for role, points in self.runs.items()
        }


def read_plan(claim: Claim, scale: str, out: Path) -> Plan | None:
    """What was run for a claim; None where nothing was, or the claim has other runs since."""
    plan = _read(_file(out, scale, claim.name))
    return plan if plan is not None and plan.digest == claim.digest() else None


def _file(out: Path, scale: str, name: str) -> Path:
    return out / FOLDER / scale / f"{name}.json"


def _read(path: Path) -> Plan | None:
    try:
        return Plan(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
