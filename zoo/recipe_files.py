"""The files a recipe is read from: ``conf/model/NAME.yaml`` and ``conf/scale/NAME.yaml``, without Hydra.

Hydra composes the same files for the command line. They keep to what both readers understand alike, and a file that
does not is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zoo.errors import ConfigError, near
from zoo.part import SIZE_FIELDS
from zoo.plugin import catalogue
from zoo.registry import parse, refuse_code

SLOTS = (
    "encoder",
    "text_encoder",
    "connector",
    "decoder",
    "trunk",
    "patch_codec",
    "output_connector",
    "denoiser",
    "image_tokenizer",
    "mask_decoder",
    "data_tokenizer",
)
"""The part kinds a recipe may fill, each a Hydra group of the same name."""

_YAML_FLOAT, _YAML_DATE = "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp"
_FLOAT = re.compile(
    r"(?:[-+]?(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|[-+]?\.[0-9_]+(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)

SECTIONS = (*SLOTS, "objective", "wiring", "stages", "optimizer")
"""Top-level keys of a composed configuration that belong to the recipe."""


@dataclass(frozen=True, kw_only=True)
class PlainRecipe:
    """The shape of recipe.json, whose sections are then parsed by their own names."""

    model: str
    scale: str
    wiring: dict[str, Any]
    encoder: dict[str, Any] | None = None
    text_encoder: dict[str, Any] | None = None
    connector: dict[str, Any] | None = None
    decoder: dict[str, Any] | None = None
    trunk: dict[str, Any] | None = None
    patch_codec: dict[str, Any] | None = None
    output_connector: dict[str, Any] | None = None
    denoiser: dict[str, Any] | None = None
    image_tokenizer: dict[str, Any] | None = None
    mask_decoder: dict[str, Any] | None = None
    data_tokenizer: dict[str, Any] | None = None
    objective: dict[str, dict[str, Any]]
    stages: list[dict[str, Any]]
    optimizer: dict[str, Any]
    changed: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class RecipeFile:
    """``conf/model/NAME.yaml`` as it stands: the options it picks, and the fields it sets."""

    choices: dict[str, Any]
    body: dict[str, Any]


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping, read as Hydra reads it: ``1e-3`` is a number and a date is text, which plain YAML 1.1 denies.

    Raises:
        ConfigError: No valid YAML, no mapping, or an interpolation, which only Hydra could resolve.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers = {  # noqa: RUF012
            first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_YAML_FLOAT, _YAML_DATE)]
            for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value]
            twice = next((key for key in keys if keys.count(key) > 1), None)
            if twice is not None:
                raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} stands twice", node.start_mark)
            return super().construct_mapping(node, deep=deep)

    Loader.add_implicit_resolver(_YAML_FLOAT, _FLOAT, list("-+0123456789."))
    text = path.read_text(encoding="utf-8")
    try:
        content = yaml.load(text, Loader) or {}  # a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"{path.name} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path.name} holds a {type(content).__name__}, expected keys and values")
    if "${" in "\n".join(line.partition("#")[0] for line in text.splitlines()):
        raise ConfigError(f"{path.name} holds an interpolation '${{...}}': write the value itself")
    return content


def read_recipe(model: str) -> RecipeFile:
    """Read a recipe file: ``override /GROUP: OPTION`` defaults, then fields.

    Raises:
        ConfigError: Unknown model, or a file outside this grammar (Hydra would accept more; notebooks read the same
            files without it).
    """
    catalogue()["model"].get(model)
    path = catalogue().recipes[model]
    content = read_yaml(path)
    refuse_code(content, path.name)
    if not content:
        raise ConfigError(f"recipe {path.name} is empty, expected defaults and fields")
    choices: dict[str, Any] = {}
    for item in content.pop("defaults", []):
        if item == "_self_":
            continue
        key = next(iter(item), "") if isinstance(item, dict) and len(item) == 1 else ""
        group = key.removeprefix("override /")
        if not key.startswith("override /") or group not in (*SLOTS, "objective"):
            raise ConfigError(f"recipe {path.name}: defaults may only hold 'override /GROUP: OPTION', not {item!r}")
        choices[group] = item[key]
    for key, value in content.items():
        if key not in SECTIONS:
            raise ConfigError(f"recipe {path.name} has an unknown key {key!r}{near(str(key), SECTIONS)}")
        sizes = SIZE_FIELDS & set(value) if isinstance(value, dict) else set()
        if sizes:
            raise ConfigError(
                f"recipe {path.name} sets {key}.{sorted(sizes)[0]}: sizes belong to the preset of a part's name"
            )
    return RecipeFile(choices, content)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """``conf/scale/NAME.yaml``.

    Attributes:
        sizes: Standard size field -> value, for every part that has the field.
        optimizer: Optimizer fields that suit the size.
        batch_size: Samples a step, unless the run says otherwise; 0 = no opinion.
    """

    name: str
    sizes: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 0


def scales() -> dict[str, Path]:
    return {path.stem: path for folder in catalogue().conf_dirs for path in sorted((folder / "scale").glob("*.yaml"))}


def read_scale(name: str) -> Scale:
    """Read a scale.

    Raises:
        ConfigError: No such scale, or it sets what is no standard size field.
    """
    known = scales()
    if name not in known:
        raise ConfigError(f"unknown scale {name!r}{near(name, known)}")
    scale: Scale = parse(Scale, {"name": name, **read_yaml(known[name])}, f"scale {name}")
    for key in scale.sizes:
        if key not in SIZE_FIELDS:
            raise ConfigError(f"scale {name!r} sets {key!r}, which is no standard size field{near(key, SIZE_FIELDS)}")
    return scale
