"""A claim of a paper as a comparison: what ``conf/claim/NAME.yaml`` holds. docs/claims.md tells how to write one.

    title: Attention both ways inside an image is essential where patches are linear maps
    system: Transfusion
    source: arXiv 2408.11039, table 5
    paper:                                  what was measured there; a number with checked: no is never shown
      - {metric: FID, baseline: 61.3, variant: 20.3, checked: yes}
    experiment: claims-transfusion          data, budget, tasks, and runs that come first: conf/experiment
    shared: [model=transfusion]
    baseline: {causal: [wiring.image_attention=causal]}
    variant: {both ways: []}
    kind: difference
    metric: text-to-image/score
    at_least: 0

A claim says that a quantity lies within bounds. The kinds differ in the quantity alone (`KINDS`).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from zoo.errors import ConfigError, near
from zoo.plugin import catalogue, conf_dir
from zoo.recipe_files import read_yaml
from zoo.registry import parse, refuse_code

KINDS = {
    "difference": "gain of the variant in a metric, counted upwards where it is better",
    "interaction": "gain of the variant less the gain that the same change has elsewhere (than)",
    "cost": "cost of the variant divided by that of the baseline",
    "parity": "share of the baseline's compute or passes at which the variant reaches the baseline's score",
    "divergence": "loss at the end of the baseline less that of the variant, in nats",
}
"""Kind -> the quantity that the claim bounds."""

CHECKED = ("yes", "via", "no")
"""Read in the paper, read in a copy of it, not found."""

ALONG = ("flops", "passes")
"""What parity counts: training FLOPs of runs of several budgets, or forward passes an image of one run."""

COSTS = ("flops", "seconds", "memory")
"""What kind ``cost`` counts: training FLOPs, training seconds, peak memory."""

Overrides = list[str]
Number = float | str


@dataclass(frozen=True, kw_only=True)
class Stated:
    """What the paper measured.

    Attributes:
        metric: As the paper calls it.
        baseline, variant: Its numbers, or text as written there ("about 20 times"). They are None wherever ``checked``
            is ``no``, whatever the file says: nobody can show what is not there.
        checked: ``yes`` = read in the paper, ``via`` = in a copy of its table, ``no`` = recalled, not found.
    """

    metric: str
    baseline: Number | None = None
    variant: Number | None = None
    checked: str = "no"

    def __post_init__(self) -> None:
        if self.checked not in CHECKED:
            raise ValueError(f"checked = {self.checked!r} must be {', '.join(CHECKED[:-1])} or {CHECKED[-1]}")
        if self.checked == "no":
            object.__setattr__(self, "baseline", None)
            object.__setattr__(self, "variant", None)

    @property
    def text(self) -> str:
        """``FID 61.3 → 20.3``; the metric alone where no number was read."""
        if self.variant is None:
            return self.metric
        before = "" if self.baseline is None else f"{_short(self.baseline)} → "
        return f"{self.metric} {before}{_short(self.variant)}"


def _short(value: Number) -> str:
    return f"{value:g}" if isinstance(value, float | int) else value


@dataclass(frozen=True, kw_only=True)
class ClaimConfig:
    """Fields of a claim's file.

    Attributes:
        title: The claim, in words.
        system: Whose.
        source: Paper and table or section.
        paper: What it measured.
        experiment: File of conf/experiment with what all runs share; its ``first`` runs are trained before.
        shared: Overrides of all runs.
        baseline, variant: One label and the overrides behind it.
        than: Kind ``interaction``: the ``baseline`` and ``variant`` that the gain is compared with.
        kind: One of ``KINDS``.
        metric: ``TASK/METRIC``; of kind ``cost`` one of ``COSTS``; of kind ``divergence`` nothing.
        at_least, at_most: Bounds of the quantity, within which the claim holds; without either it is to be above 0.
        along: Kind ``parity``: one of ``ALONG``.
        points: Kind ``parity``: budgets (values of ``budget.value``), or sampling steps, that are measured.
        evaluate_on: Data on which runs that trained on different data are measured, such as ``openmoji``.
        capfilt: Steps of fine-tuning with which ``zoo data capfilt`` cleans the baseline's data; ``@clean`` in the
            variant's overrides is what comes out. 0 = none.
        minutes: Expected minutes on one CPU core for one seed at scale=tiny, runs that come first left out.
        first_minutes: Those of the runs that come first, which claims share.
        note: What a reader must know of the difference between this comparison and the paper's.
    """

    title: str
    system: str
    source: str
    paper: list[Stated]
    experiment: str
    baseline: dict[str, Overrides]
    variant: dict[str, Overrides]
    kind: str
    shared: Overrides = field(default_factory=list)
    than: dict[str, dict[str, Overrides]] = field(default_factory=dict)
    metric: str = ""
    at_least: float | None = None
    at_most: float | None = None
    along: str = ""
    points: list[float] = field(default_factory=list)
    evaluate_on: str = ""
    capfilt: int = 0
    minutes: float = 0.0
    first_minutes: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Arm:
    """Runs of a claim that differ in their seed alone (and, where a claim has points of a budget, in it)."""

    role: str
    label: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Claim:
    """A claim that was checked.

    Attributes:
        name: The file's.
        id: Its row in the list of claims: the name up to the first ``-``.
        config: The file's fields.
        arms: Role (baseline, variant, and of an interaction than.baseline and than.variant) -> runs.
    """

    name: str
    config: ClaimConfig
    arms: Mapping[str, Arm]

    @property
    def id(self) -> str:
        return self.name.partition("-")[0]

    @property
    def task(self) -> str:
        """The task of its metric; of kinds without one nothing."""
        return self.config.metric.partition("/")[0] if "/" in self.config.metric else ""

    @property
    def bounds(self) -> tuple[float, float]:
        """Least and largest value with which the claim holds."""
        low, high = self.config.at_least, self.config.at_most
        if low is None and high is None:
            return 0.0, math.inf
        return -math.inf if low is None else low, math.inf if high is None else high

    @property
    def paper(self) -> str:
        """The paper's numbers that were read, and how; its direction where none was."""
        said = []
        for checked, how in (("yes", ""), ("via", " (read in a copy)"), ("no", " (direction only)")):
            texts = [s.text for s in self.config.paper if self._shown_as(s) == checked]
            if texts:
                said.append("; ".join(texts) + how)
        return "; ".join(said) or "direction only"

    @staticmethod
    def _shown_as(stated: Stated) -> str:
        return "no" if stated.variant is None else stated.checked

    def digest(self) -> str:
        """Changes with everything that decides which runs a claim has; measuring them is repeated in each report."""
        from zoo.run_config import digest

        c = self.config
        runs = {arm.role: list(arm.overrides) for arm in self.arms.values()}
        return digest([c.experiment, runs, c.along, c.points, c.evaluate_on, c.capfilt])[:16]


def load_claim(name: str, body: Mapping[str, Any]) -> Claim:
    """Check a claim's fields.

    Raises:
        ConfigError: An unknown field, kind, task or metric, a wrong type, or fields that do not fit together.
    """
    where = f"claim {name}"
    refuse_code(body, where)
    paper = [_with_text(said) for said in body.get("paper") or []]
    config: ClaimConfig = parse(ClaimConfig, {**body, "paper": paper}, where)
    arms = [_arm(where, config, "baseline", config.baseline), _arm(where, config, "variant", config.variant)]
    for role, labelled in config.than.items():
        if role not in ("baseline", "variant"):
            raise ConfigError(f"{where}: than.{role}: expected baseline and variant")
        arms.append(_arm(where, config, f"than.{role}", labelled))
    _check_kind(where, config)
    claim = Claim(name, config, {arm.role: arm for arm in arms})
    low, high = claim.bounds
    if low > high:
        raise ConfigError(f"{where}: at_least = {low:g} is above at_most = {high:g}")
    return claim


def _with_text(said: Any) -> Any:
    """``checked: yes`` is a truth value in YAML."""
    if isinstance(said, Mapping) and isinstance(said.get("checked"), bool):
        return {**said, "checked": "yes" if said["checked"] else "no"}
    return said


def _arm(where: str, config: ClaimConfig, role: str, labelled: Mapping[str, Overrides]) -> Arm:
    if len(labelled) != 1:
        raise ConfigError(f"{where}: {role} must be one label and its overrides, as in {{causal: [KEY=VALUE]}}")
    ((label, own),) = labelled.items()
    overrides = (*config.shared, *own)
    keys = [text.partition("=")[0].lstrip("+") for text in overrides]
    wrong = next((text for text, key in zip(overrides, keys, strict=True) if "=" not in text or not key), None)
    if wrong is not None:
        raise ConfigError(f"{where}: {role}: {wrong!r} must be KEY=VALUE")
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise ConfigError(f"{where}: {role} sets {twice} twice, here and in shared: say it once")
    for key in ("seed", "out", "scale", "experiment"):
        if key in keys:
            raise ConfigError(f"{where}: {role} sets {key}, which is not a claim's to set: zoo claims run has it")
    return Arm(role, label, overrides)


def _check_kind(where: str, config: ClaimConfig) -> None:
    from zoo.evaluation.catalogue import METRICS
    from zoo.evaluation.task import task_metrics

    kind = config.kind
    if kind not in KINDS:
        raise ConfigError(f"{where}: unknown kind {kind!r}{near(kind, KINDS)}; known: {', '.join(KINDS)}")
    if (kind == "interaction") != (set(config.than) == {"baseline", "variant"}):
        raise ConfigError(f"{where}: kind interaction, and no other, has than with a baseline and a variant")
    if (kind == "parity") != bool(config.along and config.points):
        raise ConfigError(f"{where}: kind parity, and no other, has along and points")
    if kind == "parity" and (config.along not in ALONG or len(config.points) < 2 or min(config.points) < 1):
        raise ConfigError(f"{where}: along is {' or '.join(ALONG)}, points are two or more values of 1 or more")
    if kind in ("cost", "parity") and config.at_least is None and config.at_most is None:
        raise ConfigError(f"{where}: kind {kind} bounds a ratio: give at_most or at_least")
    if kind == "cost":
        if config.metric not in COSTS:
            raise ConfigError(f"{where}: metric = {config.metric!r}: kind cost counts {', '.join(COSTS)}")
        return
    if kind == "divergence":
        if config.metric:
            raise ConfigError(f"{where}: kind divergence reads the losses and has no metric")
        return
    task, slash, metric = config.metric.partition("/")
    known = METRICS[task] if task in METRICS else task_metrics(task)
    if not slash or not known:
        raise ConfigError(f"{where}: metric = {config.metric!r} must be TASK/METRIC{near(task, METRICS)}")
    if metric not in known:
        raise ConfigError(f"{where}: task {task!r} has no metric {metric!r}{near(metric, known)}")
    if known[metric].higher_is_better is None:
        raise ConfigError(f"{where}: {config.metric} has no better and no worse: choose another metric")
    if kind != "parity" and not known[metric].numerator:
        raise ConfigError(
            f"{where}: {config.metric} has no scores of single items, so no interval: choose another metric"
        )


def claim_files() -> dict[str, Any]:
    """Name -> file of every claim, of the zoo and of plugins, by id as a reader counts (T6 before T10)."""
    found = {file.stem: file for folder in catalogue().conf_dirs for file in (folder / "claim").glob("*.yaml")}
    return {name: found[name] for name in sorted(found, key=_place)}


def _place(name: str) -> tuple[str, int, str]:
    letters = name.rstrip("0123456789") if "-" not in name else name.partition("-")[0].rstrip("0123456789")
    digits = name[len(letters) :].partition("-")[0]
    return letters, int(digits) if digits.isdigit() else 0, name


def read_claim(name: str) -> Claim:
    """One claim by its file's name.

    Raises:
        ConfigError: There is none of this name, or its file is wrong.
    """
    files = claim_files()
    if name not in files:
        raise ConfigError(f"unknown claim {name!r}{near(name, files)}; zoo claims list shows them")
    return load_claim(name, read_yaml(files[name]))


def read_claims(names: tuple[str, ...] | list[str] = ()) -> list[Claim]:
    """The claims of these names or ids (``T8`` is T8-linear, T8-unet, ...); all claims where none is given, but for
    those of plugins that are wrong, which are said on stderr: a broken plugin is never fatal.

    Raises:
        ConfigError: As ``read_claim``.
    """
    files = claim_files()
    chosen: dict[str, None] = {}
    for name in names or files:
        same = [file for file in files if file == name or file.partition("-")[0] == name]
        chosen.update(dict.fromkeys(same or [name]))
    found = []
    for name in chosen:
        try:
            found.append(read_claim(name))
        except ConfigError as error:
            if names or files[name].is_relative_to(conf_dir()):
                raise
            print(f"left out: {error}", file=sys.stderr)
    return found
