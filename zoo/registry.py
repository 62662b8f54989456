"""Names of parts: a name stands for a typed Config class, imported when it is first used, and the fields it presets.

Names are strings only at the door (command line, notebook, YAML, checkpoint). Listing names imports no part, no torch.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from zoo.errors import ConfigError, MissingExtra, near

KINDS: dict[str, str] = {
    "model": "a whole system: a recipe in conf/model",
    "encoder": "turns images into tokens",
    "text_encoder": "turns text into tokens and one vector",
    "modality_encoder": "turns a modality that is neither image nor text (audio, depth, ...) into tokens",
    "connector": "turns tokens into tokens the decoder can read",
    "decoder": "turns tokens into text",
    "trunk": "turns images, text, or both at once into tokens",
    "patch_codec": "turns noisy image latents into tokens, and a trunk's states into what is predicted of them",
    "output_connector": "turns a language model's states into the tokens that something which draws reads",
    "denoiser": "predicts, of noisy image latents and the tokens they are drawn from, the noise or the image",
    "image_tokenizer": "turns images into discrete codes or latents and back",
    "data_tokenizer": "turns data of one modality into a sequence of tokens",
    "mask_decoder": "turns an image and a language model's states into masks",
    "objective": "a loss and what it reports",
    "tokenizer": "turns text into ids and back",
    "wiring": "joins parts into a model",
    "data": "a source of samples",
    "task": "an evaluation",
    "command": "a word of the command line: zoo NAME",
    "checkpoint": "reads the weights that were released for the recipe of this name",
}

FUNCTIONS = ("checkpoint", "command")
"""Kinds whose names stand for a function; all others, but models, stand for a Config class."""

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")


@dataclass(frozen=True, kw_only=True)
class Component:
    """One name in a registry, as a plugin's manifest states it.

    Attributes:
        kind: One of ``KINDS``.
        name: Lower-case, words joined by ``-``, as users write it.
        ref: ``"package.module:ConfigClass"``; for a model, empty (its recipe is ``conf/model/NAME.yaml``); for a
            command, ``"package.module:main"``, a function of the words behind its name that returns the exit status;
            for a checkpoint, ``"package.module:from_state"``, ``(recipe, state) -> zoo.weights.formats.Official``.
        preset: Values of the Config's fields under this name, e.g. a published size.
        summary: One line for ``zoo list``.
        extra: The extra of mmzoo (or the package) to install when an import fails.
    """

    kind: str
    name: str
    ref: str = ""
    preset: Mapping[str, Any] = field(default_factory=dict)
    summary: str = ""
    extra: str | None = None


class Registry:
    """The components of one kind, by name. Duplicates are refused, wrong names answered with near ones."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, tuple[Component, str]] = {}  # name -> component, plugin

    def add(self, component: Component, plugin: str = "zoo") -> None:
        """Register a component.

        Raises:
            ConfigError: The name is taken, malformed, or of another kind.
        """
        name = component.name
        if component.kind != self.kind:
            raise ConfigError(f"component {name!r} is of kind {component.kind!r}, expected {self.kind!r}")
        if not _NAME.fullmatch(name):
            raise ConfigError(f"{self.kind} name {name!r} must be lower-case letters, digits, '-', '.' and '_'")
        if name in self._entries:
            raise ConfigError(
                f"{self.kind} {name!r} of plugin {plugin!r} is already registered by {self.plugin(name)!r}"
            )
        self._entries[name] = (component, plugin)

    def names(self) -> list[str]:
        return sorted(self._entries)

    def __iter__(self) -> Iterator[Component]:
        return (self._entries[name][0] for name in self.names())

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def get(self, name: str) -> Component:
        """The component called ``name``.

        Raises:
            ConfigError: No such name; the message lists near ones.
        """
        if name not in self._entries:
            raise ConfigError(f"unknown {self.kind.replace('_', ' ')} {name!r}{near(str(name), self._entries)}")
        return self._entries[name][0]

    def plugin(self, name: str) -> str:
        return self._entries[name][1]

    def load(self, name: str) -> Any:
        """Import and return what ``name`` stands for: a function of the kinds `FUNCTIONS`, else a Config class.

        Raises:
            ConfigError: Unknown name, or the reference does not resolve to such a thing.
            MissingExtra: The module needs a package that is not installed; the component says which extra brings it.
        """
        component = self.get(name)
        module, _, attribute = component.ref.partition(":")
        if not module or not attribute:
            what = "function" if self.kind in FUNCTIONS else "Config class"
            raise ConfigError(f"{self.kind} {name!r} has no {what}: its ref is {component.ref!r}")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except Exception as error:  # a plugin's module may raise anything
            if isinstance(error, ModuleNotFoundError) and error.name and component.extra:
                raise MissingExtra(error.name, component.extra, f"{self.kind} {name!r}") from error
            raise ConfigError(f"{self.kind} {name!r} ({component.ref}) cannot be imported: {error}") from error
        if self.kind in FUNCTIONS:
            if not callable(found):
                raise ConfigError(f"{self.kind} {name!r}: {component.ref} is not a function")
        elif not (isinstance(found, type) and dataclasses.is_dataclass(found)):
            raise ConfigError(f"{self.kind} {name!r}: {component.ref} is not a dataclass")
        return found

    def config_class(self, name: str) -> type[Any]:
        """``load`` of a kind that has Config classes."""
        cls: type[Any] = self.load(name)
        return cls

    def parse(
        self,
        name: str,
        values: Mapping[str, Any] | None = None,
        where: str | None = None,
    ) -> Any:
        """The Config of ``name``: class defaults, then the preset, then ``values``, checked against the field types.

        Args:
            where: The path to name in messages, by default the kind.

        Raises:
            ConfigError: Unknown name or field (with near names), or a value of the wrong type.
        """
        cls = self.config_class(name)
        return parse(cls, {**self.get(name).preset, **(values or {})}, where or self.kind)


def parse(cls: type[Any], values: Mapping[str, Any], where: str) -> Any:
    """Make the dataclass ``cls`` from plain values, strictly typed (``"64"`` is no integer, ``1`` is a float).

    Raises:
        ConfigError: An unknown field or a wrong type, in one line, with the path of the field.
    """
    import pydantic

    known = {f.name for f in dataclasses.fields(cls) if f.init}
    for key in values:
        if key not in known:
            raise ConfigError(f"{where} has no field {key!r} ({cls.__name__}){near(str(key), known)}")
    try:
        text = json.dumps(dict(values))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where} holds a value that is no plain number, text, list or mapping: {error}") from error
    try:
        return pydantic.TypeAdapter(cls).validate_json(text, strict=True)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        path = ".".join([where, *(str(p) for p in first["loc"])])
        got = first.get("input")
        if isinstance(first.get("ctx", {}).get("error"), Exception):
            raise ConfigError(f"{path}: {first['ctx']['error']}") from error
        raise ConfigError(f"{path} = {got!r}: {first['msg'][0].lower()}{first['msg'][1:]}") from error


def refuse_code(plain: Any, where: str) -> None:
    """Refuse ``_target_``, ``_partial_`` and the like anywhere in a configuration: names go through the registry only.

    Raises:
        ConfigError: Such a key, with its path.
    """
    if isinstance(plain, Mapping):
        for key, value in plain.items():
            if str(key).strip("+~").split(".")[-1] in CODE_KEYS:
                raise ConfigError(f"{where}.{key} is refused: configurations name parts of the registry, never code")
            refuse_code(value, f"{where}.{key}")
    elif isinstance(plain, list | tuple):
        for index, value in enumerate(plain):
            refuse_code(value, f"{where}.{index}")


CODE_KEYS = ("_target_", "_partial_", "_args_", "_recursive_", "_convert_", "_call_", "_component_")
"""Keys by which Hydra and others turn a configuration into calls."""


def to_plain(config: Any) -> dict[str, Any]:
    """The fields of a Config as JSON-like values, without ``later_fields`` at their default; ``parse`` reads it."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    later: frozenset[str] = getattr(config, "later_fields", frozenset())
    defaults = {f.name: f.default for f in dataclasses.fields(config) if f.name in later}
    return {key: value for key, value in plain.items() if key not in later or value != defaults[key]}
