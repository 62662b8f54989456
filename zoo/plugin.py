"""Plugins: separately installed packages that add components and recipes through an entry point.

A plugin's ``pyproject.toml`` says::

    [project.entry-points."zoo.plugins"]
    example = "zoo_example:PLUGIN"

and ``zoo_example/__init__.py``, which imports nothing heavy::

    PLUGIN = Plugin(
        name="zoo-example",
        components=(Component(kind="connector", name="gated-mlp", ref="zoo_example.gated_mlp:GatedMLPConfig"),),
        conf="pkg://zoo_example/conf",
    )

A plugin that cannot be imported, speaks another API or claims a taken name is reported by ``zoo doctor`` and otherwise
ignored.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import entry_points
from pathlib import Path

from zoo.errors import ConfigError
from zoo.registry import KINDS, Component, Registry

API = 1
GROUP = "zoo.plugins"


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """What a package offers: ``components``, and ``conf``, the folder of its recipes as ``pkg://package/folder``."""

    name: str
    components: tuple[Component, ...] = ()
    conf: str | None = None
    api: int = API

    def conf_dir(self) -> Path | None:
        if self.conf is None:
            return None
        if not self.conf.startswith("pkg://"):
            raise ConfigError(f"plugin {self.name!r}: conf = {self.conf!r} must be 'pkg://package/folder'")
        package, _, folder = self.conf.removeprefix("pkg://").partition("/")
        path = Path(str(importlib.resources.files(package))) / folder
        if not path.is_dir():
            raise ConfigError(f"plugin {self.name!r}: its recipe folder {self.conf!r} does not exist")
        return path


@dataclass(frozen=True)
class Broken:
    """A plugin that was found and could not be used, and why in one line."""

    name: str
    reason: str


@dataclass(frozen=True)
class Catalogue:
    """Everything that can be named: one Registry a kind, the recipe files, and the plugins they came from."""

    registries: dict[str, Registry]
    recipes: dict[str, Path]
    conf_dirs: tuple[Path, ...]
    plugins: tuple[Plugin, ...]
    broken: tuple[Broken, ...]

    def __getitem__(self, kind: str) -> Registry:
        return self.registries[kind]


def conf_dir() -> Path:
    """The zoo's own Hydra configuration: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    for path in (package / "conf", package.parent / "conf"):
        if (path / "train.yaml").is_file():
            return path
    raise ConfigError("the zoo's conf folder is missing from this installation: reinstall mmzoo")


def _add(
    plugin: Plugin,
    registries: dict[str, Registry],
    recipes: dict[str, Path],
    folder: Path | None,
    folders: Sequence[Path] = (),
) -> None:
    """Add a plugin whole or not at all; ``folders`` are of the plugins before it, whose files it may not replace."""
    files = sorted((folder / "model").glob("*.yaml")) if folder else []
    summaries = {c.name: c for c in plugin.components if c.kind == "model"}
    models = [summaries.get(f.stem, Component(kind="model", name=f.stem, summary=_summary(f))) for f in files]
    stated = set(summaries) - {f.stem for f in files}
    if stated:
        raise ConfigError(f"plugin {plugin.name!r} names models without a recipe file: {', '.join(sorted(stated))}")
    everything = [*(c for c in plugin.components if c.kind != "model"), *models]
    seen: set[tuple[str, str]] = set()
    for component in everything:  # check first, so that a refused plugin leaves nothing behind
        if component.kind not in KINDS:
            raise ConfigError(f"plugin {plugin.name!r}: unknown kind {component.kind!r}; known: {', '.join(KINDS)}")
        registry = registries[component.kind]
        if component.name in registry or (component.kind, component.name) in seen:
            owner = registry.plugin(component.name) if component.name in registry else plugin.name
            raise ConfigError(
                f"plugin {plugin.name!r}: {component.kind} {component.name!r} is already registered by {owner!r}"
            )
        Registry(component.kind).add(component)
        seen.add((component.kind, component.name))
    for file in sorted(folder.rglob("*.yaml")) if folder else []:
        name = file.relative_to(folder) if folder else file
        if any((other / name).is_file() for other in folders):
            raise ConfigError(f"plugin {plugin.name!r}: {name.as_posix()} is already there: rename its file")
    for component in everything:
        registries[component.kind].add(component, plugin.name)
    recipes.update({f.stem: f for f in files})


def _summary(recipe: Path) -> str:
    """The first comment line of a recipe file describes the model."""
    with recipe.open(encoding="utf-8") as lines:
        for line in lines:
            text = line.strip()
            if text.startswith("#") and "@package" not in text:
                return text.lstrip("# ").strip()
            if text and not text.startswith("#"):
                break
    return ""


_uninstalled: list[Plugin] = []


def _itself(plugin: Plugin) -> Plugin:
    return plugin


@contextmanager
def registered(plugin: Plugin) -> Iterator[Catalogue]:
    """The catalogue with a plugin in it that is not installed, e.g. one under test; after the block it is gone.

    A plugin that cannot be added is among ``broken``.
    """
    _uninstalled.append(plugin)
    catalogue.cache_clear()
    try:
        yield catalogue()
    finally:
        _uninstalled.remove(plugin)
        catalogue.cache_clear()


@cache
def catalogue() -> Catalogue:
    """The catalogue of this environment, read once: the zoo's own parts, then every installed plugin in name order."""
    from zoo.builtin import PLUGIN

    registries = {kind: Registry(kind) for kind in KINDS}
    recipes: dict[str, Path] = {}
    own = conf_dir()
    _add(PLUGIN, registries, recipes, own)
    plugins, broken, folders = [PLUGIN], [], [own]
    found: list[tuple[str, Callable[[], object]]] = [
        *((point.name, point.load) for point in sorted(entry_points(group=GROUP), key=lambda p: p.name)),
        *((plugin.name, partial(_itself, plugin)) for plugin in _uninstalled),
    ]
    for name, load in found:
        try:
            plugin = load()
            if not isinstance(plugin, Plugin):
                raise ConfigError(f"its entry point is a {type(plugin).__name__}, expected a zoo.plugin.Plugin")
            if plugin.api != API:
                raise ConfigError(
                    f"it speaks plugin API {plugin.api}, this zoo speaks {API}: update the older of the two"
                )
            folder = plugin.conf_dir()
            _add(plugin, registries, recipes, folder, folders)
        except (Exception, SystemExit) as error:  # whatever a foreign package raises must not take the zoo with it
            text = " ".join(str(error).split()) or "no message"
            broken.append(
                Broken(
                    name,
                    text if isinstance(error, ConfigError) else f"{type(error).__name__}: {text}",
                )
            )
            continue
        plugins.append(plugin)
        if folder is not None:
            folders.append(folder)
    return Catalogue(registries, recipes, tuple(folders), tuple(plugins), tuple(broken))
