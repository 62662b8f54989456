"""Between the command line and Hydra: check names first, let Hydra choose and sweep, then resolve to a RunConfig."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from zoo.budget import BudgetConfig
from zoo.cli.experiments import placed
from zoo.cli.match import matched, to_match
from zoo.errors import ConfigError, MissingExtra, near
from zoo.plugin import catalogue
from zoo.recipe import SECTIONS, SLOTS, Recipe, read_recipe, read_scale, resolve, scales
from zoo.registry import parse, refuse_code
from zoo.run_config import EvaluationConfig, RunConfig, TrainerConfig
from zoo.tracking import TrackingConfig

FILE_GROUPS = ("scale", "trainer", "strategy", "budget", "tracking", "experiment", "tune", "match")
"""Groups whose options are YAML files of the conf folders."""

PLAIN = ("seed", "out", "batch_size", "lr_factor", "evaluation", "init")
"""Top-level keys of conf/train.yaml that are no group."""

HYDRA_EXTRAS = {
    "hydra/launcher": {
        "joblib": ("hydra_joblib_launcher", "hydra-joblib-launcher", "joblib"),
        "ray": ("hydra_ray_launcher", "hydra-ray-launcher", "ray"),
        "submitit_local": ("hydra_submitit_launcher", "hydra-submitit-launcher", "submitit"),
        "submitit_slurm": ("hydra_submitit_launcher", "hydra-submitit-launcher", "submitit"),
    },
}
"""Hydra group -> option -> the plugin's module, its package, and the extra of mmzoo that brings it."""

BATCH_SIZE = 32
"""Samples a step when neither the run nor the scale says."""


def options(group: str) -> list[str]:
    """The names ``group=`` accepts."""
    if group == "scale":
        return sorted(scales())
    if group in FILE_GROUPS:
        return sorted({f.stem for folder in catalogue().conf_dirs for f in (folder / group).glob("*.yaml")})
    return catalogue()[group].names()


def known(group: str) -> str:
    """The first names of a group, for a message."""
    names = options(group)
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


def store_parts() -> None:
    """Give Hydra one option a registered part, in its ConfigStore; fields are filled in and checked by
    ``zoo.recipe``.
    """
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    for slot in SLOTS:
        for name in catalogue()[slot].names():
            store.store(group=slot, name=name, node={"name": name})
    for name in catalogue()["objective"].names():
        # the name marks it as chosen: of a list of choices Hydra keeps no record
        store.store(group="objective", name=name, package=f"objective.{name}", node={"name": name})
    files = {f.stem for folder in catalogue().conf_dirs for f in (folder / "data").glob("*.yaml")}
    for name in set(catalogue()["data"].names()) - files:
        store.store(group="data", name=name, node={"name": name})


def search_path() -> str:
    """The override that lets Hydra find the recipes of plugins."""
    return f"hydra.searchpath=[{','.join(f'file://{folder}' for folder in catalogue().conf_dirs[1:])}]"


def prepare(overrides: Sequence[str]) -> list[str]:
    """Check names and make fields settable: ``encoder.width=96`` becomes ``++encoder.width=96``.

    Raises:
        ConfigError: A malformed override, an unknown key, or an unknown option of a group, with near names.
    """
    prepared = [search_path()] if len(catalogue().conf_dirs) > 1 else []
    for text, override in zip(overrides, parsed(overrides), strict=True):
        key = override.key_or_group
        refuse_code({key: None if override.is_delete() else override.value()}, "override")
        if key.startswith("hydra"):
            if key in HYDRA_EXTRAS:
                check_installed(key, str(override.value()))
            prepared.append(text)
            continue
        head = key.split(".")[0].split("@")[0]
        groups = (*SLOTS, "objective", "model", "data", *FILE_GROUPS)
        if head not in groups and head not in (*PLAIN, "stages", "wiring", "optimizer"):
            raise ConfigError(f"unknown key {head!r}{near(head, (*groups, *SECTIONS, *PLAIN))}")
        is_choice = "." not in key and head in groups
        if is_choice:
            for value in values_of(override):
                names = value if isinstance(value, list) else [value]
                for name in names:
                    if name is None:
                        raise ConfigError(f"{head}=null names nothing: leave it out, or choose one of {known(head)}")
                    if str(name) not in options(head):
                        what = head.replace("_", " ")
                        raise ConfigError(f"unknown {what} {str(name)!r}{near(str(name), options(head))}")
        prepared.append(text if is_choice or text[:1] in "+~" else f"++{text}")
    return prepared


def with_quotes(overrides: Sequence[str]) -> list[str]:
    """Quote the paths of ``init=PATH`` and ``evaluation.tasks.TASK.evaluator=PATH``: those of run directories hold
    characters that Hydra reads as its own."""

    def quoted(text: str) -> str:
        key, _, value = text.partition("=")
        is_path = key.lstrip("+") == "init" or (
            key.lstrip("+").startswith("evaluation.") and key.endswith(".evaluator")
        )
        if not is_path or not value or value[0] in "'\"" or value == "null":
            return text
        return f"{key}=" + ",".join(f"'{path}'" for path in value.split(","))

    return [quoted(text) for text in overrides]


def check_installed(group: str, option: str) -> None:
    """Refuse a launcher whose package is missing, before anything is composed.

    Raises:
        MissingExtra: Names the package and the extra.
    """
    from importlib.util import find_spec

    if option in HYDRA_EXTRAS[group]:
        module, package, extra = HYDRA_EXTRAS[group][option]
        if find_spec("hydra_plugins") is None or find_spec(f"hydra_plugins.{module}") is None:
            raise MissingExtra(package, extra, f"{group}={option}")


def parsed(overrides: Sequence[str]) -> list[Any]:
    """Hydra's own reading of the overrides.

    Raises:
        ConfigError: One is malformed.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    out = []
    for text in overrides:
        try:
            out.append(parser.parse_override(text))
        except HydraException as error:
            raise ConfigError(f"cannot read {text!r}: expected key=value ({str(error).splitlines()[0]})") from error
    return out


def values_of(override: Any) -> list[Any]:
    """All values an override sweeps over, or its one value."""
    from hydra.core.override_parser.types import QuotedString

    values = list(override.sweep_iterator()) if override.is_sweep_override() else [override.value()]
    return [v.text if isinstance(v, QuotedString) else v for v in values]


def expand(overrides: Sequence[str]) -> Iterator[list[str]]:
    """The single jobs of a sweep, in the order Hydra's basic sweeper runs them."""
    axes = []
    for text, override in zip(overrides, parsed(overrides), strict=True):
        if override.is_sweep_override():
            key = override.get_key_element()
            axes.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            axes.append([text])
    return (list(job) for job in itertools.product(*axes))


def is_sweep(overrides: Sequence[str]) -> bool:
    return any(override.is_sweep_override() for override in parsed(overrides))


def composed(overrides: Sequence[str]) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Compose ``conf/train.yaml`` with prepared overrides; returns the plain configuration and Hydra's choices.

    Raises:
        ConfigError: Hydra refuses; its first line is the message.
    """
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from zoo.api import own_hydra
    from zoo.plugin import conf_dir

    try:
        with own_hydra():
            store_parts()
            with initialize_config_dir(str(conf_dir()), version_base="1.3"):
                config = compose("train", overrides=list(overrides), return_hydra_config=True)
                choices = dict(config.hydra.runtime.choices)
                plain: dict[str, Any] = OmegaConf.to_container(config)  # type: ignore[assignment]
                plain.pop("hydra")
                marked = [name for name, fields in (plain.get("objective") or {}).items() if fields.pop("name", None)]
                choices.setdefault("objective", marked or None)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(str(error).splitlines()[0]) from error
    return plain, choices


def to_run(
    plain: Mapping[str, Any],
    choices: Mapping[str, Any],
    written: Sequence[str],
    places: Mapping[str, str] | None = None,
) -> RunConfig:
    """The RunConfig of one composed job.

    Args:
        plain: The composed configuration.
        choices: Hydra's group choices.
        written: Keys the user wrote, which win over the scale even where they repeat the recipe.
        places: Directories of an experiment's first runs (``zoo.cli.experiments``).

    Raises:
        ConfigError: As ``zoo.recipe.resolve`` and ``RunConfig``.
    """
    refuse_code(plain, "config")
    plain = {**plain, **{key: placed(plain.get(key), places or {}) for key in ("init", "evaluation")}}
    recipe = matched(to_recipe(plain, choices, written), to_match(plain), written)
    scale = read_scale(recipe.scale)
    evaluation = dict(plain.get("evaluation") or {})
    tasks = evaluation.get("tasks")
    if isinstance(tasks, list):
        evaluation["tasks"] = {name: {} for name in tasks}
    elif isinstance(tasks, dict):
        evaluation["tasks"] = {name: fields or {} for name, fields in tasks.items()}
    seed = plain.get("seed", 0)
    batch_size = plain.get("batch_size") or scale.batch_size or BATCH_SIZE
    for name, value in (("seed", seed), ("batch_size", batch_size)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{name} = {value!r}: expected an integer")
    unit = (plain.get("budget") or {}).get("unit")
    if unit != "steps" and {"budget", "budget.unit"} & set(written) and "budget.value" not in written:
        raise ConfigError(f"budget={unit} needs budget.value=N: how many {unit}")
    factor = plain.get("lr_factor", 1.0)
    if isinstance(factor, bool) or not isinstance(factor, int | float):
        raise ConfigError(f"lr_factor = {factor!r}: expected a number")
    return RunConfig(
        recipe=recipe,
        data=dict(plain.get("data") or {}),
        batch_size=batch_size,
        seed=seed,
        lr_factor=float(factor),
        budget=parse(BudgetConfig, plain.get("budget") or {}, "budget"),
        trainer=parse(TrainerConfig, plain.get("trainer") or {}, "trainer"),
        evaluation=parse(EvaluationConfig, evaluation, "evaluation"),
        tracking=parse(TrackingConfig, plain.get("tracking") or {}, "tracking"),
        init=str(plain.get("init") or ""),
    )


def to_recipe(plain: Mapping[str, Any], choices: Mapping[str, Any], written: Sequence[str]) -> Recipe:
    """The recipe of a composed job: Hydra's choices, and the fields that are not the recipe file's own.

    Hydra has merged the recipe's body with what the user wrote; the scale stands between the two, so they are told
    apart again.
    """
    model = choices.get("model")
    if not model:
        raise ConfigError(f"which model? say model=NAME{near('', catalogue()['model'].names())}")
    body = read_recipe(model).body

    def own(value: Any, file: Any, path: str) -> Any:
        if isinstance(value, Mapping):
            inside = file if isinstance(file, Mapping) else {}
            kept = {key: own(v, inside.get(key), f"{path}.{key}") for key, v in value.items() if key != "name"}
            return {key: v for key, v in kept.items() if v is not None} or None
        return None if value == file and path not in written else value

    values = {key: own(plain[key], body.get(key), key) for key in SECTIONS if plain.get(key) is not None}
    picked = {slot: choices[slot] for slot in SLOTS if choices.get(slot)}
    objective = choices.get("objective")
    if objective:
        picked["objective"] = [objective] if isinstance(objective, str) else list(objective)
    wiring = plain.get("wiring")
    if wiring:
        picked["wiring"] = wiring if isinstance(wiring, str) else wiring["name"]
        if isinstance(wiring, str):
            values.pop("wiring", None)
    scale = (plain.get("scale") or {}).get("name", "published")
    return resolve(model, choices=picked, values={k: v for k, v in values.items() if v is not None}, scale=scale)


def run_config(overrides: Sequence[str]) -> RunConfig:
    """The RunConfig that ``zoo train OVERRIDES`` (no sweep) would run."""
    overrides = with_quotes(overrides)
    plain, choices = composed(prepare(overrides))
    return to_run(plain, choices, written_keys(overrides))


def written_keys(overrides: Sequence[str]) -> list[str]:
    return [override.key_or_group for override in parsed(overrides)]
