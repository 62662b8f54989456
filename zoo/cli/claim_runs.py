"""Running claims: their arms are commands of ``zoo train``, resolved, run and resumed by its own machinery."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.claims.claim import Claim
from zoo.claims.plan import ONE, Plan
from zoo.errors import ConfigError, RunError, ZooError
from zoo.run_config import RunConfig

if TYPE_CHECKING:
    from zoo.cli.commands.train import Sweep

CLEAN = "@clean"
"""In overrides of a variant: the data that ``zoo data capfilt`` makes of the baseline's run of the first seed."""


@dataclass
class Runs:
    """The runs of an arm at one point, resolved.

    Attributes:
        sweep: One run a seed.
        firsts: Name -> what is trained before.
    """

    sweep: Sweep
    firsts: Mapping[str, Sweep]

    @property
    def configs(self) -> dict[Path, RunConfig]:
        return self.sweep.configs


@dataclass
class Resolved:
    """A claim and all its runs: role -> point -> runs.

    Attributes:
        clean: Folder of the cleaned data that the variant trains on, where the claim has some.
    """

    claim: Claim
    arms: dict[str, dict[str, Runs]] = field(default_factory=dict)
    clean: Path | None = None

    @property
    def all(self) -> list[Runs]:
        return [runs for points in self.arms.values() for runs in points.values()]

    def plan(self, scale: str, out: Path, settings: Sequence[str] = ()) -> Plan:
        """What is written for reports."""
        runs = {
            role: {
                point: {str(c.seed): str(folder.relative_to(out)) for folder, c in runs.configs.items()}
                for point, runs in points.items()
            }
            for role, points in self.arms.items()
        }
        firsts = {n: str(next(iter(s.configs)).relative_to(out)) for r in self.all for n, s in r.firsts.items()}
        return Plan(self.claim.name, self.claim.digest(), scale, runs, firsts, tuple(settings))


class Resolver:
    """Resolves claims; what several have in common is resolved once.

    Args:
        settings: Further overrides of every run, such as ``budget.value=10``; ``first.NAME.KEY=VALUE`` are those of
            a run that comes first.
    """

    def __init__(self, scale: str, seeds: Sequence[int], out: Path, settings: Sequence[str] = ()) -> None:
        from zoo.cli.experiments import split_first

        self.settings, self.changes = split_first(settings)
        self.seeds = tuple(seeds)
        self._shared = [*self.settings, f"scale={scale}", f"out={out}"]
        self._known: dict[tuple[str, ...], Runs] = {}
        self._experiments: dict[str, dict[str, Sweep]] = {}

    def claim(self, claim: Claim) -> Resolved:
        """All runs of a claim.

        Raises:
            ConfigError: A run does not compose, with the claim and the arm.
        """
        found = Resolved(claim)
        along = claim.config.along == "flops"
        points = [f"{point:g}" for point in claim.config.points] if along else [ONE]
        for role, arm in claim.arms.items():
            overrides = [text.replace(CLEAN, f"'{found.clean}'") if CLEAN in text else text for text in arm.overrides]
            found.arms[role] = {}
            for point in points:
                budget = [f"budget.value={int(float(point))}"] if point else []
                try:
                    runs = self._runs((f"experiment={claim.config.experiment}", *overrides, *budget))
                except ZooError as error:
                    raise ConfigError(f"claim {claim.name}, {arm.label}: {error}") from error
                found.arms[role][point] = runs
            if claim.config.capfilt and role == "baseline":
                first = next(iter(found.arms[role][points[0]].configs))
                found.clean = first / f"capfilt-{claim.config.capfilt}"
        return found

    def _runs(self, overrides: tuple[str, ...]) -> Runs:
        if overrides not in self._known:
            from zoo.cli.commands.train import leaned_on, places, resolve
            from zoo.cli.overrides import with_quotes

            firsts = self._firsts(overrides[0])
            written = {text.partition("=")[0] for text in self.settings}
            own = [text for text in overrides if text.partition("=")[0] not in written]
            given = [*own, *self._shared, f"seed={','.join(map(str, self.seeds))}"]
            sweep = resolve(with_quotes(given), True, places(firsts))
            if len(sweep.configs) != len(self.seeds):
                raise ConfigError("an arm of a claim is one run a seed: leave sweeps out of it")
            used = {text for config in sweep.configs.values() for text in leaned_on(config)}
            needed = {}
            for name, first in reversed(firsts.items()):  # a first run may name those before it
                if used & {str(folder) for folder in first.configs}:
                    needed[name] = first
                    used |= {text for config in first.configs.values() for text in leaned_on(config)}
            self._known[overrides] = Runs(sweep, dict(reversed(needed.items())))
        return self._known[overrides]

    def _firsts(self, experiment: str) -> dict[str, Sweep]:
        """What an experiment may want first, in its order."""
        if experiment not in self._experiments:
            from zoo.cli.commands.train import places, resolve
            from zoo.cli.experiments import read_experiment
            from zoo.cli.overrides import with_quotes

            found = read_experiment([experiment])
            if found.sweep or found.sweeps:
                raise ConfigError(
                    f"{experiment} sweeps, and an arm of a claim is one run a seed: leave sweeps out of it"
                )
            firsts: dict[str, Sweep] = {}
            for name in found.first:
                command = found.first_command(name, [experiment, *self._shared], self.changes)
                firsts[name] = resolve(with_quotes(command), False, places(firsts))
            self._experiments[experiment] = firsts
        return self._experiments[experiment]


def check(found: Sequence[Resolved]) -> None:
    """Everything that can be wrong before the first run starts, as zoo train checks it.

    Raises:
        ZooError: Data, weights or files that are missing, or features that cannot be cached.
    """
    from zoo.cli.jobs import check_offline, outcome_of

    seen: set[Path] = set()
    for resolved in found:
        for runs in resolved.all:
            pending = {str(folder) for sweep in runs.firsts.values() for folder in sweep.configs}
            sweeps = [*runs.firsts.values(), runs.sweep]
            for folder, config in {f: c for sweep in sweeps for f, c in sweep.configs.items()}.items():
                later = resolved.clean is not None and config.data.get("root") == str(resolved.clean)
                if folder not in seen and not later and outcome_of(folder).status != "done":
                    check_offline(config, pending)
                seen.add(folder)


def run(found: Sequence[Resolved], scale: str, out: Path, settings: Sequence[str] = ()) -> tuple[dict[str, str], bool]:
    """Run what is not done yet, claim by claim; what fails is told, and the others go on.

    Args:
        settings: Those that the claims were resolved with.

    Returns:
        Claim -> what went wrong, and whether the user interrupted.
    """
    failed: dict[str, str] = {}
    broken: dict[Path, str] = {}  # not tried twice in one command
    for number, resolved in enumerate(found, 1):
        name = resolved.claim.name
        print(f"\nclaim {name} ({number} of {len(found)}): {resolved.claim.config.title}")
        resolved.plan(scale, out, settings).write(out)
        try:
            for role, points in resolved.arms.items():
                for runs in points.values():
                    if _run(runs, broken):
                        return failed, True
                if role == "baseline" and resolved.clean is not None:
                    _clean(resolved)
            _measure(resolved)
        except ZooError as error:
            failed[name] = str(error)
            print(f"error: claim {name}: {error}", file=sys.stderr)
    return failed, False


def _run(runs: Runs, broken: dict[Path, str]) -> bool:
    """Train and evaluate; whether the user interrupted.

    Raises:
        RunError: A run failed, or one that comes first did, now or earlier in this command.
    """
    from zoo.cli.jobs import check_offline, outcome_of

    for sweep in [*runs.firsts.values(), runs.sweep]:
        folders = list(sweep.configs)
        known = next((broken[folder] for folder in folders if folder in broken), None)
        if known is not None:
            raise RunError(known)
        if all(outcome_of(folder).status == "done" for folder in folders):
            continue
        for config in sweep.configs.values():
            check_offline(config)
        outcomes = sweep.run()
        if any(outcome.status == "interrupted" for outcome in outcomes):
            return True
        for outcome in outcomes:
            if outcome.status != "done":
                broken[outcome.folder] = f"{outcome.folder}: {outcome.status}: {outcome.error}"
        if any(folder in broken for folder in folders):
            raise RunError(next(broken[folder] for folder in folders if folder in broken))
    return False


def _clean(resolved: Resolved) -> None:
    """Make the cleaned data of the baseline's run, once."""
    from zoo.cli.commands.data import main as data
    from zoo.data.capfilt import SUMMARY

    assert resolved.clean is not None
    if not (resolved.clean / SUMMARY).is_file():
        run = str(resolved.clean.parent)
        data(["capfilt", run, "--out", str(resolved.clean), "--steps", str(resolved.claim.config.capfilt)])


def _measure(resolved: Resolved) -> None:
    """Evaluations beyond the runs' own: on other data, and at several numbers of sampling steps."""
    from zoo.claims.measure import items_of
    from zoo.cli.commands.eval import main as evaluate
    from zoo.compare.rundir import Run

    claim, config = resolved.claim, resolved.claim.config
    for folder in [folder for runs in resolved.all for folder in runs.configs]:
        if config.evaluate_on:
            if not (items_of(claim, Run.read(folder)) / "items" / f"{claim.task}.parquet").is_file():
                evaluate([str(folder), "--data", config.evaluate_on, "--tasks", claim.task])
        elif config.along == "passes":
            points = [f"{point:g}" for point in config.points]
            swept = {file.parent.name for file in folder.glob("eval/steps=*/sweep.json")}
            if "steps=all" not in swept and not {f"steps={point}" for point in points} <= swept:
                evaluate([str(folder), "--sweep", f"steps={','.join(points)}", "--tasks", claim.task])


def show(found: Sequence[Resolved]) -> None:
    """What would be run: each run once, with its length, FLOPs and the minutes that these come to on one CPU core."""
    told: dict[Path, tuple[str, Any]] = {}
    for resolved in found:
        for runs in resolved.all:
            for sweep in [*runs.firsts.values(), runs.sweep]:
                for folder, config in sweep.configs.items():
                    told.setdefault(folder, (resolved.claim.name, config))
    total, costs = 0.0, {}
    for folder, (name, config) in told.items():
        key = str(folder.parent)
        if key not in costs:
            costs[key] = expected_seconds(config)
        total += costs[key]
        print(f"{name}  {folder}  {config.budget.value} {config.budget.unit}, about {costs[key] / 60:.1f} minutes")
    print(f"{len(told)} runs, about {total / 60:.0f} minutes on one CPU core, evaluation included")


SAMPLE, RATE = 0.004, 60e9
"""Seconds a sample of a tiny model besides its FLOPs, and FLOPs a second, of one CPU core: what fits the runs that were
measured (docs/claims.md) within a factor of two."""


def expected_seconds(config: RunConfig) -> float:
    """What training a run is expected to take on one CPU core, counted on the meta device."""
    from zoo.budget import plan
    from zoo.compare.flops import count_recipe

    flops = count_recipe(config.recipe, cached=config.trainer.cache_features)
    steps = plan(config, flops=flops).steps or (0,) * len(flops)
    return sum(n * config.batch_size * (SAMPLE + f.per_sample / RATE) for n, f in zip(steps, flops, strict=True))
