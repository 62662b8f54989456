"""Connectors of equal size: a variant's connector resized to a reference's parameters by the width that it declares."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from zoo.errors import ConfigError
from zoo.part import PartConfig
from zoo.registry import parse

if TYPE_CHECKING:
    from zoo.connectors.base import ConnectorConfig
    from zoo.recipe import Recipe

WIDEST = 1 << 20
"""No width beyond it is tried."""


@dataclass(frozen=True, kw_only=True)
class MatchConfig(PartConfig):
    """What is matched.

    Attributes:
        reference: Name of the connector whose parameters all have.
        tolerance: Largest difference, as a share of the reference's.
    """

    reference: str
    tolerance: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance = {self.tolerance} must be above 0 and below 1")


def to_match(plain: Mapping[str, Any]) -> MatchConfig | None:
    """The matching that a composed job asks for; None where it asks for none.

    Raises:
        ConfigError: No reference.
    """
    values = {key: value for key, value in (plain.get("match") or {}).items() if value is not None}
    if not values:
        return None
    if "reference" not in values:
        raise ConfigError("match=parameters needs match.reference=CONNECTOR: whose parameters all connectors get")
    match: MatchConfig = parse(MatchConfig, values, "match")
    return match


def matched(recipe: Recipe, match: MatchConfig | None, written: Sequence[str] = ()) -> Recipe:
    """The recipe with its connector at the reference's number of parameters; itself where nothing is to be matched.

    Both are counted in this model: between its encoder and its decoder, at its number of visual tokens. In every stage
    that trains a connector all of it learns, so that its parameters are those that are trained.

    Args:
        written: Keys the user wrote.

    Raises:
        ConfigError: No connector, one that declares no width, a width the user set as well, or none comes near enough.
    """
    if match is None:
        return recipe
    if "connector" not in recipe.parts:
        raise ConfigError(f"match=parameters is for connectors, and {recipe.model} has none: leave it out")
    name, config = recipe.parts["connector"]
    reference = recipe.with_(connector=match.reference) if name != match.reference else recipe
    target = parameters(reference)[0]
    own, count = parameters(recipe)
    if abs(own - target) <= match.tolerance * target:
        return recipe
    width = getattr(config, "sized_by", "")
    if not width:
        raise ConfigError(
            f"connector {name!r} has {own:,} parameters, {match.reference!r} {target:,}, and it declares no width to"
            f" match them by: leave it out, or choose match.reference={name}"
        )
    if f"connector.{width}" in written:
        raise ConfigError(f"match=parameters sets connector.{width}, and so do you: leave one of them out")
    best = nearest(lambda value: count({width: value}), target)
    found = count({width: best})
    if abs(found - target) > match.tolerance * target:
        raise ConfigError(
            f"connector {name!r} cannot have the {target:,} parameters of {match.reference!r}: at {width} = {best} it"
            f" has {found:,}, {abs(found - target) / target:.0%} off: choose another match.reference"
        )
    changes: dict[str, Any] = {f"connector.{width}": best}
    return recipe.with_(**changes)


def parameters(recipe: Recipe) -> tuple[int, Callable[[Mapping[str, int]], int]]:
    """Parameters of a recipe's connector, and a function that counts them with fields changed; nothing takes memory."""
    import dataclasses

    import torch

    from zoo.api import build_module

    with torch.device("meta"):
        model: Any = build_module(recipe, 0).model
    connector = model.connector
    config = cast("ConnectorConfig", getattr(model, "connector_config", recipe.parts["connector"][1]))

    def count(changes: Mapping[str, int]) -> int:
        with torch.device("meta"):
            built = dataclasses.replace(config, **changes).build(
                in_width=model.encoder.width, in_tokens=model.encoder.tokens, out_width=connector.width
            )
        return sum(p.numel() for p in built.parameters())

    return sum(p.numel() for p in connector.parameters()), count


def nearest(count: Callable[[int], int], target: int) -> int:
    """The whole number, 1 or more, at which a growing ``count`` comes nearest to ``target``."""
    high = 1
    while count(high) < target and high < WIDEST:
        high *= 2
    low = high // 2
    while high - low > 1:  # count(low) < target <= count(high)
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) < target else (low, middle)
    return min((max(1, low), high), key=lambda value: abs(count(value) - target))
