"""Recipes: what a model is made of, as one typed value that the command line, notebooks and checkpoints share.

A recipe is resolved in one order, whichever door it comes through: class defaults, the preset of the part's name, the
body of ``conf/model/NAME.yaml``, the scale, and last what the user wrote.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from zoo.errors import ConfigError, near
from zoo.part import PartConfig
from zoo.plugin import catalogue
from zoo.recipe_changes import difference
from zoo.recipe_files import SECTIONS, SLOTS, PlainRecipe, RecipeFile, Scale, read_recipe, read_scale, scales
from zoo.registry import KINDS, parse, refuse_code, to_plain

__all__ = [
    "JOINT",
    "SECTIONS",
    "SLOTS",
    "ObjectiveConfig",
    "OptimizerConfig",
    "Recipe",
    "RecipeFile",
    "Scale",
    "Stage",
    "WiringConfig",
    "merge",
    "read_recipe",
    "read_scale",
    "resolve",
    "scales",
    "split_changes",
]


@dataclass(frozen=True, kw_only=True)
class WiringConfig(PartConfig):
    """Base of the wirings' configuration: ``slots`` are the part kinds it joins, ``per_stage`` the fields that a stage
    of training may set for itself, because no weight depends on them."""

    slots: ClassVar[tuple[str, ...]] = ()
    per_stage: ClassVar[frozenset[str]] = frozenset()

    def build(self, parts: Mapping[str, tuple[str, Any]], seed: int) -> Any:
        """Build the parts, each within ``zoo.part.seeded(seed, slot)``, and join them: a ``zoo.models.base.Model``."""
        raise TypeError(f"{type(self).__name__} defines no build")


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(PartConfig):
    """Base of the objectives' configuration.

    Attributes:
        weight: Factor of this loss in the sum.
    """

    weight: float = 1.0

    def check_batch(self, batch_size: int) -> None:
        """Refuse a global batch (of one forward pass) that the objective cannot train with; raises ConfigError."""

    def build(self) -> Any:
        """Build the ``zoo.objectives.base.Objective``."""
        raise TypeError(f"{type(self).__name__} defines no build")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(PartConfig):
    """AdamW with linear warm-up and cosine decay.

    Attributes:
        lr: Peak learning rate.
        min_lr: Learning rate at the end of the cosine.
        warmup: Steps of linear warm-up when 1 or more, a fraction of the stage's steps when below 1.
        clip: Largest total gradient norm; 0 = no clipping.
        weight_decay: Decoupled; not applied to gains, biases, scalars, positions and class or query embeddings.
    """

    lr: float = 1e-4
    min_lr: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.05
    warmup: float = 0.03
    clip: float = 1.0

    def __post_init__(self) -> None:
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas = {list(self.betas)} must be two numbers in [0, 1)")
        if self.lr <= 0 or not 0 <= self.min_lr <= self.lr:
            raise ValueError(f"lr = {self.lr}, min_lr = {self.min_lr}: need 0 <= min_lr <= lr and lr > 0")
        if self.warmup < 0 or self.clip < 0 or self.weight_decay < 0:
            raise ValueError("warmup, clip and weight_decay must not be negative")


@dataclass(frozen=True, kw_only=True)
class Stage(PartConfig):
    """One stretch of training.

    Attributes:
        train: Paths of what learns: slots (``connector``), or modules inside (``decoder.lm_head``,
            ``trunk.trunk.layers.*.ffn.0`` in every layer); ``"*"`` is all.
        freeze: Paths inside ``train`` that stay fixed all the same.
        objectives: Names of the recipe's objectives this stage uses; empty = all.
        share: Part of the run's budget, relative to the other stages.
        optimizer: Fields of the recipe's optimizer that differ in this stage.
        lr: Path of something that learns -> its own peak learning rate, on the stage's schedule; the longest path wins.
        wiring: Fields of the wiring, of its ``per_stage``, that differ in this stage; the last one's stay.
    """

    name: str
    train: list[str] = field(default_factory=lambda: ["*"])
    freeze: list[str] = field(default_factory=list)
    objectives: list[str] = field(default_factory=list)
    share: float = 1.0
    optimizer: dict[str, Any] = field(default_factory=dict)
    lr: dict[str, float] = field(default_factory=dict)
    wiring: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wrong = next((path for path, rate in self.lr.items() if rate <= 0), None)
        if wrong is not None:
            raise ValueError(f"lr of {wrong!r} = {self.lr[wrong]} must be above 0")


JOINT = Stage(name="joint")
"""Everything learns at once; ``stages=joint`` on the command line. What a recipe without pretrained parts wants."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A resolved recipe.

    Attributes:
        model: File stem of the recipe.
        scale: Name of the scale applied, ``"published"`` for none.
        wiring: (registry name, config) of the wiring.
        parts: Slot -> (registry name, config), in the wiring's order.
        objectives: Registry name -> config.
        changed: What differs from the recipe as published at this scale, ``("connector", "mlp")`` or
            ``("encoder.width", "96")``.
    """

    model: str
    scale: str
    wiring: tuple[str, WiringConfig]
    parts: dict[str, tuple[str, PartConfig]]
    objectives: dict[str, ObjectiveConfig]
    stages: tuple[Stage, ...]
    optimizer: OptimizerConfig
    changed: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """``blip2-opt+connector=mlp``: a changed part shows everywhere."""
        return self.model + "".join(f"+{key}={value}" for key, value in self.changed)

    @property
    def image_size(self) -> int | None:
        """Side in pixels of the images the model reads; None where its parts do not say."""
        slots = ("encoder", "trunk", "image_tokenizer")
        sizes = (getattr(self.parts[slot][1], "image_size", None) for slot in slots if slot in self.parts)
        return next((size for size in sizes if size is not None), None)

    def stage_optimizer(self, index: int) -> OptimizerConfig:
        """The optimizer of a stage, its own fields over the recipe's."""
        stage = self.stages[index]
        values = {**to_plain(self.optimizer), **stage.optimizer}
        config: OptimizerConfig = parse(OptimizerConfig, values, f"stages.{index}.optimizer")
        return config

    def stage_wiring(self, index: int) -> WiringConfig:
        """The wiring of a stage, its own fields over the recipe's; -1 is what a finished model has."""
        (name, config), stage = self.wiring, self.stages[index]
        for key in stage.wiring:
            if key not in config.per_stage:
                raise ConfigError(f"stage {stage.name!r} sets wiring.{key}, which a stage of {name!r} cannot")
        if not stage.wiring:
            return config
        own: WiringConfig = parse(type(config), {**to_plain(config), **stage.wiring}, f"stages.{index}.wiring")
        return own

    def to_plain(self) -> dict[str, Any]:
        """JSON-like form, the content of recipe.json: every field written out: a new default changes no checkpoint."""
        return {
            "format": 1,
            "model": self.model,
            "scale": self.scale,
            "wiring": {"name": self.wiring[0], **to_plain(self.wiring[1])},
            **{slot: {"name": name, **to_plain(config)} for slot, (name, config) in self.parts.items()},
            "objective": {name: to_plain(config) for name, config in self.objectives.items()},
            # an empty wiring or lr is left out: runs made before stages had one keep their hash
            "stages": [{k: v for k, v in to_plain(s).items() if v or k not in ("wiring", "lr")} for s in self.stages],
            "optimizer": to_plain(self.optimizer),
            "changed": [list(pair) for pair in self.changed],
        }

    @staticmethod
    def from_plain(plain: Mapping[str, Any]) -> Recipe:
        """Read what ``to_plain`` wrote.

        Raises:
            ConfigError: Another format, an unknown name or field, a wrong type.
        """
        refuse_code(plain, "recipe")
        if plain.get("format") != 1:
            raise ConfigError(
                f"recipe format {plain.get('format')!r} is unknown to this version, expected 1: update mmzoo"
            )
        unknown = set(plain) - {"format", "model", "scale", "changed", *SECTIONS}
        if unknown:
            key = sorted(unknown)[0]
            raise ConfigError(f"recipe has an unknown key {key!r}{near(key, SECTIONS)}")
        whole = parse(PlainRecipe, {key: value for key, value in plain.items() if key != "format"}, "recipe")
        wiring_name, wiring = _named("wiring", whole.wiring)
        given = {slot: getattr(whole, slot) for slot in SLOTS if getattr(whole, slot) is not None}
        if set(given) != set(wiring.slots):
            raise ConfigError(
                f"recipe has the parts {', '.join(given) or 'none'}, but its wiring {wiring_name!r} joins"
                f" {', '.join(wiring.slots)}"
            )
        return _checked(
            Recipe(
                model=whole.model,
                scale=whole.scale,
                wiring=(wiring_name, wiring),
                parts={slot: _named(slot, given[slot]) for slot in wiring.slots},
                objectives={
                    name: catalogue()["objective"].parse(name, values, f"objective.{name}")
                    for name, values in whole.objective.items()
                },
                stages=_stages(whole.stages),
                optimizer=parse(OptimizerConfig, whole.optimizer, "optimizer"),
                changed=tuple((key, value) for key, value in whole.changed),
            )
        )

    def with_(self, *, scale: str | None = None, **changes: Any) -> Recipe:
        """The same recipe with parts or fields changed: ``with_(connector="mlp", encoder={"width": 96})``.

        Raises:
            ConfigError: As ``resolve``.
        """
        choices: dict[str, Any] = {slot: name for slot, (name, _) in self.parts.items()}
        choices["wiring"], choices["objective"] = self.wiring[0], list(self.objectives)
        # Only what differs from the recipe's own values is the user's; the rest follows a new scale.
        base = _over(self.to_plain(), resolve(self.model, choices=choices, scale=self.scale).to_plain())
        new_choices, new_values = split_changes(changes)
        for kind, choice in new_choices.items():
            if choice != choices.get(kind):
                base.pop(kind, None)  # fields of the part that goes have no meaning for the one that comes
        merged = merge(base, new_values)
        return resolve(
            self.model,
            choices={**choices, **new_choices},
            values=merged,
            scale=scale or self.scale,
        )


def _over(new: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """The sections and fields of ``new`` that ``base`` has otherwise; merged over ``base`` they give ``new``."""
    out: dict[str, Any] = {}
    for key, value in new.items():
        if key not in SECTIONS or value == base.get(key):
            continue
        if key == "stages":
            out[key] = value
            continue
        was = base.get(key) or {}
        for name, now in value.items():
            if key == "objective":
                now = {k: v for k, v in now.items() if v != (was.get(name) or {}).get(k)}
            if now != was.get(name) and now != {}:
                out.setdefault(key, {})[name] = now
    return out


def _named(kind: str, plain: Mapping[str, Any]) -> tuple[str, Any]:
    values = dict(plain)
    name = values.pop("name", None)
    if name is None:
        raise ConfigError(f"{kind} needs a 'name'; known: {', '.join(catalogue()[kind].names())}")
    return name, catalogue()[kind].parse(name, values, kind)


def _stages(values: Any) -> tuple[Stage, ...]:
    if values == "joint" or not values:
        return (JOINT,)
    if not isinstance(values, list | tuple):
        raise ConfigError(f"stages = {values!r}: expected 'joint' or a list of stages")
    stages = tuple(parse(Stage, value, f"stages.{i}") for i, value in enumerate(values))
    for stage in stages:
        if stage.share <= 0:
            raise ConfigError(f"stage {stage.name!r}: share = {stage.share} must be above 0")
    return stages


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings merged, ``over`` winning."""
    out = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = merge(out[key], value) if both else value
    return out


def split_changes(changes: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tell choices (``connector="mlp"``) from values (``connector={"queries": 8}``, ``{"encoder.width": 96}``).

    Raises:
        ConfigError: A key that is no section of a recipe, with near names.
    """
    choices: dict[str, Any] = {}
    values: dict[str, Any] = {}
    for key, value in changes.items():
        head, *rest = key.split(".")
        if head not in SECTIONS:
            raise ConfigError(f"unknown option {key!r} of a recipe{near(head, SECTIONS)}")
        if not rest and isinstance(value, Mapping) and head != "stages":
            value = dict(value)
            if "name" in value and head in KINDS:
                choices[head] = value.pop("name")
        elif not rest and head in (*SLOTS, "wiring", "objective"):
            choices[head] = value
            continue
        for step in reversed(rest):
            value = {step: value}
        values = merge(values, {head: value})
    return choices, values


def resolve(
    model: str,
    *,
    choices: Mapping[str, Any] | None = None,
    values: Mapping[str, Any] | None = None,
    scale: str | None = None,
) -> Recipe:
    """The recipe of ``model`` with parts chosen and fields set by the user.

    Args:
        choices: Slot, ``wiring`` or ``objective`` -> registry name (objective: one or a list).
        values: Section -> fields, as in a composed configuration.
        scale: A name in conf/scale; None = published sizes.

    Raises:
        ConfigError: Any unknown name or field, wrong type, or parts that do not fit the wiring.
    """
    file = read_recipe(model)
    recipe = _resolve(model, file, dict(choices or {}), dict(values or {}), scale or "published")
    if not choices and not values:
        return recipe
    published = _resolve(model, file, {}, {}, recipe.scale)
    own_stages = {key: value for key, value in (values or {}).items() if key == "stages"}  # they name objectives
    chosen = _resolve(model, file, dict(choices), own_stages, recipe.scale) if choices else published
    return dataclasses.replace(
        recipe,
        changed=difference(recipe.to_plain(), chosen.to_plain(), published.to_plain()),
    )


def _resolve(
    model: str,
    file: RecipeFile,
    choices: dict[str, Any],
    values: dict[str, Any],
    scale_name: str,
) -> Recipe:
    for key in (*choices, *values):
        if key not in SECTIONS:
            raise ConfigError(f"unknown option {key!r} of a recipe{near(key, SECTIONS)}")
    scale = read_scale(scale_name)
    picked = {**file.choices, **choices}

    def config(
        kind: str,
        name: str,
        where: str,
        body: Mapping[str, Any],
        user: Mapping[str, Any],
    ) -> Any:
        # Parse twice: the scale replaces sizes of a valid part, and what the user wrote then wins over the scale.
        cls = catalogue()[kind].config_class(name)
        known = {f.name for f in dataclasses.fields(cls)}
        fitting = body if picked.get(kind) == file.choices.get(kind) else {k: v for k, v in body.items() if k in known}
        published = catalogue()[kind].parse(name, fitting, where)
        try:
            base = published.scaled(scale.sizes)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{where} {name!r} does not take scale {scale.name!r}: {error}") from error
        return parse(cls, merge(to_plain(base), user), where)

    def section(key: str) -> tuple[dict[str, Any], dict[str, Any]]:
        both = [dict(source.get(key) or {}) for source in (file.body, values)]
        for source in both:
            source.pop("name", None)
        return both[0], both[1]

    named = [source.get("wiring") for source in (file.body, values)]
    wiring_name = choices.get("wiring") or next(
        (
            w["name"] if isinstance(w, Mapping) else w
            for w in reversed(named)
            if w and (isinstance(w, str) or "name" in w)
        ),
        None,
    )
    if wiring_name is None:
        raise ConfigError(f"recipe {model!r} states no wiring; known: {', '.join(catalogue()['wiring'].names())}")
    plain_wirings = [
        {} if isinstance(w, str) or w is None else {k: v for k, v in w.items() if k != "name"} for w in named
    ]
    wiring = config("wiring", wiring_name, "wiring", *plain_wirings)
    parts: dict[str, tuple[str, PartConfig]] = {}
    for slot in wiring.slots:
        name = picked.get(slot)
        if name is None:
            raise ConfigError(f"{model} ({wiring_name}) has no {slot}; known: {', '.join(catalogue()[slot].names())}")
        parts[slot] = (name, config(slot, name, slot, *section(slot)))
    for slot in SLOTS:
        if slot not in wiring.slots and (choices.get(slot) is not None or values.get(slot)):
            raise ConfigError(f"{model} has no {slot}: its wiring {wiring_name!r} joins {', '.join(wiring.slots)}")
    names = picked.get("objective") or []
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise ConfigError(f"recipe {model!r} states no objective; known: {', '.join(catalogue()['objective'].names())}")
    body, user = section("objective")
    for key in user:
        if key not in names:
            raise ConfigError(f"objective.{key} is set but the model trains {', '.join(names)}{near(key, names)}")
    objectives = {n: config("objective", n, f"objective.{n}", body.get(n) or {}, user.get(n) or {}) for n in names}
    optimizer_body, optimizer_user = section("optimizer")
    optimizer = parse(
        OptimizerConfig,
        {**optimizer_body, **scale.optimizer, **optimizer_user},
        "optimizer",
    )
    stages = _stages(values.get("stages") or file.body.get("stages"))
    # a published stage gives way to the scale's optimizer and to what the user wrote
    fixed = {*scale.optimizer, *optimizer_user} if "stages" not in values else set(optimizer_user)
    said = set(values.get("wiring") or {}) if "stages" not in values else set()
    stages = tuple(
        dataclasses.replace(
            s,
            optimizer={k: v for k, v in s.optimizer.items() if k not in fixed},
            lr={} if "lr" in fixed else s.lr,
            wiring={k: v for k, v in s.wiring.items() if k not in said},
        )
        for s in stages
    )
    return _checked(
        Recipe(
            model=model,
            scale=scale.name,
            wiring=(wiring_name, wiring),
            parts=parts,
            objectives=objectives,
            stages=stages,
            optimizer=optimizer,
        )
    )


def _checked(recipe: Recipe) -> Recipe:
    """What can be wrong between valid sections."""
    for index, stage in enumerate(recipe.stages):
        for name in stage.objectives:
            if name not in recipe.objectives:
                raise ConfigError(f"stage {stage.name!r} uses objective {name!r}{near(name, recipe.objectives)}")
        recipe.stage_optimizer(index)
        recipe.stage_wiring(index)
    return recipe
