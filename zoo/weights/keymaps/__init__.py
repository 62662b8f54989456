"""Key maps: where every tensor of an official checkpoint lives in a zoo model, and the way back.

A map is a list of rules, written as data. Names are templates: ``{i}`` (and j to n) stands for one or more digits, any
other name such as ``{p}`` for one path component without dots, ``{**}`` for any rest. The same placeholder means the
same text on both sides::

    KeyMap(
        rename("blocks.{i}.attn.proj.{p}", "layers.{i}.attn.out.{p}"),
        split("blocks.{i}.attn.qkv.{p}", ["layers.{i}.attn.q.{p}", "layers.{i}.attn.k.{p}", "layers.{i}.attn.v.{p}"]),
        drop("position_ids"),
    )

Every rule can be undone, so the same map saves in the official layout. Nothing is loaded loosely: keys no rule knows
and parameters no rule fills are errors, unless the caller names them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from zoo.errors import WeightsError

Tensors = tuple[Tensor, ...]
State = Mapping[str, Tensor]

_PLACE = re.compile(r"\{(\*\*|\w+)\}")
_NUMBERS = frozenset("ijklmn")  # placeholders that stand for digits


def _pattern(template: str) -> re.Pattern[str]:
    seen: set[str] = set()
    out, at = "", 0
    for place in _PLACE.finditer(template):
        name = "rest" if place[1] == "**" else place[1]
        shape = ".+" if name == "rest" else r"\d+" if name in _NUMBERS else r"[^.]+"
        out += re.escape(template[at : place.start()]) + (f"(?P={name})" if name in seen else f"(?P<{name}>{shape})")
        seen.add(name)
        at = place.end()
    return re.compile(out + re.escape(template[at:]))


def _filled(template: str, places: Mapping[str, str]) -> str:
    return _PLACE.sub(lambda place: places["rest" if place[1] == "**" else place[1]], template)


@dataclass(frozen=True)
class Rule:
    """Some official tensors become some tensors of ours.

    Attributes:
        source: templates of the official names.
        target: templates of our names.
        to: official tensors to ours, in the order of the templates.
        back: ours to the official ones.
        kind: ``map``; ``drop`` (official, not ours); ``tie`` (an official copy of ``source[1]``); ``share`` (our second
            name of the parameter ``target[1]``).
    """

    source: tuple[str, ...]
    target: tuple[str, ...]
    to: Callable[[Tensors], Tensors]
    back: Callable[[Tensors], Tensors]
    kind: Literal["map", "drop", "tie", "share"] = "map"


def _same(tensors: Tensors) -> Tensors:
    return tensors


def rename(
    source: str,
    target: str,
    to: Callable[[Tensor], Tensor] | None = None,
    back: Callable[[Tensor], Tensor] | None = None,
) -> Rule:
    """One tensor under another name, changed by ``to`` on loading and by its inverse ``back`` on saving."""
    if (to is None) != (back is None):
        raise ValueError(f"rule {source}: give `to` and `back` together, or the map cannot save what it loads")
    if to is None or back is None:
        return Rule((source,), (target,), _same, _same)
    return Rule((source,), (target,), lambda t: (to(t[0]),), lambda t: (back(t[0]),))


def split(source: str, targets: Sequence[str], sizes: Sequence[int] | None = None, dim: int = 0) -> Rule:
    """One fused tensor becomes several along ``dim``: equal parts, or of ``sizes``."""

    def to(tensors: Tensors) -> Tensors:
        (whole,) = tensors
        if sizes is not None:
            return tuple(part.contiguous() for part in torch.split(whole, list(sizes), dim))
        if whole.shape[dim] % len(targets):
            raise WeightsError(f"{source}: {whole.shape[dim]} rows cannot be cut into {len(targets)} equal parts")
        return tuple(part.contiguous() for part in whole.chunk(len(targets), dim))

    return Rule((source,), tuple(targets), to, lambda tensors: (torch.cat(tensors, dim),))


def merge(sources: Sequence[str], target: str, dim: int = 0) -> Rule:
    """Several equal tensors become one along ``dim``."""
    count = len(sources)
    return Rule(
        tuple(sources),
        (target,),
        lambda tensors: (torch.cat(tensors, dim),),
        lambda tensors: tuple(part.contiguous() for part in tensors[0].chunk(count, dim)),
    )


def regroup(source: str, targets: Sequence[str], to: Callable[[Tensor], Tensors], back: Callable[..., Tensor]) -> Rule:
    """One tensor becomes several by any invertible function (per-head [q, k, v] and the like)."""
    return Rule((source,), tuple(targets), lambda t: to(t[0]), lambda t: (back(*t),))


def drop(source: str) -> Rule:
    """An official tensor that a zoo model does not have and does not need (``position_ids``); not written on saving."""
    return Rule((source,), (), _same, _same, kind="drop")


def tie(source: str, of: str) -> Rule:
    """An official copy of another official tensor: must be equal to it on loading, is written again on saving."""
    return Rule((source, of), (), _same, _same, kind="tie")


def share(target: str, of: str) -> Rule:
    """A second name of ours for the parameter ``of``, where two modules share one: nothing is loaded into it, and it is
    not saved. Official copies of it are another matter, see :func:`tie`."""
    return Rule((), (target, of), _same, _same, kind="share")


@dataclass(frozen=True)
class KeyMap:
    """An ordered list of rules; the first rule that knows a name takes it.

    ``a + b`` joins maps; :meth:`under` puts a map below prefixes on both sides.
    """

    rules: tuple[Rule, ...]

    def __init__(self, *rules: Rule) -> None:
        object.__setattr__(self, "rules", rules)

    def __add__(self, other: KeyMap) -> KeyMap:
        return KeyMap(*self.rules, *other.rules)

    def under(self, source: str = "", target: str = "") -> KeyMap:
        """Return the map with ``source`` before every official name and ``target`` before every one of ours."""
        return KeyMap(
            *(
                Rule(tuple(source + s for s in r.source), tuple(target + t for t in r.target), r.to, r.back, r.kind)
                for r in self.rules
            )
        )

    def load(self, state: State) -> tuple[dict[str, Tensor], list[str]]:
        """Map an official state dict to ours.

        Returns:
            Our tensors by name, and the official names no rule knows.

        Raises:
            WeightsError: part of a group is missing, a tied copy differs, or two tensors land on one name.
        """
        left, out = dict(state), {}
        for rule in self.rules:
            for name, places in _matches(rule.source[0], left) if rule.source else []:
                if rule.kind == "drop":
                    del left[name]
                    continue
                names = [_filled(s, places) for s in rule.source]
                pool = state if rule.kind == "tie" else left
                missing = [n for n in names if n not in pool]
                if missing:
                    raise WeightsError(f"the checkpoint has {names[0]} but not {missing[0]}, which belongs to it")
                if rule.kind == "tie":
                    if not torch.equal(state[names[0]], state[names[1]]):
                        raise WeightsError(f"{names[0]} differs from {names[1]}; they are one tensor in this model")
                    del left[name]
                    continue
                results = rule.to(tuple(left.pop(n) for n in names))
                for template, tensor in zip(rule.target, results, strict=True):
                    ours = _filled(template, places)
                    if ours in out:
                        raise WeightsError(f"two tensors of the checkpoint land on {ours}; the second is {name}")
                    out[ours] = tensor
        return out, sorted(left)

    def save(self, state: State) -> tuple[dict[str, Tensor], list[str]]:
        """Map our state dict back to the official names; returns them and our names no rule knows.

        Raises:
            WeightsError: part of a group is missing, or two names of a shared parameter hold different tensors.
        """
        left, out = dict(state), {}
        for rule in self.rules:
            if rule.kind == "share":
                for name, places in _matches(rule.target[0], left):
                    if (of := state.get(_filled(rule.target[1], places))) is None or not torch.equal(
                        left.pop(name), of
                    ):
                        raise WeightsError(
                            f"{name} differs from {_filled(rule.target[1], places)}; they are one parameter"
                        )
            if rule.kind != "map":
                continue
            for _, places in _matches(rule.target[0], left):
                names = [_filled(t, places) for t in rule.target]
                missing = [n for n in names if n not in left]
                if missing:
                    raise WeightsError(f"the model has {names[0]} but not {missing[0]}, which is saved with it")
                for template, tensor in zip(rule.source, rule.back(tuple(left.pop(n) for n in names)), strict=True):
                    out[_filled(template, places)] = tensor
        for rule in self.rules:
            if rule.kind == "tie":
                for name, places in _matches(rule.source[1], out):
                    out[_filled(rule.source[0], places)] = out[name]
        return out, sorted(left)


@dataclass(frozen=True)
class KeyReport:
    """What happened to the keys of one checkpoint.

    Attributes:
        loaded: our names that were filled.
        new: our names the checkpoint did not have, as the caller allowed.
        ignored: official names that were left, as the caller allowed.
    """

    loaded: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)


def load_into(
    module: nn.Module,
    state: State,
    keymap: KeyMap,
    *,
    allow_new: Iterable[str] = (),
    allow_ignored: Iterable[str] = (),
) -> KeyReport:
    """Load an official state dict into a module, completely or not at all.

    Args:
        module: the zoo module.
        state: official names and tensors.
        keymap: the rules.
        allow_new: templates of our names that may stay as they are.
        allow_ignored: templates of official names that may be left.

    Raises:
        WeightsError: unknown official keys, parameters that nothing fills, or shapes that differ.
    """
    mapped, unknown = keymap.load(state)
    own = module.state_dict()
    ignored = [n for n in unknown if _fits(n, allow_ignored)]
    strange = [n for n in unknown if n not in ignored]
    if strange:
        raise WeightsError(
            f"the checkpoint has {_some(strange)} that this model does not know; is it of another model?"
        )
    outside = [n for n in mapped if n not in own]
    if outside:
        raise WeightsError(f"the checkpoint fills {_some(outside)}, but this model has no such parameters")
    shared = {t.data_ptr() for n, t in own.items() if n in mapped and t.numel() and t.device.type != "meta"}
    missing = [n for n, t in own.items() if n not in mapped and (not t.numel() or t.data_ptr() not in shared)]
    new = [n for n in missing if _fits(n, allow_new)]
    lost = [n for n in missing if n not in new]
    if lost:
        raise WeightsError(f"the checkpoint does not fill {_some(lost)}; name them as new if they should be trained")
    for name, tensor in mapped.items():
        if tensor.shape != own[name].shape:
            raise WeightsError(
                f"{name} is {tuple(tensor.shape)} in the checkpoint and {tuple(own[name].shape)} in the model;"
                " use the sizes of the checkpoint"
            )
    module.load_state_dict(mapped, strict=False)  # strict by the checks above, which know what is new
    return KeyReport(sorted(mapped), new, ignored)


def _matches(template: str, names: Mapping[str, Tensor]) -> list[tuple[str, dict[str, str]]]:
    pattern = _pattern(template)
    return [(name, found.groupdict()) for name in list(names) if (found := pattern.fullmatch(name))]


def _fits(name: str, templates: Iterable[str]) -> bool:
    return any(_pattern(t).fullmatch(name) for t in templates)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
