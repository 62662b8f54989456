"""The notebook door: build, load, list and describe models by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.plugin import catalogue
from zoo.recipe import Recipe, resolve, split_changes

if TYPE_CHECKING:
    from zoo.module import ZooModule


def list_models(pattern: str = "*") -> list[str]:
    """Names of all recipes that match a shell pattern, plugins' included."""
    from fnmatch import fnmatchcase

    return [name for name in catalogue()["model"].names() if fnmatchcase(name, pattern)]


def build(
    model: str,
    *,
    scale: str | None = None,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    init: str | Path | Sequence[str | Path] | None = None,
    **changes: Any,
) -> ZooModule:
    """Build a model with new weights.

    Args:
        model: A recipe's name, see ``list_models``.
        scale: ``tiny``, ``small``, or None for the published size.
        seed: Seed of all initial weights; every part draws from its own stream, so exchanging one leaves the others
            bit-equal.
        options: Changes by dotted path, ``{"encoder.width": 96}``.
        init: A run directory or checkpoint of another model, whose weights are taken over as far as both have them, or
            a list of several, of which a later one wins; the module's ``load_report`` tells what was dropped and what
            is new.
        changes: Parts by name (``connector="mlp"``), or fields of parts (``connector={"depth": 3}``); also
            ``stages="joint"``.

    Returns:
        A LightningModule; ``.model`` is the plain nn.Module.

    Raises:
        ConfigError: An unknown name or field (with near names), a wrong type, or parts that do not fit.
    """
    choices, values = split_changes({**changes, **(options or {})})
    return build_module(resolve(model, choices=choices, values=values, scale=scale), seed, init)


def build_module(recipe: Recipe, seed: int, init: str | Path | Sequence[str | Path] | None = None) -> ZooModule:
    """Build a resolved recipe: parts from their own random streams, then the objectives' modules from theirs.

    ``init`` is a run directory or checkpoint whose weights the model starts from (``zoo.weights.start``), several in a
    list or joined by ``" + "``.
    """
    from zoo.module import ZooModule
    from zoo.part import seeded

    _, wiring = recipe.wiring
    model = wiring.build(recipe.parts, seed)
    report = None
    if init:
        from zoo.run_config import starts
        from zoo.weights.start import joined, start_from

        found = starts(str(init)) if isinstance(init, str | Path) else [str(path) for path in init]
        report = joined([start_from(model, path, recipe.model) for path in found], model)
    with seeded(seed, "objectives"):
        module = ZooModule(model, recipe)  # its momentum copy starts from these weights too
    if report is not None:
        module.load_report = report  # type: ignore[assignment]
    return module


def from_pretrained(
    path: str | Path, *, model: str | None = None, seed: int = 0, strict: bool = True, **changes: Any
) -> ZooModule:
    """Load a model with its weights.

    Args:
        path: A zoo checkpoint folder, a transformers-format folder of a supported type, an official file (with
        ``model``),
            or a hub id.
        model: The recipe an official file belongs to.
        seed: Seed of the weights that ``changes`` make new.
        strict: Raise on missing and unexpected keys that no key map names.
        changes: As in ``build``: parts to exchange. Their weights are new, and ``load_report`` says so.

    Returns:
        The module in eval mode; its attribute ``load_report`` tells what was loaded, renamed, ignored and is new.

    Raises:
        WeightsError: Unsafe, incomplete or foreign files.
        ConfigError: As ``build``.
    """
    from zoo.module import ZooModule
    from zoo.weights import load_model

    network, recipe, report = load_model(str(path), model=model, changes=changes or None, seed=seed, strict=strict)
    module = ZooModule(network, recipe)
    network.reconfigure(recipe.stage_wiring(-1))  # a new module stands at its first stage, this model is finished
    module.load_report = report  # type: ignore[assignment]
    return module.eval()


def describe(model: str, *, scale: str | None = None, **changes: Any) -> str:
    """What a recipe is made of, as text: parts with parameters, frozen or trained, FLOPs, layout. Builds no weights."""
    from zoo.compare.wiring import wiring_text

    choices, values = split_changes(changes)
    return wiring_text(resolve(model, choices=choices, values=values, scale=scale))


def compose(overrides: list[str] | None = None) -> dict[str, Any]:
    """The configuration ``zoo train OVERRIDES`` would start from, composed by Hydra, as a plain dict.

    Hydra's global state is put back as it was, so this works inside another Hydra application.
    """
    from zoo.cli.overrides import composed, prepare

    return composed(prepare(overrides or []))[0]


@contextmanager
def own_hydra() -> Iterator[None]:
    """Give the block a Hydra of its own: its state is one global object, which another application may be using."""
    from hydra.core.global_hydra import GlobalHydra

    before = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        GlobalHydra.instance().clear()
        GlobalHydra.instance().hydra = before
