"""The resolved configuration of one run: everything that decides its result, as plain values in ``run.yaml``."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zoo.budget import BudgetConfig, plan
from zoo.errors import ConfigError, RunError, near
from zoo.part import PartConfig
from zoo.plugin import catalogue
from zoo.recipe import Recipe
from zoo.registry import parse, refuse_code, to_plain
from zoo.tracking import TrackingConfig


@dataclass(frozen=True, kw_only=True)
class TrainerConfig(PartConfig):
    """How a run is executed. Nothing here may change what it learns beyond rounding, except ``precision`` and ``ema``.

    Attributes:
        accelerator: ``auto``, ``cpu``, ``gpu`` (or ``cuda``), ``mps``.
        devices: Devices a node; the batch is divided among them.
        strategy: ``single``, one device; ``ddp``, a copy of everything on each; ``fsdp``, parameters, gradients and
            moments divided among them (FSDP2); ``auto``: single on one device, ddp on several (``zoo.strategies``).
        checkpointing: Of activations: ``blocks`` keeps the inputs of the models' blocks and computes the rest again in
            the backward pass, ``none`` keeps everything. The numbers are the same.
        precision: ``fp32``, ``bf16`` (autocast) or ``fp16`` (autocast with loss scaling). On a CPU measure before
        choosing bf16.
        compile: Compile the inner module.
        ema: Decay of an exponential moving average of the weights, which is what is evaluated and saved; 0 = none.
        accumulate: Micro-batches an optimizer step is split into; the global batch stays ``batch_size``.
        workers: Data loading processes a device.
        pack: Tokens of the sequences that rows of text and images are packed into (``zoo.data.packing``); 0 = a row
            each, padded. Draws of dropout are the one thing it changes.
        log_every: Steps between two lines of the curve.
        checkpoint_every: Steps between two resumable checkpoints; 0 = only at the end of a stage and on interruption.
        keep: How many resumable checkpoints are kept while the run goes on; the last one when it is done.
        timeout: Seconds that ranks wait for each other before the run ends and says which one did not come.
        restarts: How often torch elastic starts the ranks of a run anew, from the last checkpoint, when one was lost.
        deterministic: Refuse operations without a deterministic implementation.
        cache_features: Read the tokens of a frozen encoder from disk, where each image's are computed once for all
            runs (``zoo.data.feature_cache``).
        cache_dir: Folder of the cached features; empty = the zoo's own cache folder.
        cache_max_gb: What all cached features together may take, in 10^9 bytes. Sets that were used least recently and
            by no running process are removed to make room; a run that needs more than this is refused.
        cache_dtype: ``computed`` stores what the encoder returns, ``float16`` rounds it to half the size of fp32, which
            changes what is learned a little and counts as another run.
    """

    accelerator: str = "auto"
    devices: int = 1
    nodes: int = 1
    strategy: str = "auto"
    checkpointing: str = "none"
    precision: str = "fp32"
    compile: bool = False
    ema: float = 0.0
    accumulate: int = 1
    workers: int = 0
    pack: int = 0
    log_every: int = 10
    checkpoint_every: int = 100
    keep: int = 2
    timeout: float = 1800.0
    restarts: int = 3
    deterministic: bool = False
    cache_features: bool = False
    cache_dir: str = ""
    cache_max_gb: float = 20.0
    cache_dtype: str = "computed"

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision = {self.precision!r}{near(self.precision, PRECISIONS)}")
        if self.accelerator not in ACCELERATORS:
            raise ValueError(f"accelerator = {self.accelerator!r}{near(self.accelerator, ACCELERATORS)}")
        for name in ("devices", "nodes", "accumulate", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be 1 or more")
        if self.checkpointing not in CHECKPOINTING:
            raise ValueError(f"checkpointing = {self.checkpointing!r}{near(self.checkpointing, CHECKPOINTING)}")
        self._check_strategy()
        if self.cache_dtype not in CACHE_DTYPES:
            raise ValueError(f"cache_dtype = {self.cache_dtype!r}{near(self.cache_dtype, CACHE_DTYPES)}")
        if not self.cache_max_gb > 0:
            raise ValueError(f"cache_max_gb = {self.cache_max_gb} must be more than 0")
        if self.keep < 1:
            raise ValueError(f"keep = {self.keep} must be 1 or more")
        if self.restarts < 0:
            raise ValueError(f"restarts = {self.restarts} must not be negative")
        if not self.timeout > 0:
            raise ValueError(f"timeout = {self.timeout} must be more than 0 seconds")
        if self.pack < 0:
            raise ValueError(f"pack = {self.pack} must be 0 (do not pack) or a number of tokens")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema = {self.ema} must be in [0, 1)")

    def _check_strategy(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy = {self.strategy!r}{near(self.strategy, STRATEGIES)}")
        count = self.devices * self.nodes
        if self.strategy == "single" and count > 1:
            raise ValueError(f"strategy = single is one device, not {count}: choose auto, ddp or fsdp")
        if self.strategy in ("ddp", "fsdp") and count == 1:
            raise ValueError(f"strategy = {self.strategy} needs several devices: set trainer.devices, or choose auto")
        if self.strategy == "fsdp" and self.precision == "fp16":
            raise ValueError("strategy = fsdp has no loss scaling for precision = fp16: choose bf16")

    @property
    def resolved_strategy(self) -> str:
        """``single``, ``ddp`` or ``fsdp``."""
        if self.strategy != "auto":
            return self.strategy
        return "ddp" if self.devices * self.nodes > 1 else "single"


PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
CACHE_DTYPES = ("computed", "float16")
ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")
STRATEGIES = ("auto", "single", "ddp", "fsdp")
CHECKPOINTING = ("none", "blocks")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(PartConfig):
    """What is measured after training.

    Attributes:
        tasks: Task name -> fields that differ from its defaults.
    """

    split: str = "test"
    tasks: dict[str, dict[str, Any]] = field(
        default_factory=lambda: {"retrieval": {}, "caption-likelihood": {}, "naming": {}}
    )


def starts(init: str) -> list[str]:
    """The paths of an ``init``, in order."""
    return [path for part in init.split(" + ") if (path := part.strip())]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run. ``to_plain`` is what run.yaml holds; its hash names the run directory.

    Attributes:
        lr_factor: What every learning rate of the recipe is multiplied by; ``tune`` chooses it.
        init: A run directory or checkpoint whose weights training starts from; several joined by ``" + "``, of which a
            later one wins where two have a tensor.
    """

    recipe: Recipe
    data: dict[str, Any]
    batch_size: int
    seed: int = 0
    lr_factor: float = 1.0
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    init: str = ""

    def __post_init__(self) -> None:
        if not 0 < self.lr_factor < math.inf:
            raise ConfigError(f"lr_factor = {self.lr_factor} must be above 0")
        per_step = self.trainer.devices * self.trainer.nodes * self.trainer.accumulate
        if self.batch_size < 1 or self.batch_size % per_step:
            raise ConfigError(
                f"batch_size = {self.batch_size} must be a positive multiple of devices x nodes x accumulate = "
                f"{per_step}"
            )
        if self.budget.fixed_order:  # what other units come to takes data or a count of FLOPs
            plan(self)
        for objective in self.recipe.objectives.values():
            objective.check_batch(self.batch_size // self.trainer.accumulate)
        values = dict(self.data)
        name = values.pop("name", None)
        if name is None:
            raise ConfigError(f"data needs a 'name'; known: {', '.join(catalogue()['data'].names())}")
        catalogue()["data"].parse(name, values, "data")
        for task, fields in self.evaluation.tasks.items():
            catalogue()["task"].parse(task, fields, f"evaluation.tasks.{task}")

    @property
    def trained_recipe(self) -> Recipe:
        """The recipe with its learning rates multiplied by ``lr_factor``: what is trained and saved."""
        return self.recipe if self.lr_factor == 1 else times_lr(self.recipe, self.lr_factor)

    @property
    def name(self) -> str:
        """The recipe's name and what else sets this run apart, e.g. ``llava+data.blank_images=true``."""
        registry = catalogue()["data"]
        values = {k: v for k, v in self.data.items() if k != "name"}
        default = to_plain(registry.parse(self.data["name"], {}, "data"))
        now = to_plain(registry.parse(self.data["name"], values, "data"))
        shown = [f"+data.{key}={json.dumps(now[key])}" for key in SHOWN_DATA if now.get(key) != default.get(key)]
        paths = [Path(start) for start in starts(self.init)]
        models = [(path.parent if path.name.startswith("seed=") else path).name.split("+")[0] for path in paths]
        started = [f"+init={'+'.join(models)}"] if models else []
        return self.recipe.name + "".join([*shown, *started])

    def to_plain(self) -> dict[str, Any]:
        return {
            "format": 1,
            "recipe": self.recipe.to_plain(),
            "data": dict(self.data),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "lr_factor": self.lr_factor,
            "budget": to_plain(self.budget),
            "trainer": to_plain(self.trainer),
            "evaluation": to_plain(self.evaluation),
            "tracking": to_plain(self.tracking),
            **({"init": self.init} if self.init else {}),
        }

    @staticmethod
    def from_plain(plain: Mapping[str, Any]) -> RunConfig:
        """Read what ``to_plain`` wrote.

        Raises:
            ConfigError: Another format, an unknown name or field, a wrong type.
        """
        refuse_code(plain, "run")
        if plain.get("format") != 1:
            raise ConfigError(
                f"run format {plain.get('format')!r} is unknown to this version, expected 1: update mmzoo"
            )
        known = {f.name for f in dataclasses.fields(RunConfig)}
        for key in plain:
            if key not in known | {"format"}:
                raise ConfigError(f"run configuration has an unknown key {key!r}{near(key, known)}")
        return RunConfig(
            recipe=Recipe.from_plain(plain["recipe"]),
            data=dict(plain["data"]),
            batch_size=plain["batch_size"],
            seed=plain["seed"],
            lr_factor=float(plain.get("lr_factor", 1.0)),
            budget=parse(BudgetConfig, plain["budget"], "budget"),
            trainer=parse(TrainerConfig, plain["trainer"], "trainer"),
            evaluation=parse(EvaluationConfig, plain["evaluation"], "evaluation"),
            tracking=parse(TrackingConfig, plain.get("tracking") or {"name": "none"}, "tracking"),
            init=str(plain.get("init") or ""),
        )

    def hash(self) -> str:
        """Eight hex digits over everything that decides the result; how it is executed (devices, workers, tracking) is
        left out.
        """
        plain = self.to_plain()
        plain["recipe"].pop("changed")
        plain.pop("tracking")
        if self.lr_factor == 1:
            plain.pop("lr_factor")
        deciding = ["precision", "ema", "accumulate"]
        if self.trainer.cache_features and self.trainer.cache_dtype != "computed":
            deciding.append("cache_dtype")
        plain["trainer"] = {k: plain["trainer"][k] for k in deciding}
        return digest(plain)[:8]

    def directory(self, out: str | Path) -> Path:
        """``OUT/NAME/seed=S-HASH``; a name too long for a folder is cut, the hash keeps it unique."""
        name = self.name.replace("/", "-")
        return Path(out) / (name if len(name) <= 150 else name[:149] + "~") / f"seed={self.seed}-{self.hash()}"

    def write(self, path: Path) -> None:
        import yaml

        path.write_text(yaml.safe_dump(self.to_plain(), sort_keys=False, allow_unicode=True), encoding="utf-8")

    @staticmethod
    def read(path: Path) -> RunConfig:
        """Read a run.yaml.

        Raises:
            RunError: There is none, or it is no YAML.
            ConfigError: As ``from_plain``.
        """
        import yaml

        try:
            plain = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise RunError(f"cannot read {path}: {error}") from error
        if not isinstance(plain, dict):
            raise RunError(f"{path} holds no run configuration")
        return RunConfig.from_plain(plain)


def times_lr(recipe: Recipe, factor: float) -> Recipe:
    """The recipe with every peak and final learning rate, of stages and of paths in them too, times ``factor``."""

    def scaled(values: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value * factor if key in ("lr", "min_lr") else value for key, value in values.items()}

    optimizer = recipe.optimizer
    stages = tuple(
        dataclasses.replace(
            stage, optimizer=scaled(stage.optimizer), lr={path: lr * factor for path, lr in stage.lr.items()}
        )
        for stage in recipe.stages
    )
    own = dataclasses.replace(optimizer, lr=optimizer.lr * factor, min_lr=optimizer.min_lr * factor)
    return dataclasses.replace(recipe, optimizer=own, stages=stages)


SHOWN_DATA = ("blank_images", "text_only", "questions", "shuffled_captions", "trusted", "split_scheme", "language")
"""Data fields that set two runs of one model apart in their names."""


def digest(plain: Any) -> str:
    """Hex sha256 of the canonical JSON of ``plain``."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
